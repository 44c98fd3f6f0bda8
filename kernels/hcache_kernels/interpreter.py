"""Triton's interpreter, which runs kernels on the CPU: set up so that its small floats are right.

The interpreter keeps bfloat16 as sixteen bits. Its product multiplies these as integers (triton
3.7.1; reported there as issue 11584), and rounding to bfloat16 cuts off instead of rounding to the
nearest. Rounding to eight-bit floats forgets to carry: 1.97 becomes 1 and not 2. Our kernels use
both in products, loads and stores alone, so that three repairs are all that is needed: operands of
products are widened (the products of a GPU are exact in float32, too), and numbers are rounded as a
GPU rounds them.
"""

from __future__ import annotations

import os
import sys
from typing import Any


def interpret() -> None:
    """Make this process run Triton's kernels in the interpreter; it cannot compile any then.

    Raises:
        RuntimeError: Triton has been imported before.
    """
    if "triton" in sys.modules:
        raise RuntimeError("the interpreter must be chosen before Triton is imported")
    os.environ["TRITON_INTERPRET"] = "1"
    import numpy as np
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    create_dot = interpreter.InterpreterBuilder.create_dot

    def widened(operand: Any) -> Any:
        if operand.dtype.scalar != tl.bfloat16 or operand.data.dtype != np.uint16:
            return operand
        numbers = (operand.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(numbers, tl.float32)

    def create_wide_dot(builder: Any, a: Any, b: Any, *rest: Any) -> Any:
        return create_dot(builder, widened(a), widened(b), *rest)

    cast = interpreter.InterpreterBuilder.cast_impl

    def rounding_cast(builder: Any, source: Any, dtype: Any) -> Any:
        if source.dtype.scalar != tl.float32 or dtype.scalar != tl.bfloat16:
            return cast(builder, source, dtype)
        bits = np.ascontiguousarray(source.data, dtype=np.float32).view(np.uint32)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # of two as near, the even one
        rounded = np.where(np.isnan(source.data), 0x7FC0, nearest).astype(np.uint16)
        return interpreter.TensorHandle(rounded, tl.bfloat16)

    fp_to_fp = interpreter.InterpreterBuilder.create_fp_to_fp

    def carrying_fp_to_fp(builder: Any, source: Any, dtype: Any, mode: Any) -> Any:
        if source.dtype.scalar != tl.float32 or dtype.scalar != tl.float8e4nv:
            return fp_to_fp(builder, source, dtype, mode)
        rounded = torch.from_numpy(source.data).to(torch.float8_e4m3fn).view(torch.uint8)
        return interpreter.TensorHandle(rounded.numpy(), tl.float8e4nv)

    interpreter.InterpreterBuilder.create_dot = create_wide_dot
    interpreter.InterpreterBuilder.create_fp_to_fp = carrying_fp_to_fp
    interpreter.InterpreterBuilder.cast_impl = rounding_cast
