"""`StateStore`: states in one LMDB environment. Knows bytes and keys; the one door to lmdb.

Four databases: `meta` (format version, store id), `records` (key -> `StateRecord`), `chunks`
(key | layer u16 | chunk u32, big-endian, so that a layer's chunks lie together) and `models`
(root key -> a person's name for it). A state is written in one transaction, its record last.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import lmdb

from hcache_rag import environment
from hcache_rag.environment import SharedEnvironment
from hcache_rag.errors import (
    DamagedStateError,
    MissingStateError,
    StoreError,
    StoreFullError,
    StoreOpenError,
)
from hcache_rag.state import StateKey, StateRecord

_CHUNK_SUFFIX = struct.Struct(">HI")


@dataclass(frozen=True, slots=True)
class StoreStats:
    """What a store holds: states by kind, bytes on disk, documents and layout of each model.

    `unreadable` counts records that are damaged or of an unreleased format; they are stored again
    when their documents are indexed again.
    """

    documents: int
    preambles: int
    tokens: int
    unreadable: int
    file_bytes: int
    models: dict[str, int]
    layouts: dict[str, str]


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A model that has stored states: its name, what they keep, and why that was chosen."""

    name: str
    layout: str = ""
    reason: str = ""

    @classmethod
    def from_bytes(cls, data: bytes) -> StoredModel:
        """What `StateStore.name_model` wrote; a damaged entry is a model without a name."""
        try:
            return cls(**json.loads(data))
        except (ValueError, TypeError):
            return cls("an unknown model")


