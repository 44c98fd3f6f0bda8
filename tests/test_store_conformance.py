"""Both stores keep the contract, through any sequence of operations; what goes is worth least."""

from __future__ import annotations

import pickle
import random
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from store_conformance import (
    MishapError,
    StoreConformance,
    a_record,
    check_sums,
    failing,
    held,
    put,
    stored,
    texts_in,
    values,
)

from hcache_rag.errors import StoreFullError
from hcache_rag.state import StateRecord
from hcache_rag.store import NewState, StateStore, states
from hcache_rag.store.backend import Durability
from hcache_rag.store.eviction import priority, victims

MACHINE_LIMIT = 1 << 22


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody who reads here is about to end."""
    monkeypatch.setattr(states, "PAUSE_S", 0.0)


# --- the contract -------------------------------------------------------------------------------


class TestOnDisk(StoreConformance):
    """LMDB, without waiting for the disk after each put: the file is the same."""

    is_persistent = True
    key: bytes | None = None
    path: Path

    @pytest.fixture(autouse=True)
    def _path(self, tmp_path: Path) -> None:
        self.path = tmp_path / "store"

    def open_store(
        self,
        namespace: str = "default",
        *,
        max_bytes: int | None = None,
        namespace_max_bytes: int | None = None,
    ) -> StateStore:
        return StateStore.open(
            self.path,
            namespace=namespace,
            max_bytes=max_bytes,
            namespace_max_bytes=namespace_max_bytes,
            key=self.key,
            durability="fast",
        )

    def largest_size(self) -> int:
        return (self.path / "data.mdb").stat().st_size


class TestEncrypted(TestOnDisk):
    """LMDB with a key."""

    key = bytes(range(32))


class TestInMemory(StoreConformance):
    """The reference; the first store that a test opens stays, and the others are beside it."""

    first: StateStore | None

    @pytest.fixture(autouse=True)
    def _first(self) -> None:
        self.first = None

    def open_store(
        self,
        namespace: str = "default",
        *,
        max_bytes: int | None = None,
        namespace_max_bytes: int | None = None,
    ) -> StateStore:
        if self.first is None:
            self.first = StateStore.in_memory(namespace=namespace)
        return StateStore.in_memory(
            namespace=namespace,
            max_bytes=max_bytes,
            namespace_max_bytes=namespace_max_bytes,
            beside=self.first,
        )


@pytest.mark.parametrize("durability", ["fsync", "fast"])
def test_a_store_that_was_passed_on_is_the_same_store(
    tmp_path: Path, durability: Durability
) -> None:
    """Pickled, as for a process pool: path, namespace, rights and durability."""
    with (
        StateStore.open(tmp_path / "store", namespace="a", durability=durability) as store,
        pickle.loads(pickle.dumps(store)) as again,
    ):
        put(store, 1)
        assert held(again) == held(store)
        assert (again.namespace, again.path) == ("a", store.path)


def test_a_namespace_that_a_reader_opened_first_is_seen_once_it_is_there(tmp_path: Path) -> None:
    """A read-only store cannot make it, but may wait for whoever does."""
    with (
        StateStore.open(tmp_path / "store") as _,
        StateStore.open(tmp_path / "store", namespace="a", read_only=True) as reader,
        StateStore.open(tmp_path / "store", namespace="a") as writer,
    ):
        put(writer, 1)
        assert held(reader) == held(writer)


# --- any sequence of operations -----------------------------------------------------------------


@dataclass
class Known:
    """What a dict knows of a state."""

    fill: int
    size: int
    is_preamble: bool
    owners: set[str] = field(default_factory=set)
    hits: int = 0

    @property
    def values(self) -> list[tuple[int, int, bytes]]:
        return values(self.fill, self.size)


NAMESPACES = st.sampled_from(["default", "other"])
NUMBERS = st.integers(0, 11)
SOME = st.lists(NUMBERS, max_size=6, unique=True)
FEW = st.lists(NUMBERS, max_size=3, unique=True)
OWNERS = st.sampled_from(["a", "b", "c"])
FILLS = st.integers(0, 255)
SIZES = st.sampled_from([0, 3, 300, 2040, 5000, 12_000, 20_000])

PREAMBLES = (10, 11)
"""Few, so that a limited store cannot be filled with them."""


def the_record(number: int) -> StateRecord:
    """Two documents have one text; one is long; the last ones are preambles."""
    texts = {0: "One text.", 1: "One text.", 2: "A long text. " * 50}
    return a_record(number, text=texts.get(number), is_preamble=number in PREAMBLES)


RECORDS = {number: the_record(number) for number in range(12)}
KEYS = {number: record.key for number, record in RECORDS.items()}


class StoreMachine(RuleBasedStateMachine):
    """A store in two namespaces, and a dict for each of them."""

    limit: int | None = None

    def __init__(self) -> None:
        super().__init__()
        self.stores: dict[str, StateStore] = {}
        self.known: dict[str, dict[int, Known]] = {"default": {}, "other": {}}
        self.hits: dict[str, int] = {"default": 0, "other": 0}
        self.open_all()

    def open_all(self) -> None:
        """Open both namespaces."""
        raise NotImplementedError

    def reconcile(self, pinned: Sequence[int] = (), new: Sequence[int] = ()) -> None:
        """Forget what a limited store let go, which must have been allowed to."""
        for name, store in self.stores.items():
            there = set(held(store))
            gone = [number for number in self.known[name] if KEYS[number] not in there]
            assert not gone or self.limit is not None
            assert not set(gone) & {*pinned, *new, *PREAMBLES}
            for number in gone:
                del self.known[name][number]

    def learn(self, name: str, number: int, fill: int, size: int, owners: Sequence[str]) -> None:
        before = self.known[name].get(number)
        kept = before.owners if before is not None else set()
        is_preamble = number in PREAMBLES
        self.known[name][number] = Known(fill, size, is_preamble, {*kept, *owners})

    @rule(name=NAMESPACES, number=NUMBERS, fill=FILLS, size=SIZES, owners=st.sets(OWNERS))
    def put(self, name: str, number: int, fill: int, size: int, owners: set[str]) -> None:
        its_owners = sorted(owners)
        store = self.stores[name]
        num_bytes = store.put(RECORDS[number], values(fill, size), owners=its_owners)
        assert num_bytes == sum(len(value) for _, _, value in values(fill, size))
        self.learn(name, number, fill, size, its_owners)
        self.reconcile(new=[number])

    @rule(name=NAMESPACES, numbers=FEW, fill=FILLS, size=SIZES, fails=st.booleans())
    def put_all(self, name: str, numbers: list[int], fill: int, size: int, fails: bool) -> None:
        states = [
            NewState(RECORDS[number], values(fill + number, size), owners=["c"])
            for number in numbers
        ]
        if fails:
            with pytest.raises(MishapError):
                self.stores[name].put_all([*states, NewState(RECORDS[0], failing())])
            return
        self.stores[name].put_all(states)
        for number in numbers:
            self.learn(name, number, fill + number, size, ["c"])
        self.reconcile(new=numbers)

    @rule(name=NAMESPACES, pinned=SOME, numbers=SOME, fill=FILLS, size=SIZES)
    def put_while_others_are_read(
        self, name: str, pinned: list[int], numbers: list[int], fill: int, size: int
    ) -> None:
        store, before = self.stores[name], dict(self.known[name])
        with store.reading(keys=[KEYS[number] for number in pinned]) as reader:
            for number in numbers:
                try:
                    store.put(RECORDS[number], values(fill, size))
                except StoreFullError:  # the reader holds on to what went
                    assert self.limit is not None
                    self.reconcile(pinned)
                else:
                    self.learn(name, number, fill, size, [])
                    self.reconcile(pinned, [number])
            for number, known in before.items():
                for layer, chunk, value in known.values:
                    assert bytes(reader.value(KEYS[number], layer, chunk)) == value

    @rule(name=NAMESPACES, number=NUMBERS)
    def delete(self, name: str, number: int) -> None:
        was_there = self.known[name].pop(number, None) is not None
        assert self.stores[name].delete(KEYS[number]) is was_there

    @rule(name=NAMESPACES, owner=OWNERS, numbers=SOME)
    def assign(self, name: str, owner: str, numbers: list[int]) -> None:
        its = [number for number in numbers if number in self.known[name]]
        self.stores[name].assign(owner, [KEYS[number] for number in its])
        for number, known in self.known[name].items():
            (known.owners.add if number in its else known.owners.discard)(owner)

    @rule(name=NAMESPACES, owner=OWNERS)
    def delete_owner(self, name: str, owner: str) -> None:
        gone = [n for n, known in self.known[name].items() if known.owners == {owner}]
        assert self.stores[name].delete_owner(owner) == len(gone)
        for number in gone:
            del self.known[name][number]
        for known in self.known[name].values():
            known.owners.discard(owner)

    @rule(name=NAMESPACES)
    def gc(self, name: str) -> None:
        all_known = self.known[name]
        gone = [n for n, known in all_known.items() if not (known.owners or known.is_preamble)]
        assert self.stores[name].gc() == len(gone)
        for number in gone:
            del all_known[number]

    @rule(name=NAMESPACES, numbers=SOME)
    def gc_all_but(self, name: str, numbers: list[int]) -> None:
        all_known = self.known[name]
        gone = [n for n in all_known if n not in numbers and n not in PREAMBLES]
        assert self.stores[name].gc(keep=[KEYS[number] for number in numbers]) == len(gone)
        for number in gone:
            del all_known[number]

    @rule(name=NAMESPACES, numbers=SOME)
    def use(self, name: str, numbers: list[int]) -> None:
        store = self.stores[name]
        before = dict(store.entries())
        store.count_use([KEYS[number] for number in numbers])
        store.flush_uses()
        self.hits[name] += len(numbers)
        for number in set(numbers) & set(self.known[name]):
            self.known[name][number].hits += 1
            entry = store.entry(KEYS[number])
            assert entry is not None
            assert entry.priority > before[KEYS[number]].priority

    @rule(name=NAMESPACES, by=NAMESPACES)
    def delete_namespace(self, name: str, by: str) -> None:
        """Of both ways: by itself, and by another after which it is opened anew."""
        if name != by:
            self.stores[name].close()
        assert self.stores[by].delete_namespace(name)
        self.known[name].clear()
        self.hits[name] = 0
        if name != by:
            self.open_all()

    @invariant()
    def holds_what_the_dict_holds(self) -> None:
        for name, store in self.stores.items():
            known = self.known[name]
            assert held(store) == sorted(KEYS[number] for number in known)
            for number, key in KEYS.items():
                assert stored(store, key) == (known[number].values if number in known else [])
            for owner in "abc":
                its = sorted(KEYS[n] for n, each in known.items() if owner in each.owners)
                assert store.keys_of(owner) == its
            entries = dict(store.entries())
            assert {n: entries[KEYS[n]].hits for n in known} == {
                n: each.hits for n, each in known.items()
            }
            assert store.counters().hits == self.hits[name]
            check_sums(store)

    @invariant()
    def finds_what_the_dict_holds(self) -> None:
        for name, store in self.stores.items():
            documents = [number for number in self.known[name] if number not in PREAMBLES]
            texts = {RECORDS[number].text for number in documents}
            for number in KEYS:
                text = RECORDS[number].text
                its = sorted(KEYS[n] for n in documents if RECORDS[n].text == text)
                assert sorted(record.key for record in store.find(text)) == its
                assert texts_in(store, text) == [text] * (text in texts)

    @invariant()
    def keeps_its_limit(self) -> None:
        if self.limit is not None:
            assert all(store.used_bytes() <= self.limit for store in self.stores.values())

    def teardown(self) -> None:
        for store in self.stores.values():
            store.close()


class MachineInMemory(StoreMachine):
    """The reference."""

    def open_all(self) -> None:
        if not self.stores:
            self.stores["default"] = StateStore.in_memory(max_bytes=self.limit)
        for name, beside in (("other", "default"), ("default", "other")):
            if name not in self.stores or not self.stores[name]._session.is_open:
                self.stores[name] = StateStore.in_memory(namespace=name, beside=self.stores[beside])


class MachineOnDisk(StoreMachine):
    """LMDB, which may be closed and opened again, or be lost but for its file."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="hcache-store-"))
        super().__init__()

    def open_all(self) -> None:
        for name in ("default", "other"):
            if name not in self.stores or not self.stores[name]._session.is_open:
                self.stores[name] = StateStore.open(
                    self.folder / "store",
                    namespace=name,
                    max_bytes=self.limit,
                    durability="fast",
                )

    @rule(name=NAMESPACES, numbers=SOME)
    def close_and_open_again(self, name: str, numbers: list[int]) -> None:
        """What was counted before is written down by closing."""
        self.stores[name].count_use([KEYS[number] for number in numbers])
        self.hits[name] += len(numbers)
        for number in set(numbers) & set(self.known[name]):
            self.known[name][number].hits += 1
        for store in self.stores.values():
            store.close()
        self.open_all()

    @rule()
    def crash(self) -> None:
        """All that is left is the file, as it is between two calls."""
        (self.folder / "left").mkdir()
        shutil.copy(self.folder / "store" / "data.mdb", self.folder / "left")
        mine = self.stores
        try:
            self.stores = {
                name: StateStore.open(self.folder / "left", namespace=name, durability="fast")
                for name in mine
            }
            self.holds_what_the_dict_holds()
            self.finds_what_the_dict_holds()
            for store in self.stores.values():
                assert store.max_bytes == self.limit
                store.put(RECORDS[0], values(1))
                store.close()
        finally:
            self.stores = mine
            shutil.rmtree(self.folder / "left")

    @precondition(lambda self: self.limit is not None)
    @invariant()
    def the_file_keeps_the_limit(self) -> None:
        assert (self.folder / "store" / "data.mdb").stat().st_size <= (self.limit or 0)

    def teardown(self) -> None:
        super().teardown()
        shutil.rmtree(self.folder)


