"""What differs between model families: a table of facts, and the few functions that are no facts.

The facts are those of transformers' own modelling code. See docs/add-a-family.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from hcache_rag.spec import ModelSpec

Parts = tuple[Tensor, Tensor, Tensor]
"""Q, K and V, (..., H * D), (..., G * D) and (..., G * D)."""


class Positions(str, Enum):
    """How a model knows where a token stands, and what follows for its states, in words."""

    ROTARY = "RoPE can move it"
    """K is rotated by its position: before that it can be moved."""
    LEARNED = "the model has learned positions"
    """Added to the embeddings: everything behind them depends on the place."""
    ALIBI = "the model has ALiBi"
    """A bias by distance, which transformers computes from the order in the cache."""
    UNKNOWN = "nothing is known about models of its family"
    """K and V are taken as the model's own cache receives them."""


# How one projection's output (..., W) for Q, K and V is divided


def in_a_row(rows: Tensor, spec: ModelSpec, config: Any) -> Parts:
    """All heads of Q, then those of K, then those of V."""
    first, second = spec.query_width, spec.query_width + spec.kv_width
    return rows[..., :first], rows[..., first:second], rows[..., second:]


def by_kv_head(rows: Tensor, spec: ModelSpec, config: Any) -> Parts:
    """For each head of K and V: its heads of Q, then K, then V."""
    heads = rows.reshape(*rows.shape[:-1], spec.num_kv_heads, -1, spec.head_dim)
    query, key, value = heads[..., :-2, :], heads[..., -2, :], heads[..., -1, :]
    return query.flatten(-3), key.flatten(-2), value.flatten(-2)


def as_falcon(rows: Tensor, spec: ModelSpec, config: Any) -> Parts:
    """Falcon has had three ways; the newest repeats K and V for every head of Q in the cache."""
    if config.new_decoder_architecture:
        heads = rows.reshape(*rows.shape[:-1], config.num_kv_heads, -1, spec.head_dim)
        query = heads[..., :-2, :]
        key, value = (heads[..., at, None, :].expand(query.shape) for at in (-2, -1))
        return query.flatten(-3), key.flatten(-3), value.flatten(-3)
    return (in_a_row if config.multi_query else by_kv_head)(rows, spec, config)


def as_latent(rows: Tensor, spec: ModelSpec, config: Any) -> Parts:
    """MLA: no Q; as K the one rotated head, as V the latent that K and V are made of.

    Where transformers takes neighbouring channels as pairs and leaves them in two halves, the
    channels are put into halves here.
    """
    latent, rotated = rows[..., : spec.value_dim], rows[..., spec.value_dim :]
    return rows[..., :0], in_halves(rotated, config), latent


def in_halves(rotated: Tensor, config: Any) -> Tensor:
    """DeepSeek-V3: even channels (..., D) first."""
    if config.model_type != "deepseek_v2" and getattr(config, "rope_interleave", False):
        return torch.cat((rotated[..., ::2], rotated[..., 1::2]), -1)
    return rotated


# Cosines and sines (1, T, R) of positions (1, T)


