"""The contract of every state store, as tests.

Subclass `StoreConformance` in a test module and say how your store is opened:

    class TestMyStore(StoreConformance):
        def open_store(self, namespace="default", *, max_bytes=None, namespace_max_bytes=None):
            return ...
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import replace

import pytest

from hcache_rag.errors import MissingStateError, StoreError, StoreFullError
from hcache_rag.layout import LayerFormat, Representation, StateLayout
from hcache_rag.state import StateKey, StateRecord, child_key, root_key, token_array
from hcache_rag.store import NewState, StateStore
from hcache_rag.store.backend import Transaction
from hcache_rag.store.tables import Counters, Totals
from hcache_rag.store.uses import AT_ONCE
from hcache_rag.texts import find_texts

LAYERS, CHUNKS = 3, 2
ROOT, OTHER_ROOT = root_key("model", "tokenizer"), root_key("other model", "tokenizer")
LAYOUT = StateLayout((LayerFormat(Representation.KV, "float32"),) * LAYERS)

LIMIT = 1 << 22
STATE_BYTES = 102_000
"""Not less than one state of `values()` takes: some forty of them fill `LIMIT`."""

Value = tuple[int, int, bytes]


def a_record(
    number: int = 0,
    *,
    text: str | None = None,
    parent: StateKey = ROOT,
    root: StateKey = ROOT,
    is_preamble: bool = False,
) -> StateRecord:
    """A state; each number and each text is another one."""
    words = f"This is document {number}, long enough to be looked up." if text is None else text
    ids = token_array([number, *map(ord, words)])
    return StateRecord(child_key(parent, ids), parent, root, ids, words, LAYOUT, 1.5, is_preamble)


def values(fill: int = 0, size: int = 13_000) -> list[Value]:
    """A value for every chunk of every layer, each with bytes of its own."""
    return [
        (layer, chunk, bytes([fill % 256, layer, chunk]) * (size // 3))
        for layer in range(LAYERS)
        for chunk in range(CHUNKS)
    ]


def stored(store: StateStore, key: StateKey) -> list[Value]:
    """All values of a state that are there."""
    found = []
    with store.reading() as reader:
        for layer in range(LAYERS):
            for chunk in range(CHUNKS):
                with suppress(MissingStateError):
                    found.append((layer, chunk, bytes(reader.value(key, layer, chunk))))
    return found


def texts_in(store: StateStore, prompt: str) -> list[str]:
    """The store's texts that a prompt holds."""
    return [match.text for match in find_texts(prompt, [store])]


def keys(numbers: Iterable[int]) -> list[StateKey]:
    """Of some documents, sorted."""
    return sorted(a_record(number).key for number in numbers)


def held(store: StateStore) -> list[StateKey]:
    """Of all states."""
    return [record.key for record in store.records()]


def put(store: StateStore, *numbers: int, owners: Iterable[str] = ()) -> None:
    """Store some documents, each with values of its own."""
    for number in numbers:
        store.put(a_record(number), values(number), owners=list(owners))


def put_one_by_one(store: StateStore, states: Iterable[NewState]) -> None:
    """Each in a transaction of its own."""
    for state in states:
        store.put(state.record, state.values)


def check_sums(store: StateStore) -> None:
    """Entries, totals and stats agree with a recount of the records."""
    records = {record.key: record for record in store.records()}
    entries = dict(store.entries())
    assert list(entries) == list(records)
    counted: dict[StateKey, Totals] = {}
    for key, record in records.items():
        entry = entries[key]
        assert entry == store.entry(key)
        assert (entry.num_tokens, entry.is_preamble) == (record.num_tokens, record.is_preamble)
        assert entry.num_bytes >= sum(len(value) for _, _, value in stored(store, key))
        totals = counted.get(record.root, Totals())
        counted[record.root] = Totals(
            totals.documents + (not record.is_preamble),
            totals.preambles + record.is_preamble,
            totals.num_tokens + record.num_tokens,
            totals.num_bytes + entry.num_bytes,
        )
    assert {root: sums for root, sums in store.totals().items() if sums != Totals()} == counted
    stats = store.stats()
    kinds = Counter(record.is_preamble for record in records.values())
    assert (stats.documents, stats.preambles) == (kinds[False], kinds[True])
    assert stats.tokens == sum(record.num_tokens for record in records.values())
    assert stats.state_bytes == sum(entry.num_bytes for entry in entries.values())
    assert sum(stats.models.values()) == stats.documents
    assert stats.used_bytes == store.used_bytes()


class MishapError(Exception):
    """What goes wrong midway."""


def failing(fill: int = 0) -> Iterator[Value]:
    """Most values of a state, then an error."""
    yield from values(fill)[:-1]
    raise MishapError


Question = Callable[[StateStore, StateRecord], bool]

QUESTIONS: dict[str, Question] = {
    "record": lambda store, record: store.record(record.key) is not None,
    "contains": lambda store, record: record.key in store,
    "records": lambda store, record: record.key in held(store),
    "entry": lambda store, record: store.entry(record.key) is not None,
    "entries": lambda store, record: record.key in dict(store.entries()),
    "find": lambda store, record: bool(store.find(record.text)),
    "looking": lambda store, record: bool(texts_in(store, record.text)),
    "reading": lambda store, record: bool(stored(store, record.key)),
    "keys-of": lambda store, record: record.key in store.keys_of("owner"),
    "totals": lambda store, record: any(sums.documents for sums in store.totals().values()),
    "stats": lambda store, record: bool(store.stats().documents or store.stats().state_bytes),
    "counters": lambda store, record: replace(store.counters(), sequence=0) != Counters(),
    "models": lambda store, record: record.root in store.models(),
    "delete": lambda store, record: store.delete(record.key),
    "delete-owner": lambda store, record: bool(store.delete_owner("owner")),
    "gc": lambda store, record: bool(store.gc(keep=())),
}
"""Whether a store has a document, in all ways of asking that there are."""

ANY_LIMIT = pytest.mark.parametrize(
    "limits",
    [
        {"max_bytes": LIMIT},
        {"namespace_max_bytes": LIMIT},
        {"max_bytes": LIMIT, "namespace_max_bytes": LIMIT},
    ],
    ids=["store", "namespace", "both"],
)


