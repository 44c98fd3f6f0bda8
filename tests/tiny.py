"""Tiny random models and a byte tokenizer, for tests that need no words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

VOCABULARY = 260


@dataclass(frozen=True)
class Shape:
    """One layout of a decoder."""

    label: str
    family: str = "llama"
    hidden_size: int = 64
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 16
    layers: int = 3
    bias: bool = False
    tied: bool = False


SHAPES = [
    Shape("llama-mha"),
    Shape("llama-gqa-tied", heads=4, kv_heads=2, tied=True),
    Shape("llama-mqa-odd", hidden_size=72, heads=3, kv_heads=1, head_dim=20, layers=5),
    Shape("llama-gqa-bias", kv_heads=2, bias=True),
    Shape("mistral-gqa", family="mistral", kv_heads=2),
    Shape("qwen2-gqa-bias", family="qwen2", kv_heads=2),
    Shape("qwen2-mha-odd", family="qwen2", hidden_size=60, heads=5, kv_heads=5, head_dim=12),
]


def tiny_model(
    shape: Shape, *, dtype: torch.dtype = torch.float32, attention: str = "sdpa", seed: int = 0
) -> PreTrainedModel:
    """A random model of a shape, with biases that are not zero and gains that are not one."""
    torch.manual_seed(seed)
    options: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": shape.hidden_size,
        "intermediate_size": 2 * shape.hidden_size,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": shape.tied,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 257,
    }
    if shape.family == "llama":
        options["attention_bias"] = shape.bias
    if shape.family == "mistral":
        options["sliding_window"] = None
    config = AutoConfig.for_model(shape.family, **options)
    auto: Any = AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation=attention)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
        elif "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            torch.nn.init.normal_(parameter, std=0.08)
    result: PreTrainedModel = model.to(dtype).eval()
    return result


def attentive_model(shape: Shape) -> PreTrainedModel:
    """A tiny model with weights so large that its answers depend on all that it reads."""
    model = tiny_model(shape)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(3)
    return model


def byte_tokenizer(*, adds_bos: bool = False) -> PreTrainedTokenizerBase:
    """A byte-level tokenizer: ids 0-255 are bytes, 256-258 are <bos>, <eos> and <|im_end|>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = [AddedToken(t, special=True) for t in ("<bos>", "<eos>", "<|im_end|>")]
    backend.add_special_tokens(special)
    if adds_bos:
        from tokenizers.processors import TemplateProcessing

        backend.post_processor = TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 256)]
        )
    fast: Any = PreTrainedTokenizerFast
    tokenizer: PreTrainedTokenizerBase = fast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>"
    )
    return tokenizer
