"""Shards as files: which documents belong where, what is done, and what a crash leaves."""

from __future__ import annotations

import json
import multiprocessing
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hcache_rag import StoreError, StoreOpenError
from hcache_rag.store.manifest import Manifest, Shard, Unit, manifest_at
from hcache_rag.store.placement import Placement

NAMES = [f"shard-{number:05}" for number in range(8)]
TEXTS = [f"This is passage {number}." for number in range(4000)]


# --- placement ----------------------------------------------------------------------------------


def test_documents_are_spread_evenly() -> None:
    """Each of 8 shards gets an eighth of 4,000, give or take five standard deviations (105)."""
    counted = Counter(map(Placement(NAMES).place, TEXTS))
    assert sorted(counted) == NAMES
    assert all(abs(count - 500) < 105 for count in counted.values())


def test_the_order_of_the_shards_does_not_count() -> None:
    one, other = Placement(NAMES), Placement(NAMES[::-1])
    assert [one.place(t) for t in TEXTS[:200]] == [other.place(t) for t in TEXTS[:200]]


def test_whitespace_around_a_text_does_not_count() -> None:
    placement = Placement(NAMES)
    assert all(placement.place(f"\n {t} ") == placement.place(t) for t in TEXTS[:50])


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=50), st.integers(2, 9), st.data())
def test_a_shard_less_moves_only_its_own_documents(
    text: str, count: int, data: st.DataObject
) -> None:
    """And a shard more takes some from all others and moves no other document."""
    names = [f"any {n}" for n in range(count)]
    gone = data.draw(st.sampled_from(names))
    order = Placement(names).order(text)
    left = Placement([name for name in names if name != gone])
    assert sorted(order) == sorted(names)
    assert order[0] == Placement(names).place(text)
    assert left.order(text) == [name for name in order if name != gone]


def test_no_shards_place_nothing() -> None:
    with pytest.raises(ValueError, match="no shards"):
        Placement([]).place("text")
    assert Placement([]).order("text") == []


def test_where_documents_belong_is_part_of_the_format() -> None:
    """Written down once: another release must find what this one has placed."""
    placement = Placement(NAMES)
    found = [NAMES.index(placement.place(text)) for text in TEXTS[:12]]
    assert found == [4, 3, 0, 6, 1, 4, 7, 1, 2, 1, 4, 1]


# --- the manifest -------------------------------------------------------------------------------


def test_a_manifest_is_made_once(tmp_path: Path) -> None:
    made = Manifest.create(tmp_path / "store", 3, 10)
    assert Manifest.create(tmp_path / "store", 3, 10) == made == Manifest.open(tmp_path / "store")
    assert [shard.name for shard in made.shards] == NAMES[:3]
    assert made.shards[1].folder == tmp_path / "store" / NAMES[1]
    with pytest.raises(ValueError, match="3 shards of units of 10 documents, not 4 of 10"):
        Manifest.create(tmp_path / "store", 4, 10)
    with pytest.raises(ValueError, match="0 shards"):
        Manifest.create(tmp_path / "other", 0)


def _make(folder: Path) -> Manifest:
    return Manifest.create(folder, 5)


def test_many_may_make_it_at_once(tmp_path: Path) -> None:
    """All of them have the same one, and nothing else is left."""
    with multiprocessing.get_context("fork").Pool(4) as pool:
        made = pool.map_async(_make, [tmp_path] * 12).get(timeout=60)
    assert set(made) == {Manifest.open(tmp_path)}
    assert [path.name for path in tmp_path.iterdir()] == ["shards.json"]


