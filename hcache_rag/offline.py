"""Indexing offline: many documents into the shards of a store, by any number of workers.

A document's shard follows from its text (`hcache_rag.store.placement`), and a shard's documents, in
the order of the corpus, are cut into units of work. A unit's states depend on its documents alone,
and what is done of a shard is written down unit by unit. So whoever runs a shard, however often it
is killed and run again, ends with the same bytes: how the work is spread is the driver's business.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from hcache_rag.corpus import Document, documents_of
from hcache_rag.engine import HCacheEngine
from hcache_rag.errors import StoreError
from hcache_rag.indexing import Indexer, PrecomputeReport, UnitReport
from hcache_rag.sequences import BATCH_TOKENS
from hcache_rag.store import StateStore
from hcache_rag.store.manifest import Manifest, Shard, Unit
from hcache_rag.store.placement import Placement

TOO_LONG = "longer than the model's window"


@dataclass(frozen=True, slots=True)
class ShardReport:
    """What of some shards is done, and what of it was done now.

    Args:
        documents: that have a state, and `new_documents` of these since the call began.
        tokens, num_bytes: of their states, and `new_tokens` and `new_bytes` computed now.
        units, new_units: of work.
        skipped: documents without a state, counted by reason.
        seconds: of this call.
        work_s: of all calls, those of the units that are done.
    """

    documents: int = 0
    new_documents: int = 0
    tokens: int = 0
    new_tokens: int = 0
    num_bytes: int = 0
    new_bytes: int = 0
    units: int = 0
    new_units: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    work_s: float = 0.0

    def plus(self, other: ShardReport) -> ShardReport:
        """Both, one after another."""
        return ShardReport(
            self.documents + other.documents,
            self.new_documents + other.new_documents,
            self.tokens + other.tokens,
            self.new_tokens + other.new_tokens,
            self.num_bytes + other.num_bytes,
            self.new_bytes + other.new_bytes,
            self.units + other.units,
            self.new_units + other.new_units,
            dict(Counter(self.skipped) + Counter(other.skipped)),
            self.seconds + other.seconds,
            self.work_s + other.work_s,
        )


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a job is.

    Args:
        documents: that are done, of `total` if that is known.
        new_tokens: computed so far.
        seconds: since the job began.
        new_documents: of the done ones, those that were not done before.
    """

    documents: int
    total: int | None
    new_documents: int
    new_tokens: int
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        """How fast documents are read."""
        return self.new_tokens / self.seconds if self.seconds else 0.0

    @property
    def left_s(self) -> float | None:
        """How long the rest will take at this rate; None while that cannot be said."""
        if self.total is None or not self.new_documents:
            return None
        return self.seconds / self.new_documents * max(0, self.total - self.documents)


OnProgress = Callable[[Progress], None]


def index_shard(
    documents: Iterable[str | Document],
    shard: str | int,
    manifest: Manifest,
    engine: HCacheEngine,
    *,
    batch_tokens: int = BATCH_TOKENS,
    on_progress: OnProgress | None = None,
    total: int | None = None,
) -> ShardReport:
    """Read the documents of one shard and keep their states in it, see `index_shards`."""
    return index_shards(
        documents,
        [shard],
        manifest,
        engine,
        batch_tokens=batch_tokens,
        on_progress=on_progress,
        total=total,
    )


