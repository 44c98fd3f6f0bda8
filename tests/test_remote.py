"""Shards behind a network: the same states, fetched once, verified, or done without."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from far import PASSAGES, PROMPT, engine_on
from store_conformance import a_record, check_sums, held, keys, put, stored, texts_in, values

from hcache_rag import (
    DamagedStateError,
    StateStore,
    StoreError,
    UnreachableStateError,
)
from hcache_rag.profile import ReadRate
from hcache_rag.store import flight
from hcache_rag.store.flights import Flights
from hcache_rag.store.link import Link
from hcache_rag.store.manifest import Manifest
from hcache_rag.store.remote import VALUES, export_shard
from hcache_rag.store.urls import without_secrets

fsspec = pytest.importorskip("fsspec")
from fsspec.implementations.local import LocalFileSystem  # noqa: E402

STATE_BYTES = sum(len(value) for _, _, value in values())


class FarFileSystem(LocalFileSystem):  # type: ignore[misc]
    """Files of this machine, reached in blocks that are counted, and held up as a test likes."""

    protocol = "far"
    blocks: list[tuple[int, int]] = []  # noqa: RUF012 - of the class, since fsspec makes instances
    before: Callable[[int], None]

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return str(path).removeprefix("far://").rstrip("/")

    def cat_file(self, path: str, start: Any = None, end: Any = None, **kwargs: Any) -> bytes:
        if path.endswith(VALUES):
            type(self).before(end - start)
            self.blocks.append((start, end))
        data: bytes = super().cat_file(path, start=start, end=end, **kwargs)
        return data


fsspec.register_implementation("far", FarFileSystem, clobber=True)


@pytest.fixture(autouse=True)
def blocks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """What was fetched of the values, so far."""
    fetched: list[tuple[int, int]] = []
    monkeypatch.setattr(FarFileSystem, "blocks", fetched)
    monkeypatch.setattr(FarFileSystem, "before", staticmethod(lambda _: None), raising=False)
    monkeypatch.setattr(Flights, "probe", lambda *_: None)  # has a test of its own
    return fetched


def export(tmp_path: Path, fill: Callable[[StateStore], object], near_bytes: int = 1 << 26) -> Path:
    """The manifest of a store whose two shards are far away."""
    local = Manifest.create(tmp_path / "local", 2)
    with StateStore.open(local.path) as store:
        fill(store)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "shards.json").write_text('{"format": 1, "id": "x", "shards": []}')
    manifest = Manifest.open(tmp_path / "here").with_near_max_bytes(near_bytes)
    for shard in local.shards:
        shard.publish()
        url = f"far://{tmp_path}/far/{shard.name}"
        export_shard(shard, url)
        manifest = manifest.with_shard(url)
    return manifest.path


def far_values(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "far").glob(f"*/{VALUES}"))


def test_states_from_afar_are_those_that_were_exported(
    tmp_path: Path, blocks: list[tuple[int, int]]
) -> None:
    """By key, by text, by prompt; and the second time they are near, also for who opens anew."""
    path = export(tmp_path, lambda store: put(store, *range(20)))
    for _ in range(2):
        with StateStore.open(path) as store:
            assert held(store) == keys(range(20))
            for number in range(20):
                record = a_record(number)
                assert stored(store, record.key) == values(number)
                assert texts_in(store, f"x {record.text} y") == [record.text]
            store.count_use([a_record(1).key])
        assert sum(end - begin for begin, end in blocks) == 20 * STATE_BYTES
    with StateStore.open(path) as store:
        assert store.verify().values == 20 * len(values())
        assert store.stats().documents == 20


def test_what_begins_behind_the_first_value_is_fetched_from_there(
    tmp_path: Path, blocks: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where first layers are recomputed; the rest comes last, and then the state is near."""
    path = export(tmp_path, lambda store: put(store, 1))
    monkeypatch.setattr(flight, "BLOCK_BYTES", STATE_BYTES // 6)
    rest = [(la, ch) for la, ch, _ in values(1) if la >= 1]
    for _ in range(2):
        with StateStore.open(path) as store, store.reading([a_record(1).key]) as reader:
            found = [bytes(reader.value(a_record(1).key, la, ch)) for la, ch in rest]
            assert found == [value for la, _, value in values(1) if la >= 1]
            landed(store)
    begins = [begin for begin, _ in blocks]
    first = min(begins)
    assert begins[0] > first
    assert begins == sorted(b for b in begins if b >= begins[0]) + sorted(
        b for b in begins if b < begins[0]
    )
    assert sum(end - begin for begin, end in blocks) == STATE_BYTES


def answers(store: StateStore) -> None:
    """An answer has come over each link: nobody need wait before he asks again."""
    for link in store.near._links.values():  # type: ignore[attr-defined]
        link.begin()
        link.end(1)


def landed(store: StateStore) -> None:
    """Wait until nothing is on its way."""
    store.near.flights.join(60)  # type: ignore[attr-defined]


def test_who_asks_at_once_shares_one_flight(
    tmp_path: Path, blocks: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four readers ask before the first block has come; it comes once."""
    path = export(tmp_path, lambda store: put(store, 1))
    asked = threading.Barrier(5)
    monkeypatch.setattr(FarFileSystem, "before", staticmethod(lambda _: asked.wait(60)))
    monkeypatch.setattr(flight, "BLOCK_BYTES", 2 * STATE_BYTES)
    begin = Flights.start

    def beginning(*arguments: Any, **options: Any) -> Any:
        found = begin(*arguments, **options)
        asked.wait(60)
        return found

    monkeypatch.setattr(Flights, "start", beginning)
    found: list[object] = []
    with StateStore.open(path) as store:
        readers = [
            threading.Thread(target=lambda: found.append(stored(store, a_record(1).key)))
            for _ in range(4)
        ]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(60)
    assert found == [values(1)] * 4
    assert len(blocks) == 1


def test_what_comes_early_can_be_read_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first value is there while the last block is still held up."""
    path = export(tmp_path, lambda store: put(store, 1))
    may_end, count = threading.Event(), iter(range(1000))

    def hold(_: int) -> None:
        if next(count) > 2:
            assert may_end.wait(60)

    monkeypatch.setattr(flight, "BLOCK_BYTES", STATE_BYTES // 6)
    monkeypatch.setattr(FarFileSystem, "before", staticmethod(hold))
    with StateStore.open(path) as store, store.reading([a_record(1).key]) as reader:
        assert bytes(reader.value(a_record(1).key, 0, 0)) == values(1)[0][2]
        may_end.set()
        assert bytes(reader.value(a_record(1).key, 2, 1)) == values(1)[-1][2]


def test_nothing_wrong_is_served(tmp_path: Path) -> None:
    """A byte that flipped afar is noticed; one that flipped near is fetched again."""
    path = export(tmp_path, lambda store: put(store, 1, 2, 3))
    with StateStore.open(path) as store:
        for number in (1, 2, 3):
            assert stored(store, a_record(number).key) == values(number)
    with StateStore.open(path.parent / "near" / "states") as near:
        near.put(a_record(1), [(la, ch, b"?" * len(v)) for la, ch, v in values(1)])
        near.put(a_record(2), values(2)[:3])
        near.delete(a_record(3).key)
    for file in far_values(tmp_path):
        data = bytearray(file.read_bytes())
        third = bytes(data).find(values(3)[0][2][:300])
        if third >= 0:
            data[third] ^= 1
        file.write_bytes(data)
    with StateStore.open(path) as store:
        assert stored(store, a_record(1).key) == values(1)
        assert stored(store, a_record(2).key) == values(2)
        with pytest.raises(DamagedStateError, match="layer 0, chunk 0 is not what was exported"):
            stored(store, a_record(3).key)
        assert [damage.key for damage in store.verify().damaged] == [a_record(3).key]


@pytest.mark.parametrize("how", ["error", "short", "silence"])
def test_what_does_not_come_is_out_of_reach_for_now(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that the engine answers by reading afresh; the next time it may come."""
    path = export(tmp_path, lambda store: put(store, 1))
    end = threading.Event()

    def fails(_: int) -> None:
        if how == "silence":
            end.wait(60)
        raise OSError("the network is down")

    with StateStore.open(path) as store:
        if how == "short":
            cat = LocalFileSystem.cat_file
            monkeypatch.setattr(LocalFileSystem, "cat_file", lambda *a, **k: cat(*a, **k)[:-1])
        else:
            monkeypatch.setattr(FarFileSystem, "before", staticmethod(fails))
        assert store.near is not None  # type: ignore[attr-defined]
        store.near.flights.wait_s = 0.05 if how == "silence" else 60.0  # type: ignore[attr-defined]
        with pytest.raises(UnreachableStateError):
            stored(store, a_record(1).key)
        end.set()
        monkeypatch.undo()
        monkeypatch.setattr(FarFileSystem, "before", staticmethod(lambda _: None), raising=False)
    with StateStore.open(path) as store:
        assert stored(store, a_record(1).key) == values(1)


def test_what_is_near_stays_within_its_limit(tmp_path: Path) -> None:
    """More than it can take goes through it, and all of it can be read."""
    limit = 1 << 22
    path = export(tmp_path, lambda store: put(store, *range(80)), near_bytes=limit)
    with StateStore.open(path) as store:
        for number in range(80):
            assert stored(store, a_record(number).key) == values(number)
    with StateStore.open(path.parent / "near" / "states") as near:
        assert near.used_bytes() <= limit
        assert 5 < len(held(near)) < 80
        check_sums(near)


def test_a_shard_that_cannot_be_reached_takes_no_other_down(tmp_path: Path) -> None:
    path = export(tmp_path, lambda store: put(store, *range(20)))
    (far_values(tmp_path)[0].parent / "export.json").unlink()
    with StateStore.open(path) as store:
        assert 0 < len(held(store)) < 20
        assert list(store.down) == ["shard-00000"]  # type: ignore[attr-defined]


def test_an_index_that_was_damaged_on_its_way_is_refused(tmp_path: Path) -> None:
    path = export(tmp_path, lambda store: put(store, *range(20)))
    index = far_values(tmp_path)[0].parent / "index.mdb"
    index.write_bytes(index.read_bytes()[:-1] + b"?")
    with StateStore.open(path) as store:
        assert "not what was exported" in str(store.down)  # type: ignore[attr-defined]


def test_only_what_is_final_is_exported(tmp_path: Path) -> None:
    local = Manifest.create(tmp_path / "local", 1)
    with StateStore.open(local.path) as store:
        put(store, 1)
    with pytest.raises(StoreError, match="is not published"):
        export_shard(local.shards[0], f"far://{tmp_path}/far")
    assert not (tmp_path / "far").exists()


# --- an engine ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_thread")
def test_an_engine_answers_from_afar_and_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Announced nodes come ahead; where the network fails they are read, and not given up."""
    path = export(tmp_path, lambda store: engine_on(store).precompute(PASSAGES))
    with StateStore.open(tmp_path / "local") as local:
        expected = engine_on(local).generate(PROMPT)

    def down(_: int) -> None:
        raise OSError("the network is down")

    with StateStore.open(path) as store:
        engine = engine_on(store)
        monkeypatch.setattr(FarFileSystem, "before", staticmethod(down))
        without = engine.generate(PROMPT)
        assert without.provenance.missed_tokens == sum(len(t.strip()) for t in PASSAGES)
        first, *others = without.provenance.warnings
        assert "it cannot be fetched: OSError('the network is down'); it is left" in first
        assert all("has not answered just now" in other for other in others)
        monkeypatch.setattr(FarFileSystem, "before", staticmethod(lambda _: None))
        answers(store)
        engine.announce(PASSAGES)
        found = engine.generate(PROMPT)
        assert found.provenance.restored_tokens == expected.provenance.restored_tokens
        assert found.text == expected.text


# --- faults of the tier, the link and URLs ------------------------------------------------------


@pytest.mark.parametrize("how", ["no folder", "damaged", "no states"])
def test_a_tier_that_cannot_be_used_takes_nothing_down(how: str, tmp_path: Path) -> None:
    path = export(tmp_path, lambda store: put(store, *range(5)))
    near = path.parent / "near"
    if how == "no folder":
        near.write_text("in its place")
    elif how == "damaged":
        (near / "states").mkdir(parents=True)
        (near / "states" / "data.mdb").write_bytes(b"?" * 9000)
    else:
        near.mkdir()
        (near / "states").write_text("in its place")
    for _ in range(2):
        with StateStore.open(path) as store:
            for number in range(5):
                assert stored(store, a_record(number).key) == values(number)


def test_a_manifest_that_is_edited_counts_when_it_is_opened_again(tmp_path: Path) -> None:
    path = export(tmp_path, lambda store: put(store, *range(20)))
    with StateStore.open(path) as store:
        whole = path.read_text()
        path.write_text(whole[: len(whole) // 2])
        assert held(store) == keys(range(20))
        assert stored(store, a_record(1).key) == values(1)
    with pytest.raises(StoreError, match="is not a manifest of shards"):
        StateStore.open(path)
    path.write_text(whole)
    with StateStore.open(path) as store:
        assert held(store) == keys(range(20))


def test_two_stores_share_a_tier(tmp_path: Path, blocks: list[tuple[int, int]]) -> None:
    path = export(tmp_path, lambda store: put(store, *range(10)))
    with StateStore.open(path) as one, StateStore.open(path) as other:
        for number in range(10):
            assert stored(one, a_record(number).key) == values(number)
        landed(one)
        for number in range(10):
            assert stored(other, a_record(number).key) == values(number)
    assert sum(end - begin for begin, end in blocks) == 10 * STATE_BYTES


def test_a_link_is_timed_while_it_is_busy_and_left_alone_after_failures() -> None:
    clock = [0.0]
    link = Link(lambda: clock[0])
    assert link.rate is None
    link.begin()
    link.begin()
    clock[0] = 1.0
    link.end(300)
    link.end(100)
    clock[0] = 50.0  # nothing was asked for
    assert link.rate == ReadRate(400.0)
    for pause in (1.0, 2.0, 4.0):
        link.failed()
        link.failed()  # another one that was on its way counts once
        clock[0] += pause - 0.1
        assert link.is_down
        clock[0] += 0.2
        assert not link.is_down
    link.begin()
    link.end(1)
    link.failed()
    clock[0] += 1.1
    assert not link.is_down


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("http://me:secret@host/a", "http://***@host/a"),
        ("OSError('https://host/a?sig=secret&x=1')", "OSError('https://host/a?***')"),
        ("s3://bucket/what", "s3://bucket/what"),
    ],
)
def test_a_url_is_told_without_its_secrets(text: str, told: str) -> None:
    assert without_secrets(text) == told
