"""A store in shards: many stores of one file each, seen as one.

A document is stored in the shard that its text places it in, among those that may be written, and
is found in whichever has it: so shards come and go without a state being moved. What is read of one
key comes from the first shard that has it; those that may be written come first. A put is one
transaction in each shard that it concerns. A shard that cannot be opened or read is as if it were
empty, which the log and `verify` say; no other shard is concerned.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from heapq import merge
from pathlib import Path
from typing import Any, TypeVar

from hcache_rag.errors import MissingStateError, StoreError, StoreOpenError
from hcache_rag.state import StateKey, StateRecord
from hcache_rag.store.backend import Durability
from hcache_rag.store.cipher import KeySource
from hcache_rag.store.description import belonging
from hcache_rag.store.manifest import Manifest, Shard
from hcache_rag.store.models import StoredModel
from hcache_rag.store.placement import Placement
from hcache_rag.store.remote import Near, RemoteStore
from hcache_rag.store.rows import NewState
from hcache_rag.store.states import DEFAULT_NAMESPACE, StateStore, StoreReader, open_again
from hcache_rag.store.tables import Counters, Entry, Totals
from hcache_rag.store.verify import Damage, VerifyReport
from hcache_rag.texts import ANCHOR_CHARS, Anchors, Hashes, JoinedView, TextView, anchor_hashes

logger = logging.getLogger("hcache_rag")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Opened:
    """A shard that is open; it may be written unless its store is read-only.

    `is_final`: it never changes any more.
    """

    shard: Shard
    store: StateStore
    is_final: bool

    @property
    def name(self) -> str:
        return self.shard.name


class ShardedStore(StateStore):
    """The shards of a manifest, seen through one namespace. Use `StateStore.open`. Thread-safe.

    Attributes:
        down: shards that could not be opened, by name, and why.
    """

    def __init__(
        self,
        manifest: Manifest,
        namespace: str,
        *,
        read_only: bool,
        opened: Sequence[_Opened],
        down: Mapping[str, str],
        near: Near | None = None,
    ) -> None:
        self.manifest = manifest
        self.path = manifest.path.parent
        self.namespace = namespace
        self.read_only = read_only
        self.down = dict(down)
        self._opened = sorted(opened, key=lambda shard: shard.store.read_only)
        self._writable = {s.name: s.store for s in self._opened if not s.store.read_only}
        self._placement = Placement(sorted(self._writable))
        self._near = near
        self._anchors: dict[str, Anchors] = {}
        self._is_open = True

    @classmethod
    def open_manifest(
        cls,
        path: Path,
        *,
        namespace: str = DEFAULT_NAMESPACE,
        key: KeySource | None = None,
        durability: Durability = "fsync",
        write_wait_s: float | None = None,
        read_only: bool = False,
    ) -> ShardedStore:
        """See `StateStore.open`; published shards are opened for reading only.

        Raises:
            StoreOpenError: no manifest, or not one of its shards can be opened.
        """
        manifest = Manifest.open(path)
        opened: list[_Opened] = []
        down: dict[str, str] = {}
        near = None
        if any(shard.is_remote for shard in manifest.shards):
            near = Near(manifest.path.parent / "near", namespace, manifest.near_max_bytes)
        for shard in manifest.shards:
            is_fixed = read_only or shard.is_published
            if is_fixed and _is_not_begun(shard):
                continue
            try:
                if near is not None and shard.is_remote:
                    if key is not None:
                        raise StoreOpenError("what is encrypted is not read from afar")
                    store: StateStore = RemoteStore.open_url(shard.place, near, namespace=namespace)
                else:
                    store = StateStore.open(
                        shard.folder,
                        namespace=namespace,
                        key=key,
                        durability=durability,
                        write_wait_s=write_wait_s,
                        read_only=is_fixed,
                    )
                opened.append(_Opened(shard, store, shard.is_published))
            except StoreError as error:
                down[shard.name] = str(error)
                logger.warning("shard %s cannot be used: %s", shard.name, error)
        if down and not opened:
            if near is not None:
                near.close()
            raise StoreOpenError(f"no shard of {path} can be opened: {next(iter(down.values()))}")
        return cls(manifest, namespace, read_only=read_only, opened=opened, down=down, near=near)

    def beside(self, purpose: str, *, namespace_max_bytes: int | None = None) -> StateStore:
        """See `StateStore.beside`; a limit is shared by the shards that may be written."""
        share = None
        if namespace_max_bytes is not None and self._writable:
            share = max(1 << 20, namespace_max_bytes // len(self._writable))
        opened = [
            _Opened(s.shard, s.store.beside(purpose, namespace_max_bytes=share), s.is_final)
            for s in self._all
            if not s.shard.is_remote
        ]
        return ShardedStore(
            self.manifest,
            belonging(self.namespace, purpose),
            read_only=self.read_only,
            opened=opened,
            down=self.down,
        )

    def has_beside(self, purpose: str) -> bool:
        return any(self._asked(lambda store: store.has_beside(purpose)))

    @property
    def store_id(self) -> str:
        self._require_open()
        return self.manifest.id

    @property
    def max_bytes(self) -> int | None:
        """None: limits are those of shards."""
        return None

    # Which shards.

    @property
    def _all(self) -> list[_Opened]:
        self._require_open()
        return self._opened

    def _require_open(self) -> None:
        if not self._is_open:
            raise StoreError(f"the store {self.path} is closed")

    def _asked(self, ask: Callable[[StateStore], T], anchor: Hashes | None = None) -> Iterator[T]:
        """What each shard answers; one that cannot is passed over.

        Args:
            anchor: of a text that is asked for; final shards that have none such are passed over.
        """
        for shard in self._all:
            known = self._anchors.get(shard.name)
            if (
                anchor is not None
                and len(anchor)
                and known is not None
                and not known.places(anchor)[0]
            ):
                continue
            try:
                answer = ask(shard.store)
            except StoreError as error:
                self._require_open()
                logger.warning("shard %s cannot be read: %s", shard.name, error)
                continue
            yield answer

    def _to_write(self) -> Mapping[str, StateStore]:
        self._require_open()
        if self.read_only:
            raise StoreError(f"the store {self.path} is open for reading only")
        if not self._writable:
            raise StoreError(f"all shards of {self.path} are published: add one to write to")
        return self._writable

    def _holder(self, key: StateKey) -> StateStore | None:
        """The shard that has a state."""
        return next((s.store for s in self._all if s.store.record(key) is not None), None)

    # States.

    def put_all(self, states: Iterable[NewState]) -> int:
        """See `StateStore.put_all`: one transaction for each shard."""
        writable = self._to_write()
        by_shard: dict[str, list[NewState]] = {}
        for state in states:
            whole = NewState(state.record, tuple(state.values), state.saved_s, state.owners)
            whole.require_key()
            by_shard.setdefault(self._placement.place(state.record.text), []).append(whole)
        num_bytes = 0
        for name, its in by_shard.items():
            num_bytes += writable[name].put_all(its)
            # Where other shards were there, they may have been placed in one of these.
            for other in writable.keys() - {name}:
                with writable[other].reading() as reader:
                    stale = [s.record.key for s in its if reader.record(s.record.key) is not None]
                for key in stale:
                    writable[other].delete(key)
        return num_bytes

    def record(self, key: StateKey) -> StateRecord | None:
        found = (shard.store.record(key) for shard in self._all)
        return next((record for record in found if record is not None), None)

    def records(self) -> Iterator[StateRecord]:
        walks = [shard.store.records() for shard in self._all]
        return _each_once(merge(*walks, key=lambda r: r.key), lambda record: record.key)

    def find(self, text: str) -> list[StateRecord]:
        found: dict[StateKey, StateRecord] = {}
        anchor = anchor_hashes(text[:ANCHOR_CHARS])
        for records in self._asked(lambda store: store.find(text), anchor):
            for record in records:
                found.setdefault(record.key, record)
        return list(found.values())

    @contextmanager
    def looking(self) -> Iterator[TextView]:
        with ExitStack() as stack:
            views = list(self._asked(lambda store: stack.enter_context(store.looking())))
            if len(views) == len(self._opened):
                finals = zip(self._opened, views, strict=True)
                self._anchors = {shard.name: v.anchors for shard, v in finals if shard.is_final}
            yield JoinedView(views)

    @contextmanager
    def reading(self, keys: Collection[StateKey] = ()) -> Iterator[StoreReader]:
        """See `StateStore.reading`."""
        with ExitStack() as stack:
            readers = self._asked(lambda store: stack.enter_context(store.reading(keys)))
            yield _JoinedReader(list(readers))

    def prefetch(self, texts: Iterable[str]) -> None:
        if self._near is not None:
            known = list(texts)
            for shard in self._all:
                shard.store.prefetch(known)

    def delete(self, key: StateKey, *, unless_changed: StateRecord | None = None) -> bool:
        """See `StateStore.delete`.

        Raises:
            StoreError: a published shard has it.
        """
        if unless_changed is not None:
            record = self.record(key)
            if record is not None and record.to_bytes() != unless_changed.to_bytes():
                return False
        deleted = [store.delete(key) for store in self._to_write().values()]
        if self.record(key) is not None:
            raise StoreError(f"state {key.hex()} is in a shard that is published")
        return any(deleted)

    # Whose states they are: kept in the shards that may be written.

    def assign_all(
        self,
        owned: Mapping[str, Iterable[StateKey]],
        *,
        add: bool = False,
        delete: bool = False,
        within: str | None = None,
    ) -> int:
        wanted = {owner: list(keys) for owner, keys in owned.items()}
        deleted = 0
        for store in self._to_write().values():
            its = {owner: [k for k in keys if k in store] for owner, keys in wanted.items()}
            deleted += store.assign_all(its, add=add, delete=delete, within=within)
        return deleted

    def keys_of(self, owner: str) -> list[StateKey]:
        found = self._asked(lambda store: store.keys_of(owner))
        return sorted({key for keys in found for key in keys})

    def delete_owner(self, *names: str) -> int:
        return sum(store.delete_owner(*names) for store in self._to_write().values())

    def gc(self, keep: Collection[StateKey] | None = None) -> int:
        """See `StateStore.gc`; published shards stay as they are."""
        return sum(store.gc(keep) for store in self._to_write().values())

    def compact(self) -> int:
        """See `StateStore.compact`: one shard after another."""
        for store in self._to_write().values():
            store.compact()
        return self.file_bytes()

    def copy_to(self, target: StateStore, wanted: Callable[[StateRecord], bool]) -> int:
        """See `StateStore.copy_to`; the target is a store of one file."""
        return sum(shard.store.copy_to(target, wanted) for shard in self._all)

    # Whether they are whole.

    def verify(self, on_progress: Callable[[int, int], None] | None = None) -> VerifyReport:
        """See `StateStore.verify`; a shard that is down is a damage without a key."""
        sizes = list(self._asked(lambda store: sum(1 for _ in store.entries())))
        total, before = sum(sizes), 0
        reports = []
        for shard in self._all:

            def advance(done: int, _its: int, before: int = before) -> None:
                if on_progress is not None:
                    on_progress(min(before + done, total), total)

            reports.append(shard.store.verify(advance))
            before += reports[-1].states
        down = [
            Damage(b"", "", False, f"shard {name} cannot be used: {why}")
            for name, why in self.down.items()
        ]
        return VerifyReport(
            sum(report.states for report in reports),
            sum(report.values for report in reports),
            sum(report.num_bytes for report in reports),
            (*(damage for report in reports for damage in report.damaged), *down),
            sum(report.strays for report in reports),
            all(report.is_sum_right for report in reports),
        )

    def repair(self, report: VerifyReport) -> None:
        """See `StateStore.repair`; what is damaged in published shards stays, and is not used."""
        damaged = tuple(damage for damage in report.damaged if damage.key)
        for store in self._to_write().values():
            store.repair(replace(report, damaged=damaged))

    # What is known of models, uses and sizes.

    def name_model(self, root: StateKey, name: str, layout: str = "", reason: str = "") -> None:
        for store in self._writable.values():
            store.name_model(root, name, layout, reason)

    def set_fidelity(
        self, root: StateKey, fidelity: str | float | None, measured_with: str | None = None
    ) -> None:
        for store in self._to_write().values():
            store.set_fidelity(root, fidelity, measured_with)

    def models(self) -> dict[StateKey, StoredModel]:
        found: dict[StateKey, StoredModel] = {}
        for models in self._asked(lambda store: store.models()):
            for root, model in models.items():
                if root not in found or found[root].fidelity is None:
                    found[root] = model
        return found

    def count_use(
        self,
        keys: Iterable[StateKey] = (),
        *,
        misses: int = 0,
        hit_tokens: int = 0,
        missed_tokens: int = 0,
        damaged: int = 0,
    ) -> None:
        if not self._all:
            return
        first = self._opened[0].store
        used: dict[StateStore, list[StateKey]] = {first: []}
        for key in keys:
            used.setdefault(self._holder(key) or first, []).append(key)
        for store, its in used.items():
            rest = {"misses": misses, "hit_tokens": hit_tokens, "missed_tokens": missed_tokens}
            store.count_use(its, **(rest | {"damaged": damaged} if store is first else {}))

    def flush_uses(self, wait_s: float | None = None) -> None:
        for shard in self._all:
            shard.store.flush_uses(wait_s)

    def entry(self, key: StateKey) -> Entry | None:
        found = self._asked(lambda store: store.entry(key))
        return next((entry for entry in found if entry is not None), None)

    def entries(self) -> Iterator[tuple[StateKey, Entry]]:
        walks = [shard.store.entries() for shard in self._all]
        return _each_once(merge(*walks, key=lambda pair: pair[0]), lambda pair: pair[0])

    def counters(self) -> Counters:
        total = Counters()
        for its in self._asked(lambda store: store.counters()):
            more = {f.name: getattr(its, f.name) for f in fields(its) if f.name != "clock"}
            total = total.plus(**more).with_clock(its.clock)
        return total

    def totals(self) -> dict[StateKey, Totals]:
        found: dict[StateKey, Totals] = {}
        for totals in self._asked(lambda store: store.totals()):
            for root, its in totals.items():
                sums = found.get(root, Totals())
                found[root] = Totals(
                    *(getattr(sums, f.name) + getattr(its, f.name) for f in fields(Totals))
                )
        return found

    def used_bytes(self) -> int:
        return sum(self._asked(lambda store: store.used_bytes()))

    def file_bytes(self) -> int:
        return sum(self._asked(lambda store: store.file_bytes()))

    def namespaces(self) -> list[str]:
        found = self._asked(lambda store: store.namespaces())
        return sorted({name for names in found for name in names})

    def all_namespaces(self) -> list[str]:
        found = self._asked(lambda store: store.all_namespaces())
        return sorted({name for names in found for name in names})

    def delete_namespace(self, name: str) -> bool:
        """See `StateStore.delete_namespace`; published shards keep theirs."""
        deleted = [store.delete_namespace(name) for store in self._to_write().values()]
        return any(deleted)

    # The end.

    def sync(self) -> None:
        self._require_open()
        for store in self._writable.values():
            store.sync()

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            for shard in self._opened:
                shard.store.close()
            if self._near is not None:
                self._near.close()

    def __reduce__(self) -> tuple[Callable[..., StateStore], tuple[Any, ...]]:
        for shard in self._opened:
            shard.store.__reduce__()  # raises where there is a key
        path = str(self.manifest.path)
        return open_again, (path, self.namespace, "fsync", None, self.read_only)


class _JoinedReader(StoreReader):
    """Reads from the first reader that has a state."""

    def __init__(self, readers: Sequence[StoreReader]) -> None:
        self._readers = readers
        self._known: dict[StateKey, StoreReader] = {}

    def record(self, key: StateKey) -> StateRecord | None:
        found = (reader.record(key) for reader in self._readers)
        return next((record for record in found if record is not None), None)

    def value(self, key: StateKey, layer: int, chunk: int) -> memoryview:
        reader = self._holder(key)
        if reader is None:
            raise MissingStateError(key, f"layer {layer}, chunk {chunk} is in no shard")
        return reader.value(key, layer, chunk)

    def load(self, key: StateKey, layer: int, chunk: int) -> int:
        reader = self._holder(key)
        return 0 if reader is None else reader.load(key, layer, chunk)

    def _holder(self, key: StateKey) -> StoreReader | None:
        found = self._known.get(key)
        if found is None:
            found = next((r for r in self._readers if r.record(key) is not None), None)
            if found is not None:
                self._known[key] = found
        return found


def _each_once(walk: Iterable[T], key: Callable[[T], StateKey]) -> Iterator[T]:
    """What a sorted walk gives, the first of each key."""
    last = None
    for each in walk:
        if key(each) != last:
            last = key(each)
            yield each


def _is_not_begun(shard: Shard) -> bool:
    """Whether nobody has stored anything in it yet."""
    return not shard.is_remote and not (shard.folder / "data.mdb").exists()
