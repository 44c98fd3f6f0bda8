"""Launches the Triton kernels: checks what they promise each other, and chooses their tiles.

Imported only where Triton is installed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from hcache_kernels import triton_kernels, triton_rows
from hcache_kernels.operands import CacheSlots, Projection, Rotation, StoredKV, StoredRows
from hcache_kernels.quant import LARGEST
from hcache_kernels.tiles import ROWS_OF_A_TILE

CHANNELS_OF_A_STEP = 64
"""Of the layer's input, in one step of the product."""
WIDEST_HEAD = 128
"""A program takes a whole tile of such heads; of wider ones, registers hold half of it."""
WARPS, STAGES = 8, 3


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch, before it happens: also what is compiled without a device."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]

    def run(self) -> None:
        """Queue it on the current stream."""
        self.kernel[self.grid](
            **self.arguments, **self.constants, num_warps=WARPS, num_stages=STAGES
        )


def _half(head_dim: int) -> int:
    """Places for the pairs of a head: tensor cores want at least 16 columns."""
    return max(8, int(triton.next_power_of_2(head_dim)) // 2)


def _rotation(rotation: Rotation, head_dim: int) -> tuple[dict[str, Any], dict[str, Any]]:
    rotary = rotation.cos.shape[-1]
    parts = 1 if head_dim <= WIDEST_HEAD else 2
    arguments = {
        "cos_ptr": rotation.cos,
        "sin_ptr": rotation.sin,
        "stride_cos": rotation.cos.stride(0),
    }
    constants = {
        "D": head_dim,
        "R": rotary,
        "HALF": _half(head_dim),
        "INTERLEAVED": rotation.is_interleaved,
        "ALIGNED": rotary % 16 == 0 and head_dim % 16 == 0,
        "PARTS": parts,
        "BM": ROWS_OF_A_TILE // parts,
    }
    return arguments, constants


def _targets(target: CacheSlots) -> tuple[dict[str, Any], dict[str, Any]]:
    arguments = {
        "slot_ptr": target.slots,
        "key_ptr": target.keys,
        "value_ptr": target.values,
        "stride_block": target.block_stride,
        "stride_token": target.token_stride,
        "stride_head": target.head_stride,
    }
    return {**arguments, "G": target.num_heads}, {"PAGE": target.page_tokens}


def launches(
    stored: StoredRows | StoredKV,
    projection: Projection | None,
    rotation: Rotation,
    target: CacheSlots,
) -> list[Launch]:
    """What `hcache_kernels.fused.restore` launches, one behind another: one kernel, or two where K
    goes through a norm over all heads."""
    if isinstance(stored, StoredKV):
        return [_kv_launch(stored, rotation, target)]
    if projection is None:
        raise ValueError("layer inputs need a projection")
    norm = projection.key_norm
    if norm is None or not norm.is_over_heads:
        return [_rows_launch(stored, projection, rotation, target)]
    shape = (target.num_heads, len(stored.rows), target.head_dim)
    plain = torch.empty(shape, dtype=torch.float32, device=stored.rows.device)
    squares = torch.empty(shape[:2], dtype=torch.float32, device=stored.rows.device)
    first = _rows_launch(stored, projection, rotation, target)
    second = _kv_launch(StoredKV(plain, plain, stored.tiles), rotation, target)
    into = {"plain_ptr": plain, "square_ptr": squares}
    out_of = {"gain_ptr": norm.gain, "square_ptr": squares, "eps": norm.eps}
    return [
        replace(first, arguments={**first.arguments, **into}),
        replace(
            second,
            grid=(second.grid[0], target.num_heads),
            arguments={**second.arguments, **out_of},
        ),
    ]


def _rows_launch(
    stored: StoredRows, projection: Projection, rotation: Rotation, target: CacheSlots
) -> Launch:
    width = stored.rows.shape[1]
    step = stored.group_channels or CHANNELS_OF_A_STEP
    by_rotation, rotation_constants = _rotation(rotation, target.head_dim)
    by_target, target_constants = _targets(target)
    quant, norm = stored.quant_scales, projection.key_norm
    arguments = {
        "rows_ptr": stored.rows,
        "scale_ptr": stored.row_scales,
        "quant_ptr": quant,
        "channel_ptr": stored.channel_scales,
        "shift_ptr": stored.shift,
        "tile_ptr": stored.tiles,
        "weight_ptr": projection.weight,
        "bias_ptr": projection.bias,
        "sums_ptr": projection.column_sums if stored.shift is not None else None,
        "gain_ptr": norm.gain if norm is not None else None,
        "gain_bias_ptr": norm.bias if norm is not None else None,
        "plain_ptr": None,
        "square_ptr": None,
        "T": len(stored.rows),
        "E": width,
        "stride_row": stored.rows.stride(0),
        "stride_quant": quant.stride(0) if quant is not None else 0,
        "stride_weight": projection.weight.stride(0),
        "eps": norm.eps if norm is not None else 0.0,
        **by_rotation,
        **by_target,
    }
    constants = {
        **rotation_constants,
        **target_constants,
        "GROUP": stored.group_channels,
        "EVEN": width % step == 0,
        "CENTRED": norm is not None and norm.is_centred,
        "BK": step,
    }
    grid = (len(stored.tiles) * constants["PARTS"], 2 * target.num_heads)
    return Launch(triton_kernels.restore_rows_kernel, grid, arguments, constants)


def _kv_launch(stored: StoredKV, rotation: Rotation, target: CacheSlots) -> Launch:
    num_heads, num_rows, head_dim = stored.keys.shape
    by_rotation, rotation_constants = _rotation(rotation, head_dim)
    by_target, target_constants = _targets(target)
    arguments = {
        "keys_ptr": stored.keys,
        "values_ptr": stored.values,
        "key_scale_ptr": stored.key_scales,
        "value_scale_ptr": stored.value_scales,
        "tile_ptr": stored.tiles,
        "gain_ptr": None,
        "square_ptr": None,
        "T": num_rows,
        "eps": 0.0,
        **by_rotation,
        **by_target,
    }
    constants = {**rotation_constants, **target_constants}
    grid = (len(stored.tiles) * constants["PARTS"], 2 * num_heads)
    return Launch(triton_kernels.restore_kv_kernel, grid, arguments, constants)


def quantise_rows(
    rows: Tensor, group_channels: int | None = None, dtype: torch.dtype = torch.int8
) -> tuple[Tensor, Tensor]:
    """See `hcache_kernels.quant.quantise_rows`."""
    tokens, width = rows.shape
    groups = -(-width // group_channels) if group_channels else 1
    out = torch.empty((tokens, width), dtype=dtype, device=rows.device)
    scales = torch.empty((tokens, groups), dtype=torch.float32, device=rows.device)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    arguments = {
        "rows_ptr": rows,
        "out_ptr": out,
        "quant_ptr": scales,
        "E": width,
        "stride_row": rows.stride(0),
        "groups": groups,
    }
    constants = {**_groups(width, group_channels), "LARGEST": LARGEST[dtype]}
    Launch(triton_rows.quantise_rows_kernel, (tokens,), arguments, constants).run()
    return out, scales if group_channels else scales.squeeze(-1)


def dequantise_rows_into(
    numbers: Tensor, scales: Tensor, group_channels: int | None, out: Tensor
) -> None:
    """Write what `quantise_rows` made to `out` (T, E)."""
    tokens, width = numbers.shape
    groups = scales.shape[1] if scales.dim() == 2 else 1
    arguments = {
        "rows_ptr": numbers,
        "quant_ptr": scales,
        "out_ptr": out,
        "E": width,
        "groups": groups,
        "stride_out": out.stride(0),
    }
    constants = _groups(width, group_channels)
    Launch(triton_rows.dequantise_rows_kernel, (tokens,), arguments, constants).run()


def _groups(width: int, group_channels: int | None) -> dict[str, int]:
    """A whole row for each program, in groups, or as one."""
    group = group_channels or int(triton.next_power_of_2(width))
    return {"GROUPS": int(triton.next_power_of_2(-(-width // group))), "GROUP": group}


def row_statistics(rows: Tensor, eps: float, *, is_centred: bool) -> tuple[Tensor, Tensor | None]:
    """See `hcache_kernels.fused_reference.row_statistics`; no shift without a mean."""
    tokens, width = rows.shape
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    scale = torch.empty(tokens, dtype=torch.float32, device=rows.device)
    shift = torch.empty_like(scale) if is_centred else None
    arguments = {
        "rows_ptr": rows,
        "scale_ptr": scale,
        "shift_ptr": shift,
        "E": width,
        "stride_row": rows.stride(0),
        "eps": eps,
    }
    constants = {"CENTRED": is_centred, "BE": int(triton.next_power_of_2(width))}
    Launch(triton_rows.row_statistics_kernel, (tokens,), arguments, constants).run()
    return scale, shift
