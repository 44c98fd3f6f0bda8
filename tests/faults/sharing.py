"""Readers and a writer."""

from __future__ import annotations

import mmap
import random
import signal
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TypeAlias

from faults.documents import ROOT, a_record, a_state, is_content, is_whole, places, text_of
from faults.looking import complaints, opened
from faults.outcomes import Outcome, Sight
from faults.processes import HANG_S, Child, Report
from hcache_rag import codec
from hcache_rag.errors import StateError
from hcache_rag.state import StateRecord
from hcache_rag.store import StateStore
from hcache_rag.texts import find_texts

NUMBERS, LENGTHS, MAX_BYTES = range(60), (400, 700), 16 << 20
"""The documents that readers and the writer know, and room for half of them."""

Act: TypeAlias = Callable[[], object]


def readers_and_a_writer(
    seed: int, readers: int, *, operations: int = 0, seconds: float = 0.0
) -> Outcome:
    """Some processes verify what they read while another one puts, replaces, deletes and evicts.

    Args:
        operations: of the writer; or
        seconds: that it writes for.

    Returns:
        `count` are operations of all; `right` documents that were read whole; `missed` those that
        were not there; `refused` writes for which there was no room, since readers still read what
        had to go; `lost` what the writer had written and did not find. Readers meet no errors.
    """
    outcome = Outcome("readers and a writer")
    with tempfile.TemporaryDirectory(prefix="faults-") as name, mmap.mmap(-1, 1) as over:
        folder = Path(name)
        StateStore.open(folder / "store", max_bytes=MAX_BYTES).close()

        def write(report: Report) -> None:
            report(asdict(_Writer(folder / "store", seed).write(operations, seconds)))

        def read(report: Report, number: int) -> None:
            report(asdict(_Reader(folder / "store", f"{seed}/{number}").read(over)))

        processes = [
            Child.start(partial(read, number=number), folder / f"reader-{number}")
            for number in range(readers)
        ]
        processes.insert(0, Child.start(write, folder / "writer"))
        for number, process in enumerate(processes):
            try:
                for report in process.reports(seconds + 3 * HANG_S):
                    outcome.add(Outcome(**report))
                end = process.end()
            except TimeoutError:
                end = "hang: " + process.end(signal.SIGABRT)
            over[0] = 1
            if end:
                outcome.count_end(end, f"reader {number - 1}" if number else "the writer")
    return outcome


class _User:
    """A process that does random things and counts what comes of it."""

    def __init__(self, path: Path, seed: object) -> None:
        self.path = path
        self.source = random.Random(str(seed))
        self.outcome, self.sight = Outcome(""), Sight()

    def act(self, acts: Mapping[Act, int]) -> None:
        """Do one of some things, the heavier ones more often."""
        [act] = self.source.choices(list(acts), list(acts.values()))
        self.outcome.count += 1
        with self.sight.step(f"{act.__name__}, operation {self.outcome.count}"):
            act()

    def counted(self) -> Outcome:
        """What came of all."""
        for kind, what, detail in self.sight.found:
            if kind == "refused" and what != "StoreFullError":
                kind = "wrong"
            setattr(self.outcome, kind, getattr(self.outcome, kind) + 1)
            self.outcome.note(f"{kind}: {what}", f"[{type(self).__name__} {detail}]")
        return self.outcome


