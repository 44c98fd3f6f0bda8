"""Kernels on a GPU, torch elsewhere: from stored arrays to K and V in one go, and to integers.

The one place where that is chosen. What a kernel cannot do goes to the torch form, and is counted
with its reason, see `fallbacks`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from hcache_kernels import quant, torch_ops
from hcache_kernels.operands import CacheSlots, Projection, Rotation, StoredKV, StoredRows
from hcache_kernels.quant import FP8

logger = logging.getLogger("hcache_rag")

fallbacks: Counter[str] = Counter()
"""How often the torch form was taken on a GPU, by reason. Logged when a reason comes up first."""

NO_TRITON = "Triton is not installed (pip install 'hcache-rag[gpu]')"
PRODUCT_DTYPES = (torch.bfloat16, torch.float16)
FP8_SINCE = (8, 9)
"""Compute capability from which on a GPU knows eight-bit floats."""


@cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None


def why_not(stored: StoredRows | StoredKV, projection: Projection | None, rotation: Rotation,
            target: CacheSlots) -> str | None:  # fmt: skip
    """Why the kernels cannot do it; None if they can."""
    return next(_obstacles(stored, projection, rotation, target), None)


def _obstacles(
    stored: StoredRows | StoredKV,
    projection: Projection | None,
    rotation: Rotation,
    target: CacheSlots,
) -> Iterator[str]:
    if not has_triton():
        yield NO_TRITON
    numbers = stored.rows if isinstance(stored, StoredRows) else stored.keys
    if (reason := no_eight_bit_floats(numbers.dtype, numbers.device)) is not None:
        yield reason
    rotated = rotation.cos.shape[-1]
    if rotated % 2 or target.head_dim % 2:
        yield f"heads of {target.head_dim} elements, {rotated} of them rotated, are odd"
    if rotated > target.head_dim:
        yield f"{rotated} rotated elements in a head of {target.head_dim}"
    if target.head_dim > 256:
        yield f"heads of {target.head_dim} elements do not fit into registers"
    if (target.keys.shape, target.keys.stride()) != (target.values.shape, target.values.stride()):
        yield "K and V are not of one shape"
    last = (target.keys, target.values, numbers, rotation.cos, rotation.sin)
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
        norm = projection.key_norm
        if norm is not None and norm.is_over_heads and norm.is_centred:
            yield "K goes through a LayerNorm over all heads"
    elif isinstance(stored, StoredKV) and not (
        stored.keys.is_contiguous() and stored.values.is_contiguous()
    ):
        yield "stored K and V have gaps"


def restore(
    stored: StoredRows | StoredKV,
    projection: Projection | None,
    rotation: Rotation,
    target: CacheSlots,
) -> bool:
    """Write K after its norm and RoPE, and V, to the cache, by a kernel of ours.

    Args:
        stored: layer inputs, or K and V.
        projection: of layer inputs; None for K and V.
        rotation: of K.
        target: where both go.

    Returns:
        False where it is left to the caller, in torch: on the CPU, and for what the kernels cannot
        do.
    """
    if not target.keys.is_cuda:
        return False
    if not takes_kernels(why_not(stored, projection, rotation, target)):
        return False
    from hcache_kernels import launch

    for launched in launch.launches(stored, projection, rotation, target):
        launched.run()
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
    reason = _no_triton() or no_eight_bit_floats(dtype, rows.device)
    if rows.is_cuda and takes_kernels(reason):
        from hcache_kernels import launch

        return launch.quantise_rows(rows, group_channels, dtype)
    return quant.quantise_rows(rows, group_channels, dtype)


def dequantise_rows_into(numbers: Tensor, scales: Tensor, group_channels: int, out: Tensor) -> None:
    """See `hcache_kernels.quant.dequantise_rows_into`."""
    reason = _no_triton() or no_eight_bit_floats(numbers.dtype, out.device)
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


def no_eight_bit_floats(dtype: torch.dtype, place: torch.device) -> str | None:
    """Why a kernel at `place` cannot have numbers of a dtype; None if it can."""
    if dtype != FP8 or place.type != "cuda":
        return None
    capability = torch.cuda.get_device_capability(place)
    if capability >= FP8_SINCE:
        return None
    return f"a GPU of capability {capability} has no eight-bit floats"