class LimitedMachineInMemory(MachineInMemory):
    """Full after some sixteen large states."""

    limit = MACHINE_LIMIT


class LimitedMachineOnDisk(MachineOnDisk):
    """The same on disk."""

    limit = MACHINE_LIMIT


@pytest.mark.parametrize(
    "machine", [MachineInMemory, MachineOnDisk, LimitedMachineInMemory, LimitedMachineOnDisk]
)
def test_any_sequence_of_operations_leaves_what_a_dict_would_hold(
    machine: type[StoreMachine],
) -> None:
    """Whole states, their owners and uses, sums that agree, and nothing beyond the limit."""
    run_state_machine_as_test(
        machine,
        settings=settings(
            deadline=None,
            derandomize=True,
            max_examples=30,
            phases=[Phase.generate],  # making a failure smaller takes minutes
            stateful_step_count=25,
            suppress_health_check=list(HealthCheck),
        ),
    )


# --- what goes is worth least -------------------------------------------------------------------


@dataclass(frozen=True)
class Documents:
    """Documents of different sizes and costs."""

    sizes: list[int]
    saved_s: list[float]

    @classmethod
    def random(cls, count: int, seed: int, spread: float) -> Documents:
        """Most are short, some are long.

        Args:
            spread: how much the seconds that a byte saves differ, as the deviation of a logarithm.
        """
        numbers = random.Random(seed)
        sizes = [round(1000 * numbers.lognormvariate(3, 1)) for _ in range(count)]
        return cls(sizes, [size * 1e-6 * numbers.lognormvariate(0, spread) for size in sizes])


