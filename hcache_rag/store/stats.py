"""What a store holds, in numbers."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hcache_rag.state import StateKey
from hcache_rag.store.description import PATHS, legible
from hcache_rag.store.tables import Totals

if TYPE_CHECKING:
    from hcache_rag.store.states import StateStore


@dataclass(frozen=True, slots=True)
class StoreStats:
    """What the states of one namespace are, and what the store takes.

    Args:
        documents, preambles, tokens: states by kind, and tokens of both.
        state_bytes: of the states, with all that belongs to them.
        used_bytes, file_bytes: of the whole store, inside its file and of the file.
        max_bytes: the store's limit.
        models: documents by model.
        layouts: what the states of each model keep, and why.
        fidelities: what was measured to be enough for each model, see `StateStore.set_fidelity`.
        bytes_per_token: of the states of each model.
        hits, misses: documents of prompts that had a usable state, and that had none.
        evictions, evicted_bytes: states that had to go.
        damaged: states that were found damaged when they were to be restored.
        oldest_s: age of the oldest state in seconds; 0 where there is none.
        idle_s: seconds since any state was restored; None where none ever was.
        namespaces: all of the store.
        paths, path_bytes: states of exact paths that belong to this namespace, see
            `hcache_rag.paths`.
    """

    documents: int
    preambles: int
    tokens: int
    state_bytes: int
    used_bytes: int
    file_bytes: int
    max_bytes: int | None
    models: dict[str, int]
    layouts: dict[str, str]
    fidelities: dict[str, str | float]
    bytes_per_token: dict[str, float]
    hits: int
    misses: int
    evictions: int
    evicted_bytes: int
    damaged: int
    oldest_s: float
    idle_s: float | None
    namespaces: list[str] = field(default_factory=list)
    paths: int = 0
    path_bytes: int = 0

    @property
    def free_bytes(self) -> int:
        """Room inside the file that later states take first."""
        return max(0, self.file_bytes - self.used_bytes)


def stats_of(store: StateStore) -> StoreStats:
    """Add up what is known of all states."""
    totals, counters, known = store.totals(), store.counters(), store.models()
    names = {root: known[root].name if root in known else root.hex()[:8] for root in totals}
    documents: dict[str, int] = {}
    num_bytes: dict[str, int] = {}
    tokens: dict[str, int] = {}
    for root, sums in totals.items():
        name = names[root]
        documents[name] = documents.get(name, 0) + sums.documents
        num_bytes[name] = num_bytes.get(name, 0) + sums.num_bytes
        tokens[name] = tokens.get(name, 0) + sums.num_tokens
    paths: dict[StateKey, Totals] = {}
    if store.has_beside(PATHS):
        with store.beside(PATHS) as conversations:
            paths = conversations.totals()
    now = time.time()
    created, used = now, 0.0
    for _, entry in store.entries():
        created, used = min(created, entry.created_s), max(used, entry.used_s)
    return StoreStats(
        documents=sum(sums.documents for sums in totals.values()),
        preambles=sum(sums.preambles for sums in totals.values()),
        tokens=sum(tokens.values()),
        state_bytes=sum(num_bytes.values()),
        used_bytes=store.used_bytes(),
        file_bytes=store.file_bytes(),
        max_bytes=store.max_bytes,
        models={name: count for name, count in documents.items() if count},
        layouts={m.name: f"{m.layout}; {m.reason}" for m in known.values() if m.layout},
        fidelities={m.name: m.fidelity for m in known.values() if m.fidelity is not None},
        bytes_per_token={n: num_bytes[n] / count for n, count in tokens.items() if count},
        hits=counters.hits,
        misses=counters.misses,
        evictions=counters.evictions,
        evicted_bytes=counters.evicted_bytes,
        damaged=counters.damaged,
        oldest_s=now - created,
        idle_s=now - used if used else None,
        namespaces=[legible(name) for name in store.all_namespaces()],
        paths=sum(sums.documents for sums in paths.values()),
        path_bytes=sum(sums.num_bytes for sums in paths.values()),
    )
