"""Eight-bit numbers and their scales: symmetric, rounded to the nearest, zero stays zero.

Integers divide the range evenly; eight-bit floats (E4M3: four bits of exponent, three of mantissa;
Micikevicius et al. 2022, arXiv 2209.05433) have finer steps for smaller numbers, and coarser ones
for the largest.

Numbers that are not finite stay so: their scale is not finite either.

What shares a scale decides the loss. K has channels that are large in every token, so before RoPE
a scale for each channel; V varies by token, so a scale for each token. Hidden rows have both:
channels that are large everywhere, and rows that are large as a whole. Dividing each channel by
the square root of its largest magnitude first shares the range between the two (the even split of
SmoothQuant, Xiao et al. 2023, arXiv 2211.10438).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
LARGEST = {torch.int8: 127.0, FP8: 448.0}
"""The largest number of a dtype: what the largest magnitude becomes."""


def _quantise(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    steps, largest = values.float() / scales, LARGEST[dtype]
    steps = steps if dtype.is_floating_point else steps.round_()
    return steps.clamp_(-largest, largest).to(dtype)


def _scales(values: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    largest = values.float().abs().amax(dim, keepdim=True)
    return torch.where(largest == 0, torch.ones_like(largest), largest / LARGEST[dtype])


def quantise_rows(
    rows: Tensor, group_channels: int | None = None, dtype: torch.dtype = torch.int8
) -> tuple[Tensor, Tensor]:
    """Layer inputs (T, E) as eight-bit numbers (T, E) and float32 scales.

    Args:
        group_channels: neighbouring channels that share a scale; the last group may be smaller.
        dtype: int8 or float8_e4m3fn.

    Returns:
        The numbers, and scales (T,), or (T, groups) where groups were asked for.
    """
    if group_channels is None:
        scales = _scales(rows, -1, dtype)
        return _quantise(rows, scales, dtype), scales.squeeze(-1)
    groups = torch.split(rows, group_channels, dim=-1)
    group_scales = [_scales(group, -1, dtype) for group in groups]
    numbers = [_quantise(g, s, dtype) for g, s in zip(groups, group_scales, strict=True)]
    return torch.cat(numbers, dim=-1), torch.cat(group_scales, dim=-1)


def quantise_rows_smoothly(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Layer inputs (T, E) as int8 (T, E), and float32 scales of rows (T,) and of channels (E,)."""
    largest = rows.float().abs().amax(0)
    channels = torch.where(largest == 0, torch.ones_like(largest), largest.sqrt())
    integers, scales = quantise_rows(rows.float() / channels)
    return integers, scales, channels


def quantise_keys(keys: Tensor, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """K before RoPE (G, T, D) in eight bits (G, T, D), and float32 scales of channels (G, D)."""
    scales = _scales(keys, 1, dtype)
    return _quantise(keys, scales, dtype), scales.squeeze(1)


def quantise_values(values: Tensor, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """V (G, T, D) in eight bits (G, T, D), and float32 scales of tokens and heads (G, T)."""
    scales = _scales(values, -1, dtype)
    return _quantise(values, scales, dtype), scales.squeeze(-1)


def copy_numbers(numbers: Tensor, out: Tensor) -> None:
    """`out.copy_(numbers)`. Of the 256 eight-bit floats the CPU looks up what each one is: it would
    convert them one by one."""
    if numbers.dtype != FP8 or numbers.is_cuda or out.dtype == FP8:
        out.copy_(numbers)
        return
    places = numbers.view(torch.uint8).flatten().int()
    out.copy_(_eight_bit_floats(out.dtype).index_select(0, places).view(numbers.shape))


@cache
def _eight_bit_floats(dtype: torch.dtype) -> Tensor:
    return torch.arange(256, dtype=torch.uint8).view(FP8).to(dtype)


def dequantise_rows_into(numbers: Tensor, scales: Tensor, group_channels: int, out: Tensor) -> None:
    """Write rows (T, E) that `quantise_rows` made with groups to `out` (T, E)."""
    copy_numbers(numbers, out)
    whole = out.shape[-1] // group_channels
    in_groups = out[:, : whole * group_channels].view(len(out), whole, group_channels)
    in_groups.mul_(scales[:, :whole].unsqueeze(-1))
    out[:, whole * group_channels :].mul_(scales[:, whole:])


def dequantise_keys_into(numbers: Tensor, scales: Tensor, out: Tensor) -> None:
    """Write K (G, T, D) that `quantise_keys` made to `out` (G, T, D)."""
    copy_numbers(numbers, out)
    out.mul_(scales.unsqueeze(1))


def dequantise_values_into(numbers: Tensor, scales: Tensor, out: Tensor) -> None:
    """Write V (G, T, D) that `quantise_values` made to `out` (G, T, D)."""
    copy_numbers(numbers, out)
    out.mul_(scales.unsqueeze(-1))
