"""Kernels on a GPU, torch elsewhere: from stored arrays to K and V in one go, and to integers.

The one place where that is chosen. What a kernel cannot do goes to the torch form, and is counted
with its reason, see `fallbacks`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from hcache_kernels import quant, torch_ops
from hcache_kernels.quant import FP8

logger = logging.getLogger("hcache_rag")

fallbacks: Counter[str] = Counter()
"""How often the torch form was taken on a GPU, by reason. Logged when a reason comes up first."""

NO_TRITON = "Triton is not installed (pip install 'hcache-rag[gpu]')"
PRODUCT_DTYPES = (torch.bfloat16, torch.float16)
FP8_SINCE = (8, 9)
"""Compute capability from which on a GPU knows eight-bit floats."""


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
    """K before its norm and RoPE, and V, as they are stored: (G, T, D) each.

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
class Projection:
    """A layer's way from its input to K and V.

    Args:
        weight: K's and V's rows stacked, the norm's gain folded in, (2 * G * D, E).
        bias: (2 * G * D,), with a LayerNorm's own bias in it.
        column_sums: of the weight's rows, (2 * G * D,), where the norm is a LayerNorm.
    """

    weight: Tensor
    bias: Tensor | None = None
    column_sums: Tensor | None = None


@dataclass(frozen=True, slots=True)
class KeyTransform:
    """What happens to a head of K on its way to the cache: a norm, then RoPE.

    Args:
        cos, sin: of each row's position, (T, R): the first R of D elements are rotated.
        is_interleaved: pairs are neighbours, as in GPT-J, and not halves apart, as in Llama.
        gain: of an RMSNorm over the head, (D,).
        eps: of that.
    """

    cos: Tensor
    sin: Tensor
    is_interleaved: bool = False
    gain: Tensor | None = None
    eps: float = 1e-6


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


@cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None


def why_not(stored: StoredRows | StoredKV, projection: Projection | None, key: KeyTransform,
            target: CacheSlots) -> str | None:  # fmt: skip
    """Why the kernels cannot do it; None if they can."""
    return next(_obstacles(stored, projection, key, target), None)


def _obstacles(
    stored: StoredRows | StoredKV,
    projection: Projection | None,
    key: KeyTransform,
    target: CacheSlots,
) -> Iterator[str]:
    if not has_triton():
        yield NO_TRITON
    numbers = stored.rows if isinstance(stored, StoredRows) else stored.keys
    if (reason := _no_eight_bit_floats(numbers.dtype, numbers.device)) is not None:
        yield reason
    if key.cos.shape[-1] % 2 or target.head_dim % 2:
        yield f"heads of {target.head_dim} elements, {key.cos.shape[-1]} of them rotated, are odd"
    if key.cos.shape[-1] > target.head_dim:
        yield f"{key.cos.shape[-1]} rotated elements in a head of {target.head_dim}"
    if target.head_dim > 256:
        yield f"heads of {target.head_dim} elements do not fit into registers"
    if (target.keys.shape, target.keys.stride()) != (target.values.shape, target.values.stride()):
        yield "K and V are not of one shape"
    last = (target.keys, target.values, numbers, key.cos, key.sin)
    if any(tensor.stride(-1) != 1 for tensor in last):
        yield "elements of a row are not neighbours"
    if isinstance(stored, StoredRows) and projection is not None:
        weight = projection.weight
        if weight.dtype not in PRODUCT_DTYPES:
            yield f"weights of {weight.dtype}: tensor cores would round them"
        if len(weight) != 2 * target.num_heads * target.head_dim:
            yield f"{len(weight)} projected elements are not those of K and V"
        if weight.stride(1) != 1:
            yield "the weight's rows are not neighbours"
        if (
            stored.quant_scales is not None
            and stored.channel_scales is not None
            and stored.quant_scales.dim() == 2
        ):
            yield "scales of groups and of channels at once"
    elif isinstance(stored, StoredKV) and not (
        stored.keys.is_contiguous() and stored.values.is_contiguous()
    ):
        yield "stored K and V have gaps"


def restore(
    stored: StoredRows | StoredKV,
    projection: Projection | None,
    key: KeyTransform,
    target: CacheSlots,
) -> bool:
    """Write K after its norm and RoPE, and V, to the cache, by one kernel.

    Args:
        stored: layer inputs, or K and V.
        projection: of layer inputs; None for K and V.
        key: what happens to K.
        target: where both go.

    Returns:
        False where it is left to the caller, in torch: on the CPU, and for what the kernels cannot
        do.
    """
    if not target.keys.is_cuda:
        return False
    if not takes_kernels(why_not(stored, projection, key, target)):
        return False
    from hcache_kernels import launch

    if isinstance(stored, StoredRows):
        assert projection is not None
        launch.rows_launch(stored, projection, key, target).run()
    else:
        launch.kv_launch(stored, key, target).run()
    return True


def row_scale(hidden: Tensor, eps: float, *, is_centred: bool = False) -> Tensor:
    """See `hcache_kernels.torch_ops.row_scale`."""
    if hidden.is_cuda and hidden.dim() == 2 and takes_kernels(_no_triton()):
        from hcache_kernels import launch

        return launch.row_statistics(hidden, eps, is_centred=is_centred)[0]
    return torch_ops.row_scale(hidden, eps, is_centred=is_centred)


def quantise_rows(
    rows: Tensor, group_channels: int | None = None, dtype: torch.dtype = torch.int8
) -> tuple[Tensor, Tensor]:
    """See `hcache_kernels.quant.quantise_rows`."""
    reason = _no_triton() or _no_eight_bit_floats(dtype, rows.device)
    if rows.is_cuda and takes_kernels(reason):
        from hcache_kernels import launch

        return launch.quantise_rows(rows, group_channels, dtype)
    return quant.quantise_rows(rows, group_channels, dtype)


def dequantise_rows_into(
    numbers: Tensor, scales: Tensor, group_channels: int, out: Tensor
) -> None:
    """See `hcache_kernels.quant.dequantise_rows_into`."""
    reason = _no_triton() or _no_eight_bit_floats(numbers.dtype, out.device)
    if out.is_cuda and out.stride(-1) == 1 and takes_kernels(reason):
        from hcache_kernels import launch

        launch.dequantise_rows_into(numbers, scales, group_channels, out)
        return
    quant.dequantise_rows_into(numbers, scales, group_channels, out)


def takes_kernels(reason: str | None) -> bool:
    """Whether nothing speaks against a kernel; what does is counted, and logged once."""
    if reason is None:
        return True
    if not fallbacks[reason]:
        logger.warning("done by torch, not by a kernel of ours: %s", reason)
    fallbacks[reason] += 1
    return False


def _no_triton() -> str | None:
    return None if has_triton() else NO_TRITON


def _no_eight_bit_floats(dtype: torch.dtype, place: torch.device) -> str | None:
    if dtype != FP8 or place.type != "cuda":
        return None
    capability = torch.cuda.get_device_capability(place)
    if capability >= FP8_SINCE:
        return None
    return f"a GPU of capability {capability} has no eight-bit floats"


def chunks_of_rows(tiles: Tensor, num_rows: int) -> Tensor:
    """Which chunk each row is of, (T,), as the tiles say."""
    chunks = torch.zeros(num_rows, dtype=torch.long, device=tiles.device)
    for first, rows, chunk in tiles.tolist():
        chunks[first : first + rows] = chunk
    return chunks
