"""The norm of K in numbers, as kernels take it; the model's own module does the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hcache_kernels.operands import KeyNorm
from hcache_rag.models.families import Family
from hcache_rag.spec import ModelSpec


def epsilon(norm: nn.Module) -> float:
    """What a norm adds to the mean square."""
    names = ("variance_epsilon", "eps")
    return float(next((e for n in names if (e := getattr(norm, n, None)) is not None), 1e-5))


def key_norm_of(norm: nn.Module, family: Family, spec: ModelSpec) -> KeyNorm:
    """What a norm of K does: it is of the kind of the one in front of the attention.

    Args:
        norm: with a gain for a head, for each head, or for all of a row; or, StableLM, one norm for
            each head.
    """
    each: Any = getattr(norm, "norms", [norm])
    gain = _of_heads([its.weight for its in each], spec)
    biases = [its.bias for its in each if getattr(its, "bias", None) is not None]
    return KeyNorm(
        gain.float() + family.gain_offset if family.gain_offset else gain,
        _of_heads(biases, spec) if biases else None,
        epsilon(each[0]),
        is_centred=family.is_centred,
        is_over_heads=family.norm_shape == "rows",
    )


def _of_heads(parts: list[Tensor], spec: ModelSpec) -> Tensor:
    """Elements of one head, or of all, as (G, D)."""
    stacked = torch.stack([part.detach() for part in parts]).view(-1, spec.head_dim)
    return stacked.expand(spec.num_kv_heads, -1).contiguous()
