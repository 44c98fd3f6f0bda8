"""What documents are read behind when they are indexed, besides the preamble.

  alone      nothing
  stand-in   a passage that is the same for all, and in the prompt or not
  title      the document's own title
  sentence   the document's own first sentence
  given      each other, in the order of the prompts, which no index knows
  shuffled   each other, in an order that says nothing
  alike      each other, each behind the most similar one

Each has a store of its own.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from bench_rag_qa import PREAMBLE

from hcache_rag import HCacheEngine
from hcache_rag.indexing import SEPARATOR, store_batch
from hcache_rag.sequences import PendingState, TokenRow, alone, batches
from hcache_rag.state import child_key, token_array

STAND_IN = (
    "The old lighthouse stands on a low cliff above the harbour. It was built of grey stone by "
    "masons from the village, and its lamp was first lit with oil. A keeper lived in it with his "
    "family; he climbed the stairs each evening and wrote down the weather in a book. Ships that "
    "came from the north saw its light before they saw the land. Today the lamp turns by itself, "
    "and visitors may climb to the gallery in summer.\n\n"
)
CHAINED = ("given", "shuffled", "alike")


@contextmanager
def indexed(
    model: Any, tokenizer: Any, passages: Sequence[str], alike: Sequence[str]
) -> Iterator[dict[str, HCacheEngine]]:
    """An engine for each of the contexts, with its states of all passages.

    Args:
        passages: in the prompts' order.
        alike: the same ones, each behind the most similar one.
    """
    shuffled = random.Random(0).sample(passages, len(passages))
    orders = dict(zip(CHAINED, (passages, shuffled, alike), strict=True))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="bench-tries-")))

        def engine(name: str, **options: Any) -> HCacheEngine:
            its: dict[str, Any] = {"preamble": PREAMBLE, "storage_dtype": "float32"}
            its |= {"fidelity": "none", **options}
            return stack.enter_context(HCacheEngine(model, tokenizer, folder / name, **its))

        engines = {"alone": engine("alone")}
        engines["stand-in"] = engine("stand-in", preamble=PREAMBLE + STAND_IN)
        for name in ("alone", "stand-in"):
            engines[name].precompute(passages)
        for name, front_of in (("title", title_of), ("sentence", first_sentence_of)):
            engines[name] = engine(name)
            store_behind(engines[name], {text: front_of(text) for text in passages})
        for name, order in orders.items():
            engines[name] = engine(name, context_at_index="documents")
            engines[name].precompute(order)
        yield engines


def title_of(passage: str) -> str:
    """As `hcache_rag.questions` puts it in front of a passage's text."""
    return passage.partition(": ")[0]


def first_sentence_of(passage: str) -> str:
    first, end, _ = passage.partition(". ")
    return (first + end).strip()


def store_behind(engine: HCacheEngine, fronts: dict[str, str]) -> None:
    """Store texts, each read behind the preamble and a text of its own."""
    preamble_ids = engine.prompt_tokens(engine.preamble)
    preamble = PendingState(engine.root, preamble_ids, engine.preamble)
    separator = engine.tokenizer(SEPARATOR, add_special_tokens=False)["input_ids"]
    rows = []
    for text, front in fronts.items():
        lead = token_array([*engine.document_tokens(front), *separator])
        ids = engine.document_tokens(text)
        state = PendingState(child_key(preamble.key, lead), ids, text)
        rows.append(TokenRow(np.concatenate((lead, ids)), ((len(lead), state),)))
    adapter, layout = engine.adapter, engine.choice.layout
    for batch, before, is_preamble in [
        ([alone(preamble)], token_array([]), True),
        *((batch, preamble_ids, False) for batch in batches(rows)),
    ]:
        after = adapter.prefill(before.tolist())
        store_batch(
            adapter, engine.store, batch, layout, engine.root, after, is_preamble=is_preamble
        )
