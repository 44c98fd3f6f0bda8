"""Shards behind a network: what is asked for is fetched through fsspec, and kept near for a while.

Of an exported shard, the index (records, texts, and for each value its place and checksum) is
copied to this machine when it is opened; values stay in one large object. The first value of a
state that is asked for begins to fetch the state from there on, in the order in which a restore
reads it; who asks next waits only until his value has come. A state that came whole is kept in a
store on this disk, the near one, which has a limit and lets those go that save least. Whatever
comes, from afar or from near, must have its checksum.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import struct
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import xxhash

from hcache_rag.errors import (
    DamagedStateError,
    MissingStateError,
    StoreError,
    StoreOpenError,
    UnreachableStateError,
)
from hcache_rag.state import StateKey, StateRecord
from hcache_rag.store.backend import TABLES
from hcache_rag.store.lmdb_backend import LmdbBackend
from hcache_rag.store.manifest import NEAR_MAX_BYTES, Shard
from hcache_rag.store.rows import NewState
from hcache_rag.store.states import StateStore, StoreReader
from hcache_rag.store.tables import chunk_of
from hcache_rag.store.verify import Damage, VerifyReport

logger = logging.getLogger("hcache_rag")

AT_ONCE = 8
"""So many states are fetched at once."""
BLOCK_BYTES = 1 << 20
"""Of one request: what comes early can be restored early."""
WAIT_S = 30.0
"""After so long without a block a state is out of reach."""

INDEX, VALUES, SUMMARY = "index.mdb", "values.bin", "export.json"
_PLACE = struct.Struct("<QI8s")
"""Of a value: offset, size, checksum."""
_ROWS_AT_ONCE = 4096


def export_shard(shard: Shard, url: str) -> None:
    """Copy a published shard to a URL that fsspec can write, so that others read it from there.

    The summary is written last: without it there is no shard.

    Raises:
        StoreError: the shard is not published, or somebody could still change it.
    """
    if not shard.is_published:
        raise StoreError(f"shard {shard.name} is not published: it may still change")
    fs, root = _file_system(url)
    fs.makedirs(root, exist_ok=True)
    beside = shard.folder / "export"
    shutil.rmtree(beside, ignore_errors=True)
    try:
        with fs.open(f"{root}/{VALUES}", "wb") as values:
            num_bytes = _write_index(shard, beside, values.write)
        data = beside / "data.mdb"
        fs.put_file(str(data), f"{root}/{INDEX}")
        summary = {"format": 1, "index": _checksum_of(data), "num_bytes": num_bytes}
        fs.pipe_file(f"{root}/{SUMMARY}", json.dumps(summary).encode())
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _write_index(shard: Shard, folder: Path, write: Callable[[bytes], object]) -> int:
    """A store with the place of each value instead of the value; bytes that were written."""
    offset = 0
    source = LmdbBackend.acquire(shard.folder, read_only=True, durability="fast")
    folder.mkdir(mode=0o700)
    index = LmdbBackend.acquire(folder, read_only=False, durability="fast")
    try:
        with source.reading() as reading:
            for table in TABLES:
                rows = reading.scan(table)
                while some := list(islice(rows, _ROWS_AT_ONCE)):
                    with index.writing() as txn:
                        for key, value in some:
                            stored = value
                            if table == "chunks":
                                write(value)
                                stored = _PLACE.pack(offset, len(value), _checksum(value))
                                offset += len(value)
                            txn.put(table, key, stored)
    finally:
        index.close()
        source.close()
    return offset


class Near:
    """Where states from afar are kept on this disk, and the threads that fetch them. Thread-safe.

    Args:
        folder: of this machine alone; processes may share it.
        max_bytes: that the states may take.
    """

    def __init__(
        self, folder: Path, namespace: str, max_bytes: int = NEAR_MAX_BYTES, wait_s: float = WAIT_S
    ) -> None:
        self.folder = folder
        self.wait_s = wait_s
        self.store = StateStore.open(
            folder / "states", namespace=namespace, max_bytes=max_bytes, durability="fast"
        )
        self.pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="hcache-fetch")

    def close(self) -> None:
        """Stop fetching, and close the store."""
        self.pool.shutdown(wait=True, cancel_futures=True)
        self.store.close()


class RemoteStore(StateStore):
    """An exported shard, for reading only. Use `RemoteStore.open_url`. Thread-safe."""

    def __init__(self, index: StateStore, url: str, near: Near) -> None:
        super().__init__(index._session)
        self._near = near
        self._fs, root = _file_system(url)
        self._values = f"{root}/{VALUES}"
        self._flights: dict[StateKey, _Flight] = {}
        self._lock = threading.Lock()
        self._is_closing = False

    @classmethod
    def open_url(cls, url: str, near: Near, *, namespace: str) -> RemoteStore:
        """Open an exported shard; its index is copied here if that was not done yet.

        Raises:
            StoreOpenError: it cannot be reached, or is not one.
        """
        try:
            fs, root = _file_system(url)
            summary = json.loads(fs.cat_file(f"{root}/{SUMMARY}"))
            folder = near.folder / "index" / summary["index"]
            if not (folder / "data.mdb").is_file():
                folder.mkdir(parents=True, exist_ok=True)
                unfinished = folder / f"data.mdb.{os.getpid()}"
                fs.get_file(f"{root}/{INDEX}", str(unfinished))
                if _checksum_of(unfinished) != summary["index"]:
                    unfinished.unlink()
                    raise ValueError("its index is not what was exported")
                os.replace(unfinished, folder / "data.mdb")
        except StoreError:
            raise
        except Exception as error:  # every file system has errors of its own
            raise StoreOpenError(f"{url} cannot be opened: {error!r}") from error
        return cls(StateStore.open(folder, namespace=namespace, read_only=True), url, near)

    @contextmanager
    def reading(self, keys: Collection[StateKey] = ()) -> Iterator[StoreReader]:
        """See `StateStore.reading`; values may be on their way still when they are asked for."""
        with super().reading() as index, self._near.store.reading(keys) as near:
            yield _RemoteReader(self, index, near)

    def has_beside(self, purpose: str) -> bool:
        """What belongs to the namespace is not read from afar."""
        return False

    def prefetch(self, texts: Iterable[str]) -> None:
        """Begin to fetch the states of some texts."""
        for text in texts:
            for record in self.find(text):
                if self._near.store.record(record.key) is None:
                    with suppress(StoreError), super().reading() as index:
                        self._fetch(record, index, 0)

    def count_use(self, keys: Iterable[StateKey] = (), **counted: int) -> None:
        """Uses decide what stays near; nothing is counted afar."""
        self._near.store.count_use(keys)

    def verify(self, on_progress: Callable[[int, int], None] | None = None) -> VerifyReport:
        """Fetch and check everything; what lies near is checked there."""
        every, damaged, values, num_bytes = list(self.records()), [], 0, 0
        for done, record in enumerate(every, 1):
            try:
                with super().reading() as index, self.reading([record.key]) as reader:
                    for layer, chunk, _ in _places(index, record.key):
                        num_bytes += len(reader.value(record.key, layer, chunk))
                        values += 1
            except (DamagedStateError, MissingStateError, UnreachableStateError) as error:
                damaged.append(Damage(record.key, record.text, record.is_preamble, error.reason))
            if on_progress is not None:
                on_progress(done, len(every))
        return VerifyReport(len(every), values, num_bytes, tuple(damaged))

    def close(self) -> None:
        """Stop fetching; the near store is closed by who opened it."""
        self._is_closing = True
        with self._lock:
            flights = list(self._flights.values())
        for flight in flights:
            flight.landed.wait()
        super().close()

    def _fetch(self, record: StateRecord, index: StoreReader, first: int) -> _Flight:
        """The flight that brings a state from its value number `first` on: one for all who ask."""
        with self._lock:
            flight = self._flights.get(record.key)
            if flight is None or flight.first > first:
                flight = _Flight(record, _places(index, record.key), first)
                self._flights[record.key] = flight
                self._near.pool.submit(self._bring, flight)
        return flight

    def _bring(self, flight: _Flight) -> None:
        try:
            for begin, end in flight.blocks():
                if self._is_closing:
                    raise StoreError(f"{self._values} is closed")
                flight.arrived(self._fs.cat_file(self._values, start=begin, end=end))
            if flight.first == 0:
                self._keep(flight)
        except Exception as error:  # every file system has errors of its own
            flight.failed(error)
        finally:
            with self._lock:
                if self._flights.get(flight.record.key) is flight:
                    del self._flights[flight.record.key]
            flight.landed.set()

    def _keep(self, flight: _Flight) -> None:
        key = flight.record.key
        try:
            values = [
                (layer, chunk, bytes(flight.value(layer, chunk, 0.0)))
                for layer, chunk, _ in flight.places
            ]
            entry = self.entry(key)
            saved_s = entry.saved_s if entry is not None else None
            self._near.store.put_all([NewState(flight.record, values, saved_s)])
        except (StoreError, DamagedStateError) as error:
            logger.info("state %s is not kept near: %s", key.hex(), error)


_Place: TypeAlias = tuple[int, int, bytes]
"""Of a value in the object of all values: offset, size, checksum."""


def _places(index: StoreReader, key: StateKey) -> list[tuple[int, int, _Place]]:
    """(layer, chunk, place) of all values of a state."""
    txn, rows = index._txn, index._rows
    found = []
    for row_key in rows.chunk_keys(txn, key):
        offset, size, checksum = _PLACE.unpack(txn.get("chunks", row_key) or bytes(_PLACE.size))
        found.append((*chunk_of(row_key), (offset, size, checksum)))
    return found


class _Flight:
    """A state on its way. Thread-safe."""

    def __init__(
        self, record: StateRecord, places: Sequence[tuple[int, int, _Place]], first: int
    ) -> None:
        self.record = record
        self.places = places
        self.first = first
        self.landed = threading.Event()
        self._by_chunk = {(layer, chunk): place for layer, chunk, place in places}
        self._begin = places[first][2][0] if places else 0
        self._end = places[-1][2][0] + places[-1][2][1] if places else 0
        self._data = bytearray(self._end - self._begin)
        self._have = 0
        self._error: Exception | None = None
        self._news = threading.Condition()

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Stretches of the object, one after another."""
        for begin in range(self._begin, self._end, BLOCK_BYTES):
            yield begin, min(begin + BLOCK_BYTES, self._end)

    def arrived(self, data: bytes) -> None:
        """The next block."""
        with self._news:
            if len(data) != min(BLOCK_BYTES, len(self._data) - self._have):
                raise OSError(f"{len(data)} bytes came of a block")
            self._data[self._have : self._have + len(data)] = data
            self._have += len(data)
            self._news.notify_all()

    def failed(self, error: Exception) -> None:
        """No more will come."""
        with self._news:
            self._error = error
            self._news.notify_all()

    def value(self, layer: int, chunk: int, wait_s: float) -> memoryview:
        """A value, when it has come; `wait_s` is how long nothing may come.

        Raises:
            UnreachableStateError: it does not come.
            DamagedStateError: it is not what was exported.
        """
        offset, size, checksum = self._by_chunk[layer, chunk]
        begin, key = offset - self._begin, self.record.key
        with self._news:
            while self._have < begin + size and self._error is None:
                before = self._have
                if not self._news.wait(wait_s) and self._have == before:
                    raise UnreachableStateError(key, f"nothing has come for {wait_s} s")
            if self._have < begin + size:
                raise UnreachableStateError(key, f"it cannot be fetched: {self._error!r}")
        value = memoryview(self._data)[begin : begin + size]
        if _checksum(value) != checksum:
            raise DamagedStateError(key, f"layer {layer}, chunk {chunk} is not what was exported")
        return value


