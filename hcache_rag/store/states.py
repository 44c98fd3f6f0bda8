"""`StateStore`: the states of one namespace of a store, and the rules that they are kept by.

A state is written in one transaction with all that belongs to it. What a method has stored when it
returns is not lost; what a reader sees is whole.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict
from itertools import islice
from types import TracebackType
from typing import Any, TypeVar

from hcache_rag.errors import (
    MissingStateError,
    StoreBusyError,
    StoreError,
    StoreFullError,
    StoreOpenError,
)
from hcache_rag.profile import ReadRate
from hcache_rag.state import StateKey, StateRecord
from hcache_rag.store import owners
from hcache_rag.store.backend import Backend, Durability, Transaction
from hcache_rag.store.cipher import Cipher, KeySource
from hcache_rag.store.description import (
    BELONGS,
    belonging,
    belongs,
    drop_namespace,
    namespace_in,
    namespaces_in,
)
from hcache_rag.store.files import folder_at
from hcache_rag.store.lmdb_backend import LmdbBackend
from hcache_rag.store.manifest import manifest_at
from hcache_rag.store.memory import MemoryBackend
from hcache_rag.store.models import UNKNOWN, StoredModel, change_model, is_fidelity
from hcache_rag.store.room import check_limits, make_room, require_fits, set_limits
from hcache_rag.store.rows import NamespaceRows, NewState, Values
from hcache_rag.store.salvage import Salvaged, salvage
from hcache_rag.store.session import Session
from hcache_rag.store.stats import StoreStats, stats_of
from hcache_rag.store.tables import Counters, Entry, Totals
from hcache_rag.store.texts import records_alike
from hcache_rag.store.uses import Uses
from hcache_rag.store.verify import VerifyReport, repair, verify
from hcache_rag.texts import TextView

Its = TypeVar("Its", bound="StateStore")

DEFAULT_NAMESPACE = "default"

MAX_ATTEMPTS, PAUSE_S = 6, 0.05
"""So often room is made for a write, a little more each time, and after a longer pause."""

COPIED_AT_ONCE = 16
"""So many states `copy_to` writes in one transaction."""

GC_AT_ONCE = 64
"""So many states `gc` deletes in one transaction."""


class StateStore:
    """A folder of states, seen through one namespace. Use `StateStore.open`. Thread-safe."""

    def __init__(self, session: Session) -> None:
        self.path = session.path
        self.namespace = session.namespace
        self.read_only = session.read_only
        self._session = session
        self._uses = Uses(session)

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

        A folder with a manifest of shards, or such a manifest, is opened as one store of them all,
        see `hcache_rag.store.sharded`.

        Several stores may be opened on one path in one process; they share one environment.

        Args:
            namespace: states that are stored in one are not found, used or counted in another. Its
                name has 1 to 256 bytes, and not the character U+001F.
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
        _check_namespace(namespace)
        check_limits(max_bytes, namespace_max_bytes)
        manifest = manifest_at(path)
        if manifest is not None:
            if max_bytes is not None or namespace_max_bytes is not None:
                raise ValueError(f"{path} is in shards: limits are set for each of these")
            from hcache_rag.store.sharded import (
                ShardedStore,  # which is made of stores of this class
            )

            return ShardedStore.open_manifest(
                manifest,
                namespace=namespace,
                key=key,
                durability=durability,
                write_wait_s=write_wait_s,
                read_only=read_only,
            )
        if durability not in ("fsync", "fast"):
            raise ValueError(f"durability is 'fsync' or 'fast', not {durability!r}")
        cipher = Cipher(key) if key is not None else None
        folder = folder_at(path, read_only=read_only)

        def reopen() -> Backend:
            return LmdbBackend.acquire(
                folder, read_only=read_only, durability=durability, wait_s=write_wait_s
            )

        backend = reopen()
        try:
            session = Session(
                backend,
                namespace,
                cipher=cipher,
                read_only=read_only,
                wait_s=write_wait_s,
                reopen=reopen,
            )
            set_limits(session, max_bytes, namespace_max_bytes)
        except (StoreOpenError, StoreBusyError, StoreFullError):
            backend.close()
            raise
        except StoreError as error:
            backend.close()
            raise StoreOpenError(f"{folder} is not a state store: {error}") from error
        except BaseException:
            backend.close()
            raise
        return cls(session)

    @classmethod
    def in_memory(
        cls,
        *,
        namespace: str = DEFAULT_NAMESPACE,
        max_bytes: int | None = None,
        namespace_max_bytes: int | None = None,
        key: KeySource | None = None,
        beside: StateStore | None = None,
    ) -> StateStore:
        """A store that lives as long as its process, perhaps `beside` another namespace of one.

        Args: as for `open`.
        """
        _check_namespace(namespace)
        check_limits(max_bytes, namespace_max_bytes)
        session = Session(
            MemoryBackend() if beside is None else beside._live,
            namespace,
            cipher=Cipher(key) if key is not None else None,
            read_only=False,
            wait_s=None,
            reopen=None,
        )
        set_limits(session, max_bytes, namespace_max_bytes)
        return cls(session)

    def beside(self, purpose: str, *, namespace_max_bytes: int | None = None) -> StateStore:
        """A namespace that belongs to this one, opened with the same key and rules.

        `delete_namespace` deletes it together with this one.
        """
        session = self._session
        backend = self._live if session.reopen is None else session.reopen()
        try:
            its = Session(
                backend,
                belonging(self.namespace, purpose),
                cipher=session.cipher,
                read_only=self.read_only,
                wait_s=session.wait_s,
                reopen=session.reopen,
            )
            set_limits(its, None, namespace_max_bytes)
        except BaseException:
            backend.close()
            raise
        return StateStore(its)

    def has_beside(self, purpose: str) -> bool:
        """Whether a namespace for a purpose belongs to this one."""
        with self._session.reading() as txn:
            return namespace_in(txn, belonging(self.namespace, purpose)).number > 0

    @property
    def store_id(self) -> str:
        """A random name, made when the store was created."""
        self._live  # noqa: B018 - a closed store is an error
        return self._session.store_id

    @property
    def max_bytes(self) -> int | None:
        """The most that the file may grow to, as it was when that was last looked at."""
        return self._session.max_bytes

    @property
    def _live(self) -> Backend:
        return self._session.backend

    @property
    def _rows(self) -> NamespaceRows:
        return self._session.rows

    def _writing(self) -> AbstractContextManager[Transaction]:
        return self._session.writing()

    def __reduce__(self) -> tuple[Callable[..., StateStore], tuple[Any, ...]]:
        if self._session.reopen is None:
            raise TypeError("a store in memory cannot be passed to another process")
        if self._session.cipher is not None:
            raise TypeError("a store with a key is not passed on; open it there")
        durability = getattr(self._live, "durability", "fsync")
        arguments = (str(self.path), self.namespace, durability)
        return open_again, (*arguments, self._session.wait_s, self.read_only)

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

        An approximate state (see `StateRecord`) does not replace an exact one.

        Returns:
            The bytes of all values. When this returns, the states outlive this process, and with
            durability="fsync" the machine's power.

        Raises:
            StoreFullError: no room, even without all that may go; nothing is stored.
            StoreBusyError: somebody else writes.
            StoreError: the store is read-only, or the disk failed.
        """
        self._session.require_writable()
        self._session.look_at_limit()
        with self._session.reading():  # finds the namespace's rows
            rows = self._rows
        new = [rows.encoded(state) for state in states]
        require_fits(self._session, new)
        for attempt in range(MAX_ATTEMPTS):
            time.sleep(PAUSE_S * attempt)  # who reads may be about to end
            try:
                self.flush_uses()  # they decide who has to go
                make_room(self._session, new, attempt)
                with self._writing() as txn:
                    if self._rows is not rows:
                        raise StoreBusyError(f"namespace {self.namespace!r} was made anew")
                    self._session.make_namespace(txn)
                    for each in new:
                        rows.store(txn, each)
                break
            except StoreFullError:
                can_go_on = self._live.grow() or self.max_bytes is not None
                if not can_go_on or attempt + 1 == MAX_ATTEMPTS:
                    raise
        return sum(each.value_bytes for each in new)

    def record(self, key: StateKey) -> StateRecord | None:
        """The record of a state, or None where there is none that can be read."""
        try:
            with self._session.reading() as txn:
                return self._rows.record(txn, key)
        except StoreError:
            if not self._session.is_open:
                raise
            return None

    def __contains__(self, key: StateKey) -> bool:
        return self.record(key) is not None

    def records(self) -> Iterator[StateRecord]:
        """All records that can be read, in order of their keys."""
        with self._session.reading() as txn:
            for _, record in self._rows.records(txn):
                if record is not None:
                    yield record

    def find(self, text: str) -> list[StateRecord]:
        """The records of all states of a text."""
        part, _ = self._rows.text_part(text)
        with self._session.reading() as txn:
            alike = records_alike(txn, self._rows, part)
            return [record for record in alike if record.text == text]

    @contextmanager
    def looking(self) -> Iterator[TextView]:
        """The texts of all states but preambles, see `hcache_rag.texts.KnownTexts`."""
        with self._session.reading() as txn, self._session.texts.looking(txn) as view:
            yield view

    @contextmanager
    def reading(self, keys: Collection[StateKey] = ()) -> Iterator[StoreReader]:
        """A consistent view of all values, for one thread; nothing read from it outlives it.

        Args:
            keys: states that must not be evicted meanwhile.
        """
        pins, pinned = self._live.pins, [self._rows.prefix + key for key in keys]
        pins.add(pinned)
        try:
            with self._session.reading() as txn:
                yield StoreReader(txn, self._rows)
        finally:
            pins.remove(pinned)

    def prefetch(self, texts: Iterable[str]) -> None:
        """These texts may be asked for soon: those in remote shards begin to come."""

    def read_rate(self, key: StateKey) -> ReadRate | None:
        """How fast a state comes here; None where it is on this machine, or that is not known.

        Raises:
            UnreachableStateError: it does not come now.
        """
        return None

    def delete(self, key: StateKey, *, unless_changed: StateRecord | None = None) -> bool:
        """Delete a state; False where there was none.

        Args:
            unless_changed: keep it where its record is another one by now.
        """
        with self._writing() as txn:
            if unless_changed is not None:
                record = self._rows.record(txn, key)
                if record is not None and record.to_bytes() != unless_changed.to_bytes():
                    return False
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
        within: str | None = None,
    ) -> int:
        """Say which states belong to some owners: ids of source documents, say.

        Args:
            add: they belong to them besides others; by default no others do.
            delete: delete the states that belong to nobody any more.
            within: the owner that these are parts of, as nodes are of a document. What belongs to a
                part belongs to it too, until it belongs to no part of it any more; and what does
                not belong to it any more belongs to none of its parts.

        Returns:
            How many were deleted.
        """
        self._session.require_writable()
        rows = self._rows
        wanted = {rows.owner(owner): set(keys) for owner, keys in owned.items()}
        whole = rows.owner(within) if within is not None else b""
        with self._session.reading() as txn:
            if owners.is_assigned(txn, rows, wanted, add=add, within=whole):
                return 0
        with self._writing() as txn:
            return owners.assign(txn, self._rows, wanted, add=add, delete=delete, within=whole)

    def keys_of(self, owner: str) -> list[StateKey]:
        """The states that belong to `owner`."""
        with self._session.reading() as txn:
            return self._rows.keys_of(txn, self._rows.owner(owner))

    def delete_owner(self, *names: str) -> int:
        """Delete the states that belong to these owners and to nobody else; their number."""
        with self._writing() as txn:
            digests = map(self._rows.owner, names)
            gone = {digest: self._rows.keys_of(txn, digest) for digest in digests}
            return owners.disown(txn, self._rows, gone, delete=True)

    def gc(self, keep: Collection[StateKey] | None = None) -> int:
        """Delete the states that nobody owns, or all but `keep`; preambles stay. Their number."""
        self._session.require_writable()
        with self._session.reading() as txn:
            keys = [
                key
                for key, entry in self._rows.entries(txn)
                if not entry.is_preamble
                and not (self._rows.is_owned(txn, key) if keep is None else key in keep)
            ]
        deleted = 0
        for begin in range(0, len(keys), GC_AT_ONCE):  # others may write in between
            with self._writing() as txn:
                for key in keys[begin : begin + GC_AT_ONCE]:
                    if keep is not None or not self._rows.is_owned(txn, key):
                        deleted += self._rows.drop(txn, key)
        return deleted

    def compact(self) -> int:
        """Give the disk back what is free inside the file; bytes that it takes now.

        The file is written anew, beside the old one, and takes its place. Others of this process
        can read meanwhile, but for a moment at the end, and cannot write.

        Raises:
            StoreBusyError: another process has the store open, or this thread reads from it, or
                other threads do for too long, or somebody else writes.
            StoreFullError: the disk has no room for both files.
        """
        self._session.compact()
        return self.file_bytes()

    def copy_to(self, target: StateStore, wanted: Callable[[StateRecord], bool]) -> int:
        """Copy states that can be read, with their owners and uses; their number.

        Raises:
            StoreError: one of the namespaces is encrypted.
        """
        source, into = self._session, target._session
        if any(its.cipher is not None or its.is_locked for its in (source, into)):
            raise StoreError(f"{self.path} has an encrypted namespace, which is not copied")
        copied = 0
        with source.reading() as txn:
            for root, model in self.models().items():
                target._change_model(root, **asdict(model))
            found = (record for _, record in source.rows.records(txn) if record is not None)
            records = filter(wanted, found)
            while some := list(islice(records, COPIED_AT_ONCE)):
                with into.writing() as writing:
                    into.make_namespace(writing)
                    for record in some:
                        into.rows.store_copy(writing, source.rows, txn, record)
                copied += len(some)
        target.sync()
        return copied

    # Whether they are whole.

    def verify(self, on_progress: Callable[[int, int], None] | None = None) -> VerifyReport:
        """Read and check everything in this namespace.

        Args:
            on_progress: called with (states done, states to do).
        """
        return verify(self._live, self._rows, on_progress)

    @staticmethod
    def salvage(path: str | os.PathLike[str]) -> Salvaged:
        """Save what is whole of a store that `open` refuses with `DamagedStoreError`.

        The damaged file is kept beside the new one. Nobody may have the store open.

        Raises:
            StoreOpenError: nothing can be found in the file.
        """
        return salvage(folder_at(path, read_only=True))

    def repair(self, report: VerifyReport) -> None:
        """Drop the states that a report found damaged, and what belongs to none."""
        self._session.require_writable()
        repair(self._live, self._rows, report, self._session.wait_s)

    # What is known of models, uses and sizes.

    def name_model(self, root: StateKey, name: str, layout: str = "", reason: str = "") -> None:
        """Remember what a person calls the model behind `root`, what its states keep, and why."""
        known = self.models().get(root, UNKNOWN)
        if (known.name, known.layout, known.reason) == (name, layout, reason) or self.read_only:
            return
        self._change_model(root, name=name, layout=layout, reason=reason)

    def set_fidelity(
        self, root: StateKey, fidelity: str | float | None, measured_with: str | None = None
    ) -> None:
        """Remember what `HCacheEngine(fidelity="auto")` is to use for the model behind `root`.

        Args:
            fidelity: a position of the dial, or a share from 0 to 1; None forgets it.
            measured_with: with which states, see `HCacheEngine.measured_with`: an engine with
                others does not follow it. None is for all.

        Raises:
            ValueError: neither.
            StoreError: the store is open for reading only.
        """
        if not is_fidelity(fidelity):
            raise ValueError(f"fidelity is a name or a share from 0 to 1, not {fidelity!r}")
        self._change_model(root, fidelity=fidelity, measured_with=measured_with)

    def _change_model(self, root: StateKey, **fields: str | float | None) -> None:
        with self._writing() as txn:
            change_model(txn, self._rows.prefix + root, **fields)

    def models(self) -> dict[StateKey, StoredModel]:
        """The models that have stored states here, by root key."""
        with self._session.reading() as txn:
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
        self._uses.add(
            used,
            hits=len(used),
            misses=misses,
            hit_tokens=hit_tokens,
            missed_tokens=missed_tokens,
            damaged=damaged,
        )

    def flush_uses(self, wait_s: float | None = None) -> None:
        """Write down which states were used; a read-only store forgets it."""
        self._uses.flush(wait_s)

    def entry(self, key: StateKey) -> Entry | None:
        """What the store knows of a state besides its record."""
        with self._session.reading() as txn:
            return self._rows.entry(txn, key)

    def entries(self) -> Iterator[tuple[StateKey, Entry]]:
        """The same of all states."""
        with self._session.reading() as txn:
            yield from self._rows.entries(txn)

    def counters(self) -> Counters:
        """What has happened in this namespace."""
        with self._session.reading() as txn:
            return self._rows.counters(txn)

    def totals(self) -> dict[StateKey, Totals]:
        """Sums over the states of this namespace, by the root key of their model."""
        with self._session.reading() as txn:
            return self._rows.totals(txn)

    def used_bytes(self) -> int:
        """Bytes that everything in the store takes inside its file."""
        with self._session.reading() as txn:
            return txn.used_bytes()

    def file_bytes(self) -> int:
        """Bytes of the store's file on disk."""
        return self._live.file_bytes()

    def stats(self) -> StoreStats:
        """What this namespace holds, in numbers."""
        return stats_of(self)

    def namespaces(self) -> list[str]:
        """The names of all namespaces; those that belong to another one are that one."""
        return sorted({name.partition(BELONGS)[0] for name in self.all_namespaces()})

    def all_namespaces(self) -> list[str]:
        """The names of all namespaces; those that belong to another one begin with its name."""
        with self._session.reading() as txn:
            return sorted(namespaces_in(txn))

    def delete_namespace(self, name: str) -> bool:
        """Delete a namespace with everything in it, and with those that belong to it.

        Returns:
            False where there was none.
        """
        with self._writing() as txn:
            prefixes = namespaces_in(txn)
            its = [each for each in prefixes if belongs(each, name)]
            for each in its:
                NamespaceRows(prefixes[each]).clear(txn)
                if each != self.namespace:
                    drop_namespace(txn, each)
            return bool(its)

    # The end.

    def sync(self) -> None:
        """Write everything that was stored through to the disk."""
        self._session.sync()

    def close(self) -> None:
        """Write down uses, sync and close. Closing twice does nothing."""
        if not self._session.is_open:
            return
        with suppress(StoreError):  # what was counted is lost then, nothing else
            self.flush_uses()
        self._session.close()

    def __enter__(self: Its) -> Its:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class StoreReader:
    """Reads values inside one read transaction. The views it gives die with it."""

    def __init__(self, txn: Transaction, rows: NamespaceRows) -> None:
        self._txn = txn
        self._rows = rows

    def record(self, key: StateKey) -> StateRecord | None:
        """The record of a state; None where there is none that can be read."""
        return self._rows.record(self._txn, key)

    def expect(self, first: Mapping[StateKey, tuple[int, int]]) -> None:
        """These states are about to be read, each from a (layer, chunk) on."""

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

    def load(self, key: StateKey, layer: int, chunk: int) -> int:
        """Bring a chunk's value into memory as it is stored; its bytes, 0 where there is none."""
        return self._rows.load(self._txn, key, layer, chunk)


def _check_namespace(name: str) -> None:
    if not 0 < len(name.encode()) <= 256:
        raise ValueError(f"a namespace has 1 to 256 bytes, not {len(name.encode())}")
    if BELONGS in name:
        raise ValueError(f"{name!r} has a character that no namespace may have: {BELONGS!r}")


def open_again(
    path: str,
    namespace: str,
    durability: Durability,
    write_wait_s: float | None,
    read_only: bool,
) -> StateStore:
    """A store in another process, perhaps a namespace that belongs to another one."""
    owner, _, purpose = namespace.rpartition(BELONGS)
    if owner:
        with open_again(path, owner, durability, write_wait_s, read_only) as store:
            return store.beside(purpose)
    return StateStore.open(
        path,
        namespace=namespace,
        durability=durability,
        write_wait_s=write_wait_s,
        read_only=read_only,
    )
