"""A tiny random model of every family in the table, and what transformers itself makes of it.

Nothing here but `engine_of` runs any code of the library. A document is moved by calling
transformers' own rotation a second time, with the cosines and sines of the other place.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from tiny import VOCABULARY
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

WINDOW = 24
"""Of sliding layers: shorter than the documents, and than what stands behind them."""


@dataclass(frozen=True)
class Tiny:
    """A configuration.

    Args:
        label: what tests call it.
        family: transformers' `model_type`.
        options: beside those that all have.
    """

    label: str
    family: str
    options: dict[str, Any] = field(default_factory=dict, hash=False)


Options = dict[str, Any]

LLAMA: Options = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
PLAIN: Options = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
ROPE: Options = {"rope_type": "default", "rope_theta": 10_000.0}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
SLIDING: Options = {"sliding_window": WINDOW, "layer_types": MIXED}
EXPERTS: Options = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
PARTIAL: Options = {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}}
TWO_BASES: Options = {
    "rope_parameters": {
        "sliding_attention": ROPE,
        "full_attention": {**ROPE, "rope_theta": 500.0},
    }
}
YARN: Options = {**ROPE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONG: Options = {
    **ROPE,
    "rope_type": "longrope",
    "short_factor": [1.0 + i / 8 for i in range(8)],
    "long_factor": [4.0] * 8,
    "original_max_position_embeddings": 1024,
}
LLAMA3: Options = {
    **ROPE,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MLA: Options = {
    "head_dim": 8,
    "num_key_value_heads": 4,
    "kv_lora_rank": 24,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}


def _of(family: str, label: str = "", **options: Any) -> Tiny:
    name = family if not label else f"{family}-{label}"
    return Tiny(name, family, {**LLAMA, **options})


def _own(family: str, label: str = "", **options: Any) -> Tiny:
    """Of a family with names of its own."""
    return Tiny(family if not label else f"{family}-{label}", family, options)


TINY: list[Tiny] = [
    _of("llama", "linear", rope_parameters={**ROPE, "rope_type": "linear", "factor": 4.0}),
    _of("llama", "dynamic", rope_parameters={**ROPE, "rope_type": "dynamic", "factor": 4.0}),
    _of("llama", "yarn", rope_parameters=YARN),
    _of("llama", "llama3", rope_parameters=LLAMA3),
    _of("llama", "longrope", rope_parameters=LONG),
    _of("mistral", "sliding", sliding_window=WINDOW),
    _of("ministral", **SLIDING),
    _of("mixtral", sliding_window=None, num_local_experts=4),
    _of("qwen2"),
    _of("qwen2", "sliding", use_sliding_window=True, max_window_layers=1, sliding_window=WINDOW),
    _of("qwen2_moe", shared_expert_intermediate_size=32, **EXPERTS),
    _of("qwen3", head_dim=24),
    _of("qwen3_moe", **EXPERTS),
    _of("smollm3", no_rope_layers=[1, 0, 1]),
    _of("arcee"),
    _of("seed_oss"),
    _of("glm", **PARTIAL),
    _of("glm4", **PARTIAL),
    _of("helium"),
    _of("ernie4_5"),
    _of("granite", attention_multiplier=0.2, embedding_multiplier=3.0, residual_multiplier=0.5),
    _of("granitemoe", num_local_experts=4, attention_multiplier=0.2),
    _of("gpt_oss", num_local_experts=4, **SLIDING),
    _of("phi", **PARTIAL),
    _of("phi", "qk", num_key_value_heads=4, qk_layernorm=True, **PARTIAL),
    _of("phi3", sliding_window=WINDOW, **PARTIAL),
    _of("gemma", head_dim=24),
    _of("gemma2", head_dim=24, attn_logit_softcapping=2.0, query_pre_attn_scalar=8, **SLIDING),
    _of("gemma3_text", head_dim=24, query_pre_attn_scalar=8, **SLIDING, **TWO_BASES),
    _of("olmo"),
    _of("olmoe", num_experts=4, num_experts_per_tok=2),
    _of("olmo2"),
    _of("olmo3", **SLIDING, **TWO_BASES),
    _of("stablelm", use_qkv_bias=True, **PARTIAL),
    _of("stablelm", "qk-parallel", qk_layernorm=True, use_parallel_residual=True, **PARTIAL),
    _of("starcoder2", sliding_window=WINDOW),
    _of("nemotron", **PARTIAL),
    _own("persimmon", intermediate_size=96, qk_layernorm=True, **PLAIN, **PARTIAL),
    _of("cohere"),
    _of("cohere", "qk", use_qk_norm=True),
    _of("cohere2", **SLIDING),
    _own("gpt_neox", intermediate_size=96, **PLAIN, **PARTIAL),
    _own("gpt_neox", "serial", intermediate_size=96, use_parallel_residual=False, **PLAIN),
    _own("falcon", "7b", multi_query=True, bias=True, **PLAIN),
    _own("falcon", "heads", multi_query=False, parallel_attn=False, **PLAIN),
    _own("falcon", "40b", new_decoder_architecture=True, num_kv_heads=2, **PLAIN),
    _own("gptj", n_embd=64, n_layer=3, n_head=4, rotary_dim=8, n_positions=1024),
    _own("gpt2", n_embd=64, n_layer=3, n_head=4, n_positions=1024),
    _own("opt", ffn_dim=96, word_embed_proj_dim=64, **PLAIN),
    _own("bloom", hidden_size=64, n_layer=3, n_head=4),
    _of("deepseek_v2", **MLA),
    _of("deepseek_v3", **MLA),
    _of("deepseek_v3", "halves", rope_interleave=False, **{**MLA, "q_lora_rank": None}),
]
"""Of every family at least one, and of every kind of RoPE."""

UNKNOWN: list[Tiny] = [
    _own("falcon", "alibi", alibi=True, **PLAIN),
    _own("opt", "norm-behind", word_embed_proj_dim=64, do_layer_norm_before=False, **PLAIN),
    _of("olmo", "clipped", clip_qkv=0.5),
    _own("codegen", n_embd=64, n_layer=3, n_head=4, rotary_dim=8, n_positions=1024),
    _own(
        "gpt_neo",
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        intermediate_size=96,
        attention_types=[[["global", "local"], 1]],
        window_size=WINDOW,
    ),
    _own("gpt_bigcode", n_embd=64, n_layer=3, n_head=4, n_positions=1024),
    _of("exaone4", sliding_window=WINDOW, layer_types=MIXED),
]
"""Of families, or with features, that the table says nothing about."""

REFUSED: list[tuple[Tiny, str]] = [
    (_of("mamba", num_hidden_layers=2), "LinearAttention"),
    (_of("jamba"), "LinearAttention"),
    (_of("qwen3_next"), "LinearAttention"),
    (_of("llama4_text"), "chunks"),
    (_own("rwkv", hidden_size=64, num_hidden_layers=2), "no KV cache"),
    (_own("mpt", d_model=64, n_heads=4, n_layers=2, max_seq_len=1024), "does not decode"),
]
"""What cannot be served, and a word of the reason."""


def model_of(
    tiny: Tiny, dtype: torch.dtype = torch.float32, attention: str = "sdpa"
) -> PreTrainedModel:
    """A random model that tests share and leave as it is; no gain is one, no bias zero."""
    return _model(tiny, dtype, attention)


@cache
def _model(tiny: Tiny, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    torch.manual_seed(0)
    common = {
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 257,
    }
    config = AutoConfig.for_model(tiny.family, **{**common, **tiny.options})
    auto: Any = AutoModelForCausalLM
    try:
        model = auto.from_config(config, attn_implementation=attention)
    except ValueError:  # no SDPA for this family
        model = auto.from_config(config, attn_implementation="eager")
    for name, parameter in model.named_parameters():
        if "bias" in name:
            torch.nn.init.normal_(parameter, std=0.2)
        elif "norm" in name or "ln_" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            torch.nn.init.normal_(parameter, std=0.08)
    result: PreTrainedModel = model.to(dtype).eval()
    return result


class _MovedCache(DynamicCache):
    """An ordinary cache that keeps a second K, which the second rotation gave."""

    def __init__(self) -> None:
        super().__init__()
        self.moved: list[tuple[Tensor, Tensor]] = []
        self.rotated: Tensor | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        pair = [key_states.clone(), value_states.clone()]
        if self.rotated is not None:
            widths = [side.shape[-1] for side in pair]
            is_latent = widths[0] != widths[1] == self.rotated.shape[-1]
            side = pair[1] if is_latent else pair[0]
            width = self.rotated.shape[-1]
            side[..., :width] = self.rotated
            self.rotated = None
        self.moved.append((pair[0], pair[1]))
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


@contextmanager
def _rotating_twice(model: PreTrainedModel, shift: int, cache: _MovedCache) -> Iterator[None]:
    """Let every rotation be made a second time, `shift` positions further on."""
    module: Any = importlib.import_module(type(model).__module__)
    rotary = next(m for n, m in model.named_modules() if n.endswith("rotary_emb"))
    names = [n for n in vars(module) if n.startswith("apply_rotary")]
    originals = {name: getattr(module, name) for name in names}
    further: dict[int, Tensor] = {}
    alive: list[Any] = []
    forward = rotary.forward

    def embeddings(x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        here = forward(x, position_ids, *args, **kwargs)
        there = forward(x, position_ids + shift, *args, **kwargs)
        pairs = zip(here, there, strict=True) if isinstance(here, tuple) else [(here, there)]
        for one, other in pairs:
            further[id(one)] = other
            alive.append(one)
        return here

    def twice(name: str) -> Any:
        def rotate(*args: Any, **kwargs: Any) -> Any:
            moved = [further.get(id(a), a) if isinstance(a, Tensor) else a for a in args]
            cache.rotated = originals[name](*moved, **kwargs)[1]
            return originals[name](*args, **kwargs)

        return rotate

    rotary.forward = embeddings
    for name in names:
        setattr(module, name, twice(name))
    try:
        yield
    finally:
        del rotary.forward
        for name, original in originals.items():
            setattr(module, name, original)


@torch.no_grad()
def read(model: PreTrainedModel, *steps: Sequence[int], into: DynamicCache | None = None) -> Tensor:
    """Read steps one after another behind what a cache holds; the last position's logits."""
    cache = into if into is not None else DynamicCache(config=model.config)
    call: Any = model
    logits = torch.empty(0)
    for ids in steps:
        inputs = torch.tensor([list(ids)])
        logits = call(input_ids=inputs, past_key_values=cache, use_cache=True).logits[0, -1]
    return logits


