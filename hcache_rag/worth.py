"""Whether indexing pays: what it costs, and after how many uses of a document it is earned."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from hcache_rag.engine import HCacheEngine
from hcache_rag.generation import GenerationOptions
from hcache_rag.store import StateStore

QUESTION = "\n\nWhat is this about?"
REPEATS = 2


@dataclass(frozen=True, slots=True)
class Worth:
    """What a document's state costs once and saves each time, in seconds of this machine.

    Args:
        index_s: of reading a document and keeping its state.
        fresh_s, restored_s: to the first token of a prompt with the document, read or restored.
        price_per_hour: of the machine, in any currency.
    """

    index_s: float
    fresh_s: float
    restored_s: float
    price_per_hour: float | None = None

    @property
    def saved_s(self) -> float:
        """Each time that the document is asked for."""
        return self.fresh_s - self.restored_s

    @property
    def break_even_uses(self) -> float | None:
        """So often a document must be asked for until it has paid; None if it never does."""
        return self.index_s / self.saved_s if self.saved_s > 0 else None

    def cost(self, seconds: float) -> float | None:
        """What the machine costs for so long."""
        return None if self.price_per_hour is None else seconds / 3600 * self.price_per_hour


def measure_worth(
    engine: HCacheEngine,
    store: StateStore,
    texts: Sequence[str],
    index_s: float,
    price_per_hour: float | None = None,
) -> Worth:
    """Ask for some documents whose states are in a store, and for the same without any states.

    Nothing is written to the store. Each document's best time of `REPEATS` counts; of the
    documents, the median.

    Args:
        index_s: what indexing took for each document.
    """
    fresh, restored = [], []
    with HCacheEngine(
        engine.adapter.model,
        engine.tokenizer,
        store,
        preamble=engine.preamble,
        add_bos=engine.add_bos,
        profile=None,
        fidelity=engine.fidelity,  # type: ignore[arg-type]
        paths_max_bytes=0,
        name=engine.adapter.spec.name,
    ) as restoring:
        for text in texts:
            prompt = engine.preamble + text.strip() + QUESTION
            times = [
                (_first_token_s(engine, prompt), _first_token_s(restoring, prompt))
                for _ in range(REPEATS)
            ]
            fresh.append(min(each for each, _ in times))
            restored.append(min(each for _, each in times))
    return Worth(index_s, statistics.median(fresh), statistics.median(restored), price_per_hour)


def _first_token_s(engine: HCacheEngine, prompt: str) -> float:
    done = engine.generate(prompt, options=GenerationOptions(max_new_tokens=1))
    return done.provenance.seconds["first_token"]
