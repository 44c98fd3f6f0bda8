"""Many shards as one store: the contract of every store, and what only shards can do."""

from __future__ import annotations

import inspect
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_conformance import (
    LIMIT,
    ROOT,
    StoreConformance,
    a_record,
    check_sums,
    held,
    keys,
    put,
    stored,
    texts_in,
    values,
)
from tiny import SHAPES, byte_tokenizer, tiny_model

from hcache_rag import HCacheEngine, StateStore, StoreError, StoreOpenError
from hcache_rag.store.manifest import Manifest, Unit
from hcache_rag.store.placement import Placement
from hcache_rag.store.reshape import merge_shards, split_shard
from hcache_rag.store.sharded import ShardedStore
from hcache_rag.texts import JoinedView, TextSet, TextView, find_texts

SHARDS = 3


class TestSharded(StoreConformance):
    """Three shards that may all be written keep the contract of one store."""

    is_persistent = True
    path: Path

    @pytest.fixture(autouse=True)
    def _path(self, tmp_path: Path) -> None:
        self.path = tmp_path / "store"
        Manifest.create(self.path, SHARDS)

    def open_store(
        self,
        namespace: str = "default",
        *,
        max_bytes: int | None = None,
        namespace_max_bytes: int | None = None,
    ) -> StateStore:
        if max_bytes is not None or namespace_max_bytes is not None:
            pytest.skip("limits are those of shards")
        return StateStore.open(self.path, namespace=namespace, durability="fast")

    def test_gc_spares_what_is_assigned_while_it_runs(
        self, store: StateStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pytest.skip("each shard is spared by itself, see TestOnDisk")

    def test_sums_are_right_after_damage(self, store: StateStore) -> None:
        pytest.skip("each shard keeps its own sums, see TestOnDisk")

    def test_the_text_of_a_damaged_state_goes_with_it(self, store: StateStore) -> None:
        pytest.skip("each shard has its own texts, see TestOnDisk")


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return Manifest.create(tmp_path / "store", SHARDS)


def fill(manifest: Manifest, *numbers: int) -> None:
    with StateStore.open(manifest.path, durability="fast") as store:
        put(store, *numbers, owners=["owner"])


def publish(manifest: Manifest) -> None:
    for shard in manifest.shards:
        shard.publish()


def holders(manifest: Manifest, number: int) -> list[str]:
    """The shards that have a document."""
    found = []
    for shard in manifest.shards:
        if (shard.folder / "data.mdb").is_file():
            with StateStore.open(shard.folder, read_only=True) as store:
                if a_record(number).key in store:
                    found.append(shard.name)
    return found


def check_all(store: StateStore, numbers: range) -> None:
    """All documents are there, however one asks."""
    assert held(store) == keys(numbers)
    for number in numbers:
        record = a_record(number)
        assert stored(store, record.key) == values(number)
        assert [r.key for r in store.find(record.text)] == [record.key]
        assert texts_in(store, f"x {record.text} y") == [record.text]
    check_sums(store)


def test_a_folder_or_its_manifest_is_one_store(manifest: Manifest) -> None:
    fill(manifest, *range(20))
    for path in (manifest.path, manifest.path.parent, str(manifest.path)):
        with StateStore.open(path, read_only=True) as store:
            assert isinstance(store, ShardedStore)
            check_all(store, range(20))


def test_documents_are_where_their_text_places_them(manifest: Manifest) -> None:
    fill(manifest, *range(20))
    placement = Placement([shard.name for shard in manifest.shards])
    for number in range(20):
        assert holders(manifest, number) == [placement.place(a_record(number).text)]


def test_published_shards_are_read_and_not_written(manifest: Manifest) -> None:
    fill(manifest, *range(20))
    publish(manifest)
    before = [(shard.folder / "data.mdb").read_bytes() for shard in manifest.shards]
    with StateStore.open(manifest.path) as store:
        check_all(store, range(20))
        store.count_use([a_record(1).key], misses=1)
        for write in (
            lambda: put(store, 20),
            lambda: store.delete(a_record(1).key),
            lambda: store.gc(),
            lambda: store.set_fidelity(ROOT, 0.5),
        ):
            with pytest.raises(StoreError, match="are published"):
                write()
        store.name_model(ROOT, "a name")  # what an engine does in passing
    assert before == [(shard.folder / "data.mdb").read_bytes() for shard in manifest.shards]


def test_a_shard_more_takes_what_is_new(manifest: Manifest) -> None:
    """Beside published ones: new documents and replacements go there, nothing is moved."""
    fill(manifest, *range(20))
    publish(manifest)
    with StateStore.open(manifest.with_shard("local").path) as store:
        put(store, 20)
        store.put(a_record(3), [(0, 0, b"new")])
        assert stored(store, a_record(3).key) == [(0, 0, b"new")]
        assert held(store) == keys(range(21))
        assert len(store.find(a_record(3).text)) == 1
        with pytest.raises(StoreError, match="in a shard that is published"):
            store.delete(a_record(5).key)
        assert store.delete(a_record(20).key)
        assert held(store) == keys(range(20))


def test_shards_come_and_go_without_a_state_being_moved(manifest: Manifest) -> None:
    """What is in a shard is found while it is there, whatever else is."""
    fill(manifest, *range(20))
    more = manifest.with_shard("another")
    with StateStore.open(more.path) as store:
        check_all(store, range(20))
        put(store, *range(20, 40))
        check_all(store, range(40))
        put(store, *range(40))  # some belong elsewhere now, and are there once
        check_all(store, range(40))
    gone = [number for number in range(40) if holders(more, number) == [manifest.shards[0].name]]
    assert gone
    with StateStore.open(more.without_shard(manifest.shards[0].name).path) as store:
        assert held(store) == keys(set(range(40)) - set(gone))
    with StateStore.open(
        Manifest.open(more.path).with_shard(manifest.shards[0].name).path
    ) as store:
        check_all(store, range(40))


def test_what_is_read_ahead_is_found_in_its_shard(manifest: Manifest) -> None:
    """All bytes of every value, and none of what is in no shard."""
    fill(manifest, *range(20))
    with StateStore.open(manifest.path) as store, store.reading() as reader:
        for number in range(20):
            key = a_record(number).key
            for layer, chunk, value in values(number):
                assert reader.load(key, layer, chunk) == len(value)
        assert reader.load(a_record(20).key, 0, 0) == 0


@pytest.mark.parametrize("how", ["cut", "zeros", "no store", "missing", "unreadable"])
def test_one_bad_shard_takes_no_other_down(how: str, manifest: Manifest) -> None:
    """Its documents are missed, all others are found, and it is told which shard it was."""
    fill(manifest, *range(30))
    publish(manifest)
    bad = manifest.shards[1]
    its = {number for number in range(30) if holders(manifest, number) == [bad.name]}
    assert its
    data = bad.folder / "data.mdb"
    if how == "cut":
        data.write_bytes(data.read_bytes()[: 3 * 4096])
    elif how == "zeros":
        data.write_bytes(bytes(len(data.read_bytes())))
    elif how == "no store":
        data.write_bytes(b"no store")
    elif how == "missing":
        shutil.rmtree(bad.folder)
    else:
        data.unlink()
        data.mkdir()
    with StateStore.open(manifest.path, read_only=True) as store:
        assert isinstance(store, ShardedStore)
        assert held(store) == keys(set(range(30)) - its)
        for number in range(30):
            assert bool(texts_in(store, a_record(number).text)) is (number not in its)
        down = [damage.reason for damage in store.verify().damaged if not damage.key]
        assert set(store.down) == (set() if how == "missing" else {bad.name})
        assert [bad.name in reason for reason in down] == [True] * len(store.down)
        assert store.stats().documents == 30 - len(its)


# --- merged and split ---------------------------------------------------------------------------


def contents(store: StateStore) -> dict[bytes, tuple[object, ...]]:
    """All that is known of every state."""
    return {
        record.key: (
            record.to_bytes(),
            stored(store, record.key),
            record.key in store.keys_of("owner"),
            (entry := dict(store.entries())[record.key]).hits,
            entry.used_s,
            entry.saved_s,
        )
        for record in store.records()
    }


@pytest.mark.parametrize("how", ["merged", "split", "both"])
def test_merged_or_split_the_states_are_the_same(how: str, manifest: Manifest) -> None:
    """Bytes, owners, uses and what belongs to the namespace; published shards stay published."""
    with StateStore.open(manifest.path) as store:
        put(store, *range(30), owners=["owner"])
        store.put(a_record(99, is_preamble=True), values(99))
        store.count_use([a_record(3).key, a_record(3).key, a_record(4).key])
        store.name_model(ROOT, "a model")
        store.set_fidelity(ROOT, 0.25)
        with store.beside("paths") as paths:
            put(paths, 200, 201)
    publish(manifest)
    with StateStore.open(manifest.path) as store:
        before = contents(store)
    names = [shard.name for shard in manifest.shards]
    if how != "split":
        manifest = merge_shards(manifest, names[:2], "merged")
        assert [shard.name for shard in manifest.shards] == [names[2], "merged"]
    if how != "merged":
        gone = [shard.name for shard in manifest.shards][-1]
        manifest = split_shard(manifest, gone, ["a", "b", "c"])
        assert [shard.name for shard in manifest.shards][-3:] == ["a", "b", "c"]
    assert all(shard.is_published for shard in manifest.shards)
    with StateStore.open(manifest.path) as store:
        assert contents(store) == before
        assert store.models()[ROOT].fidelity == 0.25
        with store.beside("paths") as paths:
            assert held(paths) == keys([200, 201])
    assert not list(manifest.path.parent.glob(".*"))


def test_who_reads_the_old_shards_goes_on(manifest: Manifest) -> None:
    """Until the store is opened again; units that are done stay done."""
    fill(manifest, *range(20))
    manifest.shards[0].commit(Unit("a" * 32, 1, 2, 3, 0.5))
    names = [shard.name for shard in manifest.shards]
    with StateStore.open(manifest.path, read_only=True) as store:
        merged = merge_shards(manifest, names, "merged")
        check_all(store, range(20))
    assert list(merged.shard("merged").units()) == ["a" * 32]
    assert not merged.shard("merged").is_published
    with StateStore.open(merged.path) as store:
        check_all(store, range(20))


def test_all_shards_can_be_copied_to_one_file(manifest: Manifest, tmp_path: Path) -> None:
    fill(manifest, *range(20))
    with StateStore.open(manifest.path) as store, StateStore.open(tmp_path / "one") as one:
        assert store.copy_to(one, lambda record: record.key != a_record(7).key) == 19
        assert held(one) == keys(set(range(20)) - {7})
        check_sums(one)


def test_a_merge_that_fails_changes_nothing(manifest: Manifest) -> None:
    fill(manifest, *range(20))
    (manifest.shards[1].folder / "data.mdb").write_bytes(b"no store")
    names = [shard.name for shard in manifest.shards]
    with pytest.raises(StoreOpenError):
        merge_shards(manifest, names, "merged")
    with pytest.raises(ValueError, match="shard-00000 cannot name new shards"):
        split_shard(manifest, names[0], ["x", names[0]])
    assert Manifest.open(manifest.path) == manifest
    assert sorted(p.name for p in manifest.path.parent.iterdir()) == [*names, "shards.json"]


def test_an_encrypted_shard_stays_as_it_is(manifest: Manifest) -> None:
    with StateStore.open(manifest.path, key=bytes(32)) as store:
        put(store, *range(9))
    with pytest.raises(StoreError, match="encrypted"):
        split_shard(manifest, manifest.shards[0].name, ["x", "y"])
    with StateStore.open(manifest.path, key=bytes(32)) as store:
        assert held(store) == keys(range(9))


def test_where_all_shards_are_bad_the_store_cannot_be_opened(manifest: Manifest) -> None:
    fill(manifest, *range(30))
    for shard in manifest.shards:
        (shard.folder / "data.mdb").write_bytes(b"no store")
    with pytest.raises(StoreOpenError, match="no shard of"):
        StateStore.open(manifest.path, read_only=True)


def test_a_shard_that_nobody_has_begun_is_empty(manifest: Manifest) -> None:
    with StateStore.open(manifest.path, read_only=True) as store:
        assert held(store) == []
        assert store.verify().is_whole
        assert store.stats().documents == 0


def test_limits_are_refused(manifest: Manifest) -> None:
    with pytest.raises(ValueError, match="limits are set for each of these"):
        StateStore.open(manifest.path, max_bytes=LIMIT)


def test_a_store_in_shards_can_be_sent_to_another_process(manifest: Manifest) -> None:
    fill(manifest, 1)
    with StateStore.open(manifest.path) as store, pickle.loads(pickle.dumps(store)) as other:
        assert held(other) == held(store)
        with store.beside("paths") as beside, pickle.loads(pickle.dumps(beside)) as its:
            put(beside, 2)
            assert held(its) == [a_record(2).key]


def test_every_method_is_that_of_shards() -> None:
    """What `StateStore` does on one file must not be inherited by chance."""
    inherited = {
        name
        for name, _ in inspect.getmembers(StateStore)
        if not name.startswith("_") and name not in vars(ShardedStore)
    }
    assert inherited == {
        *("open", "in_memory", "salvage"),
        *("put", "assign", "stats", "model_names"),
    }


# --- texts --------------------------------------------------------------------------------------

WORDS = st.lists(st.sampled_from("abc"), min_size=20, max_size=60).map("".join)


@settings(max_examples=60, deadline=None)
@given(st.lists(WORDS, max_size=12), st.integers(1, 4), st.data())
def test_texts_are_found_in_shards_as_in_one(
    texts: list[str], count: int, data: st.DataObject
) -> None:
    """Reference path: one set of all texts. Our path: they are spread, prefixes of others too."""
    texts += [text + more for text in texts[:3] for more in ("a", "abcabc")]
    parts = [TextSet() for _ in range(count)]
    for text in texts:
        data.draw(st.sampled_from(parts)).add([text])
    prompt = "\n".join(data.draw(st.permutations(texts)))
    assert find_texts(prompt, [Joined(parts)]) == find_texts(prompt, [TextSet(texts)])


class Joined:
    """Some sets of texts as one source."""

    def __init__(self, parts: list[TextSet]) -> None:
        self._parts = parts

    @contextmanager
    def looking(self) -> Iterator[TextView]:
        yield JoinedView(self._parts)


# --- an engine on it ----------------------------------------------------------------------------

PASSAGES = [f"Passage {n} tells of the number {n}, and of nothing else at all." for n in range(12)]


@pytest.fixture(scope="module")
def model() -> Iterator[HCacheEngine]:
    with StateStore.in_memory() as nothing:
        yield HCacheEngine(tiny_model(SHAPES[1]), byte_tokenizer(), nothing, preamble="Read: ")


def on(store: StateStore, model: HCacheEngine) -> HCacheEngine:
    return HCacheEngine(
        model.adapter.model, model.tokenizer, store, preamble="Read: ", fidelity="none"
    )


@pytest.mark.usefixtures("one_thread")
def test_an_engine_answers_from_shards_as_from_one_file(
    model: HCacheEngine, manifest: Manifest, tmp_path: Path
) -> None:
    """Reference path: one file. Our path: published shards, and a damaged one among them."""
    prompt = "Read: " + "\n\n".join(PASSAGES[:6]) + "\n\nWhich?"
    with StateStore.open(tmp_path / "one") as one:
        engine = on(one, model)
        engine.precompute(PASSAGES)
        expected = engine.generate(prompt)
    with StateStore.open(manifest.path) as store:
        on(store, model).precompute(PASSAGES)
    publish(manifest)
    with StateStore.open(manifest.path) as store:
        found = on(store, model).generate(prompt)
        assert found.text == expected.text
        assert found.provenance.relocated_tokens == expected.provenance.relocated_tokens > 0
    bad = Placement([s.name for s in manifest.shards]).place(PASSAGES[0])
    (manifest.shard(bad).folder / "data.mdb").write_bytes(b"no store")
    with StateStore.open(manifest.path) as store:
        engine = on(store, model)
        engine.announce(PASSAGES)
        found = engine.generate(prompt)
        assert 0 < found.provenance.missed_tokens < len(prompt)
        restored = found.provenance.restored_tokens
        assert 0 < restored < expected.provenance.restored_tokens


@pytest.mark.usefixtures("one_thread")
def test_a_damaged_value_is_found_and_repaired_in_its_shard(
    model: HCacheEngine, manifest: Manifest
) -> None:
    """What is whole passes; progress ends where it should."""
    told: list[tuple[int, int]] = []
    with StateStore.open(manifest.path) as store:
        on(store, model).precompute(PASSAGES)
        assert store.verify(lambda done, total: told.append((done, total))).is_whole
        assert told[-1] == (len(PASSAGES) + 1, len(PASSAGES) + 1)
        (record,) = store.find(PASSAGES[4])
        with store.reading([record.key]) as reader:
            value = bytes(reader.value(record.key, 0, 0))
        store.put(record, [(0, 0, value)])
        report = store.verify()
        assert [damage.key for damage in report.damaged] == [record.key]
        store.repair(report)
        assert store.verify().is_whole
        assert len(held(store)) == len(PASSAGES)


@pytest.mark.usefixtures("one_thread")
def test_conversations_are_kept_beside_published_shards(
    model: HCacheEngine, manifest: Manifest
) -> None:
    """In a shard that may be written; the next turn restores them."""
    with StateStore.open(manifest.path) as store:
        on(store, model).precompute(PASSAGES)
    publish(manifest)
    with StateStore.open(manifest.with_shard("local").path) as store:
        engine = on(store, model)
        prompt = f"Read: {PASSAGES[0]}\n\nWhat does it tell, and of which number?"
        engine.generate(prompt, remember=True)
        engine.flush()
        again = engine.generate(f"{prompt} Say it again.")
        assert again.provenance.exact_tokens >= len(prompt) - 1
        assert store.stats().paths > 0
        engine.close()