class StateStore:
    """A folder of states. Use `StateStore.open`; it is a context manager."""

    def __init__(self, path: Path, env: SharedEnvironment, read_only: bool) -> None:
        self.path = path
        self.read_only = read_only
        self._env: SharedEnvironment | None = env

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, read_only: bool = False) -> StateStore:
        """Open the store in the folder `path`, creating it unless `read_only`.

        Several stores may be opened on one path in one process; they share one environment.

        Raises:
            StoreOpenError: the path is a file, is not writable, holds something else, or was
                written by a format version that this release does not know.
        """
        folder = Path(path).expanduser().absolute()
        try:
            folder = folder.resolve()
            if folder.exists() and not folder.is_dir():
                raise StoreOpenError(f"{folder} is a file; a state store is a folder")
            if read_only and not (folder / "data.mdb").is_file():
                raise StoreOpenError(f"{folder} holds no state store")
        except OSError as error:
            raise StoreOpenError(f"cannot look into {folder}: {error.strerror}") from error
        if not read_only:
            try:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as error:
                raise StoreOpenError(f"cannot create {folder}: {error.strerror}") from error
            if not os.access(folder, os.W_OK):
                raise StoreOpenError(f"{folder} is not writable")
        return cls(folder, SharedEnvironment.acquire(folder, read_only), read_only)

    @property
    def store_id(self) -> str:
        """A random name, made when the store was created."""
        return self._shared.store_id

    def put(self, record: StateRecord, values: Iterable[tuple[int, int, bytes | bytearray]]) -> int:
        """Store a state in one transaction, replacing one under the same key.

        Args:
            values: (layer, chunk, value) of every chunk of every layer.

        Returns:
            The bytes of all values. When this returns, the state outlives this process; `sync`
            makes it outlive the machine's power.

        Raises:
            StoreFullError: no room; nothing of the state is stored.
            StoreError: the store is read-only, or the disk failed.
        """
        self._require_writable()
        value_bytes = 0
        with self._write() as txn:
            self._drop(txn, record.key)
            for layer, chunk, value in values:
                txn.put(_chunk_key(record.key, layer, chunk), value, db=self._shared.chunks)
                value_bytes += len(value)
            txn.put(record.key, record.to_bytes(), db=self._shared.records)
        return value_bytes

    def record(self, key: StateKey) -> StateRecord | None:
        """The record of a state, or None where there is none that can be read."""
        with self._shared.env.begin(db=self._shared.records) as txn:
            try:
                data = txn.get(key)
            except lmdb.Error:  # LMDB cannot follow its own pages
                return None
        return _parse(key, data) if data is not None else None

    def __contains__(self, key: StateKey) -> bool:
        return self.record(key) is not None

    def records(self) -> Iterator[StateRecord]:
        """All records that can be read, in order of their keys."""
        with self._read(self._shared.records) as txn:
            for key, data in txn.cursor():
                record = _parse(bytes(key), bytes(data))
                if record is not None:
                    yield record

    @contextmanager
    def reading(self) -> Iterator[StoreReader]:
        """A consistent view of all values, for one thread; nothing read from it outlives it."""
        with self._shared.env.begin(db=self._shared.chunks, buffers=True) as txn:
            yield StoreReader(txn)

    def delete(self, key: StateKey) -> bool:
        """Delete a state; False where there was none."""
        self._require_writable()
        with self._write() as txn:
            return self._drop(txn, key)

    def name_model(self, root: StateKey, name: str, layout: str = "", reason: str = "") -> None:
        """Remember what a person calls the model behind `root`, what its states keep, and why."""
        model = StoredModel(name, layout, reason)
        if self.models().get(root) == model or self.read_only:
            return
        with self._write() as txn:
            txn.put(root, json.dumps(asdict(model)).encode(), db=self._shared.models)

    def models(self) -> dict[StateKey, StoredModel]:
        """The models that have stored states here, by root key."""
        with self._read(self._shared.models) as txn:
            found = {bytes(key): bytes(data) for key, data in txn.cursor()}
        return {key: StoredModel.from_bytes(data) for key, data in found.items()}

    def model_names(self) -> dict[StateKey, str]:
        """What persons call these models, by root key."""
        return {root: model.name for root, model in self.models().items()}

    def sync(self) -> None:
        """Write everything that was stored through to the disk."""
        shared = self._shared
        if not self.read_only:
            shared.env.sync(True)

    def stats(self) -> StoreStats:
        """Count what is stored; reads every record."""
        documents = preambles = tokens = 0
        by_model: dict[str, int] = {}
        names = self.model_names()
        for record in self.records():
            tokens += record.num_tokens
            if record.is_preamble:
                preambles += 1
                continue
            documents += 1
            name = names.get(record.root, record.root.hex()[:8])
            by_model[name] = by_model.get(name, 0) + 1
        with self._read(self._shared.records) as txn:
            unreadable = txn.stat(self._shared.records)["entries"] - documents - preambles
        file_bytes = (self.path / "data.mdb").stat().st_blocks * 512
        layouts = {m.name: f"{m.layout}; {m.reason}" for m in self.models().values() if m.layout}
        return StoreStats(documents, preambles, tokens, unreadable, file_bytes, by_model, layouts)

    def close(self) -> None:
        """Sync and close. Closing twice does nothing."""
        if self._env is not None:
            env, self._env = self._env, None
            env.release()

    def __enter__(self) -> StateStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def _shared(self) -> SharedEnvironment:
        if self._env is None:
            raise StoreError(f"the store {self.path} is closed")
        return self._env

    def _require_writable(self) -> None:
        if self.read_only:
            raise StoreError(f"the store {self.path} is open for reading only")

    @contextmanager
    def _read(self, database: Any) -> Iterator[Any]:
        try:
            with self._shared.env.begin(db=database) as txn:
                yield txn
        except lmdb.Error as error:
            raise StoreError(f"reading {self.path} failed: {error}") from error

    @contextmanager
    def _write(self) -> Iterator[Any]:
        try:
            with self._shared.env.begin(write=True) as txn:
                yield txn
        except lmdb.MapFullError as error:
            raise StoreFullError(
                f"{self.path} has reached its {environment.MAP_BYTES}-byte map"
            ) from error
        except lmdb.Error as error:
            kind = StoreFullError if "No space left" in str(error) else StoreError
            raise kind(f"writing to {self.path} failed: {error}") from error

    def _drop(self, txn: Any, key: StateKey) -> bool:
        cursor = txn.cursor(db=self._shared.chunks)
        found = cursor.set_range(key)
        while found and bytes(cursor.key()).startswith(key):
            found = cursor.delete()
        return bool(txn.delete(key, db=self._shared.records))


class StoreReader:
    """Reads values inside one read transaction. The views it gives die with it."""

    def __init__(self, txn: Any) -> None:
        self._txn = txn

    def value(self, key: StateKey, layer: int, chunk: int) -> memoryview:
        """The stored value of one chunk, straight from the map.

        Raises:
            MissingStateError: there is none.
            DamagedStateError: LMDB cannot follow its own pages to it.
        """
        try:
            value = self._txn.get(_chunk_key(key, layer, chunk))
        except lmdb.Error as error:
            raise DamagedStateError(key, f"layer {layer}, chunk {chunk}: {error}") from error
        if value is None:
            raise MissingStateError(key, f"layer {layer}, chunk {chunk} is not in the store")
        return memoryview(value)


def _chunk_key(key: StateKey, layer: int, chunk: int) -> bytes:
    return key + _CHUNK_SUFFIX.pack(layer, chunk)


def _parse(key: StateKey, data: bytes) -> StateRecord | None:
    try:
        return StateRecord.from_bytes(key, data)
    except ValueError:
        return None
