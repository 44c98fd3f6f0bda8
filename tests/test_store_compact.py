"""Compacting, and files that take the place of a store's: nobody reads or writes the wrong one."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import lmdb
import pytest
from test_store import a_record, exchange_meta, run, stored, values

import hcache_rag.store.lmdb_backend as lmdb_backend
from hcache_rag.errors import DamagedStoreError, StoreBusyError, StoreError
from hcache_rag.store import StateStore, pages
from hcache_rag.store.turns import Turns

PATIENCE_S = 60.0
KEPT = range(0, 40, 4)


def fill(store: StateStore) -> None:
    """Forty states, of which every fourth stays."""
    for number in range(40):
        store.put(a_record(number), values(number, 60_000))
    for number in set(range(40)) - set(KEPT):
        store.delete(a_record(number).key)


def assert_is_whole(store: StateStore) -> None:
    assert_adds_up(store)
    assert len(list(store.records())) == len(KEPT)
    for number in KEPT:
        assert stored(store, a_record(number).key) == list(values(number, 60_000))


def assert_adds_up(store: StateStore) -> None:
    report = store.verify()  # of its values it knows that they are none of a model's
    assert report.is_sum_right
    assert not report.strays


@contextmanager
def another_process(path: Path, *, read_only: bool = False) -> Iterator[subprocess.Popen[str]]:
    """A process that has a store open, and looks into it once more when it is told to."""
    child = run(
        f"""
with StateStore.open(sys.argv[1], read_only={read_only}) as store:
    print(len(list(store.records())), flush=True)
    sys.stdin.readline()
    print(len(list(store.records())), flush=True)
""",
        path,
    )
    assert child.stdout is not None
    child.stdout.readline()
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def looks_again(child: subprocess.Popen[str]) -> int:
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write("\n")
    child.stdin.flush()
    return int(child.stdout.readline())


# --- compacting ---------------------------------------------------------------------------------


def test_compacting_gives_the_disk_what_is_free(tmp_path: Path) -> None:
    """The same object goes on, its limit stays, and the next one need not check the pages."""
    path = tmp_path / "store"
    with StateStore.open(path, max_bytes=1 << 26) as store:
        fill(store)
        before = store.file_bytes()
        assert store.compact() == store.file_bytes() < before / 3
        assert_is_whole(store)
        store.put(a_record(99), values(99))
        assert store._live._env.map_bytes == 1 << 26  # type: ignore[attr-defined]
        assert store.delete(a_record(99).key)
    assert sorted(p.name for p in path.iterdir()) == ["data.mdb", "lock.mdb", "writer.lock"]
    assert (path / "data.mdb").stat().st_mode & 0o777 == 0o600
    assert pages.problems(path / "data.mdb") == []
    turns = Turns(path, read_only=True)
    assert turns.is_noted()
    assert not turns.is_moved()
    turns.close()
    with StateStore.open(path, read_only=True) as again:
        assert_is_whole(again)


@pytest.mark.parametrize("read_only", [False, True], ids=["writer", "reader"])
def test_a_store_that_is_open_elsewhere_is_not_compacted(tmp_path: Path, read_only: bool) -> None:
    """The other one would go on in a file that is not there any more."""
    path = tmp_path / "store"
    with StateStore.open(path) as store:
        fill(store)
        with another_process(path, read_only=read_only) as child:
            with pytest.raises(StoreBusyError, match="another process has"):
                store.compact()
            assert_is_whole(store)
            assert looks_again(child) == len(KEPT)
            child.wait(PATIENCE_S)
        store.compact()
        assert_is_whole(store)


def test_who_opens_a_store_meanwhile_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that comes in the middle of compacting finds the new file, and writes into it."""
    path = tmp_path / "store"
    copy = lmdb_backend.LmdbBackend._copy_to
    children = []

    def slow(backend: lmdb_backend.LmdbBackend, to: Path) -> None:
        copy(backend, to)
        script = """
print("here", flush=True)
with StateStore.open(sys.argv[1]) as store:
    store.put(a_record(77), values(77))
"""
        children.append(run(script, path))
        assert children[0].stdout is not None
        assert children[0].stdout.readline() == "here\n"

    monkeypatch.setattr(lmdb_backend.LmdbBackend, "_copy_to", slow)
    with StateStore.open(path) as store:
        fill(store)
        store.compact()
        assert children[0].wait(PATIENCE_S) == 0, children[0].communicate()
        assert stored(store, a_record(77).key) == list(values(77))
        store.delete(a_record(77).key)
        assert_is_whole(store)


