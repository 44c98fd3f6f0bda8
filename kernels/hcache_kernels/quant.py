"""Eight-bit integers and their scales: symmetric, rounded to the nearest, zero stays zero.

Numbers that are not finite stay so: their scale is not finite either.

What shares a scale decides the loss. K has channels that are large in every token, so before RoPE
a scale for each channel; V varies by token, so a scale for each token. Hidden rows have both:
channels that are large everywhere, and rows that are large as a whole. Dividing each channel by
the square root of its largest magnitude first shares the range between the two (the even split of
SmoothQuant, Xiao et al. 2023, arXiv 2211.10438).
"""

from __future__ import annotations

import torch
from torch import Tensor

_LARGEST = 127


def _quantise(values: Tensor, scales: Tensor) -> Tensor:
    steps = values.float() / scales
    return steps.round_().clamp_(-_LARGEST, _LARGEST).to(torch.int8)


def _scales(values: Tensor, dim: int) -> Tensor:
    largest = values.float().abs().amax(dim, keepdim=True)
    return torch.where(largest == 0, torch.ones_like(largest), largest / _LARGEST)


def quantise_rows(rows: Tensor, group_channels: int | None = None) -> tuple[Tensor, Tensor]:
    """Layer inputs (T, E) as int8 (T, E) and float32 scales.

    Args:
        group_channels: neighbouring channels that share a scale; the last group may be smaller.

    Returns:
        The integers, and scales (T,), or (T, groups) where groups were asked for.
    """
    if group_channels is None:
        scales = _scales(rows, -1)
        return _quantise(rows, scales), scales.squeeze(-1)
    groups = torch.split(rows, group_channels, dim=-1)
    group_scales = [_scales(group, -1) for group in groups]
    integers = [_quantise(g, s) for g, s in zip(groups, group_scales, strict=True)]
    return torch.cat(integers, dim=-1), torch.cat(group_scales, dim=-1)


def quantise_rows_smoothly(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Layer inputs (T, E) as int8 (T, E), and float32 scales of rows (T,) and of channels (E,)."""
    largest = rows.float().abs().amax(0)
    channels = torch.where(largest == 0, torch.ones_like(largest), largest.sqrt())
    integers, scales = quantise_rows(rows.float() / channels)
    return integers, scales, channels


def quantise_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """K before RoPE (G, T, D) as int8 (G, T, D) and float32 scales of channels (G, D)."""
    scales = _scales(keys, 1)
    return _quantise(keys, scales), scales.squeeze(1)


def quantise_values(values: Tensor) -> tuple[Tensor, Tensor]:
    """V (G, T, D) as int8 (G, T, D) and float32 scales of tokens and heads (G, T)."""
    scales = _scales(values, -1)
    return _quantise(values, scales), scales.squeeze(-1)


def dequantise_rows_into(
    integers: Tensor, scales: Tensor, group_channels: int, out: Tensor
) -> None:
    """Write rows (T, E) that `quantise_rows` made with groups to `out` (T, E)."""
    out.copy_(integers)
    whole = out.shape[-1] // group_channels
    in_groups = out[:, : whole * group_channels].view(len(out), whole, group_channels)
    in_groups.mul_(scales[:, :whole].unsqueeze(-1))
    out[:, whole * group_channels :].mul_(scales[:, whole:])


def dequantise_keys_into(integers: Tensor, scales: Tensor, out: Tensor) -> None:
    """Write K (G, T, D) that `quantise_keys` made to `out` (G, T, D)."""
    out.copy_(integers)
    out.mul_(scales.unsqueeze(1))


def dequantise_values_into(integers: Tensor, scales: Tensor, out: Tensor) -> None:
    """Write V (G, T, D) that `quantise_values` made to `out` (G, T, D)."""
    out.copy_(integers)
    out.mul_(scales.unsqueeze(-1))