def requests(documents: Sequence[int], count: int, seed: int) -> list[int]:
    """Zipf's law: the n-th document of the sequence is asked for in proportion to 1/n."""
    weights = [1 / rank for rank in range(1, len(documents) + 1)]
    return random.Random(seed).choices(documents, weights, k=count)


class Cache:
    """A bounded store, reduced to what stays and what goes. This one is the policy under test."""

    def __init__(self, documents: Documents, num_bytes: int) -> None:
        self.documents = documents
        self.num_bytes = num_bytes
        self.ranks: dict[int, float] = {}
        self.hits: dict[int, int] = {}
        self.clock = 0.0
        self.now = 0

    def ask(self, document: int) -> bool:
        """Whether it was there; it is afterwards, unless it is larger than everything."""
        self.now += 1
        if document in self.ranks:
            self.hits[document] += 1
            self.ranks[document] = self.rank(document)
            return True
        size = self.documents.sizes[document]
        if size <= self.num_bytes:
            excess = sum(map(self.documents.sizes.__getitem__, self.ranks)) + size - self.num_bytes
            for victim in self.victims(excess) if excess > 0 else []:
                del self.ranks[victim], self.hits[victim]
            self.hits[document] = 0
            self.ranks[document] = self.rank(document)
        return False

    def rank(self, document: int) -> float:
        """What is asked for now gets this."""
        sizes, saved_s = self.documents.sizes, self.documents.saved_s
        return priority(self.clock, self.hits[document], saved_s[document], sizes[document])

    def victims(self, num_bytes: int) -> list[int]:
        """Those who have to go."""
        sizes = self.documents.sizes
        chosen, last = victims(((r, sizes[d], d) for d, r in self.ranks.items()), num_bytes)
        self.clock = max(self.clock, last)
        return chosen

    def run(self, trace: Sequence[int]) -> list[bool]:
        """Which requests were hits."""
        return [self.ask(document) for document in trace]