def test_threads_read_on_while_a_store_is_compacted(tmp_path: Path) -> None:
    """They are waited for at the end, and see the same before and after."""
    with StateStore.open(tmp_path / "store") as store:
        fill(store)
        over, wrong = threading.Event(), list[int]()

        def read() -> None:
            with StateStore.open(tmp_path / "store") as mine:
                while not over.is_set():
                    for number in KEPT:
                        if stored(mine, a_record(number).key) != list(values(number, 60_000)):
                            wrong.append(number)

        threads = [threading.Thread(target=read) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(10):
                store.compact()
        finally:
            over.set()
        for thread in threads:
            thread.join(PATIENCE_S)
        assert wrong == []
        assert_is_whole(store)


def test_who_reads_cannot_compact(tmp_path: Path) -> None:
    """It would wait for itself: an error, and nothing has changed."""
    with StateStore.open(tmp_path / "store") as store:
        fill(store)
        with store.reading(), pytest.raises(StoreBusyError, match="this thread reads"):
            store.compact()
        assert_is_whole(store)
        store.compact()
        assert_is_whole(store)


STEPS: list[tuple[object, str]] = [
    (os, "fsync"),
    (os, "replace"),
    (lmdb_backend, "_sync_folder"),
    (lmdb_backend.LmdbBackend, "_copy_to"),
    (lmdb_backend.LmdbBackend, "_environment"),
    (Turns, "note"),
]


@pytest.mark.parametrize(("place", "step"), STEPS, ids=[step for _, step in STEPS])
def test_a_step_that_fails_loses_nothing(
    tmp_path: Path, place: object, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store goes on, in one file or the other."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    with StateStore.open(tmp_path / "store") as store:
        fill(store)
        with monkeypatch.context() as patch:
            patch.setattr(place, step, fail)
            with pytest.raises((StoreError, OSError)):
                store.compact()
        assert_is_whole(store)
        store.put(a_record(88), values(88))
        store.delete(a_record(88).key)
        store.compact()
        assert_is_whole(store)


@pytest.mark.parametrize("is_after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    "step", ["os.fsync", "os.replace", "lmdb_backend._sync_folder", "Turns.note"]
)
def test_a_process_that_is_killed_while_compacting_loses_nothing(
    tmp_path: Path, step: str, is_after: bool
) -> None:
    """Before or after each step; what it leaves behind goes with the next opening."""
    path = tmp_path / "store"
    with StateStore.open(path) as store:
        fill(store)
    holder, name = step.split(".")
    child = run(
        f"""
import os, signal
import hcache_rag.store.lmdb_backend as lmdb_backend
from hcache_rag.store.turns import Turns
store = StateStore.open(sys.argv[1])
step = {step}
def killed(*a, **k):
    if {is_after}:
        step(*a, **k)
    os.kill(os.getpid(), signal.SIGKILL)
setattr({holder}, {name!r}, killed)
store.compact()
""",
        path,
    )
    assert child.wait(PATIENCE_S) == -signal.SIGKILL, child.communicate()
    with StateStore.open(path) as store:
        assert_is_whole(store)
        store.put(a_record(1), values(1))
    assert sorted(p.name for p in path.iterdir()) == ["data.mdb", "lock.mdb", "writer.lock"]


# --- files that are replaced --------------------------------------------------------------------


def test_a_backup_may_be_moved_over_a_store_that_is_open(tmp_path: Path) -> None:
    """Who opens it then has readers of his own; who had it open follows, and both can write."""
    path = tmp_path / "store"
    with StateStore.open(path) as store:
        for number in range(3):
            store.put(a_record(number), values(number))
        shutil.copytree(path, tmp_path / "backup")
        for number in range(3, 30):
            store.put(a_record(number), values(number))
        os.replace(tmp_path / "backup" / "data.mdb", path / "data.mdb")
        with another_process(path) as child:
            store.put(a_record(50), values(50))
            assert looks_again(child) == 4
            child.wait(PATIENCE_S)
        for number in range(3):
            assert stored(store, a_record(number).key) == list(values(number))
        assert_adds_up(store)


def test_a_store_whose_lock_file_is_deleted_keeps_the_readers_table(tmp_path: Path) -> None:
    """Who still has it open is still seen by LMDB."""
    path = tmp_path / "store"
    with StateStore.open(path) as store:
        store.put(a_record(1), values(1))
        before = (path / "lock.mdb").stat().st_ino
        (path / "writer.lock").unlink()
        with another_process(path) as child:
            assert looks_again(child) == 1
            child.wait(PATIENCE_S)
        assert (path / "lock.mdb").stat().st_ino == before


def test_two_threads_may_find_out_at_once_that_a_file_was_replaced(tmp_path: Path) -> None:
    """None closes the file under the other."""
    path = tmp_path / "store"
    with StateStore.open(path) as store:
        for number in range(3):
            store.put(a_record(number), values(number))
        shutil.copytree(path, tmp_path / "backup")
        errors = list[BaseException]()
        over = threading.Event()

        def look(action: Callable[[], object]) -> None:
            while not over.is_set():
                try:
                    action()
                except BaseException as error:
                    errors.append(error)
                    return

        actions: list[Callable[[], object]] = [
            lambda: list(store.records()),
            lambda: store.record(a_record(1).key),
            store.sync,
            store.used_bytes,
        ]
        threads = [threading.Thread(target=look, args=(action,)) for action in actions]
        for thread in threads:
            thread.start()
        for _ in range(60):
            copy = tmp_path / "next.mdb"
            shutil.copy2(tmp_path / "backup" / "data.mdb", copy)
            os.replace(copy, path / "data.mdb")
            store.count_use([a_record(0).key])
            store.flush_uses()
        over.set()
        for thread in threads:
            thread.join(PATIENCE_S)
        assert errors == []


def test_closing_one_of_two_leaves_the_turn_with_the_other(tmp_path: Path) -> None:
    """A process's locks end when it closes any descriptor of a file: there is only one."""
    path = tmp_path / "store"
    with StateStore.open(path) as store:
        store.put(a_record(1), values(1))
        shutil.copytree(path, tmp_path / "backup")
        old = StateStore.open(path)
        backend = old._live
        os.replace(tmp_path / "backup" / "data.mdb", path / "data.mdb")
        child = run(
            """
from hcache_rag.errors import StoreBusyError
with StateStore.open(sys.argv[1], write_wait_s=0.0) as store:
    print("open", flush=True)
    sys.stdin.readline()
    try:
        store.put(a_record(2), values(2))
    except StoreBusyError:
        print("busy")
""",
            path,
        )
        assert child.stdout is not None
        assert child.stdout.readline() == "open\n"
        with store._writing():
            assert store._live is not backend
            old.close()
            assert child.communicate("\n", timeout=PATIENCE_S)[0] == "busy\n"


# --- the rows that nothing can be found without ---------------------------------------------------


@pytest.mark.parametrize("read_only", [False, True])
def test_a_damaged_description_is_told_by_its_copy(tmp_path: Path, read_only: bool) -> None:
    """Id and limit are as before; who may write puts it right."""
    path = tmp_path / "store"
    with StateStore.open(path, max_bytes=1 << 25) as store:
        fill(store)
        before = store.store_id
    change_row(path, b"meta", b"store", b'{"format": 7')
    with StateStore.open(path, read_only=read_only) as store:
        assert (store.store_id, store.max_bytes) == (before, 1 << 25)
        assert_is_whole(store)
    assert (exchange_meta(path, b"x") == b'{"format": 7') == read_only


def test_a_store_without_a_description_is_salvaged(tmp_path: Path) -> None:
    """Its pages are whole, and so are its states; each damaged file is kept."""
    path = tmp_path / "store"
    with StateStore.open(path) as store:
        fill(store)
    exchange_meta(path, b"nothing")
    with pytest.raises(DamagedStoreError, match="its description cannot be read"):
        StateStore.open(path)
    salvaged = StateStore.salvage(path)
    assert salvaged.problems == ("its description cannot be read",)
    assert salvaged.kept is not None
    with StateStore.open(path) as store:
        assert_adds_up(store)
    exchange_meta(path, b"[]")
    assert StateStore.salvage(path).kept not in (None, salvaged.kept)


def test_a_damaged_namespace_is_told_by_its_copy(tmp_path: Path) -> None:
    """Its states are found, its limit holds, and no other one gets its number."""
    path = tmp_path / "store"
    with StateStore.open(path, namespace="one", namespace_max_bytes=1 << 25) as store:
        fill(store)
    change_row(path, b"namespaces", b"one", b"{}")
    with StateStore.open(path, namespace="two") as other:
        assert list(other.records()) == []
        assert other.namespaces() == ["one", "two"]
    with StateStore.open(path, namespace="one") as store:
        assert_is_whole(store)
    with StateStore.open(path, namespace="two") as other:
        assert other.delete_namespace("one")
        assert other.namespaces() == ["two"]


def change_row(path: Path, table: bytes, key: bytes, value: bytes) -> None:
    with lmdb.open(str(path), max_dbs=16) as env:
        database = env.open_db(table)
        with env.begin(write=True, db=database) as txn:
            assert txn.get(key) is not None
            txn.put(key, value)


# --- limits beside readers ------------------------------------------------------------------------


def test_a_limit_that_is_set_by_who_reads_holds_later(tmp_path: Path) -> None:
    """The map cannot be changed under an own reader: it is when something is stored next."""
    path = tmp_path / "store"
    with StateStore.open(path) as store:
        store.put(a_record(0), values(0))
        with store.reading():
            limited = StateStore.open(path, max_bytes=1 << 23)
        for number in range(200):
            with suppress(StoreError):
                limited.put(a_record(number), values(number, 60_000))
        assert limited.file_bytes() <= 1 << 23
        limited.close()


def test_a_generator_may_be_closed_by_another_thread(tmp_path: Path) -> None:
    """Its transaction has ended then for all who must be alone."""
    path = tmp_path / "store"
    with StateStore.open(path) as store:
        fill(store)
        walk = store.records()
        next(walk)
        thread = threading.Thread(target=walk.close)  # type: ignore[attr-defined]
        thread.start()
        thread.join(PATIENCE_S)
        store.compact()
        assert_is_whole(store)


@pytest.fixture(autouse=True)
def _nothing_is_left_open(tmp_path: Path) -> Iterator[None]:
    yield
    assert not [path for path in lmdb_backend.LmdbBackend.open_ones if tmp_path in path.parents]
