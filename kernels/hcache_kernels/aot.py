"""Compiles launches for GPUs that are not here, and says what came of it: registers, spills, tiles.

Triton brings the assembler and the disassembler. Nothing here can be told of time, of bank
conflicts, or of what a launch was given in the end.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hcache_kernels.launch import STAGES, WARPS, Launch

SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
"""Shared memory that a program may have, by compute capability (CUDA C++ Programming Guide, table
of technical specifications per compute capability)."""
TENSOR_CORES = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
"""The instruction of a product on tensor cores."""

_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int8: "i8",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int32: "i32",
    torch.int64: "i64",
}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_OPCODE = re.compile(
    r"^\s*(?:/\*[0-9a-f]+\*/)?\s*(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.[A-Za-z0-9_]+)*)\s"
)


@dataclass(frozen=True)
class Compiled:
    """A launch in a GPU's own code.

    Args:
        capability: 80, 90, 100.
        registers: of a thread.
        stack_bytes: of a thread; more than none means spilled registers.
        shared_bytes: of a program.
        opcodes: instructions, and how often each is in the code.
    """

    capability: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    opcodes: Counter[str]

    def count(self, *names: str) -> int:
        """Instructions of these names, whatever their modifiers."""
        return sum(
            number
            for opcode, number in self.opcodes.items()
            if any(opcode == name or opcode.startswith(name + ".") for name in names)
        )

    @property
    def spills(self) -> int:
        """Loads from, and stores to, a thread's own memory."""
        return self.count("LDL", "STL")

    def narrow(self, name: str) -> int:
        """Instructions of a name that move less than 16 bytes."""
        return sum(
            number
            for opcode, number in self.opcodes.items()
            if opcode.split(".")[0] == name and ".128" not in opcode
        )


def compiled(launch: Launch, capability: int) -> Compiled:
    """Compile a launch, whose tensors may be on no device ("meta"), for a compute capability.

    Raises:
        Exception: what Triton raises where the GPU cannot do it.
    """
    signature, constants, divisible = _facts(launch)
    key = (launch.kernel, capability, *(tuple(x.items()) for x in (signature, constants)))
    return _compiled((*key, tuple(divisible)))


@cache
def _compiled(key: tuple[Any, ...]) -> Compiled:
    kernel, capability, signature, constants, divisible = key
    source = ASTSource(
        fn=kernel,
        signature=dict(signature),
        constexprs=dict(constants),
        attrs={(index,): [["tt.divisibility", 16]] for index in divisible},
    )
    built = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": WARPS, "num_stages": STAGES},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    found = {name: int(number) for name, number in re.findall(r"\b(REG|STACK):(\d+)", usage)}
    matches = (_OPCODE.search(line) for line in code.splitlines())
    opcodes = Counter(match.group(1) for match in matches if match)
    return Compiled(capability, found["REG"], found["STACK"], built.metadata.shared, opcodes)


def _facts(launch: Launch) -> tuple[dict[str, str], dict[str, Any], list[int]]:
    """Types of a launch's arguments, those that are constant, and those that 16 divides: what a
    running launch would find out by itself."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = dict(launch.constants)
    divisible: list[int] = []
    for index, parameter in enumerate(launch.kernel.params):
        name = parameter.name
        if name in constants:
            signature[name] = "constexpr"
            continue
        value = launch.arguments[name]
        if value is None:
            signature[name], constants[name] = "constexpr", None
            continue
        if isinstance(value, Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
        is_round = isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0)
        if is_round and not parameter.do_not_specialize:
            divisible.append(index)
    return signature, constants, divisible


def _tool(name: str, *arguments: str) -> str:
    command = [str(_TOOLS / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
