"""Naive twins, written as transformers writes them: the tests' oracle and the documentation."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(hidden: Tensor, gain: Tensor, eps: float) -> Tensor:
    """RMSNorm of `hidden` (T, E), computed in float32 as transformers' Llama does."""
    rows = hidden.float()
    rows = rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + eps)
    return gain * rows.to(hidden.dtype)


def rope(keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `keys` (G, T, D) to the positions of `cos`, `sin` (T, D), half-split style."""
    half = keys.shape[-1] // 2
    rotated = torch.cat((-keys[..., half:], keys[..., :half]), dim=-1)
    return (keys * cos) + (rotated * sin)


def project_kv(
    hidden: Tensor,
    gain: Tensor,
    eps: float,
    key_weight: Tensor,
    value_weight: Tensor,
    key_bias: Tensor | None,
    value_bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor]:
    """K after RoPE and V, each (G, T, D), of layer inputs `hidden` (T, E).

    Args:
        key_weight, value_weight: (G * D, E).
        cos, sin: (T, D).
    """
    rows = rms_norm(hidden, gain, eps)
    keys = torch.nn.functional.linear(rows, key_weight, key_bias)
    values = torch.nn.functional.linear(rows, value_weight, value_bias)
    head_dim = cos.shape[-1]
    shape = (hidden.shape[0], -1, head_dim)
    return rope(keys.view(shape).transpose(0, 1), cos, sin), values.view(shape).transpose(0, 1)


def quantise(values: Tensor, scales: Tensor) -> Tensor:
    """The integers nearest to `values / scales`, which has any shape that fits."""
    return torch.round(values.double() / scales.double()).clamp(-127, 127).to(torch.int8)


def dequantise_rows(integers: Tensor, scales: Tensor, group_channels: int) -> Tensor:
    """Rows (T, E) in float64 from integers and their groups' scales (T, groups)."""
    channels = scales.double().repeat_interleave(group_channels, dim=-1)
    return integers.double() * channels[:, : integers.shape[-1]]