class Lru(Cache):
    """Who was asked for longest ago goes first."""

    def rank(self, document: int) -> float:
        return self.now

    def victims(self, num_bytes: int) -> list[int]:
        chosen: list[int] = []
        for document in sorted(self.ranks, key=self.ranks.__getitem__):
            if sum(self.documents.sizes[d] for d in chosen) < num_bytes:
                chosen.append(document)
        return chosen


class Fifo(Lru):
    """Who came first goes first."""

    def rank(self, document: int) -> float:
        return self.ranks.get(document, self.now)


class Lfu(Lru):
    """Who was asked for least goes first; of those, who was asked for longest ago."""

    def rank(self, document: int) -> float:
        return self.hits[document] + self.now * 1e-9


SEEDS = range(6)
SHARES = pytest.mark.parametrize("share", [0.05, 0.2, 0.5])
COUNT = 300


@SHARES
def test_the_policy_saves_no_less_than_any_simpler_one(share: float) -> None:
    """Seconds, over requests of which a few documents get most, whatever a byte saves."""
    saved_s = dict.fromkeys((Cache, Lru, Lfu, Fifo), 0.0)
    for seed in SEEDS:
        documents = Documents.random(COUNT, seed, spread=1.0)
        trace = requests(random.Random(seed).sample(range(COUNT), COUNT), 3000, seed)
        for policy in saved_s:
            hits = policy(documents, int(share * sum(documents.sizes))).run(trace)
            saved_s[policy] += sum(documents.saved_s[d] for d in compress(trace, hits))
    assert saved_s[Cache] >= max(saved_s[rival] for rival in (Lru, Lfu, Fifo)) > 0


