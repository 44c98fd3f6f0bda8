"""The same functions on preallocated buffers: the restoring step is one GEMM and three passes."""

from __future__ import annotations

import torch
from torch import Tensor


def row_scale(hidden: Tensor, eps: float) -> Tensor:
    """`1 / rms` of every row of `hidden` (..., E), in float32, shape (...,)."""
    return torch.rsqrt(hidden.float().pow(2).mean(-1) + eps)


def fold_projection(gain: Tensor, key_weight: Tensor, value_weight: Tensor) -> Tensor:
    """Fold the norm's gain into the stacked projection: `([W_k; W_v] diag(g))^T`, (E, 2 * G * D).

    Rounded once, from float32 to the weights' dtype.
    """
    stacked = torch.cat((key_weight, value_weight)).float() * gain.float()
    return stacked.to(key_weight.dtype).t()


def rope_into(keys: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """Rotate `keys` (G, T, D) to the positions of `cos`, `sin` (T, D) and write them to `out`.

    `out` (G, T, D) may have any strides but must not overlap `keys`.
    """
    half = keys.shape[-1] // 2
    torch.mul(keys, cos, out=out)
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
) -> None:
    """Write K after RoPE and V of layer inputs to `keys_out` and `values_out`, each (G, T, D).

    Args:
        hidden: (T, E).
        scale: the rows' float32 `1 / rms`, (T,).
        weight: what `fold_projection` returned, (E, 2 * G * D).
        bias: the stacked biases of K and V, (2 * G * D,), or None.
        cos, sin: (T, D).
        scratch: (T, 2 * G * D), overwritten.
    """
    num_tokens, (num_heads, _, head_dim) = hidden.shape[0], keys_out.shape
    torch.mm(hidden, weight, out=scratch)
    if bias is None:
        scratch.mul_(scale.unsqueeze(-1))
    else:
        torch.addcmul(bias, scratch, scale.unsqueeze(-1), out=scratch)
    projected = scratch.view(num_tokens, 2, num_heads, head_dim).permute(1, 2, 0, 3)
    rope_into(projected[0], cos, sin, keys_out)
    values_out.copy_(projected[1])
