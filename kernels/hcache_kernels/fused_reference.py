"""Naive twins of the fused kernels, in any dtype: the tests take float64."""

from __future__ import annotations

import torch
from torch import Tensor

from hcache_kernels.operands import KeyNorm


def dequantise_rows(
    rows: Tensor,
    quant_scales: Tensor | None,
    channel_scales: Tensor | None,
    chunk_of_row: Tensor | None,
    group_channels: int,
    dtype: torch.dtype,
) -> Tensor:
    """Stored layer inputs (T, E) as numbers.

    Args:
        rows: (T, E), of any dtype.
        quant_scales: of rows (T,), or of their groups (T, groups), or None.
        channel_scales: of each chunk's channels, (chunks, E), or None.
        chunk_of_row: which chunk each row is of, (T,).
        group_channels: channels of a group.
        dtype: what to compute in.
    """
    numbers = rows.to(dtype)
    if channel_scales is not None and chunk_of_row is not None:
        numbers = numbers * channel_scales.to(dtype)[chunk_of_row]
    if quant_scales is None:
        return numbers
    if quant_scales.dim() == 1:
        return numbers * quant_scales.to(dtype).unsqueeze(-1)
    channels = quant_scales.to(dtype).repeat_interleave(group_channels, dim=-1)
    return numbers * channels[:, : rows.shape[-1]]


def chunks_of_rows(tiles: Tensor, num_rows: int) -> Tensor:
    """Which chunk each row is of, (T,), as the tiles say."""
    chunks = torch.zeros(num_rows, dtype=torch.long, device=tiles.device)
    for first, rows, chunk in tiles.tolist():
        chunks[first : first + rows] = chunk
    return chunks


def norm_keys(keys: Tensor, norm: KeyNorm | None) -> Tensor:
    """K (T, G, D) behind its norm; as it is where there is none."""
    if norm is None:
        return keys
    shared = (-2, -1) if norm.is_over_heads else -1
    mean = keys.mean(shared, keepdim=True) if norm.is_centred else 0.0
    spread = (keys - mean).pow(2).mean(shared, keepdim=True)
    made = (keys - mean) * torch.rsqrt(spread + norm.eps) * norm.gain.to(keys.dtype)
    return made if norm.bias is None else made + norm.bias.to(keys.dtype)


def rope(keys: Tensor, cos: Tensor, sin: Tensor, *, is_interleaved: bool) -> Tensor:
    """Rotate the first R elements of each head of `keys` (T, G, D) by `cos`, `sin` (T, R)."""
    rotary = cos.shape[-1]
    cos, sin = cos.to(keys.dtype).unsqueeze(1), sin.to(keys.dtype).unsqueeze(1)
    turned, rest = keys[..., :rotary], keys[..., rotary:]
    if is_interleaved:
        pairs = turned.reshape(*turned.shape[:-1], rotary // 2, 2)
        partner = torch.stack((-pairs[..., 1], pairs[..., 0]), -1).flatten(-2)
    else:
        first, second = turned.chunk(2, -1)
        partner = torch.cat((-second, first), -1)
    return torch.cat((turned * cos + partner * sin, rest), -1)


def project(
    numbers: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shift: Tensor | None,
    column_sums: Tensor | None,
    head_dim: int,
) -> tuple[Tensor, Tensor]:
    """K before its norm and RoPE, and V, (T, G, D) each.

    `scale * (numbers @ weight^T) + shift * column_sums + bias`, where a LayerNorm's `shift` is
    `-mean / std` of a row, and its `column_sums` are those of the folded weight.

    Args:
        numbers: layer inputs (T, E).
        scale: one over the rows' rms, or std, (T,).
        weight: K's and V's rows stacked, the norm's gain folded in, (2 * G * D, E).
        bias: (2 * G * D,).
        shift: (T,).
        column_sums: (2 * G * D,).
        head_dim: D.
    """
    dtype = numbers.dtype
    made = scale.to(dtype).unsqueeze(-1) * (numbers @ weight.to(dtype).T)
    if shift is not None and column_sums is not None:
        made = made + shift.to(dtype).unsqueeze(-1) * column_sums.to(dtype)
    if bias is not None:
        made = made + bias.to(dtype)
    keys, values = made.view(len(made), 2, -1, head_dim).unbind(1)
    return keys, values


def row_statistics(rows: Tensor, eps: float, *, is_centred: bool) -> tuple[Tensor, Tensor]:
    """`scale` and `shift` (T,) of `project`: of an RMSNorm, or, centred, of a LayerNorm."""
    mean = rows.mean(-1) if is_centred else torch.zeros_like(rows[:, 0])
    spread = (rows - mean.unsqueeze(-1)).pow(2).mean(-1)
    scale = torch.rsqrt(spread + eps)
    return scale, -mean * scale