@SHARES
def test_the_policy_follows_when_other_documents_are_asked_for(share: float) -> None:
    """Long after the change it hits about as often as a cache that knows nothing of the past."""
    hits = fresh = 0
    for seed in SEEDS:
        documents = Documents.random(COUNT, seed, spread=0.1)
        order = random.Random(seed).sample(range(COUNT), COUNT)
        first = requests(order[: COUNT // 2], 3000, seed)
        second = requests(order[COUNT // 2 :], 3000, seed)
        num_bytes, late = int(share * sum(documents.sizes)), len(second) // 2
        hits += sum(Cache(documents, num_bytes).run([*first, *second])[len(first) + late :])
        fresh += sum(Lru(documents, num_bytes).run(second)[late:])
    assert hits >= 0.9 * fresh > 0


def test_the_victims_are_those_of_lowest_priority_that_make_enough_room() -> None:
    """No more than are needed; the clock rises to the last of them."""
    states = [(3.0, 10, "c"), (1.0, 10, "a"), (4.0, 10, "d"), (2.0, 10, "b")]
    assert victims(states, 0) == ([], 0.0)
    assert victims(states, -5) == ([], 0.0)
    assert victims(states, 1) == (["a"], 1.0)
    assert victims(states, 10) == (["a"], 1.0)
    assert victims(states, 11) == (["a", "b"], 2.0)
    assert victims(states, 1000) == (["a", "b", "c", "d"], 4.0)
    assert victims([], 1) == ([], 0.0)


def test_a_priority_is_what_a_byte_saves_above_the_clock() -> None:
    """The first restore is hoped for, each further one has been seen."""
    assert priority(0.0, 0, 1.0, 100) == pytest.approx(0.01)
    assert priority(5.0, 3, 1.0, 100) == pytest.approx(5.04)
    assert priority(5.0, 3, 1.0, 0) == pytest.approx(9.0)
