"""`StateStore`: the states of one namespace of a store, and the rules that they are kept by.

A state is written in one transaction with all that belongs to it. What a method has stored when it
returns is not lost; what a reader sees is whole.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from hcache_rag.errors import (
    MissingStateError,
    StoreBusyError,
    StoreError,
    StoreFullError,
    StoreOpenError,
)
from hcache_rag.state import StateKey, StateRecord
from hcache_rag.store import eviction
from hcache_rag.store.backend import Backend, Durability, Transaction
from hcache_rag.store.cipher import Cipher, KeySource
from hcache_rag.store.description import (
    describe,
    ensure_namespace,
    namespace_in,
    namespaces_in,
    put_namespace,
    set_limit,
)
from hcache_rag.store.lmdb_backend import LmdbBackend
from hcache_rag.store.memory import MemoryBackend
from hcache_rag.store.room import make_room
from hcache_rag.store.rows import NamespaceRows, NewState, StateRows, Values
from hcache_rag.store.stats import StoreStats, stats_of
from hcache_rag.store.tables import (
    Counters,
    Entry,
    Namespace,
    Totals,
    namespace_prefix,
)
from hcache_rag.store.texts import StoredTexts, records_alike
from hcache_rag.store.verify import VerifyReport, repair, verify
from hcache_rag.texts import TextView

logger = logging.getLogger("hcache_rag")

DEFAULT_NAMESPACE = "default"
MIN_BYTES = 1 << 20
"""The smallest limit of a store."""

MAX_ATTEMPTS = 4
"""So often room is made for a write, a little more each time."""

FLUSH_TOUCHES = 256
"""So many uses of states are remembered before they are written down."""


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
    """A folder of states, seen through one namespace. Use `StateStore.open`. Thread-safe."""

    def __init__(
        self,
        backend: Backend,
        namespace: str,
        *,
        key: KeySource | None = None,
        read_only: bool = False,
        write_wait_s: float | None = None,
        reopen: Callable[[], Backend] | None = None,
    ) -> None:
        self.path = backend.path
        self.namespace = namespace
        self.read_only = read_only
        self._backend: Backend | None = backend
        self._reopen = reopen
        self._pid = os.getpid()
        self._write_wait_s = write_wait_s
        self._lock = threading.Lock()
        self._touches: dict[StateKey, int] = {}
        self._counted: dict[str, float] = {}
        self._is_looking = False
        description = describe(backend, write_wait_s, read_only=read_only)
        self._store_id, self.max_bytes = description.store_id, description.max_bytes
        backend.limit(self.max_bytes)
        self._cipher = Cipher(key) if key is not None else None
        check = self._cipher.check if self._cipher is not None else None
        self._bind(ensure_namespace(backend, namespace, check, write_wait_s, read_only=read_only))

    def _bind(self, its: Namespace) -> None:
        """From now on, see a namespace; number 0, in which nothing is, where it is locked."""
        self._its = its
        check = self._cipher.check if self._cipher is not None else None
        self._is_locked = its.number > 0 and its.key_check != check
        if self._is_locked:
            logger.warning("%s; its states cannot be used", self._locked())
        number = 0 if self._is_locked else its.number
        self._rows = NamespaceRows(namespace_prefix(number), self._cipher)
        self._texts = StoredTexts(self._rows)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        namespace: str = DEFAULT_NAMESPACE,
        max_bytes: int | None = None,
        namespace_max_bytes: int | None = None,
        key: KeySource | None = None,
        durability: Durability = "fsync",
        write_wait_s: float | None = None,
        read_only: bool = False,
    ) -> StateStore:
        """Open the store in the folder `path`, creating it unless `read_only`.

        Several stores may be opened on one path in one process; they share one environment.

        Args:
            namespace: states that are stored in one are not found, used or counted in another.
            max_bytes: the most that the file may grow to, from now on; states that save least time
                go when it is filled. None leaves the limit as it is; a new store has none.
            namespace_max_bytes: the same for the states of this namespace.
            key: encrypts the texts and values of this namespace, see `hcache_rag.store.cipher`: 32
                bytes, a file that holds them, or a callback. It is given when the namespace is made
                and each time it is opened; with another key, or none, its states are not found.
            durability: "fsync": what is stored survives a power cut. "fast": it survives a killed
                process, and a power cut only after `sync`, which `HCacheEngine.precompute` and
                `close` call; a power cut before may damage any part of the store.
            write_wait_s: how long to wait while somebody else writes; None for as long as it takes.

        Raises:
            StoreOpenError: the path is a file, is not writable, holds something else, or was
                written by a format version that this release does not know.
            StoreBusyError: somebody else writes, for longer than `write_wait_s`.
        """
        if not namespace or len(namespace.encode()) > 256:
            raise ValueError(f"a namespace has 1 to 256 bytes, not {len(namespace.encode())}")
        for name, limit in (
            ("max_bytes", max_bytes),
            ("namespace_max_bytes", namespace_max_bytes),
        ):
            if limit is not None and not isinstance(limit, int):
                raise TypeError(f"{name} is a whole number of bytes, not {limit!r}")
            if limit is not None and limit < MIN_BYTES:
                raise ValueError(f"{name} is {limit:,}, but at least {MIN_BYTES:,} are needed")
        if durability not in ("fsync", "fast"):
            raise ValueError(f"durability is 'fsync' or 'fast', not {durability!r}")
        folder = _folder(path, read_only=read_only)

        def reopen() -> Backend:
            return LmdbBackend.acquire(folder, read_only=read_only, durability=durability)

        backend = reopen()
        try:
            store = cls(
                backend,
                namespace,
                key=key,
                read_only=read_only,
                write_wait_s=write_wait_s,
                reopen=reopen,
            )
            store._set_limits(max_bytes, namespace_max_bytes)
        except (StoreOpenError, StoreBusyError, StoreFullError):
            backend.close()
            raise
        except StoreError as error:
            backend.close()
            raise StoreOpenError(f"{folder} is not a state store: {error}") from error
        except BaseException:
            backend.close()
            raise
        return store

    @classmethod
    def in_memory(
        cls,
        *,
        namespace: str = DEFAULT_NAMESPACE,
        key: KeySource | None = None,
        beside: StateStore | None = None,
    ) -> StateStore:
        """A store that lives as long as its process, perhaps `beside` another namespace of one."""
        return cls(MemoryBackend() if beside is None else beside._live, namespace, key=key)

    @property
    def store_id(self) -> str:
        """A random name, made when the store was created."""
        self._live  # noqa: B018 - a closed store is an error
        return self._store_id

    def __reduce__(self) -> tuple[Callable[..., StateStore], tuple[Any, ...]]:
        if self._reopen is None:
            raise TypeError("a store in memory cannot be passed to another process")
        if self._rows.cipher is not None:
            raise TypeError("a store with a key is not passed on; open it there")
        durability = getattr(self._live, "durability", "fsync")
        arguments = (str(self.path), self.namespace, durability)
        return _open_again, (*arguments, self._write_wait_s, self.read_only)

    # States.

    def put(
        self,
        record: StateRecord,
        values: Values,
        *,
        saved_s: float | None = None,
        owners: Sequence[str] = (),
    ) -> int:
        """Store one state, see `put_all`."""
        return self.put_all([NewState(record, values, saved_s, owners)])

    def put_all(self, states: Iterable[NewState]) -> int:
        """Store some states in one transaction, replacing those under the same keys.

        Returns:
            The bytes of all values. When this returns, the states outlive this process, and with
            durability="fsync" the machine's power.

        Raises:
            StoreFullError: no room, even without all that may go; nothing is stored.
            StoreBusyError: somebody else writes.
            StoreError: the store is read-only, or the disk failed.
        """
        self._require_writable()
        self._keep_up()
        new = [self._rows.encoded(state) for state in states]
        for attempt in range(MAX_ATTEMPTS):
            self._make_room(new, attempt)
            try:
                with self._writing() as txn:
                    put_namespace(txn, self.namespace, self._current(txn))
                    for rows in new:
                        self._rows.store(txn, rows)
                break
            except StoreFullError:
                can_go_on = self._live.grow() or self.max_bytes is not None
                if not can_go_on or attempt + 1 == MAX_ATTEMPTS:
                    raise
        return sum(rows.value_bytes for rows in new)

    def _keep_up(self) -> None:
        """Look at what others may have changed: the limit, and the namespace."""
        with self._live.reading() as txn:
            its = namespace_in(txn, self.namespace)
        if its.number and its.number != self._its.number:
            self._bind(its)
            self._require_writable()
        max_bytes = describe(self._live, self._write_wait_s, read_only=True).max_bytes
        if max_bytes != self.max_bytes:
            self.max_bytes = max_bytes
            self._live.limit(max_bytes)

    def _current(self, txn: Transaction) -> Namespace:
        """This namespace as it is, or as it was before somebody deleted it."""
        its = namespace_in(txn, self.namespace)
        if its.number and its.number != self._its.number:
            raise StoreBusyError(f"namespace {self.namespace!r} was made anew meanwhile")
        return its if its.number else self._its

    def record(self, key: StateKey) -> StateRecord | None:
        """The record of a state, or None where there is none that can be read."""
        try:
            with self._live.reading() as txn:
                return self._rows.record(txn, key)
        except StoreError:
            self._live  # noqa: B018 - a closed store is an error
            return None

    def __contains__(self, key: StateKey) -> bool:
        return self.record(key) is not None

    def records(self) -> Iterator[StateRecord]:
        """All records that can be read, in order of their keys."""
        with self._live.reading() as txn:
            for _, record in self._rows.records(txn):
                if record is not None:
                    yield record

    def find(self, text: str) -> list[StateRecord]:
        """The records of all states of a text."""
        part, _ = self._rows.text_part(text)
        with self._live.reading() as txn:
            alike = records_alike(txn, self._rows, part)
            return [record for record in alike if record.text == text]

    @contextmanager
    def looking(self) -> Iterator[TextView]:
        """The texts of all states but preambles, see `hcache_rag.texts.KnownTexts`."""
        with self._live.reading() as txn, self._texts.looking(txn) as view:
            yield view

    @contextmanager
    def reading(self, keys: Collection[StateKey] = ()) -> Iterator[StoreReader]:
        """A consistent view of all values, for one thread; nothing read from it outlives it.

        Args:
            keys: states that must not be evicted meanwhile.
        """
        backend = self._live
        pinned = [self._rows.prefix + key for key in keys]
        backend.pins.add(pinned)
        try:
            with backend.reading() as txn:
                yield StoreReader(txn, self._rows)
        finally:
            backend.pins.remove(pinned)

    def delete(self, key: StateKey) -> bool:
        """Delete a state; False where there was none."""
        self._require_writable()
        with self._writing() as txn:
            return self._rows.drop(txn, key)

    # Whose states they are.

    def assign(
        self, owner: str, keys: Iterable[StateKey], *, add: bool = False, delete: bool = False
    ) -> int:
        """Say which states belong to `owner`, see `assign_all`."""
        return self.assign_all({owner: keys}, add=add, delete=delete)

    def assign_all(
        self,
        owned: Mapping[str, Iterable[StateKey]],
        *,
        add: bool = False,
        delete: bool = False,
    ) -> int:
        """Say which states belong to some owners: ids of source documents, say.

        Args:
            add: they belong to them besides others; by default no others do.
            delete: delete the states that belong to nobody any more.

        Returns:
            How many were deleted.
        """
        self._require_writable()
        wanted = {self._rows.owner(owner): set(keys) for owner, keys in owned.items()}
        with self._live.reading() as txn:
            known = {digest: set(self._rows.keys_of(txn, digest)) for digest in wanted}
        if all(known[d] >= keys if add else known[d] == keys for d, keys in wanted.items()):
            return 0
        with self._writing() as txn:
            for digest, keys in wanted.items():
                for key in keys - known[digest]:
                    self._rows.own(txn, digest, key)
            if add:
                return 0
            gone = {digest: known[digest] - keys for digest, keys in wanted.items()}
            return self._disown(txn, gone, delete=delete)

    def keys_of(self, owner: str) -> list[StateKey]:
        """The states that belong to `owner`."""
        with self._live.reading() as txn:
            return self._rows.keys_of(txn, self._rows.owner(owner))

    def delete_owner(self, *owners: str) -> int:
        """Delete the states that belong to these owners and to nobody else; their number."""
        self._require_writable()
        with self._writing() as txn:
            digests = map(self._rows.owner, owners)
            gone = {digest: self._rows.keys_of(txn, digest) for digest in digests}
            return self._disown(txn, gone, delete=True)

    def _disown(
        self, txn: Transaction, gone: Mapping[bytes, Iterable[StateKey]], *, delete: bool
    ) -> int:
        for owner, keys in gone.items():
            for key in keys:
                self._rows.disown(txn, owner, key)
        left = {key for keys in gone.values() for key in keys} if delete else set()
        return sum(self._rows.drop(txn, key) for key in left if not self._rows.is_owned(txn, key))

    def gc(self, keep: Collection[StateKey] | None = None) -> int:
        """Delete the states that nobody owns, or all but `keep`; preambles stay. Their number."""
        self._require_writable()
        with self._live.reading() as txn:
            keys = [
                key
                for key, entry in self._rows.entries(txn)
                if not entry.is_preamble
                and not (self._rows.is_owned(txn, key) if keep is None else key in keep)
            ]
        deleted = 0
        for begin in range(0, len(keys), 256):  # others may write in between
            with self._writing() as txn:
                for key in keys[begin : begin + 256]:
                    if keep is not None or not self._rows.is_owned(txn, key):
                        deleted += self._rows.drop(txn, key)
        return deleted

    # Whether they are whole.

    def verify(self, on_progress: Callable[[int, int], None] | None = None) -> VerifyReport:
        """Read and check everything in this namespace.

        Args:
            on_progress: called with (states done, states to do).
        """
        return verify(self._live, self._rows, on_progress)

    def repair(self, report: VerifyReport) -> None:
        """Drop the states that a report found damaged, and what belongs to none."""
        self._require_writable()
        repair(self._live, self._rows, report, self._write_wait_s)

    # What is known of models, uses and sizes.

    def name_model(self, root: StateKey, name: str, layout: str = "", reason: str = "") -> None:
        """Remember what a person calls the model behind `root`, what its states keep, and why."""
        model = StoredModel(name, layout, reason)
        if self.models().get(root) == model or self.read_only:
            return
        with self._writing() as txn:
            txn.put("models", self._rows.prefix + root, json.dumps(asdict(model)).encode())

    def models(self) -> dict[StateKey, StoredModel]:
        """The models that have stored states here, by root key."""
        with self._live.reading() as txn:
            return {
                key[len(self._rows.prefix) :]: StoredModel.from_bytes(data)
                for key, data in txn.scan("models", self._rows.prefix)
            }

    def model_names(self) -> dict[StateKey, str]:
        """What persons call these models, by root key."""
        return {root: model.name for root, model in self.models().items()}

    def count_use(
        self,
        keys: Iterable[StateKey] = (),
        *,
        misses: int = 0,
        hit_tokens: int = 0,
        missed_tokens: int = 0,
        damaged: int = 0,
    ) -> None:
        """States were restored, and others missed. Written down now and then, and by `close`."""
        used = list(keys)
        more = {
            "hits": len(used),
            "misses": misses,
            "hit_tokens": hit_tokens,
            "missed_tokens": missed_tokens,
            "damaged": damaged,
        }
        with self._lock:
            for key in used:
                self._touches[key] = self._touches.get(key, 0) + 1
            for name, count in more.items():
                self._counted[name] = self._counted.get(name, 0) + count
            is_due = len(self._touches) >= FLUSH_TOUCHES
        if is_due:
            with suppress(StoreError):  # somebody else writes: next time
                self.flush_uses(wait_s=0.0)

    def flush_uses(self, wait_s: float | None = None) -> None:
        """Write down which states were used; a read-only store forgets it."""
        with self._lock:
            touches, self._touches = self._touches, {}
            counted, self._counted = self._counted, {}
        if self.read_only or not (touches or any(counted.values())):
            return
        try:
            self._write_uses(touches, counted, wait_s)
        except StoreError:
            with self._lock:
                for key, times in touches.items():
                    self._touches[key] = self._touches.get(key, 0) + times
                for name, count in counted.items():
                    self._counted[name] = self._counted.get(name, 0) + count
            raise

    def _write_uses(
        self, touches: dict[StateKey, int], counted: dict[str, float], wait_s: float | None
    ) -> None:
        now = time.time()
        with self._live.writing(wait_s) as txn:
            counters = self._rows.counters(txn)
            for key, times in touches.items():
                entry = self._rows.entry(txn, key)
                if entry is not None:
                    hits = entry.hits + times
                    rank = eviction.priority(counters.clock, hits, entry.saved_s, entry.num_bytes)
                    entry = replace(entry, hits=hits, used_s=now, priority=rank)
                    self._rows.put_entry(txn, key, entry)
            self._rows.put_counters(txn, counters.plus(**counted))

    def entry(self, key: StateKey) -> Entry | None:
        """What the store knows of a state besides its record."""
        with self._live.reading() as txn:
            return self._rows.entry(txn, key)

    def entries(self) -> Iterator[tuple[StateKey, Entry]]:
        """The same of all states."""
        with self._live.reading() as txn:
            yield from self._rows.entries(txn)

    def counters(self) -> Counters:
        """What has happened in this namespace."""
        with self._live.reading() as txn:
            return self._rows.counters(txn)

    def totals(self) -> dict[StateKey, Totals]:
        """Sums over the states of this namespace, by the root key of their model."""
        with self._live.reading() as txn:
            return self._rows.totals(txn)

    def used_bytes(self) -> int:
        """Bytes that everything in the store takes inside its file."""
        with self._live.reading() as txn:
            return txn.used_bytes()

    def file_bytes(self) -> int:
        """Bytes of the store's file on disk."""
        return self._live.file_bytes()

    def stats(self) -> StoreStats:
        """What this namespace holds, in numbers."""
        return stats_of(self)

    def namespaces(self) -> list[str]:
        """The names of all namespaces."""
        with self._live.reading() as txn:
            return sorted(namespaces_in(txn))

    def delete_namespace(self, name: str) -> bool:
        """Delete a namespace with everything in it; False where there was none."""
        self._require_writable()
        with self._writing() as txn:
            prefix = namespaces_in(txn).get(name)
            if prefix is None:
                return False
            NamespaceRows(prefix).clear(txn)
            if name != self.namespace:
                txn.delete("namespaces", name.encode())
            return True

    # The end.

    def sync(self) -> None:
        """Write everything that was stored through to the disk."""
        self._live.sync()

    def close(self) -> None:
        """Write down uses, sync and close. Closing twice does nothing."""
        if self._backend is None:
            return
        with suppress(StoreError):  # what was counted is lost then, nothing else
            self.flush_uses()
        backend, self._backend = self._live, None
        backend.close()

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
    def _live(self) -> Backend:
        """The backend, opened anew in a process that has inherited this store from another."""
        if self._backend is None:
            raise StoreError(f"the store {self.path} is closed")
        if self._pid != os.getpid() and self._reopen is not None:
            with self._lock:
                if self._pid != os.getpid():
                    self._backend, self._pid = self._reopen(), os.getpid()
        if not self._its.number and not self._is_looking:
            self._look_for_namespace(self._backend)
        return self._backend

    def _look_for_namespace(self, backend: Backend) -> None:
        """A reader may have come before the namespace."""
        self._is_looking = True
        try:
            with backend.reading() as txn:
                its = namespace_in(txn, self.namespace)
            if its.number:
                self._bind(its)
        finally:
            self._is_looking = False

    def _require_writable(self) -> None:
        self._live  # noqa: B018 - a closed store is an error
        if self.read_only:
            raise StoreError(f"the store {self.path} is open for reading only")
        if self._is_locked:
            raise StoreError(self._locked())

    def _locked(self) -> str:
        name = f"namespace {self.namespace!r} of {self.path}"
        return f"{name} was made with another key, or with none"

    def _writing(self) -> AbstractContextManager[Transaction]:
        return self._live.writing(self._write_wait_s)

    def _set_limits(self, max_bytes: int | None, namespace_max_bytes: int | None) -> None:
        if self.read_only:
            return
        if max_bytes is not None:
            set_limit(self._live, self._write_wait_s, max_bytes)
            self.max_bytes = max_bytes
            self._live.limit(max_bytes)
        if namespace_max_bytes is not None:
            with self._writing() as txn:
                its = replace(namespace_in(txn, self.namespace), max_bytes=namespace_max_bytes)
                put_namespace(txn, self.namespace, its)

    def _make_room(self, new: Sequence[StateRows], attempt: int) -> None:
        held = {*self._live.pins, *(self._rows.prefix + rows.record.key for rows in new)}
        self.flush_uses()  # they decide who has to go
        make_room(
            self._live,
            self.namespace,
            self._rows,
            new,
            held,
            max_bytes=self.max_bytes,
            attempt=attempt,
            wait_s=self._write_wait_s,
        )


class StoreReader:
    """Reads values inside one read transaction. The views it gives die with it."""

    def __init__(self, txn: Transaction, rows: NamespaceRows) -> None:
        self._txn = txn
        self._rows = rows

    def value(self, key: StateKey, layer: int, chunk: int) -> memoryview:
        """The stored value of one chunk, straight from the map where it is not encrypted.

        Raises:
            MissingStateError: there is none.
            DamagedStateError: it cannot be read.
        """
        value = self._rows.value(self._txn, key, layer, chunk)
        if value is None:
            raise MissingStateError(key, f"layer {layer}, chunk {chunk} is not in the store")
        return value


def _folder(path: str | os.PathLike[str], *, read_only: bool) -> Path:
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
    return folder


def _open_again(
    path: str,
    namespace: str,
    durability: Durability,
    write_wait_s: float | None,
    read_only: bool,
) -> StateStore:
    return StateStore.open(
        path,
        namespace=namespace,
        durability=durability,
        write_wait_s=write_wait_s,
        read_only=read_only,
    )
