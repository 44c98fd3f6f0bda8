"""Times restoring a layer on the GPU that is here: the kernel, the torch form, and the copy."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from hcache_kernels import quant, torch_ops
from hcache_kernels.operands import StoredRows
from hcache_kernels.roofline import Work
from hcache_kernels.tiles import tiles_of

REPEATS = 20


@dataclass(frozen=True)
class Timing:
    """Medians in seconds.

    Args:
        kernel_s: of the fused kernel.
        torch_s: of the same in torch's own kernels.
        copy_s: of the stored bytes from pinned memory.
        host_bytes: that are copied.
    """

    kernel_s: float
    torch_s: float
    copy_s: float
    host_bytes: int


def timed(work: Work, place: torch.device) -> Timing:
    """Time a work's kernel, its torch form, and its copy."""
    from hcache_kernels import launch

    stored: Any = _real(work.stored_tensors(), place)
    chunks = [(i, work.chunk_tokens) for i in range(0, work.tokens, work.chunk_tokens)]
    is_smooth = isinstance(stored, StoredRows) and stored.channel_scales is not None
    tiles = tiles_of(chunks, crosses_chunks=not (work.is_kv or is_smooth))
    stored = replace(stored, tiles=torch.tensor(tiles, dtype=torch.int32, device=place))
    projection: Any = _real(work.projection(), place)
    rotation, target = _real(work.rotation(), place), _real(work.target(), place)
    (launched,) = launch.launches(stored, None if work.is_kv else projection, rotation, target)
    fused = launched.run
    if isinstance(stored, StoredRows):
        scratch = torch.empty(work.tokens, len(projection.weight), device=place, dtype=_BF16)

        def by_torch() -> None:
            rows = _dequantised(stored, work.chunk_tokens)
            torch_ops.project_kv(
                rows,
                stored.row_scales,
                projection.weight.t(),
                None,
                rotation.cos,
                rotation.sin,
                target.keys,
                target.values,
                scratch,
            )
    else:
        staged = torch.empty_like(target.keys)

        def by_torch() -> None:
            for index, (first, count) in enumerate(chunks):
                at = slice(first, first + count)
                quant.dequantise_keys_into(
                    stored.keys[:, at], stored.key_scales[index], staged[:, at]
                )
            quant.dequantise_values_into(stored.values, stored.value_scales, target.values)
            torch_ops.rope_into(staged, rotation.cos, rotation.sin, target.keys)

    parts = [getattr(stored, f.name) for f in fields(stored)]
    num_bytes = sum(part.nbytes for part in parts if isinstance(part, Tensor))
    pinned = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    memory = torch.empty(num_bytes, dtype=torch.uint8, device=place)
    return Timing(
        seconds(fused),
        seconds(by_torch),
        seconds(lambda: memory.copy_(pinned, non_blocking=True)),
        num_bytes,
    )


def seconds(work: Callable[[], object], repeats: int = REPEATS) -> float:
    """The median time that work takes on the current stream, by the device's own clock."""
    for _ in range(3):
        work()
    samples: list[float] = []
    for _ in range(repeats):
        begin, end = (_event() for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(samples)


_BF16 = torch.bfloat16


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _dequantised(stored: StoredRows, chunk_tokens: int) -> Tensor:
    if stored.channel_scales is None:
        return stored.rows
    rows = stored.rows.to(_BF16).view(-1, chunk_tokens, stored.rows.shape[1])
    return rows.mul_(stored.channel_scales.unsqueeze(1)).view(stored.rows.shape)


def _real(value: Any, place: torch.device) -> Any:
    """A dataclass of tensors that are on no device, with ordinary numbers in their place."""
    changes = {}
    for field in fields(value):
        tensor = getattr(value, field.name)
        if not isinstance(tensor, Tensor):
            continue
        made = torch.empty(tensor.shape, dtype=tensor.dtype, device=place)
        is_float = tensor.dtype.is_floating_point
        changes[field.name] = made.normal_(std=0.05) if is_float else made.random_(0, 100)
    return replace(value, **changes)
