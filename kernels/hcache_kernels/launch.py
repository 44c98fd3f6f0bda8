"""Launches the Triton kernels: checks what they promise each other, and chooses their tiles.

Imported only where Triton is installed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from hcache_kernels import triton_kernels as kernels
from hcache_kernels.fused import CacheSlots, KeyTransform, Projection, StoredKV, StoredRows
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


def _transform(key: KeyTransform, head_dim: int) -> tuple[dict[str, Any], dict[str, Any]]:
    rotary = key.cos.shape[-1]
    parts = 1 if head_dim <= WIDEST_HEAD else 2
    arguments = {
        "gain_ptr": key.gain,
        "cos_ptr": key.cos,
        "sin_ptr": key.sin,
        "stride_cos": key.cos.stride(0),
        "eps": key.eps,
    }
    constants = {
        "D": head_dim,
        "R": rotary,
        "HALF": _half(head_dim),
        "INTERLEAVED": key.is_interleaved,
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


def rows_launch(
    stored: StoredRows, projection: Projection, key: KeyTransform, target: CacheSlots
) -> Launch:
    """The launch for layer inputs, see `hcache_kernels.fused.restore`."""
    width = stored.rows.shape[1]
    head_dim = target.head_dim
    step = stored.group_channels or CHANNELS_OF_A_STEP
    by_key, key_constants = _transform(key, head_dim)
    by_target, target_constants = _targets(target)
    quant = stored.quant_scales
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
        "E": width,
        "stride_row": stored.rows.stride(0),
        "stride_quant": quant.stride(0) if quant is not None else 0,
        "stride_weight": projection.weight.stride(0),
        **by_key,
        **by_target,
    }
    constants = {
        **key_constants,
        **target_constants,
        "GROUP": stored.group_channels,
        "EVEN": width % step == 0,
        "BK": step,
    }
    grid = (len(stored.tiles) * constants["PARTS"], 2 * target.num_heads)
    return Launch(kernels.restore_rows_kernel, grid, arguments, constants)


def kv_launch(stored: StoredKV, key: KeyTransform, target: CacheSlots) -> Launch:
    """The launch for K and V, see `hcache_kernels.fused.restore`."""
    num_heads, num_rows, head_dim = stored.keys.shape
    by_key, key_constants = _transform(key, head_dim)
    by_target, target_constants = _targets(target)
    arguments = {
        "keys_ptr": stored.keys,
        "values_ptr": stored.values,
        "key_scale_ptr": stored.key_scales,
        "value_scale_ptr": stored.value_scales,
        "tile_ptr": stored.tiles,
        "T": num_rows,
        **by_key,
        **by_target,
    }
    constants = {**key_constants, **target_constants}
    grid = (len(stored.tiles) * constants["PARTS"], 2 * num_heads)
    return Launch(kernels.restore_kv_kernel, grid, arguments, constants)


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
    group = group_channels or int(triton.next_power_of_2(width))
    constants = {"GROUP": group, "LARGEST": LARGEST[dtype]}
    Launch(kernels.quantise_rows_kernel, (tokens, groups), arguments, constants).run()
    return out, scales if group_channels else scales.squeeze(-1)


def dequantise_rows_into(
    integers: Tensor, scales: Tensor, group_channels: int | None, out: Tensor
) -> None:
    """Write what `quantise_rows` made to `out` (T, E)."""
    tokens, width = integers.shape
    groups = scales.shape[1] if scales.dim() == 2 else 1
    arguments = {
        "rows_ptr": integers,
        "quant_ptr": scales,
        "out_ptr": out,
        "E": width,
        "groups": groups,
        "stride_out": out.stride(0),
    }
    constants = {"GROUP": group_channels or int(triton.next_power_of_2(width))}
    Launch(kernels.dequantise_rows_kernel, (tokens, groups), arguments, constants).run()


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
    Launch(kernels.row_statistics_kernel, (tokens,), arguments, constants).run()
    return scale, shift