def sides(cache: DynamicCache) -> tuple[Tensor, Tensor]:
    """K and V of all layers of a cache, (L, G, n, D) each."""
    layers: list[Any] = cache.layers
    return torch.cat([x.keys for x in layers]), torch.cat([x.values for x in layers])


@torch.no_grad()
def moved_document(
    model: PreTrainedModel, preamble: Sequence[int], document: Sequence[int], position: int
) -> list[tuple[Tensor, Tensor]]:
    """What the cache gets of a document read after the preamble alone, rotated elsewhere."""
    cache = _MovedCache()
    read(model, preamble, into=cache)
    cache.moved.clear()
    with _rotating_twice(model, position - len(preamble), cache):
        read(model, document, into=cache)
    return cache.moved


def read_apart(
    model: PreTrainedModel, preamble: Sequence[int], parts: Sequence[tuple[Sequence[int], bool]]
) -> tuple[DynamicCache, Tensor]:
    """Read parts behind a preamble, documents (True) as if there was nothing but the preamble."""
    cache, position = DynamicCache(), len(preamble)
    logits = read(model, preamble, into=cache)
    for ids, is_document in parts:
        if is_document:
            for layer, pair in enumerate(moved_document(model, preamble, ids, position)):
                cache.update(*pair, layer)
        else:
            logits = read(model, ids, into=cache)
        position += len(ids)
    return cache, logits
