"""What restoring a layer should take on a GPU: bytes, operations, and the time that they allow.

    python -m hcache_kernels.roofline

The kernels are compiled for the GPU, which need not be here; how many programs they have, and how
many of them fit on a multiprocessor, comes from the compiled code. Times are bounds, not
measurements: a product that keeps the tensor cores at their peak, memory that gives what the data
sheet says. Copying from the host is the bound that matters; the table shows how far the others are.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hcache_kernels.operands import CacheSlots, Projection, Rotation, StoredKV, StoredRows
from hcache_kernels.tiles import ROWS_OF_A_TILE

REGISTERS = 65536
"""Of a multiprocessor (compute capabilities 8.0 and 9.0, as all figures of a multiprocessor here:
CUDA C++ Programming Guide)."""
THREADS = 2048
"""That a multiprocessor holds at most."""


@dataclass(frozen=True)
class Chip:
    """A GPU, by its data sheet.

    Args:
        name: what it is called.
        capability: compute capability.
        flops_per_s: of dense products in bfloat16.
        memory_bytes_per_s: of its own memory.
        host_bytes_per_s: of its link to the host, one way.
        multiprocessors: how many.
        shared_bytes: of a multiprocessor.
    """

    name: str
    capability: int
    flops_per_s: float
    memory_bytes_per_s: float
    host_bytes_per_s: float
    multiprocessors: int
    shared_bytes: int


CHIPS = (
    Chip("A100 SXM", 80, 312e12, 2.039e12, 32e9, 108, 164 << 10),
    Chip("H100 SXM", 90, 989e12, 3.35e12, 64e9, 132, 228 << 10),
)


@dataclass(frozen=True)
class Work:
    """One layer of some tokens in one stored form, tensors on no device.

    Args:
        model: whose layer it is.
        stored: in which form.
        tokens, width, heads, head_dim: T, E, G, D.
    """

    model: str
    stored: str
    tokens: int
    width: int
    heads: int
    head_dim: int
    chunk_tokens: int = 128

    @property
    def is_kv(self) -> bool:
        """Whether K and V are stored."""
        return self.stored.startswith("kv")

    @property
    def num_tiles(self) -> int:
        """Of all rows."""
        return -(-self.tokens // ROWS_OF_A_TILE)

    def stored_tensors(self) -> StoredRows | StoredKV:
        """What comes from the host."""
        shape = (self.heads, self.tokens, self.head_dim)
        chunks = self.tokens // self.chunk_tokens
        tiles = _meta((self.num_tiles, 3), torch.int32)
        if self.stored == "kv int8":
            sides = (_meta(shape, torch.int8), _meta(shape, torch.int8))
            scales = (_meta((chunks, self.heads, self.head_dim)), _meta(shape[:2]))
            return StoredKV(*sides, tiles, *scales)
        rows = (self.tokens, self.width)
        of_rows = _meta((self.tokens,))
        if self.stored == "hidden int8-smooth":
            channels = _meta((chunks, self.width))
            return StoredRows(_meta(rows, torch.int8), of_rows, tiles, of_rows, channels)
        return StoredRows(_meta(rows, torch.bfloat16), of_rows, tiles)

    def projection(self) -> Projection:
        """What is on the device already."""
        outputs = 2 * self.heads * self.head_dim
        return Projection(_meta((outputs, self.width), torch.bfloat16))

    def target(self) -> CacheSlots:
        """The cache."""
        shape = (self.heads, self.tokens, self.head_dim)
        return CacheSlots.contiguous(_meta(shape, torch.bfloat16), _meta(shape, torch.bfloat16))

    def rotation(self) -> Rotation:
        """RoPE over the whole head."""
        shape = (self.tokens, self.head_dim)
        return Rotation(_meta(shape, torch.bfloat16), _meta(shape, torch.bfloat16))


WORKS = tuple(
    Work(model, stored, 4096, 4096, heads, 128)
    for model, heads in (("Llama-2-7B", 32), ("Llama-3-8B", 8))
    for stored in ("hidden bfloat16", "hidden int8-smooth", "kv int8")
)


@dataclass(frozen=True)
class Bound:
    """What a chip needs for a work at least, in seconds, and what that comes from.

    Args:
        programs: launched.
        programs_at_once: that fit on a multiprocessor.
        flops: of the tiles' products, with what is computed beyond the last row.
        memory_bytes: of the device's memory: read once, written once.
        host_bytes: copied from the host.
        product_s, memory_s, host_s: each of them alone.
    """

    programs: int
    programs_at_once: int
    flops: float
    memory_bytes: int
    host_bytes: int
    product_s: float
    memory_s: float
    host_s: float

    @property
    def kernel_s(self) -> float:
        """Of the kernel, whichever binds."""
        return max(self.product_s, self.memory_s)


def bound(work: Work, chip: Chip) -> Bound:
    """Compile a work's kernel for a chip, and divide."""
    from hcache_kernels import aot, launch

    stored, rotation, target = work.stored_tensors(), work.rotation(), work.target()
    projection = None if work.is_kv else work.projection()
    (launched,) = launch.launches(stored, projection, rotation, target)
    operands, flops = _tensors(stored), 0.0
    if projection is not None:
        operands = [*operands, projection.weight]
        columns = 2 * launched.constants["HALF"]
        flops = 2.0 * launched.constants["BM"] * columns * work.width
    built = aot.compiled(launched, chip.capability)
    programs = math.prod(launched.grid)
    at_once = min(
        REGISTERS // (built.registers * 32 * launch.WARPS),
        THREADS // (32 * launch.WARPS),
        chip.shared_bytes // (built.shared_bytes + 1024),
    )
    # The last wave takes as long as a full one.
    waves = -(-programs // (chip.multiprocessors * at_once))
    product_s = waves * at_once * flops * chip.multiprocessors / chip.flops_per_s
    moved = [*operands, target.keys, target.values, rotation.cos, rotation.sin]
    memory_bytes = sum(tensor.numel() * tensor.element_size() for tensor in moved)
    host_bytes = sum(tensor.numel() * tensor.element_size() for tensor in _tensors(stored))
    return Bound(
        programs,
        at_once,
        programs * flops,
        memory_bytes,
        host_bytes,
        product_s,
        memory_bytes / chip.memory_bytes_per_s,
        host_bytes / chip.host_bytes_per_s,
    )


def table() -> Iterator[str]:
    """The lines of a table in Markdown; one layer of 4,096 tokens."""
    yield (
        "| one layer, 4,096 tokens | GPU | programs (at once on a multiprocessor) | 10⁹ operations "
        "| MB of memory | MB from the host | products, µs | memory, µs | copy, µs |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for work in WORKS:
        for chip in CHIPS:
            found = bound(work, chip)
            yield (
                f"| {work.model}, {work.stored} | {chip.name} "
                f"| {found.programs:,} ({found.programs_at_once}) | {found.flops / 1e9:,.0f} "
                f"| {found.memory_bytes / 1e6:.0f} | {found.host_bytes / 1e6:.0f} "
                f"| {1e6 * found.product_s:,.0f} | {1e6 * found.memory_s:,.0f} "
                f"| {1e6 * found.host_s:,.0f} |"
            )


def bound_here(work: Work, place: torch.device) -> Bound | None:
    """The bound of the GPU at `place`; None for one whose data sheet is not here."""
    name = torch.cuda.get_device_name(place)
    found = [chip for chip in CHIPS if chip.name.split()[0] in name]
    return bound(work, found[0]) if found else None


def _meta(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _tensors(stored: StoredRows | StoredKV) -> list[Tensor]:
    found = (getattr(stored, name) for name in type(stored).__slots__)
    return [value for value in found if isinstance(value, Tensor)]


if __name__ == "__main__":
    sys.stdout.writelines(line + "\n" for line in table())
