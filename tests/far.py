"""An engine over shards that are far, and the prompt that it is asked."""

from __future__ import annotations

from tiny import SHAPES, byte_tokenizer, tiny_model

from hcache_rag import HCacheEngine, StateStore
from hcache_rag.profile import HardwareProfile

PASSAGES = [
    f"Passage {n} tells of the number {n}. " + "It goes on a while. " * 20 for n in range(6)
]
PROMPT = "Read: " + "\n\n".join(text.strip() for text in PASSAGES) + "\n\nWhich?"


def engine_on(store: StateStore, profile: HardwareProfile | None = None) -> HCacheEngine:
    """A tiny random model, always the same, that keeps K and V in float32."""
    return HCacheEngine(
        tiny_model(SHAPES[1]),
        byte_tokenizer(),
        store,
        preamble="Read: ",
        fidelity="none",
        profile=profile,
        representation="kv",
        storage_dtype="float32",
    )