def of_rotary(module: Any, probe: Tensor, positions: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """As a rotary embedding gives them; where it has several bases, that of a layer type."""
    cos, sin = module(probe, positions, kind) if kind else module(probe, positions)
    return cos, sin


def of_pairs(module: Any, probe: Tensor, positions: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Given for two halves, meant for neighbours."""
    cos, sin = (side.chunk(2, -1)[0].repeat_interleave(2, -1) for side in module(probe, positions))
    return cos, sin


def of_one_half(module: Any, probe: Tensor, positions: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Given once for both halves."""
    cos, sin = module(probe, positions)
    return torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)


def of_complex(module: Any, probe: Tensor, positions: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """DeepSeek-V2: as complex numbers, in float32."""
    turns = module(probe, positions)
    return turns.real.repeat_interleave(2, -1), turns.imag.repeat_interleave(2, -1)


def of_table(module: Any, probe: Tensor, positions: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """GPT-J: every attention has a table of sines, then cosines."""
    sin, cos = module.embed_positions[positions].to(probe.dtype).chunk(2, -1)
    return cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)


CosSin = Callable[[Any, Tensor, Tensor, str], tuple[Tensor, Tensor]]


def in_float32(rotate: CosSin) -> CosSin:
    """For models that rotate in float32, whatever they compute in."""

    def wider(*args: Any) -> tuple[Tensor, Tensor]:
        cos, sin = rotate(*args)
        return cos.float(), sin.float()

    return wider


# By what a layer rotates: "" the one rotary embedding, another name a base of it, None not at all


def same_for_all(config: Any, layer: int) -> str | None:
    """Every layer rotates alike."""
    return ""


def by_layer_type(config: Any, layer: int) -> str | None:
    """Sliding and global layers have a base each."""
    return str(config.layer_types[layer])


def where_marked(config: Any, layer: int) -> str | None:
    """SmolLM3 leaves every fourth layer as it is."""
    return "" if config.no_rope_layers[layer] else None


def where_sliding(config: Any, layer: int) -> str | None:
    """Cohere2 leaves global layers as they are."""
    return "" if config.layer_types[layer] == "sliding_attention" else None


def _one_head(config: Any) -> int:
    return 1


def _falcon_heads(config: Any) -> int:
    is_one = config.multi_query and not config.new_decoder_architecture
    return 1 if is_one else int(config.num_attention_heads)


def _kv_heads(config: Any) -> int:
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def _always(config: Any) -> bool:
    return True


def _unclipped(config: Any) -> bool:
    return getattr(config, "clip_qkv", None) is None


@dataclass(frozen=True, slots=True)
class Family:
    """How a model family makes K and V of a layer's input.

    Args:
        decoder, layers, rotary: attribute paths in the model, the decoder, the decoder.
        attention: in a layer.
        norms: in a layer, in front of the attention; the first one that there is. With none, Q, K
            and V are made of the layer's input itself.
        query, key, value: projections, in the attention.
        fused: the one projection for all of them; `split` divides what it gives.
        query_norm, key_norm, value_norm: what each goes through between its projection and RoPE;
            left out where an attention has none of this name.
        norm_shape: what these norms take: "tokens" (B, T, G, D), "heads" (B, G, T, D), or "rows"
            (B, T, G * D).
        is_centred: the norm is a LayerNorm, which takes the mean off, and no RMSNorm; so is K's.
        gain_offset: what the norm adds to its weights, and that of K to its own.
        positions: see `Positions`.
        is_interleaved: RoPE turns neighbouring channels, not the two halves.
        cos_sin: the rotary embedding's cosines and sines.
        rope_kind: by what each layer rotates.
        kv_heads: how many heads the cache receives.
        is_latent: the cache receives an MLA's latent as K and its rotated head as V; everywhere
            else it is the other way round.
        mlp_matrices: 3 with a gate, 2 without.
        covers: whether the facts hold for a configuration.
    """

    decoder: str = "model"
    layers: str = "layers"
    rotary: str = "rotary_emb"
    attention: str = "self_attn"
    norms: tuple[str, ...] = ("input_layernorm",)
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    fused: str = ""
    split: Callable[[Tensor, ModelSpec, Any], Parts] = in_a_row
    query_norm: str = ""
    key_norm: str = ""
    value_norm: str = ""
    norm_shape: str = "tokens"
    is_centred: bool = False
    gain_offset: float = 0.0
    positions: Positions = Positions.ROTARY
    is_interleaved: bool = False
    cos_sin: CosSin = of_rotary
    rope_kind: Callable[[Any, int], str | None] = same_for_all
    kv_heads: Callable[[Any], int] = _kv_heads
    is_latent: bool = False
    mlp_matrices: int = 3
    covers: Callable[[Any], bool] = _always

    @property
    def is_movable(self) -> bool:
        """Whether a state can be put anywhere; otherwise it is valid on its exact path only."""
        return self.positions is Positions.ROTARY


LLAMA = Family()
QWEN3 = replace(LLAMA, query_norm="q_norm", key_norm="k_norm")
GEMMA = replace(LLAMA, gain_offset=1.0)
OLMO2 = replace(QWEN3, norms=(), norm_shape="rows")
LAYER_NORM = replace(LLAMA, is_centred=True, mlp_matrices=2)
COHERE = replace(QWEN3, is_centred=True, is_interleaved=True, cos_sin=in_float32(of_rotary))
PAIRS = replace(LLAMA, is_interleaved=True, cos_sin=of_pairs)
GPT_NEOX = replace(
    LAYER_NORM,
    decoder="gpt_neox",
    attention="attention",
    fused="query_key_value",
    split=by_kv_head,
)
LEARNED = replace(LAYER_NORM, positions=Positions.LEARNED)
DEEPSEEK_V3 = replace(
    LLAMA,
    fused="kv_a_proj_with_mqa",
    split=as_latent,
    value_norm="kv_a_layernorm",
    norm_shape="rows",
    kv_heads=_one_head,
    is_latent=True,
)

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "ministral": LLAMA,
    "mixtral": LLAMA,
    "qwen2": LLAMA,
    "qwen2_moe": LLAMA,
    "qwen3": QWEN3,
    "qwen3_moe": QWEN3,
    "smollm3": replace(LLAMA, rope_kind=where_marked),
    "arcee": replace(LLAMA, mlp_matrices=2),
    "seed_oss": LLAMA,
    "glm": PAIRS,
    "glm4": PAIRS,
    "helium": PAIRS,
    "ernie4_5": replace(PAIRS, cos_sin=in_float32(of_pairs)),
    "granite": LLAMA,
    "granitemoe": LLAMA,
    "gpt_oss": replace(LLAMA, cos_sin=of_one_half),
    "phi": replace(
        LAYER_NORM, query_norm="q_layernorm", key_norm="k_layernorm", norm_shape="heads"
    ),
    "phi3": replace(LLAMA, fused="qkv_proj"),
    "gemma": GEMMA,
    "gemma2": GEMMA,
    "gemma3_text": replace(
        GEMMA,
        query_norm="q_norm",
        key_norm="k_norm",
        norm_shape="heads",
        rope_kind=by_layer_type,
    ),
    "olmo": replace(LLAMA, is_centred=True, covers=_unclipped),
    "olmoe": replace(QWEN3, norm_shape="rows", covers=_unclipped),
    "olmo2": OLMO2,
    "olmo3": replace(OLMO2, rope_kind=by_layer_type),
    "stablelm": replace(
        LLAMA,
        is_centred=True,
        query_norm="q_layernorm",
        key_norm="k_layernorm",
        norm_shape="heads",
    ),
    "starcoder2": LAYER_NORM,
    "nemotron": replace(LAYER_NORM, gain_offset=1.0),
    "persimmon": replace(
        LAYER_NORM,
        fused="query_key_value",
        split=by_kv_head,
        query_norm="q_layernorm",
        key_norm="k_layernorm",
    ),
    "cohere": COHERE,
    "cohere2": replace(COHERE, query_norm="", key_norm="", rope_kind=where_sliding),
    "gpt_neox": GPT_NEOX,
    "falcon": replace(
        GPT_NEOX,
        decoder="transformer",
        layers="h",
        attention="self_attention",
        norms=("ln_attn", "input_layernorm"),
        split=as_falcon,
        kv_heads=_falcon_heads,
        covers=lambda config: not config.alibi,
    ),
    "gptj": replace(
        LAYER_NORM,
        decoder="transformer",
        layers="h",
        rotary="h.0.attn",
        attention="attn",
        norms=("ln_1",),
        is_interleaved=True,
        cos_sin=of_table,
    ),
    "gpt2": replace(
        LEARNED,
        decoder="transformer",
        layers="h",
        attention="attn",
        norms=("ln_1",),
        fused="c_attn",
    ),
    "opt": replace(
        LEARNED,
        decoder="model.decoder",
        norms=("self_attn_layer_norm",),
        covers=lambda config: config.do_layer_norm_before,
    ),
    "bloom": replace(
        GPT_NEOX,
        decoder="transformer",
        layers="h",
        attention="self_attention",
        positions=Positions.ALIBI,
    ),
    "deepseek_v2": replace(DEEPSEEK_V3, is_interleaved=True, cos_sin=in_float32(of_complex)),
    "deepseek_v3": DEEPSEEK_V3,
}
"""By transformers' `model_type`."""

UNKNOWN = Family(positions=Positions.UNKNOWN)
"""Of every other model that keeps a KV cache."""


def family_of(config: Any) -> Family:
    """The facts that hold for a configuration; `UNKNOWN` where none do."""
    family = FAMILIES.get(config.model_type)
    return family if family is not None and family.covers(config) else UNKNOWN