class _RemoteReader(StoreReader):
    """Reads from the near store what is whole there, and the rest from afar."""

    def __init__(self, store: RemoteStore, index: StoreReader, near: StoreReader) -> None:
        self.index = index
        self._store = store
        self._near = near
        self._flights: dict[StateKey, _Flight] = {}
        self._is_near: dict[StateKey, bool] = {}
        self._numbers: dict[StateKey, dict[tuple[int, int], tuple[int, bytes]]] = {}

    def record(self, key: StateKey) -> StateRecord | None:
        return self.index.record(key)

    def value(self, key: StateKey, layer: int, chunk: int) -> memoryview:
        """See `StoreReader.value`.

        Raises:
            UnreachableStateError: it could not be fetched now.
        """
        number, checksum = self._place(key, layer, chunk)
        if self._is_near.setdefault(key, self._near.record(key) is not None):
            with suppress(MissingStateError, DamagedStateError):
                value = self._near.value(key, layer, chunk)
                if _checksum(value) == checksum:
                    return value
            self._is_near[key] = False
            with suppress(StoreError):
                self._store._near.store.delete(key)
        flight = self._flights.get(key)
        if flight is None or flight.first > number:
            record = self.index.record(key)
            if record is None:
                raise MissingStateError(key, "its record cannot be read")
            flight = self._flights[key] = self._store._fetch(record, self.index, number)
        return flight.value(layer, chunk, self._store._near.wait_s)

    def load(self, key: StateKey, layer: int, chunk: int) -> int:
        """See `StoreReader.load`: of what lies near; the rest is on its way."""
        return self._near.load(key, layer, chunk)

    def _place(self, key: StateKey, layer: int, chunk: int) -> tuple[int, bytes]:
        """Number and checksum of a value."""
        if key not in self._numbers:
            self._numbers[key] = {
                (la, ch): (number, place[2])
                for number, (la, ch, place) in enumerate(_places(self.index, key))
            }
        found = self._numbers[key].get((layer, chunk))
        if found is None:
            raise MissingStateError(key, f"layer {layer}, chunk {chunk} is not in the store")
        return found


def _file_system(url: str) -> tuple[Any, str]:
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise StoreOpenError(f"{url}: pip install 'hcache-rag[remote]' to reach it") from error
    fs, root = url_to_fs(url)
    return fs, str(root).rstrip("/")


def _checksum(data: bytes | memoryview) -> bytes:
    return xxhash.xxh3_64_digest(data)


def _checksum_of(path: Path) -> str:
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
