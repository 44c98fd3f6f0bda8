"""What several stores say, as one would say it: readers, walks, sums and reports."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import TypeVar

from hcache_rag.errors import MissingStateError
from hcache_rag.state import StateKey, StateRecord
from hcache_rag.store.states import StoreReader
from hcache_rag.store.tables import Counters, Totals
from hcache_rag.store.verify import Damage, VerifyReport

T = TypeVar("T")


class JoinedReader(StoreReader):
    """Reads from the first reader that has a state."""

    def __init__(self, readers: Sequence[StoreReader]) -> None:
        self._readers = readers
        self._known: dict[StateKey, StoreReader] = {}

    def record(self, key: StateKey) -> StateRecord | None:
        found = (reader.record(key) for reader in self._readers)
        return next((record for record in found if record is not None), None)

    def expect(self, first: Mapping[StateKey, tuple[int, int]]) -> None:
        """See `StoreReader.expect`."""
        by_reader: dict[StoreReader, dict[StateKey, tuple[int, int]]] = {}
        for key, place in first.items():
            reader = self._reader(key)
            if reader is not None:
                by_reader.setdefault(reader, {})[key] = place
        for reader, its in by_reader.items():
            reader.expect(its)

    def value(self, key: StateKey, layer: int, chunk: int) -> memoryview:
        reader = self._reader(key)
        if reader is None:
            raise MissingStateError(key, f"layer {layer}, chunk {chunk} is in no shard")
        return reader.value(key, layer, chunk)

    def load(self, key: StateKey, layer: int, chunk: int) -> int:
        """See `StoreReader.load`."""
        reader = self._reader(key)
        return reader.load(key, layer, chunk) if reader is not None else 0

    def _reader(self, key: StateKey) -> StoreReader | None:
        if key not in self._known:
            found = next((r for r in self._readers if r.record(key) is not None), None)
            if found is None:
                return None
            self._known[key] = found
        return self._known[key]


def each_once(walk: Iterable[T], key: Callable[[T], StateKey]) -> Iterator[T]:
    """What a sorted walk gives, the first of each key."""
    last = None
    for each in walk:
        if key(each) != last:
            last = key(each)
            yield each


def counters(every: Iterable[Counters]) -> Counters:
    """The sum of all; the clock is the latest."""
    total = Counters()
    for its in every:
        more = {f.name: getattr(its, f.name) for f in fields(its) if f.name != "clock"}
        total = total.plus(**more).with_clock(its.clock)
    return total


def totals(every: Iterable[Mapping[StateKey, Totals]]) -> dict[StateKey, Totals]:
    """The sums by root key."""
    found: dict[StateKey, Totals] = {}
    for its in every:
        for root, more in its.items():
            sums = found.get(root, Totals())
            found[root] = Totals(
                *(getattr(sums, f.name) + getattr(more, f.name) for f in fields(Totals))
            )
    return found


def report(every: Sequence[VerifyReport], down: Mapping[str, str]) -> VerifyReport:
    """One report; a shard that is down, by name and why, is a damage without a key."""
    missing = [
        Damage(b"", "", False, f"shard {name} cannot be used: {why}") for name, why in down.items()
    ]
    return VerifyReport(
        sum(each.states for each in every),
        sum(each.values for each in every),
        sum(each.num_bytes for each in every),
        (*(damage for each in every for damage in each.damaged), *missing),
        sum(each.strays for each in every),
        all(each.is_sum_right for each in every),
    )