def test_a_store_of_one_file_is_not_made_one_of_shards(tmp_path: Path) -> None:
    (tmp_path / "data.mdb").write_bytes(b"")
    with pytest.raises(StoreOpenError, match="of one file"):
        Manifest.create(tmp_path, 3)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"format": 2, "id": "", "shards": []}',
        '{"format": 1, "shards": []}',
        '{"format": 1, "id": "", "shards": [1]}',
        '{"format": 1, "id": "", "shards": ["a", "x/a"]}',
        '{"format": 1, "id": "", "shards": [""]}',
        "[" * 100_000,
    ],
)
def test_what_is_no_manifest_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "shards.json").write_text(text)
    with pytest.raises(StoreOpenError):
        Manifest.open(tmp_path)


def test_shards_come_and_go_without_a_file_of_theirs_touched(tmp_path: Path) -> None:
    manifest = Manifest.create(tmp_path / "store", 2)
    more = manifest.with_shard("s3://bucket/there/far").with_shard(str(tmp_path / "near"))
    assert [shard.name for shard in more.shards] == [*NAMES[:2], "far", "near"]
    assert [shard.is_remote for shard in more.shards] == [False, False, True, False]
    assert more.shards[3].folder == tmp_path / "near"
    with pytest.raises(StoreError, match="not in a folder"):
        _ = more.shards[2].folder
    less = more.without_shard(NAMES[0])
    assert less == Manifest.open(tmp_path / "store")
    assert [shard.name for shard in less.shards] == [NAMES[1], "far", "near"]
    assert less.unit_documents == manifest.unit_documents
    with pytest.raises(ValueError, match="no shard 'shard-00000'"):
        less.without_shard(NAMES[0])
    with pytest.raises(StoreOpenError, match="twice"):
        less.with_shard("/elsewhere/far")


def test_a_folder_of_shards_can_be_moved(tmp_path: Path) -> None:
    """They are named by where they are beside the manifest."""
    Manifest.create(tmp_path / "store", 2).with_shard("third")
    (tmp_path / "store").rename(tmp_path / "moved")
    assert Manifest.open(tmp_path / "moved").shards[2].folder == tmp_path / "moved" / "third"


def test_a_path_means_its_manifest(tmp_path: Path) -> None:
    path = Manifest.create(tmp_path / "store", 2).path
    assert manifest_at(tmp_path / "store") == manifest_at(path) == path
    assert manifest_at(tmp_path) is None
    assert manifest_at(tmp_path / "missing.json") is None


# --- what of a shard is done --------------------------------------------------------------------


def a_unit(number: int) -> Unit:
    return Unit(f"{number:032x}", number, 10 * number, 100 * number, 0.5, {"empty": 1})


@pytest.fixture
def shard(tmp_path: Path) -> Shard:
    return Shard("any", str(tmp_path))


def test_units_are_there_when_they_were_committed(shard: Shard) -> None:
    assert shard.units() == {}
    for number in range(5):
        shard.commit(a_unit(number))
        assert list(shard.units().values()) == [a_unit(n) for n in range(number + 1)]


@pytest.mark.parametrize("left", [1, 20, 80, -1])
def test_what_a_crash_leaves_of_a_line_counts_for_nothing(shard: Shard, left: int) -> None:
    """And does not spoil the next one."""
    shard.commit(a_unit(1))
    whole = (shard.folder / "units.jsonl").read_bytes()
    shard.commit(a_unit(2))
    line = (shard.folder / "units.jsonl").read_bytes()[len(whole) :].strip()
    (shard.folder / "units.jsonl").write_bytes(whole + line[:left])
    assert list(shard.units().values()) == [a_unit(1)]
    shard.commit(a_unit(3))
    assert list(shard.units().values()) == [a_unit(1), a_unit(3)]


def test_a_published_shard_says_what_it_holds_until_it_is_opened_again(shard: Shard) -> None:
    for number in (1, 2):
        shard.commit(a_unit(number))
    assert not shard.is_published
    shard.publish()
    assert shard.is_published
    summary = json.loads((shard.folder / "published.json").read_text())
    assert summary == {"format": 1, "documents": 3, "tokens": 30, "num_bytes": 300}
    shard.reopen()
    shard.reopen()
    assert not shard.is_published