class _Writer(_User):
    """Versions of documents differ in their time, and so in their values."""

    def write(self, operations: int, seconds: float) -> Outcome:
        """Do so many things, or for so long."""
        until = time.perf_counter() + seconds
        with opened(self.sight, self.path, durability="fast") as store:
            if store is not None:
                self.store = store
                acts: dict[Act, int] = {
                    self.put: 50,
                    self.delete: 10,
                    self.use: 10,
                    self.delete_owner: 3,
                    self.gc: 1,
                }
                while self.outcome.count < operations or time.perf_counter() < until:
                    self.act(acts)
                for what in complaints(store):
                    self.sight.add("wrong", what)
                self.outcome.note("evicted", str(store.counters().evictions))
        return self.counted()

    def some(self, most: int) -> list[StateRecord]:
        """Some documents, in a new version."""
        numbers = self.source.sample(NUMBERS, self.source.randint(1, most))
        options: dict[str, int] = {
            "tokens": self.source.choice(LENGTHS),
            "layout": self.source.randrange(3),
            "version": self.outcome.count,
            "chunk_tokens": 64,
        }
        return [a_record(number, **options) for number in numbers]

    def put(self) -> None:
        """Some are there when it returns."""
        records, owner = self.some(3), f"owner {self.source.randrange(40)}"
        self.store.put_all([a_state(record, [owner]) for record in records])
        self.outcome.acknowledged += len(records)
        for record in records:
            if not is_whole(self.store, record):
                self.sight.add("lost", "a document is not there after its write")

    def delete(self) -> None:
        """Some are gone when it returns."""
        for record in self.some(4):
            self.store.delete(record.key)
            if record.key in self.store:
                self.sight.add("wrong", "a deleted record")

    def use(self) -> None:
        """Uses decide who has to go."""
        self.store.count_use([record.key for record in self.some(4)], misses=1)
        self.store.flush_uses()
        self.store.name_model(ROOT, f"model {self.outcome.count}")

    def delete_owner(self) -> None:
        """And all that nobody else owns."""
        self.store.delete_owner(f"owner {self.source.randrange(40)}")

    def gc(self) -> None:
        """All that nobody owns."""
        self.store.gc()


class _Reader(_User):
    """Takes nothing for granted."""

    def read(self, over: mmap.mmap) -> Outcome:
        """Read until it is over."""
        self.records = {n: [a_record(n, tokens=tokens) for tokens in LENGTHS] for n in NUMBERS}
        self.prompt = "\n".join(text_of(number) for number in NUMBERS)
        is_read_only = self.source.random() < 0.5
        with opened(self.sight, self.path, read_only=is_read_only, durability="fast") as store:
            if store is not None:
                self.store = store
                acts: dict[Act, int] = {
                    self.at_one_moment: 80,
                    self.as_an_engine_does: 10,
                    self.in_a_prompt: 5,
                    self.everything: 5,
                }
                while not over[0] or self.outcome.count < 100:
                    self.act(acts)
        return self.counted()

    def check(self, record: StateRecord, number: int) -> None:
        """A record is one of a document's, in some version."""
        mine = {mine.key: mine for mine in self.records[number]}.get(record.key)
        if mine is None or (record.text, record.root) != (mine.text, mine.root):
            self.sight.add("wrong", "a record", record.text[-20:])

    def at_one_moment(self) -> None:
        """Record and values of one transaction are of one version, or there is nothing."""
        number = self.source.choice(NUMBERS)
        key = self.source.choice(self.records[number]).key
        with self.store.reading() as reader:
            record = self.store._rows.record(reader._txn, key)
            place = self.store._rows.prefix + key
            if record is None:
                self.outcome.missed += 1
                there = [reader._txn.key_at_or_after(t, place) for t in ("records", "chunks")]
                if any(row is not None and row.startswith(place) for row in there):
                    self.sight.add("wrong", "values without a record")
                return
            self.check(record, number)
            for layer, chunk, shape in places(record):
                value = reader.value(key, layer, chunk)
                if not is_content(record, layer, chunk, shape, value):
                    self.sight.add("wrong", "a value of another version")
            self.outcome.right += 1

    def as_an_engine_does(self) -> None:
        """Find a text, then read: it may have been replaced or deleted meanwhile."""
        number = self.source.choice(NUMBERS)
        for record in self.store.find(text_of(number)):
            self.check(record, number)
            with self.store.reading([record.key]) as reader:
                try:
                    for layer, chunk, shape in places(record):
                        value = reader.value(record.key, layer, chunk)
                        codec.decode(shape, record.key, layer, chunk, value)
                    self.outcome.right += 1
                except StateError:
                    self.outcome.missed += 1

    def in_a_prompt(self) -> None:
        """Matches are matches."""
        for match in find_texts(self.prompt, [self.store]):
            if not match.text.startswith(self.prompt[match.start : match.end]):
                self.sight.add("wrong", "a match", match.text[-20:])

    def everything(self) -> None:
        """All records, and the sums."""
        for record in self.store.records():
            self.check(record, int(record.token_ids[0]))
        self.store.stats()
        with self.store.reading() as reader:
            totals = self.store._rows.totals(reader._txn).values()
            if sum(sums.documents for sums in totals) != reader._txn.count("records"):
                self.sight.add("wrong", "totals")
