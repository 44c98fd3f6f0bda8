"""What a transformers configuration says: a model's numbers, its windows, and why it cannot be
served.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from hcache_rag.errors import UnsupportedModelError
from hcache_rag.models.families import Family, family_of
from hcache_rag.spec import ModelSpec

UNLIMITED_TOKENS = 1 << 20
"""The window of a model that names none."""


def why_refused(config: Any) -> str | None:
    """Why models of a configuration cannot be served; None where they perhaps can."""
    if getattr(config, "is_encoder_decoder", False):
        return "it has an encoder, whose states hold for one prompt only"
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        return "its attention sees chunks of the sequence"
    try:
        layers = cache_layers(config)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return f"transformers makes no KV cache for it ({error!r})"
    others = {type(x).__name__ for x in layers} - {
        DynamicLayer.__name__,
        DynamicSlidingWindowLayer.__name__,
    }
    if others:
        return f"not every layer keeps K and V of every token ({', '.join(sorted(others))})"
    return None


def cache_layers(config: Any) -> list[Any]:
    """The layers of the cache that transformers would make."""
    return list(DynamicCache(config=config).layers)


def windows_of(config: Any) -> list[int | None]:
    """How many tokens up to its own each layer sees of a sequence; None for all."""
    return [getattr(layer, "sliding_window", None) for layer in cache_layers(config)]


def spec_of(config: Any, name: str, dtype: str) -> ModelSpec:
    """The numbers of a model, from its transformers configuration.

    Raises:
        UnsupportedModelError: numbers that no decoder has.
    """
    family = family_of(config)
    try:
        return _spec_of(config, family, name, dtype)
    except (AttributeError, ValueError) as error:
        raise UnsupportedModelError(f"{name}: {error}") from error


def _spec_of(config: Any, family: Family, name: str, dtype: str) -> ModelSpec:
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    latent = family.is_latent
    return ModelSpec(
        name=name,
        family=config.model_type,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=heads,
        num_kv_heads=family.kv_heads(config),
        head_dim=config.qk_rope_head_dim if latent else head_dim,
        value_dim=config.kv_lora_rank if latent else 0,
        window_tokens=_window(config),
        dtype=dtype,
        mlp_size=_mlp_size(config),
        mlp_matrices=family.mlp_matrices,
    )


def _window(config: Any) -> int:
    """The longest sequence, all of whose positions are rotated alike however long it is."""
    names = ("max_position_embeddings", "max_seq_len", "seq_length")
    window = _first(config, names, int) or UNLIMITED_TOKENS
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for kind in (rope, *(kind for kind in rope.values() if isinstance(kind, dict))):
        if kind.get("rope_type") == "longrope":  # behind that, every position gets other factors
            window = min(window, int(kind.get("original_max_position_embeddings") or window))
    return window


def _mlp_size(config: Any) -> int:
    """Width between the MLP's matrices, of all experts that a token goes through."""
    experts = _first(config, ("num_experts_per_tok",), int)
    width = _first(config, ("moe_intermediate_size",), int) if experts else 0
    names = ("intermediate_size", "ffn_hidden_size", "ffn_dim", "n_inner")
    width = width or _first(config, names, int) or 4 * int(config.hidden_size)
    return width * (experts or 1)


def _first(config: Any, names: tuple[str, ...], kind: Callable[[Any], int]) -> int:
    """The first of some numbers that a configuration names; 0 where it names none."""
    return next((kind(value) for name in names if (value := getattr(config, name, None))), 0)
