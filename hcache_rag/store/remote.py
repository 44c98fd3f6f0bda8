"""Shards behind a network: what is asked for is fetched through fsspec, and kept near for a while.

The index of an exported shard is copied to this machine when it is opened; values stay where they
are. The first value of a state that is asked for begins to fetch the state, and who asks waits only
until his value has come. A state that came whole is kept near. Whatever comes, from afar or from
near, must have the checksum that the index says.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress

from hcache_rag.errors import (
    DamagedStateError,
    MissingStateError,
    StoreError,
    StoreOpenError,
    UnreachableStateError,
)
from hcache_rag.profile import ReadRate
from hcache_rag.state import StateKey, StateRecord
from hcache_rag.store.export import VALUES, export_shard, places_of
from hcache_rag.store.flight import Flight, Place, Source, checksum
from hcache_rag.store.near import Near
from hcache_rag.store.rows import NewState
from hcache_rag.store.states import StateStore, StoreReader
from hcache_rag.store.urls import file_system, told, without_secrets
from hcache_rag.store.verify import Damage, VerifyReport

__all__ = ["VALUES", "RemoteStore", "export_shard"]

logger = logging.getLogger("hcache_rag")

PROBE_BYTES = 1 << 18
"""By so much it is seen how fast a link is, when nothing has come over it yet."""


class RemoteStore(StateStore):
    """An exported shard, for reading only. Use `RemoteStore.open_url`. Thread-safe."""

    def __init__(self, index: StateStore, source: Source, near: Near) -> None:
        super().__init__(index._session)
        self._near = near
        self._source = source

    @classmethod
    def open_url(cls, url: str, near: Near, *, namespace: str) -> RemoteStore:
        """Open an exported shard; its index is copied here if that was not done yet.

        A little is fetched, to see how fast the link is, if nothing has come over it yet.

        Raises:
            StoreOpenError: it cannot be reached, or is not one.
        """
        try:
            fs, root = file_system(url)
            folder = near.index_of(url, fs, root)
        except StoreError:
            raise
        except Exception as error:  # every file system has errors of its own
            reason = told(error, url)
            raise StoreOpenError(f"{without_secrets(url)} cannot be opened: {reason}") from None
        values = f"{root}/{VALUES}"

        def read(begin: int, end: int) -> bytes:
            data: bytes = fs.cat_file(values, start=begin, end=end)
            return data

        source = Source(without_secrets(url), near.link(url), read, lambda error: told(error, url))
        if source.link.rate is None and not source.link.is_down:
            near.flights.probe(source, PROBE_BYTES)
        return cls(StateStore.open(folder, namespace=namespace, read_only=True), source, near)

    @contextmanager
    def reading(self, keys: Collection[StateKey] = ()) -> Iterator[StoreReader]:
        """See `StateStore.reading`; values may be on their way still when they are asked for."""
        with super().reading() as index, ExitStack() as stack:
            near = None
            with suppress(StoreError):  # one can do without
                near = stack.enter_context(self._near.store.reading(keys))
            yield _RemoteReader(self, index, near)

    def read_rate(self, key: StateKey) -> ReadRate | None:
        """See `StateStore.read_rate`: that of the link, and more if a part has come already.

        Raises:
            UnreachableStateError: the link does not answer.
        """
        if self._near.store.record(key) is not None:
            return None
        flight = self._near.flights.of(self._source, key)
        share = flight.missing_share if flight is not None else 1.0
        if not share:
            return None
        if (why := self._near.flights.why_not(self._source)) is not None:
            raise UnreachableStateError(key, why)
        rate = self._source.link.rate
        return ReadRate(rate.bytes_per_s / share) if rate is not None else None

    def has_beside(self, purpose: str) -> bool:
        """What belongs to the namespace is not read from afar."""
        return False

    def prefetch(self, texts: Iterable[str]) -> None:
        """Begin to fetch the states of some texts, when nothing else is on its way."""
        for text in texts:
            self._bring_near(record.key for record in self.find(text))

    def count_use(self, keys: Iterable[StateKey] = (), **counted: int) -> None:
        """Uses decide what stays near; nothing is counted afar.

        What was used, and is not near, comes there: it may be asked for again.
        """
        used = list(keys)
        self._near.store.count_use(used)
        self._bring_near(used)

    def verify(self, on_progress: Callable[[int, int], None] | None = None) -> VerifyReport:
        """Fetch and check everything; what lies near is checked there."""
        every, damaged, values, num_bytes = list(self.records()), [], 0, 0
        for done, record in enumerate(every, 1):
            try:
                with super().reading() as index, self.reading([record.key]) as reader:
                    for layer, chunk, _ in places_of(index, record.key):
                        num_bytes += len(reader.value(record.key, layer, chunk))
                        values += 1
            except (DamagedStateError, MissingStateError, UnreachableStateError) as error:
                damaged.append(Damage(record.key, record.text, record.is_preamble, error.reason))
            if on_progress is not None:
                on_progress(done, len(every))
        return VerifyReport(len(every), values, num_bytes, tuple(damaged))

    def close(self) -> None:
        """Leave what is on its way; the near store is closed by who opened it."""
        self._near.flights.cancel(self._source)
        super().close()

    def _bring_near(self, keys: Iterable[StateKey]) -> None:
        """Fetch states that are not near, if there is room and the link answers."""
        far = [key for key in keys if self._near.store.record(key) is None]
        with suppress(StoreError, UnreachableStateError):
            if far:
                with super().reading() as index:
                    for key in far:
                        self._fetch(key, places_of(index, key), is_wanted=False)

    def _fetch(
        self, key: StateKey, places: list[tuple[int, int, Place]], *, is_wanted: bool
    ) -> Flight | None:
        flights = self._near.flights
        return flights.start(self._source, key, places, self._keep, is_wanted=is_wanted)

    def _keep(self, flight: Flight) -> None:
        """Keep a state near that came whole."""
        key = flight.key
        try:
            values = [(la, ch, bytes(flight.value(la, ch, 0.0))) for la, ch, _ in flight.places]
            record, entry = self.record(key), self.entry(key)
            if record is not None:
                saved_s = entry.saved_s if entry is not None else None
                self._near.store.put_all([NewState(record, values, saved_s)])
        except (StoreError, DamagedStateError) as error:
            logger.info("state %s is not kept near: %s", key.hex(), error)


class _RemoteReader(StoreReader):
    """Reads from the near store what is whole there, and the rest from afar."""

    def __init__(self, store: RemoteStore, index: StoreReader, near: StoreReader | None) -> None:
        self._index = index
        self._store = store
        self._near = near
        self._flights: dict[StateKey, Flight] = {}
        self._places: dict[StateKey, dict[tuple[int, int], Place]] = {}
        self._is_near: dict[StateKey, bool] = {}

    def record(self, key: StateKey) -> StateRecord | None:
        return self._index.record(key)

    def expect(self, first: Mapping[StateKey, tuple[int, int]]) -> None:
        """See `StoreReader.expect`: what is not near is on its way from now on."""
        for key, (layer, chunk) in first.items():
            with suppress(MissingStateError, UnreachableStateError):  # told when it is asked for
                if not self._has_near(key):
                    self._place(key, layer, chunk)
                    self._flight(key).want(layer, chunk)

    def value(self, key: StateKey, layer: int, chunk: int) -> memoryview:
        """See `StoreReader.value`.

        Raises:
            UnreachableStateError: it could not be fetched now.
        """
        _, _, expected = self._place(key, layer, chunk)
        if self._near is not None and self._has_near(key):
            with suppress(MissingStateError, DamagedStateError):
                value = self._near.value(key, layer, chunk)
                if checksum(value) == expected:
                    return value
            self._is_near[key] = False  # what comes takes its place
        return self._store._near.flights.value(self._flight(key), layer, chunk)

    def load(self, key: StateKey, layer: int, chunk: int) -> int:
        """See `StoreReader.load`: of what is near; the rest comes as it is announced."""
        return self._near.load(key, layer, chunk) if self._near is not None else 0

    def _has_near(self, key: StateKey) -> bool:
        if key not in self._is_near:
            self._is_near[key] = self._near is not None and self._near.record(key) is not None
        return self._is_near[key]

    def _flight(self, key: StateKey) -> Flight:
        flight = self._flights.get(key)
        if flight is None:
            places = [(la, ch, place) for (la, ch), place in self._places[key].items()]
            flight = self._store._fetch(key, places, is_wanted=True)
            if flight is None:
                raise MissingStateError(key, "it has no values")
            self._flights[key] = flight
        return flight

    def _place(self, key: StateKey, layer: int, chunk: int) -> Place:
        if key not in self._places:
            places = places_of(self._index, key)
            self._places[key] = {(la, ch): place for la, ch, place in places}
        found = self._places[key].get((layer, chunk))
        if found is None:
            raise MissingStateError(key, f"layer {layer}, chunk {chunk} is not in the store")
        return found
