"""The smaller kernels in Triton: to eight bits and back, and what a norm needs of a row.

The rules of `triton_kernels` hold here too.
"""

import triton
import triton.language as tl


@triton.jit
def quantise_rows_kernel(
    rows_ptr, out_ptr, quant_ptr, E, stride_row, groups,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """Numbers (T, E) to integers, or eight-bit floats, and scales (T, groups).

    Grid: (T,); GROUPS is `groups`, padded. Rounded to the nearest, even where two are as near:
    adding and subtracting 1.5 * 2^23 leaves no fraction.
    """
    row, group = tl.program_id(0).to(tl.int64), tl.arange(0, GROUPS)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = column < E
    x = tl.load(rows_ptr + row * stride_row + column, mask=inside, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(x), axis=1)
    is_number = tl.min((x == x).to(tl.int32), axis=1) == 1
    scale = tl.where(largest == 0.0, 1.0, tl.div_rn(largest, LARGEST))
    scale = tl.where(is_number, scale, float("nan"))
    steps = tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
    steps = tl.where(tl.abs(steps) <= LARGEST * 1.01, steps, 0.0)
    if out_ptr.dtype.element_ty == tl.int8:
        steps = (steps + 12582912.0) - 12582912.0
    steps = tl.minimum(tl.maximum(steps, -LARGEST), LARGEST)
    tl.store(out_ptr + row * E + column, steps.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(quant_ptr + row * groups + group, scale, mask=group < groups)


@triton.jit
def dequantise_rows_kernel(
    rows_ptr, quant_ptr, out_ptr, E, groups, stride_out, GROUPS: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """The inverse of `quantise_rows_kernel`. Grid: (T,)."""
    row, group = tl.program_id(0).to(tl.int64), tl.arange(0, GROUPS)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = column < E
    x = tl.load(rows_ptr + row * E + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(quant_ptr + row * groups + group, mask=group < groups, other=0.0)
    x = x * scale[:, None]
    tl.store(out_ptr + row * stride_out + column, x.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def row_statistics_kernel(
    rows_ptr, scale_ptr, shift_ptr, E, stride_row, eps, CENTRED: tl.constexpr, BE: tl.constexpr
):  # fmt: skip
    """`1 / rms`, or `1 / std` and `-mean / std`, of every row (T, E). Grid: (T,)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BE)
    inside = column < E
    x = tl.load(rows_ptr + row * stride_row + column, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=0) / E if CENTRED else 0.0
    apart = tl.where(inside, x - mean, 0.0)
    scale = tl.rsqrt(tl.sum(apart * apart, axis=0) / E + eps)
    tl.store(scale_ptr + row, scale)
    if CENTRED:
        tl.store(shift_ptr + row, -mean * scale)
