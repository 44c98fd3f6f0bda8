"""The same functions on preallocated buffers: the restoring step is one GEMM and three passes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hcache_kernels import reference


def row_scale(hidden: Tensor, eps: float, *, is_centred: bool = False) -> Tensor:
    """`1 / rms` of every row of `hidden` (..., E), in float32, shape (...,).

    Args:
        is_centred: of the rows less their means, as a LayerNorm divides by.
    """
    rows = hidden.float()
    if is_centred:
        rows = rows - rows.mean(-1, keepdim=True)
    return torch.rsqrt(rows.pow(2).mean(-1) + eps)


def fold_projection(
    gain: Tensor, key_weight: Tensor, value_weight: Tensor, *, is_centred: bool = False
) -> Tensor:
    """Fold the norm's gain into the stacked projection: `([W_k; W_v] diag(g))^T`, (E, W_k + W_v).

    Rounded once, from float32 to the weights' dtype.

    Args:
        is_centred: a LayerNorm's mean as well: `W diag(g) (h - mean(h))` is `W' h`, where each row
            of `W'` is one of `W diag(g)` less its own mean.
    """
    stacked = torch.cat((key_weight, value_weight)).float() * gain.float()
    if is_centred:
        stacked = stacked - stacked.mean(-1, keepdim=True)
    return stacked.to(key_weight.dtype).t()


def rope_into(
    keys: Tensor, cos: Tensor, sin: Tensor, out: Tensor, *, is_interleaved: bool = False
) -> None:
    """Rotate `keys` (G, T, D) to the positions of `cos`, `sin` (T, R) and write them to `out`.

    The first `R` channels are rotated, the others copied.

    Args:
        out: (G, T, D); may have any strides but must not overlap `keys`.
        is_interleaved: pairs are neighbouring channels, not those of the two halves.
    """
    rotated = cos.shape[-1]
    if rotated < keys.shape[-1]:
        out[..., rotated:].copy_(keys[..., rotated:])
        keys, out = keys[..., :rotated], out[..., :rotated]
    if not rotated:
        return
    if cos.dtype != keys.dtype:  # rotated in float32, rounded once
        out.copy_(reference.rope(keys, cos, sin, is_interleaved=is_interleaved))
        return
    torch.mul(keys, cos, out=out)
    if is_interleaved:
        out[..., ::2].addcmul_(keys[..., 1::2], sin[:, ::2], value=-1)
        out[..., 1::2].addcmul_(keys[..., ::2], sin[:, 1::2])
        return
    half = rotated // 2
    out[..., :half].addcmul_(keys[..., half:], sin[:, :half], value=-1)
    out[..., half:].addcmul_(keys[..., :half], sin[:, half:])


def project_kv(
    hidden: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    keys_out: Tensor,
    values_out: Tensor,
    scratch: Tensor,
    *,
    is_interleaved: bool = False,
    key_norm: Callable[[Tensor], Tensor] | None = None,
    value_norm: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Write K after RoPE (G, T, D) and V (G, T, D_v) of layer inputs to where they belong.

    Args:
        hidden: (T, E).
        scale: the rows' float32 `1 / rms`, (T,), see `row_scale`.
        weight: what `fold_projection` returned, (E, W) with `W = G * D + G * D_v`.
        bias: the stacked biases of K and V, (W,), or None.
        cos, sin: (T, R), see `rope_into`.
        scratch: (T, W), overwritten.
        key_norm, value_norm: what rows of K (T, G * D), and of V, go through before RoPE.
    """
    num_tokens, (num_heads, _, head_dim) = hidden.shape[0], keys_out.shape
    torch.mm(hidden, weight, out=scratch)
    if bias is None:
        scratch.mul_(scale.unsqueeze(-1))
    else:
        torch.addcmul(bias, scratch, scale.unsqueeze(-1), out=scratch)
    keys, values = scratch[:, : num_heads * head_dim], scratch[:, num_heads * head_dim :]
    keys = keys if key_norm is None else key_norm(keys)
    values = values if value_norm is None else value_norm(values)
    shape = (num_tokens, num_heads, -1)
    rope_into(keys.view(shape).transpose(0, 1), cos, sin, keys_out, is_interleaved=is_interleaved)
    values_out.copy_(values.view(shape).transpose(0, 1))
