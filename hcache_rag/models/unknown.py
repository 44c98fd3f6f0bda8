"""Models that no facts are known about: looked at from outside, by reading a few tokens.

What such a model's own cache receives is K and V as they are used, rotated or not. They hold on
the exact path only.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from hcache_rag.errors import UnsupportedModelError
from hcache_rag.models.configuration import UNLIMITED_TOKENS
from hcache_rag.spec import ModelSpec

logger = logging.getLogger("hcache_rag")

PROBE_TOKENS = 4
warned_families: set[str] = set()
"""Of which it has been said what their states are good for."""


def warn_once(family: str) -> None:
    """Say once of each family what its states are good for."""
    if family not in warned_families:
        warned_families.add(family)
        logger.warning(
            "nothing is known about models of family %r: K and V are kept as the model's own cache "
            "receives them, and used only behind the very tokens that they were computed behind; "
            "see docs/add-a-family.md",
            family,
        )


@torch.no_grad()
def probed_spec(model: PreTrainedModel, name: str, dtype: str) -> ModelSpec:
    """The numbers of a model, from what its cache holds after a few tokens.

    Raises:
        UnsupportedModelError: it keeps no KV cache, or not one that says all.
    """
    family = model.config.model_type

    def refused(reason: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"models of family {family!r} cannot be served: {reason}")

    if getattr(model, "_is_stateful", False):
        raise refused("they keep a state that is no KV cache")
    try:
        whole = _layers_after(model, [PROBE_TOKENS])
        halves = _layers_after(model, [PROBE_TOKENS // 2] * 2)
    except (AttributeError, TypeError, ValueError, RuntimeError, IndexError, KeyError) as error:
        raise refused(f"reading a few tokens fails ({error!r})") from error
    shapes = {tuple(side.shape) for pair in whole for side in pair[:1]}
    others = {tuple(side.shape) for pair in whole for side in pair[1:]}
    if not whole or len(shapes) != 1 or len(others) != 1:
        raise refused(f"its layers keep K of shapes {sorted(shapes)}, V of {sorted(others)}")
    keys, values = whole[0]
    if keys.dim() != 4 or keys.shape[:3] != values.shape[:3] or keys.shape[2] != PROBE_TOKENS:
        raise refused(f"its cache holds K {tuple(keys.shape)} and V {tuple(values.shape)}")
    if len(whole) != len(halves) or not all(map(_are_near, whole, halves)):
        raise refused("what it computes of a token depends on what follows, or on no cache")
    if not _decodes_on_a_cache(model, len(whole)):
        raise refused("transformers does not decode on a KV cache that it is given")
    return _spec(model, name, dtype, len(whole), keys, values)


def _layers_after(model: PreTrainedModel, steps: list[int]) -> list[tuple[Tensor, Tensor]]:
    """K and V of every layer after reading so many tokens in each of some steps."""
    cache, first = DynamicCache(), 0
    decoder: Any = model.base_model
    for tokens in steps:
        ids = torch.arange(first, first + tokens, device=model.device).unsqueeze(0)
        decoder(input_ids=ids, past_key_values=cache, use_cache=True)
        first += tokens
    layers: list[Any] = cache.layers
    return [(layer.keys, layer.values) for layer in layers if layer.is_initialized]


def _decodes_on_a_cache(model: PreTrainedModel, layers: int) -> bool:
    """Whether `generate` reads each new token alone, behind what a given cache holds."""
    kind: Any = DynamicLayer
    cache = Cache(layers=[kind() for _ in range(layers)])
    ids = torch.arange(PROBE_TOKENS, device=model.device).unsqueeze(0)
    generate: Any = model.generate
    options = {"min_new_tokens": 3, "max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    try:
        generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **options)
    except (AttributeError, TypeError, ValueError, RuntimeError, IndexError, KeyError):
        return False
    return cache.get_seq_length() == PROBE_TOKENS + 2


def _are_near(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> bool:
    """Equal but for rounding."""
    return all(
        a.shape == b.shape
        and bool((a - b).float().norm() <= 0.05 * a.float().norm() + torch.finfo(a.dtype).tiny)
        for a, b in zip(one, other, strict=True)
    )


def _spec(
    model: PreTrainedModel, name: str, dtype: str, layers: int, keys: Tensor, values: Tensor
) -> ModelSpec:
    config: Any = model.config.get_text_config()
    kv_heads, head_dim = keys.shape[1], keys.shape[3]
    heads = int(getattr(config, "num_attention_heads", kv_heads))
    window = getattr(config, "max_position_embeddings", None) or UNLIMITED_TOKENS
    return ModelSpec(
        name=name,
        family=model.config.model_type,
        num_layers=layers,
        hidden_size=config.hidden_size,
        num_heads=heads if heads % kv_heads == 0 else kv_heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        window_tokens=int(window),
        dtype=dtype,
        mlp_size=4 * int(config.hidden_size),
        mlp_matrices=2,
        value_dim=values.shape[3] if values.shape[3] != head_dim else 0,
    )
