"""What the fused kernels take: stored arrays, a layer's projection, positions, the cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class StoredRows:
    """Layer inputs as they are stored.

    Args:
        rows: (T, E): the model's dtype, another float, int8, or float8_e4m3fn.
        row_scales: one over the rows' rms, or std, (T,) float32.
        tiles: (tiles, 3) int32, see `hcache_kernels.tiles`.
        quant_scales: of rows (T,), or of groups (T, groups), float32.
        channel_scales: of each chunk's channels, (chunks, E) float32.
        group_channels: channels of a group; 0 where there are none.
        shift: a LayerNorm's `-mean / std`, (T,) float32.
    """

    rows: Tensor
    row_scales: Tensor
    tiles: Tensor
    quant_scales: Tensor | None = None
    channel_scales: Tensor | None = None
    group_channels: int = 0
    shift: Tensor | None = None


@dataclass(frozen=True, slots=True)
class StoredKV:
    """K before RoPE, and V, as they are stored: (G, T, D) each.

    Args:
        keys, values: floats, int8, or float8_e4m3fn.
        tiles: (tiles, 3) int32, see `hcache_kernels.tiles`.
        key_scales: of each chunk's heads and channels, (chunks, G, D) float32.
        value_scales: of heads and tokens, (G, T) float32.
    """

    keys: Tensor
    values: Tensor
    tiles: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None


@dataclass(frozen=True, slots=True)
class KeyNorm:
    """An RMSNorm or LayerNorm that K goes through behind its projection.

    Args:
        gain: of each head's elements, (G, D).
        bias: as well, (G, D); none of an RMSNorm.
        eps: what is added to the mean square.
        is_centred: a LayerNorm, which takes the mean off.
        is_over_heads: over a whole row of K, and not over each of its heads.
    """

    gain: Tensor
    bias: Tensor | None = None
    eps: float = 1e-6
    is_centred: bool = False
    is_over_heads: bool = False


@dataclass(frozen=True, slots=True)
class Projection:
    """A layer's way from its input to K and V.

    Args:
        weight: K's and V's rows stacked, the norm's gain folded in, (2 * G * D, E).
        bias: (2 * G * D,), with a LayerNorm's own bias in it.
        column_sums: of the weight's rows, (2 * G * D,), where the norm is a LayerNorm whose mean is
            not folded into the weight.
        key_norm: what K goes through behind its bias.
    """

    weight: Tensor
    bias: Tensor | None = None
    column_sums: Tensor | None = None
    key_norm: KeyNorm | None = None


@dataclass(frozen=True, slots=True)
class Rotation:
    """RoPE of K.

    Args:
        cos, sin: of each row's position, (T, R): the first R of a head's D elements are rotated.
        is_interleaved: pairs are neighbours, as in GPT-J, and not halves apart, as in Llama.
    """

    cos: Tensor
    sin: Tensor
    is_interleaved: bool = False


@dataclass(frozen=True, slots=True)
class CacheSlots:
    """Where rows go in a cache.

    Args:
        keys, values: equal in shape and strides.
        num_heads, head_dim: G, D.
        token_stride, head_stride: elements between tokens (of a page), and between heads.
        slots: of each row, (T,) int64, below zero for none; by default row t has slot t.
        page_tokens: tokens of a page; 0 where the cache is one stretch.
        block_stride: elements between pages.
    """

    keys: Tensor
    values: Tensor
    num_heads: int
    head_dim: int
    token_stride: int
    head_stride: int
    slots: Tensor | None = None
    page_tokens: int = 0
    block_stride: int = 0

    @classmethod
    def contiguous(cls, keys: Tensor, values: Tensor, slots: Tensor | None = None) -> CacheSlots:
        """A cache (G, T, D), of any strides but the last."""
        heads, _, width = keys.shape
        return cls(keys, values, heads, width, keys.stride(1), keys.stride(0), slots)

    @classmethod
    def paged(cls, keys: Tensor, values: Tensor, slots: Tensor, *, heads_first: bool) -> CacheSlots:
        """Pages (pages, G, page, D) where heads come first, else (pages, page, G, D)."""
        head, token = (1, 2) if heads_first else (2, 1)
        return cls(
            keys,
            values,
            keys.shape[head],
            keys.shape[-1],
            keys.stride(token),
            keys.stride(head),
            slots,
            keys.shape[token],
            keys.stride(0),
        )

    def write(self, keys: Tensor, values: Tensor) -> None:
        """Put K and V, (T, G, D) each, into their slots: the torch form."""
        rows = torch.arange(len(keys), device=keys.device)
        slots = self.slots if self.slots is not None else rows
        kept = slots >= 0
        slots, page = slots[kept], self.page_tokens
        begins = (
            slots // page * self.block_stride + slots % page * self.token_stride
            if page
            else slots * self.token_stride
        )
        steps = torch.arange(self.num_heads, device=keys.device) * self.head_stride
        columns = torch.arange(self.head_dim, device=keys.device)
        at = begins[:, None, None] + steps[None, :, None] + columns
        for cache_side, side in ((self.keys, keys), (self.values, values)):
            end = int(at.max()) + 1 if at.numel() else 0
            flat = cache_side.as_strided((end,), (1,), cache_side.storage_offset())
            flat[at] = side[kept].to(flat.dtype)
