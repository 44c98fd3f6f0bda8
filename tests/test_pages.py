"""Files that something else has changed: found before LMDB is given them, and salvaged."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import lmdb.verify
import pytest
from commands import Run
from fakes import save_tiny_model
from faults.documents import a_record, a_state, is_whole
from faults.files import PAGE, Original, a_flip, a_torn_write, a_truncation, an_original
from faults.looking import complaints
from test_store_sharing import another_process_writing, let_go_on

from hcache_rag.errors import DamagedStoreError, StoreBusyError, StoreOpenError
from hcache_rag.llama_index.folder import open_states
from hcache_rag.store import StateStore, turns
from hcache_rag.store.pages import problems, rows
from hcache_rag.store.salvage import DAMAGED_FILE

RECORDS = [a_record(number) for number in range(40)]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Original:
    return an_original(tmp_path_factory.mktemp("original"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), chat=True))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A store of some documents, closed."""
    with StateStore.open(tmp_path / "store") as store:
        store.put_all([a_state(record, ["somebody"]) for record in RECORDS])
    return tmp_path / "store"


def checks(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are checked from now on."""
    found: list[Path] = []

    def check(path: Path) -> list[str]:
        found.append(path)
        return problems(path)

    monkeypatch.setattr("hcache_rag.store.pages.problems", check)
    return found


def lmdb_says(path: Path) -> list[str]:
    """What LMDB's own verifier finds; pages that nothing uses harm nobody."""
    try:
        found: list[str] = lmdb.verify.verify(str(path), subdir=False)  # type: ignore[no-untyped-call]
    except lmdb.verify.VerifyError as error:
        return [str(error)]
    return [problem for problem in found if "a leak" not in problem]


def zero_a_page_of(path: Path, key: bytes) -> None:
    """Zeros in the first leaf that holds a key."""
    data = bytearray((path / "data.mdb").read_bytes())
    page = data.index(key) // PAGE * PAGE
    data[page : page + PAGE] = bytes(PAGE)
    (path / "data.mdb").write_bytes(data)


# --- what is found ------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [a_flip, a_truncation, a_torn_write])
def test_whatever_lmdbs_own_verifier_finds_is_found(
    damage: Any, original: Original, tmp_path: Path
) -> None:
    """300 damaged files / py-lmdb's own `lmdb.verify`, which lets some by and takes longer."""
    path, found = tmp_path / "data.mdb", 0
    for number in range(300):
        data, what = damage(original, random.Random(number))
        path.write_bytes(data)
        if lmdb_says(path):
            found += 1
            assert problems(path), what
    assert found >= 30


@pytest.mark.parametrize("num_documents", [0, 1, 7, 300])
@pytest.mark.parametrize("tokens", [1, 40])
def test_nothing_is_found_in_a_file_that_is_whole(
    tmp_path: Path, num_documents: int, tokens: int
) -> None:
    """After puts, replacements and deletes; what is read is what LMDB reads."""
    records = [a_record(number, tokens=tokens) for number in range(num_documents)]
    with StateStore.open(tmp_path, durability="fast") as store:
        for begin in range(0, num_documents, 20):
            store.put_all([a_state(record) for record in records[begin : begin + 20]])
        for record in records[::3]:
            store.delete(record.key)
        store.put_all([a_state(a_record(n, tokens=tokens, version=1)) for n in range(0, 9, 2)])
        with store._live.reading() as txn:
            tables = {name for name, _, _ in rows(tmp_path / "data.mdb")}
            every = {(t, key, value) for t in tables for key, value in txn.scan(t)}  # type: ignore[arg-type]
    assert problems(tmp_path / "data.mdb") == lmdb_says(tmp_path / "data.mdb") == []
    assert set(rows(tmp_path / "data.mdb")) == every


@pytest.mark.parametrize(
    "data",
    [b"", b"x", bytes(100_000), b"\xff" * 100_000, json.dumps([1] * 9000).encode()],
    ids=["empty", "short", "zeros", "ones", "text"],
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, data: bytes) -> None:
    """Read-only or not; it stays as it is. An empty file is a store that is being made."""
    (tmp_path / "data.mdb").write_bytes(data)
    if data:
        for read_only in (True, False):
            with pytest.raises(DamagedStoreError, match="is not a state store, or is damaged"):
                StateStore.open(tmp_path, read_only=read_only)
        with pytest.raises(StoreOpenError, match="nothing can be saved"):
            StateStore.salvage(tmp_path)
    assert (tmp_path / "data.mdb").read_bytes() == data


def test_free_pages_may_be_missing_at_the_end(tmp_path: Path) -> None:
    """What a transaction took there and gave back, it has not written; the file is whole."""
    short = 0
    for number in range(40):
        path = tmp_path / str(number)
        source = random.Random(number)
        with StateStore.open(path, durability="fast") as store:
            for n in range(source.randint(5, 25)):
                record = a_record(n, tokens=source.choice((1, 40, 400)))
                store.put_all([a_state(record, [f"owner {n % 3}"])])
            store.delete_owner("owner 0", "owner 1")
            last = store._live._env._env.info()["last_pgno"]  # type: ignore[attr-defined]
        short += (path / "data.mdb").stat().st_size < (last + 1) * PAGE
        assert problems(path / "data.mdb") == []
    assert short > 0


def test_a_file_that_has_lost_everything_is_not_a_new_one(path: Path) -> None:
    (path / "data.mdb").write_bytes(b"")
    for read_only in (True, False):
        with pytest.raises(DamagedStoreError):
            StateStore.open(path, read_only=read_only)


def test_closing_does_not_vouch_for_what_something_else_has_put_there(path: Path) -> None:
    with StateStore.open(path) as store:
        data = bytearray((path / "data.mdb").read_bytes())
        data[10 * PAGE : 14 * PAGE] = bytes(4 * PAGE)
        (path / "new").write_bytes(data)
        (path / "new").replace(path / "data.mdb")
        assert store.record(RECORDS[0].key) is None
    with pytest.raises(DamagedStoreError):
        StateStore.open(path)


# --- when it is looked for ----------------------------------------------------------------------


def test_a_file_is_checked_when_something_else_has_changed_it(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not after closing, nor beside a writer, nor for a copy with its note; else once."""
    checked = checks(monkeypatch)
    for _ in range(2):
        StateStore.open(path).close()
        StateStore.open(path, read_only=True).close()
    shutil.copytree(path, tmp_path / "copy")
    StateStore.open(tmp_path / "copy").close()
    assert checked == []
    os.utime(path / "data.mdb")
    for _ in range(2):
        StateStore.open(path).close()
    assert checked == [path / "data.mdb"]
    shutil.copytree(path, tmp_path / "bare", ignore=shutil.ignore_patterns(turns.FILE_NAME))
    StateStore.open(tmp_path / "bare").close()
    assert checked[1:] == [tmp_path / "bare" / "data.mdb"]


def test_what_was_not_synced_is_checked_after_the_machine_has_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut may have cost pages of "fast" stores; `sync` and "fsync" stores lose none."""
    start = ["first"]
    monkeypatch.setattr(turns, "_start_of_machine", lambda: start[0])
    checked = checks(monkeypatch)
    for name, durability, is_synced in (
        ("fast", "fast", False),
        ("synced", "fast", True),
        ("fsync", "fsync", False),
    ):
        folder = tmp_path / name
        with StateStore.open(folder, durability=durability) as store:  # type: ignore[arg-type]
            store.put_all([a_state(RECORDS[0])])
            if is_synced:
                store.sync()
            shutil.copytree(folder, tmp_path / f"{name}-cut")  # with no chance to close
        start[0] += "+"
        StateStore.open(tmp_path / f"{name}-cut").close()
    assert checked == [tmp_path / "fast-cut" / "data.mdb"]


# --- what is saved ------------------------------------------------------------------------------


def test_what_is_whole_is_salvaged(path: Path) -> None:
    """A leaf of records is lost with what it held; the rest is there, and all of it agrees."""
    damaged = sorted(record.key for record in RECORDS)[20]
    zero_a_page_of(path, damaged + b'{"version"')
    data = (path / "data.mdb").read_bytes()
    with pytest.raises(DamagedStoreError, match=r"records: .*page"):
        StateStore.open(path)
    salvaged = StateStore.salvage(path)
    assert salvaged.problems
    assert salvaged.kept == path / DAMAGED_FILE
    assert salvaged.kept.read_bytes() == data
    with StateStore.open(path) as store:
        assert store.verify().is_whole
        assert not complaints(store)
        left = [record for record in RECORDS if record.key in store]
        assert len(left) == salvaged.states
        assert len(RECORDS) / 2 < len(left) < len(RECORDS)
        assert damaged not in store
        assert all(is_whole(store, record) for record in left)
        assert set(store.keys_of("somebody")) == {record.key for record in left}
        store.put_all([a_state(record, ["somebody"]) for record in RECORDS])
        assert all(is_whole(store, record) for record in RECORDS)
        assert not complaints(store)
    assert StateStore.salvage(path).problems == ()


def test_namespaces_keep_their_own_and_their_keys(tmp_path: Path) -> None:
    """What belongs to a namespace whose name is lost is not given to the next one."""
    key = bytes(range(32))
    for number, name in enumerate(("first", "secret", "third")):
        with StateStore.open(tmp_path, namespace=name, key=key if number == 1 else None) as store:
            store.put_all([a_state(record) for record in RECORDS[number * 10 : number * 10 + 10]])
    zero_a_page_of(tmp_path, sorted(record.key for record in RECORDS[:10])[5] + b'{"version"')
    StateStore.salvage(tmp_path)
    with StateStore.open(tmp_path, namespace="secret", key=key) as store:
        assert all(is_whole(store, record) for record in RECORDS[10:20])
    with StateStore.open(tmp_path, namespace="third") as store:
        assert {r.key for r in store.records()} == {record.key for record in RECORDS[20:30]}
    with StateStore.open(tmp_path, namespace="fourth") as store:
        assert list(store.records()) == []
        assert store.namespaces() == ["first", "fourth", "secret", "third"]


def test_nobody_salvages_while_somebody_writes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor where the store is open in the same process."""
    monkeypatch.setattr("hcache_rag.store.salvage.OPEN_WAIT_S", 0.0)
    with another_process_writing(path) as child:
        with pytest.raises(StoreBusyError):
            StateStore.salvage(path)
        let_go_on(child)
        child.communicate(timeout=60)
    with StateStore.open(path), pytest.raises(StoreOpenError, match="open in this process"):
        StateStore.salvage(path)
    assert not (path / DAMAGED_FILE).exists()


def test_the_command_salvages_and_reads_again(run: Run, model: str, tmp_path: Path) -> None:
    """`verify` says what is wrong; `verify --repair` leaves the index as it was."""
    docs, index = tmp_path / "docs", tmp_path / "index"
    docs.mkdir()
    for name in ("Venus", "Mars", "Saturn"):
        (docs / f"{name}.txt").write_text(f"{name} is a planet, and this is what is said of it.")
    assert run("index", docs, "--store", index, "--model", model).code == 0
    with open_states(index) as store:
        before = {record.key: record.text for record in store.records()}
        states = store.path
    zero_a_page_of(states, next(iter(before)) + b'{"version"')
    outcome = run("verify", "--store", index)
    assert outcome.code == 1
    assert "verify --repair" in outcome.err.replace("\n", " ")
    outcome = run("verify", "--repair", "--store", index)
    assert outcome.code == 0, outcome.err
    assert "the file was damaged" in outcome.err
    with open_states(index) as store:
        assert {record.key: record.text for record in store.records()} == before
    assert run("verify", "--store", index).code == 0