def index_shards(
    documents: Iterable[str | Document],
    shards: Collection[str | int],
    manifest: Manifest,
    engine: HCacheEngine,
    *,
    batch_tokens: int = BATCH_TOKENS,
    on_progress: OnProgress | None = None,
    total: int | None = None,
) -> ShardReport:
    """Read the documents of some shards and keep their states, in one pass over a corpus.

    What is done already is passed over; what a killed run has left half done is done again. Only
    one worker may index a shard at a time.

    Args:
        documents: of the corpus; those of other shards are passed over.
        shards: names or numbers of the shards that are this worker's.
        engine: the model, and how documents are read; its own store is left alone.
        batch_tokens: that are read at once, padding included; part of what a unit is.
        on_progress: told after each unit.
        total: documents of these shards, or about so many, if that is known.

    Raises:
        StoreError: a shard is published, but the corpus has documents that are not in it.
        StoreFullError: no room; what was stored before stays.
    """
    started = time.perf_counter()
    mine = [manifest.shard(each) for each in shards]
    with ExitStack() as stack:
        workers = {shard.name: _Worker(stack, shard, engine, batch_tokens) for shard in mine}
        for name, unit in _units(documents, manifest, set(workers)):
            workers[name].do(unit)
            if on_progress is not None:
                on_progress(_progress(workers.values(), total, time.perf_counter() - started))
    report = ShardReport(seconds=time.perf_counter() - started)
    for worker in workers.values():
        report = report.plus(worker.report)
    return report


def _units(
    documents: Iterable[str | Document], manifest: Manifest, names: Collection[str]
) -> Iterator[tuple[str, list[str]]]:
    """Shard and texts of each unit, as soon as it is full; at the end what is left of each."""
    placement = Placement([shard.name for shard in manifest.shards])
    filling: dict[str, list[str]] = {name: [] for name in sorted(names)}
    for document in documents_of(documents):
        name = placement.place(document.text)
        if name not in filling:
            continue
        filling[name].append(document.text)
        if len(filling[name]) == manifest.unit_documents:
            yield name, filling[name]
            filling[name] = []
    yield from ((name, texts) for name, texts in filling.items() if texts)


class _Worker:
    """Does the units of one shard, whose store it opens when there is something to do."""

    def __init__(
        self, stack: ExitStack, shard: Shard, engine: HCacheEngine, batch_tokens: int
    ) -> None:
        self._stack = stack
        self._shard = shard
        self._engine = engine
        self._batch_tokens = batch_tokens
        self._done = {} if shard.is_remote else shard.units()
        self._indexer: Indexer | None = None
        self._name_unit = engine.indexer(engine.store, batch_tokens=batch_tokens).unit_id
        self.report = ShardReport()

    def do(self, texts: Sequence[str]) -> None:
        unit_id = self._name_unit(texts)
        done = self._done.get(unit_id)
        is_new, new = done is None, PrecomputeReport()
        if done is None:
            its = self._opened().precompute_unit(texts)
            done, new = _unit_of(unit_id, its), its.done
            self._shard.commit(done)
            self._done[unit_id] = done
        self.report = self.report.plus(
            ShardReport(
                documents=done.documents,
                new_documents=new.stored,
                tokens=done.tokens,
                new_tokens=new.stored_tokens,
                num_bytes=done.num_bytes,
                new_bytes=new.stored_bytes,
                units=1,
                new_units=int(is_new),
                skipped=done.skipped,
                work_s=done.seconds,
            )
        )

    def _opened(self) -> Indexer:
        if self._indexer is None:
            if self._shard.is_published:
                raise StoreError(
                    f"shard {self._shard.name} is published, but the corpus has documents that "
                    "are not in it: add a shard for them, or reopen it"
                )
            store = self._stack.enter_context(StateStore.open(self._shard.folder))
            self._indexer = self._engine.indexer(store, batch_tokens=self._batch_tokens)
        return self._indexer


def _unit_of(unit_id: str, its: UnitReport) -> Unit:
    skipped = Counter(r if r == "empty" else TOO_LONG for _, r in its.done.skipped)
    documents = its.done.stored + its.done.reused
    return Unit(unit_id, documents, its.tokens, its.num_bytes, its.done.seconds, dict(skipped))


def _progress(workers: Iterable[_Worker], total: int | None, seconds: float) -> Progress:
    reports = [worker.report for worker in workers]
    return Progress(
        sum(r.documents + sum(r.skipped.values()) for r in reports),
        total,
        sum(r.new_documents for r in reports),
        sum(r.new_tokens for r in reports),
        seconds,
    )