class StoreConformance(ABC):
    """What every store keeps to."""

    is_persistent = False
    """Whether a store can be opened again when all that had it open have closed it."""

    @abstractmethod
    def open_store(
        self,
        namespace: str = "default",
        *,
        max_bytes: int | None = None,
        namespace_max_bytes: int | None = None,
    ) -> StateStore:
        """Open the one store that a test has, perhaps beside others that have it open."""

    def largest_size(self) -> int:
        """Bytes that the store's file has grown to, where it has one."""
        return 0

    @pytest.fixture
    def store(self) -> Iterator[StateStore]:
        """An empty store."""
        with self.open_store() as opened:
            yield opened

    @pytest.fixture
    def other(self, store: StateStore) -> Iterator[StateStore]:
        """Another namespace of it."""
        with self.open_store("other") as opened:
            yield opened

    def check_limits(self, store: StateStore, limits: dict[str, int]) -> None:
        """Neither the states of the one namespace nor the file are larger than they may be."""
        if "max_bytes" in limits:
            assert store.used_bytes() <= LIMIT
            assert self.largest_size() <= LIMIT
        if "namespace_max_bytes" in limits:
            assert store.stats().state_bytes <= LIMIT

    # What was put is there.

    def test_an_empty_store_has_nothing(self, store: StateStore) -> None:
        """However it is asked, and nothing can be deleted."""
        for name, has in QUESTIONS.items():
            assert not has(store, a_record()), name
        assert store.gc() == 0
        assert store.namespaces() == ["default"]
        check_sums(store)

    def test_a_state_that_was_put_is_found(self, store: StateStore) -> None:
        """Record and values as they were given; the bytes of all values are returned."""
        record = a_record()
        num_bytes = store.put(record, iter(values()), saved_s=2.5)
        found = store.record(record.key)
        assert found is not None
        assert found.to_bytes() == record.to_bytes()
        assert record.key in store
        assert stored(store, record.key) == values()
        assert num_bytes == sum(len(value) for _, _, value in values())
        entry = store.entry(record.key)
        assert entry is not None
        assert (entry.saved_s, entry.created_s, entry.hits, entry.used_s) == (2.5, 1.5, 0, 0)
        check_sums(store)

    def test_saved_seconds_are_in_proportion_to_tokens_where_nobody_says(
        self, store: StateStore
    ) -> None:
        """So that longer documents are worth more."""
        short, long = a_record(text="short"), a_record(text="long" * 100)
        for record in (short, long):
            store.put(record, [])
        saved = dict(store.entries())
        per_token = saved[short.key].saved_s / short.num_tokens
        assert per_token > 0
        assert saved[long.key].saved_s == pytest.approx(per_token * long.num_tokens)

    @pytest.mark.parametrize("size", [0, 3, 2040, 2043, 4080, 4096, 100_000])
    def test_values_may_have_any_size(self, store: StateStore, size: int) -> None:
        """Around the sizes of pages too; bytearrays as well as bytes."""
        store.put(a_record(), [(la, ch, bytearray(value)) for la, ch, value in values(1, size)])
        assert stored(store, a_record().key) == values(1, size)
        check_sums(store)

    def test_records_come_in_order_of_their_keys(self, store: StateStore) -> None:
        """All of them, each once."""
        put(store, *range(30))
        assert held(store) == keys(range(30))

    def test_putting_again_replaces_the_whole_state(self, store: StateStore) -> None:
        """Chunks that the new state has not are gone; nothing is counted twice."""
        put(store, 1, 2)
        store.put(a_record(1), [(0, 0, b"new")])
        assert stored(store, a_record(1).key) == [(0, 0, b"new")]
        assert stored(store, a_record(2).key) == values(2)
        assert held(store) == keys([1, 2])
        assert len(store.find(a_record(1).text)) == 1
        check_sums(store)

    def test_an_approximate_state_takes_no_exact_ones_place(self, store: StateStore) -> None:
        exact = a_record(1)
        approximate = replace(exact, is_approximate=True)
        for record, fill, kept, expected in (
            (approximate, 1, approximate, 1),
            (approximate, 2, approximate, 2),
            (exact, 3, exact, 3),
            (approximate, 4, exact, 3),
            (exact, 5, exact, 5),
        ):
            store.put(record, values(fill))
            found = store.record(exact.key)
            assert found is not None
            assert found.to_bytes() == kept.to_bytes()
            assert stored(store, exact.key) == values(expected)
        check_sums(store)

    def test_a_state_may_become_a_preamble_and_a_document_again(self, store: StateStore) -> None:
        """It is counted and found as what it is now."""
        for is_preamble in (False, True, False, True):
            record = a_record(is_preamble=is_preamble)
            store.put(record, values())
            assert bool(store.find(record.text)) is not is_preamble
            assert bool(texts_in(store, record.text)) is not is_preamble
            check_sums(store)

    def test_a_deleted_state_is_gone_and_its_neighbours_are_not(self, store: StateStore) -> None:
        """However one asks; a second time there is nothing to delete."""
        put(store, *range(20), owners=["owner"])
        gone = keys(range(20))[7]
        (number,) = (n for n in range(20) if a_record(n).key == gone)
        assert store.delete(gone)
        assert not store.delete(gone)
        assert held(store) == store.keys_of("owner") == keys(set(range(20)) - {number})
        assert stored(store, gone) == []
        assert not store.find(a_record(number).text)
        assert not texts_in(store, a_record(number).text)
        for left in set(range(20)) - {number}:
            assert stored(store, a_record(left).key) == values(left)
        check_sums(store)

    # All or nothing.

    def test_a_put_that_fails_midway_leaves_nothing(self, store: StateStore) -> None:
        """The error comes out as it is."""
        put(store, 1)
        with pytest.raises(MishapError):
            store.put(a_record(2), failing(), owners=["owner"])
        assert held(store) == keys([1])
        assert stored(store, a_record(2).key) == []
        assert not store.keys_of("owner")
        assert not store.find(a_record(2).text)
        check_sums(store)

    def test_a_replacement_that_fails_midway_keeps_the_old_state(self, store: StateStore) -> None:
        """Whole."""
        put(store, 1)
        with pytest.raises(MishapError):
            store.put(a_record(1), failing(9))
        assert stored(store, a_record(1).key) == values(1)
        check_sums(store)

    def test_put_all_stores_all(self, store: StateStore) -> None:
        """With their owners and what they save; the bytes of all are returned."""
        states = [NewState(a_record(n), values(n), float(n), [f"owner {n}"]) for n in (1, 2, 3)]
        assert store.put_all(states) == 3 * sum(len(value) for _, _, value in values())
        for number in (1, 2, 3):
            assert stored(store, a_record(number).key) == values(number)
            assert store.keys_of(f"owner {number}") == keys([number])
            entry = store.entry(a_record(number).key)
            assert entry is not None
            assert entry.saved_s == number
        assert store.put_all([]) == 0
        check_sums(store)

    def test_put_all_stores_nothing_where_one_fails(self, store: StateStore) -> None:
        """Neither those before nor those behind; what they were to replace stays."""
        put(store, 1)
        states = [
            NewState(a_record(1), values(9)),
            NewState(a_record(2), failing()),
            NewState(a_record(3), values(3)),
        ]
        with pytest.raises(MishapError):
            store.put_all(states)
        assert held(store) == keys([1])
        assert stored(store, a_record(1).key) == values(1)
        check_sums(store)

    def test_of_two_states_under_one_key_the_last_one_stays(self, store: StateStore) -> None:
        """In one `put_all` as in two."""
        store.put_all([NewState(a_record(1), values(7)), NewState(a_record(1), [(0, 0, b"new")])])
        assert stored(store, a_record(1).key) == [(0, 0, b"new")]
        check_sums(store)

    # Readers.

    def test_a_reader_sees_one_moment(self, store: StateStore) -> None:
        """What is put, replaced or deleted meanwhile does not change what it reads."""
        put(store, 1, 2)
        with store.reading() as reader:
            store.put(a_record(1), values(9))
            store.delete(a_record(2).key)
            put(store, 3)
            for number in (1, 2):
                for layer, chunk, value in values(number):
                    assert bytes(reader.value(a_record(number).key, layer, chunk)) == value
            with pytest.raises(MissingStateError):
                reader.value(a_record(3).key, 0, 0)
        assert stored(store, a_record(1).key) == values(9)
        assert stored(store, a_record(2).key) == []
        assert stored(store, a_record(3).key) == values(3)

    def test_a_walk_over_all_records_sees_one_moment(self, store: StateStore) -> None:
        """A state that is deleted meanwhile still comes, a new one does not."""
        put(store, *range(9))
        walk, entries = store.records(), store.entries()
        first = [next(walk).key, next(entries)[0]]
        store.delete(keys(range(9))[-1])
        put(store, 9)
        assert [first[0], *(record.key for record in walk)] == keys(range(9))
        assert [first[1], *(key for key, _ in entries)] == keys(range(9))

    def test_a_missing_chunk_says_which(self, store: StateStore) -> None:
        """The error carries the key and names layer and chunk."""
        store.put(a_record(), [(0, 0, b"x")])
        with (
            store.reading() as reader,
            pytest.raises(MissingStateError, match="layer 2, chunk 1") as caught,
        ):
            reader.value(a_record().key, 2, 1)
        assert caught.value.key == a_record().key

    def test_two_openings_see_what_the_other_one_does(self, store: StateStore) -> None:
        """At once, by text too; closing one leaves the other usable."""
        with self.open_store() as second:
            assert second.store_id == store.store_id
            for number, (writer, reader) in enumerate([(store, second), (second, store)]):
                put(writer, number, owners=["owner"])
                for name in ("record", "records", "find", "looking", "reading", "keys-of", "stats"):
                    assert QUESTIONS[name](reader, a_record(number)), name
                assert texts_in(reader, a_record(number).text) == [a_record(number).text]
            assert second.delete(a_record(1).key)
            assert a_record(1).key not in store
            assert texts_in(store, a_record(1).text) == []
        put(store, 2)
        assert held(store) == keys([0, 2])
        with pytest.raises(StoreError):
            second.record(a_record(0).key)

    # Texts.

    @pytest.mark.parametrize(
        "text", ["x", "long " * 30, "5" * 480, "6" * 481, "ü" * 240, "🙂" * 121, "a\0b" * 200]
    )
    def test_a_text_is_found_exactly(self, store: StateStore, text: str) -> None:
        """Texts that begin with it, or that it begins with, are others."""
        alike = [text, text + "x", text + "\0", text + "x" * 500, "x" + text]
        for other in alike:
            store.put(a_record(text=other), [])
        for other in alike:
            assert [record.text for record in store.find(other)] == [other]
        assert store.find(text + "y") == []
        store.delete(a_record(text=text).key)
        assert store.find(text) == []
        assert [record.text for record in store.find(text + "x")] == [text + "x"]

    def test_all_states_of_a_text_are_found(self, store: StateStore) -> None:
        """After other parents and for other models; deleting one leaves the others."""
        parents = [ROOT, OTHER_ROOT, a_record(1).key, a_record(2).key]
        records = [
            a_record(text="one text", parent=parent, root=root)
            for parent, root in zip(parents, [ROOT, OTHER_ROOT, ROOT, ROOT], strict=True)
        ]
        for record in records:
            store.put(record, values())
        assert {record.key for record in store.find("one text")} == {r.key for r in records}
        assert texts_in(store, "one text") == ["one text"]
        for count, record in enumerate(records, 1):
            store.delete(record.key)
            left = {record.key for record in records[count:]}
            assert {record.key for record in store.find("one text")} == left
            assert texts_in(store, "one text") == ["one text"] * bool(left)
        check_sums(store)

    def test_preambles_are_never_found_by_their_text(self, store: StateStore) -> None:
        """A document of the same text is."""
        preamble = a_record(is_preamble=True)
        store.put(preamble, values())
        assert not store.find(preamble.text)
        assert not texts_in(store, preamble.text)
        assert preamble.key in store
        document = a_record(parent=OTHER_ROOT)
        store.put(document, values())
        assert [record.key for record in store.find(preamble.text)] == [document.key]
        assert texts_in(store, preamble.text) == [preamble.text]

    def test_texts_are_found_after_everything_was_deleted(self, store: StateStore) -> None:
        """What was known of texts before does not hide those that come later."""
        put(store, 1)
        assert texts_in(store, a_record(1).text) == [a_record(1).text]
        store.delete(a_record(1).key)
        assert texts_in(store, a_record(1).text) == []
        put(store, 1, 2)
        assert texts_in(store, a_record(1).text) == [a_record(1).text]
        assert texts_in(store, a_record(2).text) == [a_record(2).text]

    # Owners.

    def test_assigning_replaces_what_an_owner_had(self, store: StateStore) -> None:
        """And touches no other owner's."""
        put(store, 1, 2, 3)
        store.assign("a", keys([1, 2]))
        store.assign("b", keys([2]))
        store.assign("a", keys([2, 3]))
        assert store.keys_of("a") == keys([2, 3])
        assert store.keys_of("b") == keys([2])
        store.assign("a", [])
        assert store.keys_of("a") == []
        assert held(store) == keys([1, 2, 3])

    @pytest.mark.parametrize("owner", ["", "x" * 5000, "größer 🙂", "a\0b", "\udc80"])
    def test_an_owner_may_be_any_text(self, store: StateStore, owner: str) -> None:
        """Paths are, and not all of them are Unicode."""
        put(store, 1, 2, owners=[owner])
        put(store, 3, owners=[owner + "x"])
        assert store.keys_of(owner) == keys([1, 2])
        assert store.delete_owner(owner) == 2
        assert held(store) == keys([3])

    def test_owners_stay_when_a_state_is_replaced(self, store: StateStore) -> None:
        """Those that are given with the new one come to them."""
        put(store, 1, owners=["a"])
        put(store, 1)
        put(store, 1, owners=["b"])
        assert store.keys_of("a") == store.keys_of("b") == keys([1])

    def test_owners_do_not_outlive_a_state(self, store: StateStore) -> None:
        """A state that was deleted and comes again belongs to nobody."""
        put(store, 1, owners=["a"])
        store.delete(a_record(1).key)
        assert store.keys_of("a") == []
        put(store, 1)
        assert store.keys_of("a") == []
        assert store.gc() == 1

    def test_deleting_an_owner_deletes_what_nobody_else_owns(self, store: StateStore) -> None:
        """What is shared stays until its last owner goes; what nobody owned stays too."""
        put(store, 1, owners=["a"])
        put(store, 2, owners=["a", "b"])
        put(store, 3, owners=["b"])
        put(store, 4)
        assert store.delete_owner("a") == 1
        assert held(store) == keys([2, 3, 4])
        assert store.keys_of("a") == []
        assert store.delete_owner("a") == 0
        assert store.delete_owner("b") == 2
        assert held(store) == keys([4])
        check_sums(store)

    def test_gc_deletes_what_nobody_owns(self, store: StateStore) -> None:
        """Preambles stay."""
        put(store, 1, 2, owners=["a"])
        put(store, 3, 4)
        preamble = a_record(5, is_preamble=True)
        store.put(preamble, values())
        assert store.gc() == 2
        assert held(store) == sorted([*keys([1, 2]), preamble.key])
        store.assign("a", keys([2]))
        assert store.gc() == 1
        assert held(store) == sorted([*keys([2]), preamble.key])
        assert store.gc() == 0
        check_sums(store)

    def test_gc_keeps_what_it_is_told_to(self, store: StateStore) -> None:
        """Owned or not; preambles stay all the same."""
        put(store, 1, 2, owners=["a"])
        put(store, 3, 4)
        preamble = a_record(5, is_preamble=True)
        store.put(preamble, values())
        assert store.gc(keep={a_record(1).key, a_record(3).key, a_record(9).key}) == 2
        assert held(store) == sorted([*keys([1, 3]), preamble.key])
        assert store.keys_of("a") == keys([1])
        assert store.gc(keep=[]) == 2
        assert held(store) == [preamble.key]
        check_sums(store)

    def test_gc_deletes_hundreds_at_once(self, store: StateStore) -> None:
        """More than go into one transaction."""
        store.put_all([NewState(a_record(number), [(0, 0, b"x")]) for number in range(600)])
        store.assign("a", keys([7]))
        assert store.gc() == 599
        assert held(store) == keys([7])
        check_sums(store)

    def test_gc_spares_what_is_assigned_while_it_runs(
        self, store: StateStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Between its look at all states and its first delete."""
        put(store, 1, 2)
        writing = store._writing

        def assign_first() -> AbstractContextManager[Transaction]:
            monkeypatch.undo()
            with self.open_store() as second:
                second.assign("late", keys([1]))
            return writing()

        monkeypatch.setattr(store, "_writing", assign_first)
        assert store.gc() == 1
        assert held(store) == store.keys_of("late") == keys([1])

    # Uses, sums, names.

    def test_sums_are_kept_by_model(self, store: StateStore) -> None:
        """Stats call models by the names that they were given, or by the start of their keys."""
        store.name_model(ROOT, "SmolLM2", "30 x kv", "kv is smaller")
        for number in (1, 2):
            put(store, number)
        store.put(a_record(3, root=OTHER_ROOT), values())
        store.put(a_record(4, root=OTHER_ROOT, is_preamble=True), values())
        check_sums(store)
        stats = store.stats()
        assert stats.models == {"SmolLM2": 2, OTHER_ROOT.hex()[:8]: 1}
        assert stats.layouts == {"SmolLM2": "30 x kv; kv is smaller"}
        assert store.totals()[OTHER_ROOT].documents == store.totals()[OTHER_ROOT].preambles == 1
        store.delete(a_record(3, root=OTHER_ROOT).key)
        check_sums(store)

    def test_sums_are_right_after_damage(self, store: StateStore) -> None:
        """A state whose record cannot be read is replaced, or deleted, and counted once or not."""
        put(store, 1, 2)
        for number in (1, 2):
            with store._writing() as txn:
                txn.put("records", store._rows.prefix + a_record(number).key, b"damaged")
        put(store, 1)
        assert store.delete(a_record(2).key)
        assert held(store) == keys([1])
        check_sums(store)

    def test_the_text_of_a_damaged_state_goes_with_it(self, store: StateStore) -> None:
        """It is not found in prompts any more, as no state stands behind it."""
        put(store, 1)
        assert texts_in(store, a_record(1).text) == [a_record(1).text]
        with store._writing() as txn:
            txn.put("records", store._rows.prefix + a_record(1).key, b"damaged")
        store.delete(a_record(1).key)
        assert texts_in(store, a_record(1).text) == []

    def test_what_happened_is_counted(self, store: StateStore) -> None:
        """Added up, and written down by `flush_uses`; stats show it."""
        put(store, 1, 2)
        assert store.counters() == Counters(sequence=2)
        store.count_use(keys([1, 2]), misses=3, hit_tokens=10, missed_tokens=20, damaged=1)
        store.count_use(keys([1]), misses=1, hit_tokens=5)
        store.count_use()
        store.flush_uses()
        store.flush_uses()
        assert store.counters() == Counters(
            sequence=2, hits=3, misses=4, hit_tokens=15, missed_tokens=20, damaged=1
        )
        stats = store.stats()
        assert (stats.hits, stats.misses, stats.damaged) == (3, 4, 1)
        assert stats.idle_s is not None

    def test_a_use_raises_hits_and_priority(self, store: StateStore) -> None:
        """Of what was used and of nothing else; everything else of an entry stays."""
        put(store, 1, 2)
        used, unused = a_record(1).key, a_record(2).key
        before = dict(store.entries())
        for times in (1, 4, 7):
            store.count_use([used])
            if times > 1:
                store.count_use([used, used])
            store.flush_uses()
            entry = store.entry(used)
            assert entry is not None
            assert entry.hits == times
            assert entry.priority > before[used].priority
            assert entry.used_s > 0
            assert replace(before[used], hits=0, priority=0.0, used_s=0.0) == replace(
                entry, hits=0, priority=0.0, used_s=0.0
            )
            before[used] = entry
        assert store.entry(unused) == before[unused]
        check_sums(store)

    def test_a_priority_grows_with_seconds_and_shrinks_with_bytes(self, store: StateStore) -> None:
        """What saves most for its bytes stays longest."""
        store.put(a_record(1), values(), saved_s=1.0)
        store.put(a_record(2), values(), saved_s=2.0)
        store.put(a_record(3), values(size=50_000), saved_s=1.0)
        entries = dict(store.entries())
        ranks = {n: entries[a_record(n).key].priority for n in (1, 2, 3)}
        assert ranks[3] < ranks[1] < ranks[2]

    def test_the_use_of_a_state_that_is_gone_is_counted_all_the_same(
        self, store: StateStore
    ) -> None:
        """It was a hit when it happened."""
        put(store, 1)
        store.count_use(keys([1, 2]))
        store.delete(a_record(1).key)
        store.flush_uses()
        assert store.counters().hits == 2
        assert list(store.entries()) == []

    def test_many_uses_are_written_down_by_themselves(self, store: StateStore) -> None:
        """Nobody has to flush."""
        put(store, 1)
        store.count_use([a_record(number).key for number in range(1, AT_ONCE + 1)])
        assert store.counters().hits == AT_ONCE
        entry = store.entry(a_record(1).key)
        assert entry is not None
        assert entry.hits == 1

    def test_closing_writes_uses_down(self, store: StateStore) -> None:
        """And closing twice does nothing more."""
        with self.open_store() as second:
            put(second, 1)
            second.count_use(keys([1]), misses=1)
        second.close()
        assert (store.counters().hits, store.counters().misses) == (1, 1)

    def test_models_have_names(self, store: StateStore) -> None:
        """The last one counts; a name may be any text."""
        store.name_model(ROOT, "first")
        store.name_model(ROOT, "größer 🙂", "layout", "reason")
        store.name_model(OTHER_ROOT, "other")
        assert store.model_names() == {ROOT: "größer 🙂", OTHER_ROOT: "other"}
        assert store.models()[ROOT].reason == "reason"

    # Namespaces.

    @pytest.mark.parametrize("has", QUESTIONS.values(), ids=QUESTIONS)
    def test_what_one_namespace_has_another_has_not(
        self, store: StateStore, other: StateStore, has: Question
    ) -> None:
        """However it is asked; a second opening of the same one has it."""
        put(store, 1, owners=["owner"])
        store.name_model(ROOT, "SmolLM2")
        store.count_use(keys([1]))
        store.flush_uses()
        assert not has(other, a_record(1))
        with self.open_store() as same:
            assert has(same, a_record(1))

    def test_one_state_in_two_namespaces_is_two_states(
        self, store: StateStore, other: StateStore
    ) -> None:
        """Each with values, owners, uses and sums of its own."""
        store.put(a_record(1), values(1), owners=["a"])
        other.put(a_record(1), values(2), owners=["b"])
        assert stored(store, a_record(1).key) == values(1)
        assert stored(other, a_record(1).key) == values(2)
        assert store.keys_of("b") == other.keys_of("a") == []
        other.count_use(keys([1]))
        other.flush_uses()
        assert (store.counters().hits, other.counters().hits) == (0, 1)
        assert other.delete(a_record(1).key)
        assert stored(store, a_record(1).key) == values(1)
        for each in (store, other):
            check_sums(each)

    @pytest.mark.parametrize(
        "action",
        [
            lambda other: other.gc(),
            lambda other: other.gc(keep=[]),
            lambda other: other.delete(a_record(1).key),
            lambda other: other.delete_owner("owner"),
            lambda other: other.assign("owner", []),
            lambda other: other.assign("somebody", keys([2])),
            lambda other: other.name_model(ROOT, "other"),
            lambda other: (other.count_use(keys([1]), misses=1), other.flush_uses()),
            lambda other: put(other, 1, 2, 3, owners=["owner"]),
            lambda other: other.delete_namespace("other"),
            lambda other: other.delete_namespace("nobody's"),
        ],
        ids=[
            "gc",
            "gc-keep",
            "delete",
            "delete-owner",
            "assign",
            "assign-other",
            "name-model",
            "count-use",
            "put",
            "delete-namespace",
            "delete-no-namespace",
        ],
    )
    def test_what_is_done_in_one_namespace_does_not_touch_another(
        self, store: StateStore, other: StateStore, action: Callable[[StateStore], object]
    ) -> None:
        """Everything of it is as it was."""
        put(store, 1, owners=["owner"])
        put(store, 2)
        store.name_model(ROOT, "SmolLM2")
        before = (dict(store.entries()), store.totals(), store.counters(), store.models())
        action(other)
        assert (dict(store.entries()), store.totals(), store.counters(), store.models()) == before
        assert store.keys_of("owner") == keys([1])
        assert store.keys_of("somebody") == []
        for number in (1, 2):
            assert stored(store, a_record(number).key) == values(number)
            assert texts_in(store, a_record(number).text) == [a_record(number).text]
        check_sums(store)

    def test_namespaces_are_listed(self, store: StateStore) -> None:
        """By all of them, in order; a name may be any text of 256 bytes."""
        names = ["b", "a", "größer 🙂", "n" * 256]
        for name in names:
            with self.open_store(name) as each:
                assert each.namespace == name
        assert store.namespaces() == sorted([*names, "default"])
        assert store.stats().namespaces == sorted([*names, "default"])

    def test_deleting_a_namespace_empties_only_that_one(
        self, store: StateStore, other: StateStore
    ) -> None:
        """It is not listed any more; opened anew it is empty and has none of its past."""
        put(store, 1)
        put(other, *range(8), owners=["owner"])
        other.count_use(keys([1]))
        other.name_model(ROOT, "SmolLM2")
        other.close()
        before = store.used_bytes()
        assert store.delete_namespace("other")
        assert not store.delete_namespace("other")
        assert store.namespaces() == ["default"]
        assert before - store.used_bytes() > 7 * 6 * 5000
        assert held(store) == keys([1])
        with self.open_store("other") as again:
            for name, has in QUESTIONS.items():
                assert not has(again, a_record(1)), name
            put(again, 1)
            assert stored(again, a_record(1).key) == values(1)
            check_sums(again)

    def test_a_namespace_can_empty_itself(self, store: StateStore, other: StateStore) -> None:
        """It stays a namespace, and can be used as if it were new."""
        put(store, 1, 2, owners=["owner"])
        store.count_use(keys([1]))
        store.flush_uses()
        put(other, 3)
        assert store.delete_namespace("default")
        for name, has in QUESTIONS.items():
            assert not has(store, a_record(1)), name
        assert store.namespaces() == ["default", "other"]
        assert held(other) == keys([3])
        put(store, 4)
        assert stored(store, a_record(4).key) == values(4)
        check_sums(store)

    @pytest.mark.parametrize("more", [0, 1, 2])
    def test_texts_are_found_after_a_namespace_was_deleted(
        self, store: StateStore, more: int
    ) -> None:
        """By who looked at the old ones too."""
        put(store, 1, 2)
        assert texts_in(store, a_record(1).text) == [a_record(1).text]
        with self.open_store() as second:
            assert second.delete_namespace("default")
            for number in range(3, 5 + more):
                put(store, number)
        for number in range(3, 5 + more):
            assert texts_in(store, a_record(number).text) == [a_record(number).text]
        assert texts_in(store, a_record(1).text) == []

    def test_what_is_put_into_a_deleted_namespace_is_not_lost(
        self, store: StateStore, other: StateStore
    ) -> None:
        """Who has it open is told, or goes on, and whoever opens it later sees what it put."""
        put(other, 1)
        store.delete_namespace("other")
        stored_again = []
        with suppress(StoreError):
            put(other, 2)
            stored_again = keys([2])
        with self.open_store("other") as again:
            assert held(again) == stored_again

    def test_a_namespace_that_was_made_anew_is_seen_by_who_had_the_old_one_open(
        self, store: StateStore, other: StateStore
    ) -> None:
        """What another puts into it is found, as in any namespace that both have open."""

        put(other, 1)
        store.delete_namespace("other")
        with self.open_store("other") as again:
            put(again, 2)
            assert held(other) == keys([2])
            assert texts_in(other, a_record(2).text) == [a_record(2).text]
            assert other.delete(a_record(2).key)
            assert held(again) == []

    # Limits.

    @ANY_LIMIT
    def test_a_full_store_lets_those_of_lowest_priority_go(self, limits: dict[str, int]) -> None:
        """Of those that may go; they are counted, and are gone with all that belonged to them."""
        evicted, evicted_bytes = 0, 0
        with self.open_store("default", **limits) as store:
            for number in range(120):
                before = dict(store.entries())
                saved_s = 1.0 + number * 7 % 10
                store.put(a_record(number), values(number), saved_s=saved_s, owners=["owner"])
                left = {key: entry for key, entry in before.items() if key in store}
                gone = {key: entry for key, entry in before.items() if key not in store}
                if gone:
                    lowest = min(entry.priority for entry in left.values())
                    assert max(entry.priority for entry in gone.values()) <= lowest
                evicted += len(gone)
                evicted_bytes += sum(entry.num_bytes for entry in gone.values())
                assert a_record(number).key in store
            assert evicted > 60
            assert store.counters().evictions == store.stats().evictions == evicted
            assert store.counters().evicted_bytes == evicted_bytes
            assert store.counters().clock > 0
            assert store.keys_of("owner") == held(store)
            for number in range(120):
                key = a_record(number).key
                assert stored(store, key) == (values(number) if key in store else [])
                assert bool(store.find(a_record(number).text)) is (key in store)
                assert bool(texts_in(store, a_record(number).text)) is (key in store)
            check_sums(store)

    @ANY_LIMIT
    def test_limits_are_kept_and_made_use_of(self, limits: dict[str, int]) -> None:
        """After any put: neither the states nor the file are larger, nor is half of it wasted."""
        filled = []
        with self.open_store("default", **limits) as store:
            for number in range(250):
                size = 300 + number * 7919 % 60_000
                store.put(a_record(number), values(number, size))
                self.check_limits(store, limits)
                filled.append(store.stats().state_bytes)
            assert min(filled[50:]) >= LIMIT // 4
            assert sum(filled[50:]) / 200 >= LIMIT // 2
            assert store.stats().max_bytes == store.max_bytes == limits.get("max_bytes")
            check_sums(store)

    @ANY_LIMIT
    def test_what_is_used_stays(self, limits: dict[str, int]) -> None:
        """Documents that are restored again and again outlive all that pass through."""
        used = keys(range(5))
        with self.open_store("default", **limits) as store:
            put(store, *range(5))
            for number in range(5, 105):
                store.count_use(used)
                put(store, number)
            assert set(used) <= set(held(store))
            assert store.counters().evictions > 30

    @ANY_LIMIT
    def test_what_was_used_long_ago_goes(self, limits: dict[str, int]) -> None:
        """However often it was: others that are used now take its place."""
        old = keys(range(5))
        with self.open_store("default", **limits) as store:
            put(store, *range(5))
            for _ in range(3):
                store.count_use(old)
            for number in range(5, 1005):
                store.put(a_record(number), values(number, 30_000))
                if not set(old) & set(held(store)):
                    break
            assert not set(old) & set(held(store))

    @ANY_LIMIT
    def test_pinned_states_stay(self, limits: dict[str, int]) -> None:
        """As long as they are pinned, by whomever; what is full meanwhile says so."""
        pinned = keys(range(10))
        with self.open_store("default", **limits) as store:
            for number in range(10):
                store.put(a_record(number), values(number), saved_s=1e-9)
            with store.reading(keys=pinned), store.reading(keys=pinned[:3]):
                for number in range(10, 60):
                    with suppress(StoreFullError):
                        put(store, number)
                    assert set(pinned) <= set(held(store))
            with store.reading(keys=pinned[:3]):
                for number in range(60, 90):
                    with suppress(StoreFullError):
                        put(store, number)
            assert set(pinned[:3]) <= set(held(store))
            for number in range(100, 160):
                put(store, number)
            assert not set(pinned) & set(held(store))
            check_sums(store)

    def test_pins_hold_for_everybody_who_has_the_store_open(self) -> None:
        """Another opening, another namespace: a state that is being read does not go."""
        with self.open_store(max_bytes=LIMIT) as store, self.open_store(max_bytes=LIMIT) as second:
            for number in range(10):
                store.put(a_record(number), values(number), saved_s=1e-9)
            with store.reading(keys=keys(range(10))):
                for number in range(10, 60):
                    with suppress(StoreFullError):
                        put(second, number)
                assert set(keys(range(10))) <= set(held(store))

    @ANY_LIMIT
    def test_preambles_stay(self, limits: dict[str, int]) -> None:
        """However little they save."""
        preambles = [a_record(number, is_preamble=True) for number in range(10)]
        with self.open_store("default", **limits) as store:
            for preamble in preambles:
                store.put(preamble, values(), saved_s=1e-9)
            put(store, *range(100, 180))
            assert {preamble.key for preamble in preambles} <= set(held(store))
            assert store.counters().evictions > 20
            check_sums(store)

    @ANY_LIMIT
    @pytest.mark.parametrize("at_once", [1, 50], ids=["one-state", "put-all"])
    def test_what_is_larger_than_the_limit_is_refused(
        self, limits: dict[str, int], at_once: int
    ) -> None:
        """And leaves everything as it was: nothing has to go for what cannot come."""
        size = 2 * LIMIT // 6 // at_once
        new = [NewState(a_record(1000 + n), values(1, size)) for n in range(at_once)]
        with self.open_store("default", **limits) as store:
            put(store, *range(60))
            before = (dict(store.entries()), store.counters())
            with pytest.raises(StoreFullError):
                store.put_all(new)
            assert (dict(store.entries()), store.counters()) == before
            for number in range(60):
                assert stored(store, a_record(number).key) in ([], values(number))
            assert stored(store, a_record(1000).key) == []
            put(store, 60)
            check_sums(store)

    def test_what_the_file_cannot_take_pushes_nothing_out_of_its_namespace(self) -> None:
        """A state that a namespace's limit allows and the store's does not."""
        with self.open_store(max_bytes=LIMIT, namespace_max_bytes=LIMIT) as store:
            put(store, *range(20))
            with pytest.raises(StoreFullError):
                store.put(a_record(99), values(99, int(0.95 * LIMIT / 6)))
            assert held(store) == keys(range(20))

    @ANY_LIMIT
    def test_what_may_not_go_cannot_be_pushed_out(self, limits: dict[str, int]) -> None:
        """A store full of preambles says that it is full, and stays within its limit."""
        with self.open_store("default", **limits) as store:
            preambles = [NewState(a_record(n, is_preamble=True), values(n)) for n in range(200)]
            with pytest.raises(StoreFullError):
                put_one_by_one(store, preambles)
            assert store.stats().documents == 0
            assert store.stats().preambles > 20
            self.check_limits(store, limits)
            check_sums(store)

    def test_replacing_a_state_needs_no_room_for_two(self) -> None:
        """Where the namespace is not fuller afterwards than before, nothing has to go."""
        with self.open_store(namespace_max_bytes=LIMIT) as store:
            store.put(a_record(99), values(99, 100_000))
            put(store, *range(20))
            before = held(store)
            assert store.stats().state_bytes < 0.9 * LIMIT
            store.put(a_record(99), values(98, 100_000))
            assert held(store) == before

    def test_a_namespace_that_is_full_takes_nothing_from_others(self) -> None:
        """Its limit is its own."""
        with (
            self.open_store() as store,
            self.open_store("other", namespace_max_bytes=LIMIT) as other,
        ):
            put(store, *range(50))
            put(other, *range(60))
            assert held(store) == keys(range(50))
            assert other.counters().evictions > 0
            assert store.counters().evictions == 0
            put(store, *range(50, 70))
            assert held(store) == keys(range(70))
            for each in (store, other):
                check_sums(each)

    def test_a_full_store_takes_from_all_namespaces(self) -> None:
        """Those of lowest priority go, wherever they are; each namespace counts its own."""
        with (
            self.open_store(max_bytes=LIMIT) as store,
            self.open_store("other", max_bytes=LIMIT) as other,
        ):
            for number in range(20):
                other.put(a_record(number), values(number), saved_s=0.001)
            for number in range(25):
                store.put(a_record(number), values(number), saved_s=1.0)
            assert held(store) == keys(range(25))
            assert 0 < len(held(other)) < 20
            assert store.counters().evictions == 0
            assert other.counters().evictions == 20 - len(held(other))
            for each in (store, other):
                check_sums(each)

    def test_a_limit_holds_for_those_who_had_the_store_open(self) -> None:
        """They make room for what they put, as does who has set it."""
        with self.open_store() as store:
            with self.open_store("other", max_bytes=LIMIT):
                put(store, *range(60))
            assert store.used_bytes() <= LIMIT
            assert store.counters().evictions > 0

    def test_limits_are_remembered(self) -> None:
        """By whoever opens the store again without saying them."""
        with self.open_store(max_bytes=2 * LIMIT, namespace_max_bytes=LIMIT):
            with self.open_store() as second:
                assert second.max_bytes == 2 * LIMIT
                put(second, *range(60))
                assert second.stats().state_bytes <= LIMIT
            with self.open_store("other") as other:
                put(other, *range(60))
                assert other.stats().state_bytes > LIMIT
                assert other.used_bytes() <= 2 * LIMIT

    def test_a_lower_limit_counts_from_the_next_put_on(self) -> None:
        """States go until what is used is within it."""
        with self.open_store(max_bytes=2 * LIMIT) as store:
            put(store, *range(60))
            assert store.used_bytes() > 1.2 * LIMIT
        with self.open_store(max_bytes=LIMIT) as store:
            put(store, *range(60, 65))
            assert store.used_bytes() <= LIMIT
            assert set(keys(range(60, 65))) <= set(held(store))
            check_sums(store)

    @pytest.mark.parametrize("count", [45, 60, 70])
    @pytest.mark.parametrize(
        "action",
        [
            lambda store: put(store, 100),
            lambda store: store.gc(),
            lambda store: store.delete_owner("owner"),
            lambda store: store.delete_namespace("default"),
            lambda store: store.delete(a_record(0).key),
            lambda store: (store.count_use(keys([1])), store.flush_uses()),
        ],
        ids=["put", "gc", "delete-owner", "delete-namespace", "delete", "use"],
    )
    def test_a_store_above_its_new_limit_can_be_written(
        self, count: int, action: Callable[[StateStore], object]
    ) -> None:
        """Whatever is done first: deleting needs some room too."""

        with self.open_store(max_bytes=2 * LIMIT) as store:
            put(store, *range(0, count, 2))
            put(store, *range(1, count, 2), owners=["owner"])
        with self.open_store(max_bytes=LIMIT) as store:
            action(store)
            put(store, 101)
            assert store.used_bytes() <= LIMIT
            assert a_record(101).key in store
            check_sums(store)

    # What is refused.

    @pytest.mark.parametrize("namespace", ["", "n" * 257, "ü" * 129])
    def test_a_namespace_has_a_name_of_up_to_256_bytes(
        self, store: StateStore, namespace: str
    ) -> None:
        """No namespace is made."""
        with pytest.raises(ValueError, match="namespace"):
            self.open_store(namespace)
        assert store.namespaces() == ["default"]

    @pytest.mark.parametrize("limit", [-1, 0, 1, (1 << 20) - 1])
    @pytest.mark.parametrize("name", ["max_bytes", "namespace_max_bytes"])
    def test_tiny_limits_are_refused(self, store: StateStore, name: str, limit: int) -> None:
        """With the limit's name; none is set."""
        with pytest.raises(ValueError, match=f"^{name}"):
            self.open_store("default", **{name: limit})
        with self.open_store() as again:
            assert again.max_bytes is None
            put(again, 1)

    @pytest.mark.parametrize("name", ["max_bytes", "namespace_max_bytes"])
    def test_a_limit_that_is_no_whole_number_does_no_harm(
        self, store: StateStore, name: str
    ) -> None:
        """`max_bytes=2e9` is refused, or taken as it is meant; the store can be opened later."""
        put(store, 1)
        store.close()
        limits: dict[str, int] = {name: 2e9}  # type: ignore[dict-item]
        with suppress(TypeError, ValueError):
            self.open_store("default", **limits).close()
        with self.open_store() as again:
            put(again, 2)
            assert again.max_bytes in (None, 2_000_000_000)
            assert set(keys([2])) <= set(held(again))

    def test_a_record_under_a_foreign_key_is_refused(self, store: StateStore) -> None:
        """A key is made of the parent and the token ids; `put_all` stores nothing then."""
        wrong = replace(a_record(1), parent=bytes(16))
        with pytest.raises(ValueError, match=wrong.key.hex()):
            store.put_all([NewState(a_record(2), values()), NewState(wrong, values())])
        assert held(store) == []

    def test_a_closed_store_refuses_any_use(self) -> None:
        """`StoreError`, whatever is asked of it."""
        store = self.open_store()
        store.close()
        for has in QUESTIONS.values():
            with pytest.raises(StoreError):
                has(store, a_record())
        for use in (
            lambda: put(store, 1),
            lambda: store.assign("owner", []),
            lambda: store.delete_namespace("default"),
            store.used_bytes,
            store.namespaces,
            store.sync,
        ):
            with pytest.raises(StoreError):
                use()

    # Closing and opening again.

    def test_everything_is_there_after_opening_again(self) -> None:
        """States, texts, owners, uses, sums, names and limits."""
        if not self.is_persistent:
            pytest.skip("the store is gone when it is closed")
        with (
            self.open_store(max_bytes=2 * LIMIT, namespace_max_bytes=LIMIT) as store,
            self.open_store("other") as other,
        ):
            put(store, *range(60), owners=["owner"])
            store.count_use(held(store)[:3], misses=1)
            store.flush_uses()
            store.name_model(ROOT, "SmolLM2")
            put(other, 1)
            before = (dict(store.entries()), store.totals(), store.counters(), store.models())
            identity = store.store_id
        with self.open_store() as again, self.open_store("other") as other:
            now = (dict(again.entries()), again.totals(), again.counters(), again.models())
            assert now == before
            assert (again.store_id, again.max_bytes) == (identity, 2 * LIMIT)
            assert again.keys_of("owner") == held(again)
            for record in again.records():
                assert texts_in(again, record.text) == [record.text]
                assert stored(again, record.key) == values(int(record.token_ids[0]))
            assert held(other) == keys([1])
            put(again, *range(60, 120))
            assert again.stats().state_bytes <= LIMIT
            check_sums(again)
