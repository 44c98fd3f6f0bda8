"""Stand-ins for what a program brings along: an embedding, a chat template, a saved model."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from llama_index_instrumentation.base import BaseEvent
from llama_index_instrumentation.event_handlers import BaseEventHandler
from tiny import SHAPES, VOCABULARY, byte_tokenizer, tiny_model
from transformers import PreTrainedTokenizerBase

PRINTABLE = {"suppress_tokens": list(range(94, VOCABULARY))}
"""Keeps a tiny model's answers to the bytes `!` to `~`, so that their texts can be compared."""

CHAT_TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)


def chat_tokenizer() -> PreTrainedTokenizerBase:
    """A byte tokenizer with a chat template."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save_tiny_model(folder: Path, *, chat: bool = False) -> Path:
    """A tiny model with its tokenizer, as transformers saves them."""
    tiny_model(SHAPES[1]).save_pretrained(folder)
    (chat_tokenizer() if chat else byte_tokenizer()).save_pretrained(folder)
    return folder


def mamba() -> Any:
    """A model of a family that keeps no K and V, and so cannot be served."""
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, state_size=4)
    return MambaForCausalLM(config)


def save_mamba(folder: Path) -> Path:
    """The same in a folder."""
    mamba().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


class WordEmbedding(BaseEmbedding):
    """Every word has a random direction; a text is the sum of its words. Counts its texts."""

    _embedded: list[str] = PrivateAttr(default_factory=list)

    def __init__(self, model_name: str = "words", **kwargs: Any) -> None:
        super().__init__(model_name=model_name, **kwargs)

    @property
    def embedded(self) -> list[str]:
        """Every text, not query, that was embedded so far."""
        return self._embedded

    def _get_text_embedding(self, text: str) -> list[float]:
        self._embedded.append(text)
        return word_vector(text)

    def _get_query_embedding(self, query: str) -> list[float]:
        return word_vector(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return word_vector(query)


def word_vector(text: str) -> list[float]:
    """The sum of the directions of a text's words, of no particular length."""
    total = np.zeros(32)
    for word in text.lower().split():
        seed = int.from_bytes(hashlib.sha256(word.strip("?.,").encode()).digest()[:4], "big")
        total += np.random.default_rng(seed).normal(size=32)
    return [float(x) for x in total]


class FixedRetriever(BaseRetriever):
    """Gives the same nodes to every question."""

    def __init__(self, texts: Sequence[str]) -> None:
        super().__init__()
        self.nodes = [TextNode(text=text, id_=f"node-{i}") for i, text in enumerate(texts)]

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return [NodeWithScore(node=node, score=1.0) for node in self.nodes]


class Recorder(BaseEventHandler):
    """Keeps every event of LlamaIndex's instrumentation."""

    events: list[BaseEvent] = []  # noqa: RUF012 - pydantic copies it for every instance

    @classmethod
    def class_name(cls) -> str:
        """The stable name in serialised forms."""
        return "Recorder"

    def handle(self, event: BaseEvent, **_: Any) -> None:
        """Keep it."""
        self.events.append(event)

    def count(self, kind: type[BaseEvent]) -> int:
        """How many events of exactly this kind there were."""
        return sum(type(event) is kind for event in self.events)
