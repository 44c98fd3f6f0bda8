"""Prometheus metrics of an engine and its store: `pip install 'hcache-rag[metrics]'`.

Everything is read when it is scraped, from what is counted anyway; answering pays nothing for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from hcache_rag.errors import StoreError
from hcache_rag.store import StateStore

if TYPE_CHECKING:
    from hcache_rag.engine import HCacheEngine

_TOKENS = ("exact", "relocated", "repaired", "fresh", "missed")
_DOCUMENTS = ("restored", "missed", "queued")
_STAGES = ("match", "compose", "first_token", "reading", "waiting", "recomputing", "restoring")


def register(
    source: HCacheEngine | StateStore, registry: CollectorRegistry = REGISTRY
) -> StatesCollector:
    """Let a registry show an engine and its store, or a store alone.

    Args:
        source: an `HCacheEngine` (`HCacheLLM.engine`) or a `StateStore`; it may be closed later.

    Returns:
        What was registered, for `registry.unregister`.
    """
    collector = StatesCollector(source)
    registry.register(collector)
    return collector


class StatesCollector(Collector):
    """Shows an engine and its store, see `register`. All names begin with `hcache_`."""

    def __init__(self, source: HCacheEngine | StateStore) -> None:
        self._store = source if isinstance(source, StateStore) else source.store
        self._engine = None if isinstance(source, StateStore) else source

    def describe(self) -> Iterator[Any]:
        """Nothing: that would read the store when it is registered."""
        yield from ()

    def collect(self) -> Iterator[Any]:
        """What is true now; of a store that cannot be read, nothing."""
        with suppress(StoreError):
            yield from self._of_store()
        if self._engine is not None:
            yield from self._of_engine(self._engine)

    def _of_store(self) -> Iterator[Any]:
        store = self._store
        with suppress(StoreError):  # somebody writes: what is not written down yet comes later
            store.flush_uses(wait_s=0.0)
        counters, totals = store.counters(), list(store.totals().values())
        yield _gauge("store_documents", "Documents with a state.", sum(t.documents for t in totals))
        yield _gauge("store_tokens", "Tokens of all states.", sum(t.num_tokens for t in totals))
        yield _gauge("store_states_bytes", "Of all states.", sum(t.num_bytes for t in totals))
        yield _gauge("store_file_bytes", "Of the store's file on disk.", store.file_bytes())
        if store.max_bytes is not None:
            yield _gauge("store_max_bytes", "The most that the file may take.", store.max_bytes)
        yield _labelled(
            "store_asked_documents",
            "Documents in prompts.",
            "outcome",
            {"hit": counters.hits, "miss": counters.misses},
        )
        yield _labelled(
            "store_asked_tokens",
            "Their tokens.",
            "outcome",
            {"hit": counters.hit_tokens, "miss": counters.missed_tokens},
        )
        yield _counter("store_evicted_documents", "States that had to go.", counters.evictions)
        yield _counter("store_evicted_bytes", "That these took.", counters.evicted_bytes)
        yield _counter("store_damaged_documents", "States found damaged.", counters.damaged)

    def _of_engine(self, engine: HCacheEngine) -> Iterator[Any]:
        served = engine.served
        yield _counter("prompts", "Prompts that were answered.", served.prompts)
        yield _labelled(
            "prompt_tokens",
            "Tokens of prompts by where they came from; missed ones are fresh ones too.",
            "source",
            {name: getattr(served, f"{name}_tokens") for name in _TOKENS},
        )
        yield _labelled(
            "documents",
            "Known documents in prompts; queued are those of the missed that are read afterwards.",
            "outcome",
            {name: getattr(served, f"documents_{name}") for name in _DOCUMENTS},
        )
        yield _counter("read_bytes", "Read from the store.", served.bytes_read)
        yield _labelled(
            "stage_seconds",
            "Seconds by stage, see Provenance; reading runs beside the others.",
            "stage",
            {stage: served.seconds.get(stage, 0.0) for stage in _STAGES},
        )


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"hcache_{name}", text, value=value)


def _counter(name: str, text: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(f"hcache_{name}", text, value=value)


def _labelled(name: str, text: str, label: str, values: dict[str, float]) -> CounterMetricFamily:
    family = CounterMetricFamily(f"hcache_{name}", text, labels=[label])
    for value, number in values.items():
        family.add_metric([value], number)
    return family
