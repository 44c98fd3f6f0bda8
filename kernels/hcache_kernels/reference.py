"""Naive twins, written as transformers writes them: the tests' oracle and the documentation."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(hidden: Tensor, gain: Tensor, eps: float) -> Tensor:
    """RMSNorm of `hidden` (T, E), computed in float32 as transformers' Llama does."""
    rows = hidden.float()
    rows = rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + eps)
    return gain * rows.to(hidden.dtype)


def layer_norm(hidden: Tensor, gain: Tensor, shift: Tensor, eps: float) -> Tensor:
    """LayerNorm of `hidden` (T, E), computed in float32."""
    rows = hidden.float()
    rows = rows - rows.mean(-1, keepdim=True)
    rows = rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + eps)
    return (rows * gain.float() + shift.float()).to(hidden.dtype)


def rope(keys: Tensor, cos: Tensor, sin: Tensor, *, is_interleaved: bool = False) -> Tensor:
    """Rotate `keys` (G, T, D) to the positions of `cos`, `sin` (T, R), in the widest dtype.

    The first `R` channels are rotated in pairs: channel `i` with `i + R / 2`, or where
    `is_interleaved`, `2 i` with `2 i + 1`.
    """
    width = cos.shape[-1]
    turned, rest = keys[..., :width], keys[..., width:]
    if is_interleaved:
        rotated = torch.stack((-turned[..., 1::2], turned[..., ::2]), dim=-1).flatten(-2)
    else:
        rotated = torch.cat((-turned[..., width // 2 :], turned[..., : width // 2]), dim=-1)
    turned = (turned * cos) + (rotated * sin)
    return torch.cat((turned, rest.to(turned.dtype)), dim=-1) if rest.shape[-1] else turned


def rope_undone(keys: Tensor, cos: Tensor, sin: Tensor, *, is_interleaved: bool = False) -> Tensor:
    """What `rope` made `keys` (G, T, D) of, in float32.

    Turned back by the same angle; the scale that some kinds of RoPE have is undone as well.
    """
    cos, sin, width = cos.float(), sin.float(), cos.shape[-1]
    plain = rope(keys.float(), cos, -sin, is_interleaved=is_interleaved)
    plain[..., :width] /= cos.square() + sin.square()
    return plain


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
