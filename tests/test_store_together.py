"""Threads, forks and processes that open, close, compact and copy one store at the same time."""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import shutil
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import lmdb
import pytest
from test_store import a_record, exchange_meta, run, stored, values
from test_store_compact import KEPT, assert_is_whole, fill
from test_store_sharing import another_process_writing, in_a_fork, let_go_on

from hcache_rag.errors import StoreBusyError, StoreError, StoreFullError, StoreOpenError
from hcache_rag.state import StateRecord
from hcache_rag.store import (
    StateStore,
    description,
    environment,
    locks,
    opening,
    salvage,
    session,
    shared,
)
from hcache_rag.store.gate import Gate
from hcache_rag.store.lmdb_backend import LmdbBackend
from hcache_rag.store.process import LOCK
from hcache_rag.store.turns import Turns

PATIENCE_S = 60.0

forks = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


class Waits(threading.Condition):
    """Says when somebody begins to wait."""

    def __init__(self, lock: Any) -> None:
        super().__init__(lock)
        self.begun = threading.Event()

    def wait(self, timeout: float | None = None) -> bool:
        self.begun.set()
        return super().wait(timeout)


class Writer:
    """Another process that has a store open, and puts what it is told to."""

    def __init__(self, path: Path) -> None:
        self.process = run(
            """
with StateStore.open(sys.argv[1], write_wait_s=60.0) as store:
    print("open", flush=True)
    for line in sys.stdin:
        store.put(a_record(int(line)), values(int(line)))
        print("stored", flush=True)
""",
            path,
        )
        self.heard = ""

    def is_open(self) -> bool:
        assert self.process.stdout is not None
        return self.process.stdout.readline() == "open\n"

    def put(self, number: int) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{number}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "stored\n", self.process.communicate()[1]

    def end(self) -> str:
        """What it says of errors."""
        try:
            return self.process.communicate(timeout=PATIENCE_S)[1]
        finally:
            self.process.kill()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def writers(path: Path) -> Iterator[Callable[[], Writer]]:
    started = list[Writer]()

    def start() -> Writer:
        started.append(Writer(path))
        return started[-1]

    yield start
    for writer in started:
        writer.process.kill()
        writer.process.communicate()


def started(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def ended(*threads: threading.Thread) -> bool:
    for thread in threads:
        thread.join(PATIENCE_S)
    return not any(thread.is_alive() for thread in threads)


def put_by_turns(store: StateStore, other: Writer, numbers: range) -> None:
    """Both processes write, one after the other; nothing is lost."""
    for number in numbers:
        if number % 2:
            store.put(a_record(number), values(number))
        else:
            other.put(number)
    for number in numbers:
        assert stored(store, a_record(number).key) == list(values(number))


def inode(path: Path) -> int:
    return path.stat().st_ino


# --- opening and closing ------------------------------------------------------------------------


def test_who_opens_while_another_thread_closes_waits(
    path: Path, writers: Callable[[], Writer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own is not the first one's: LMDB's lock file stays under the other process."""
    other = writers()
    assert other.is_open()
    store = StateStore.open(path)
    before = inode(path / "lock.mdb")
    waits = Waits(LOCK)
    monkeypatch.setattr(LmdbBackend, "_changed", waits)
    close, opened = LmdbBackend._close, list[StateStore]()

    def open_it() -> None:
        try:
            opened.append(StateStore.open(path))
        finally:
            waits.begun.set()

    def slow(backend: LmdbBackend) -> None:
        threads.append(started(open_it))
        assert waits.begun.wait(PATIENCE_S)
        close(backend)

    threads = list[threading.Thread]()
    with monkeypatch.context() as patch:
        patch.setattr(LmdbBackend, "_close", slow)
        store.close()
    assert ended(*threads)
    assert inode(path / "lock.mdb") == before
    with opened[0]:
        put_by_turns(opened[0], other, range(20))


def test_a_store_that_is_closed_while_it_is_opened_anew_stays_closed(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two threads, one of which finds another file in the store's place."""
    store = StateStore.open(path)
    store.put(a_record(1), values(1))
    shutil.copytree(path, tmp_path / "backup")
    os.replace(tmp_path / "backup" / "data.mdb", path / "data.mdb")
    acquire = LmdbBackend.acquire

    def closed_meanwhile(*args: Any, **kwargs: Any) -> LmdbBackend:
        assert ended(started(store.close))
        return acquire(*args, **kwargs)

    monkeypatch.setattr(LmdbBackend, "acquire", closed_meanwhile)
    with pytest.raises(StoreError, match="is closed"):
        store.used_bytes()


def test_a_store_that_another_thread_closes_is_closed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any moment: an error of the tree, not one of Python."""
    is_stale = session.Session._is_stale

    def closed_then(it: session.Session, backend: Any) -> bool:
        assert ended(started(it.close))
        return is_stale(it, backend)

    store = StateStore.open(path)
    monkeypatch.setattr(session.Session, "_is_stale", closed_then)
    with pytest.raises(StoreError, match="closed"):
        store.used_bytes()


def test_a_store_that_is_compacted_is_closed_afterwards(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another thread, in the middle."""
    store = StateStore.open(path)
    fill(store)
    before = store.file_bytes()
    backend, copy = cast(LmdbBackend, store._live), LmdbBackend._copy_to

    def closed_meanwhile(it: LmdbBackend, to: Path) -> None:
        copy(it, to)
        assert ended(started(store.close))
        assert it._env.is_open

    monkeypatch.setattr(LmdbBackend, "_copy_to", closed_meanwhile)
    backend.compact()
    assert not backend._env.is_open
    with StateStore.open(path) as again:
        assert_is_whole(again)
        assert again.file_bytes() < before / 3


@forks
def test_waiting_for_one_store_does_not_stop_another(tmp_path: Path) -> None:
    """Nor a fork: another process is in its turn, and a thread waits to open that store."""
    StateStore.open(tmp_path / "y").close()
    with StateStore.open(tmp_path / "x") as store, another_process_writing(tmp_path / "y") as child:
        thread = started(lambda: StateStore.open(tmp_path / "y").close())

        def use() -> None:
            store.put(a_record(1), values(1))
            StateStore.open(tmp_path / "x").close()
            assert in_a_fork(lambda: None) == 0

        assert ended(started(use))
        assert thread.is_alive()
        let_go_on(child)
        assert ended(thread)


@pytest.mark.parametrize("wait_s", [0.0, 0.05])
def test_opening_waits_for_a_writer_as_long_as_it_is_told(path: Path, wait_s: float) -> None:
    StateStore.open(path).close()
    with another_process_writing(path), pytest.raises(StoreBusyError, match=f"after {wait_s} s"):
        StateStore.open(path, write_wait_s=wait_s)


@pytest.mark.parametrize("wait_s", [None, PATIENCE_S])
def test_locks_that_a_process_has_as_a_whole_do_as_well(
    path: Path, wait_s: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the system has no others. Nobody waits in it: it would see a deadlock that is none."""
    monkeypatch.setattr(locks, "_HAS_OWNED_LOCKS", False)
    asked = list[int]()
    lockf = fcntl.lockf

    def asking(descriptor: int, flags: int, *more: int) -> None:
        asked.append(flags)
        lockf(descriptor, flags, *more)

    monkeypatch.setattr(fcntl, "lockf", asking)
    with StateStore.open(path, write_wait_s=wait_s) as store, another_process_writing(path) as it:
        thread = started(lambda: store.put(a_record(2), values(2)))
        let_go_on(it)
        assert ended(thread)
        assert it.wait(PATIENCE_S) == 0
        assert len(list(store.records())) == 2
        store.compact()
    assert all(flags & fcntl.LOCK_NB or flags == fcntl.LOCK_UN for flags in asked)


# --- compacting ---------------------------------------------------------------------------------


@pytest.mark.parametrize("is_before", [True, False], ids=["taken-back", "written"])
def test_a_note_that_cannot_be_written_makes_nobody_delete_the_lock_file(
    path: Path,
    is_before: bool,
    writers: Callable[[], Writer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A disk without room for it, before or after the file is exchanged."""

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with StateStore.open(path) as store:
        for number in range(3):
            store.put(a_record(number), values(number))
        with monkeypatch.context() as patch:
            if is_before:
                patch.setattr(os, "pwrite", fail)
                with pytest.raises(StoreError, match="cannot be written"):
                    store.compact()
            else:
                patch.setattr(Turns, "note", lambda *_, **__: None)
                store.compact()
        before = inode(path / "lock.mdb")
        other = writers()
        assert other.is_open()
        assert inode(path / "lock.mdb") == before
        put_by_turns(store, other, range(20))


def test_compacting_gives_up_on_a_reader_that_does_not_end(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A generator that somebody keeps; all others read and write on."""
    monkeypatch.setattr(opening, "ALONE_WAIT_S", 0.05)
    with StateStore.open(path) as store:
        fill(store)
        walk = cast(Generator[StateRecord, None, None], store.records())
        assert ended(started(lambda: next(walk)))
        with pytest.raises(StoreBusyError, match="other threads still read"):
            store.compact()
        assert_is_whole(store)
        store.put(a_record(99), values(99))
        store.delete(a_record(99).key)
        walk.close()
        store.compact()
        assert_is_whole(store)


def test_who_writes_while_it_reads_does_not_wait_for_compacting_for_ever(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor compacting for it: each would wait for the other one."""
    monkeypatch.setattr(opening, "ALONE_WAIT_S", 0.05)
    copied, reads, said = threading.Event(), threading.Event(), list[str]()
    copy = LmdbBackend._copy_to

    def slow(backend: LmdbBackend, to: Path) -> None:
        copy(backend, to)
        copied.set()

    monkeypatch.setattr(LmdbBackend, "_copy_to", slow)
    with StateStore.open(path) as store:
        fill(store)

        def delete() -> None:
            for record in store.records():
                reads.set()
                assert copied.wait(PATIENCE_S)
                store.delete(record.key)
            said.append("deleted")

        def compact() -> None:
            assert reads.wait(PATIENCE_S)
            with pytest.raises(StoreBusyError, match="other threads still read"):
                store.compact()

        assert ended(started(delete), started(compact))
        assert said == ["deleted"]
        assert list(store.records()) == []


def test_readers_come_and_go_while_somebody_waits_to_be_alone() -> None:
    """They are kept out for moments only, not until the last reader has ended."""
    it, alone, done = Gate(), list[bool](), threading.Event()
    it._changed = waits = Waits(LOCK)

    def read() -> None:
        with it.inside():
            pass

    with it.inside():
        thread = started(lambda: alone.append(it.alone(done.set, PATIENCE_S)))
        assert waits.begun.wait(PATIENCE_S)
        assert ended(*(started(read) for _ in range(5)))
        assert not done.is_set()
    assert ended(thread)
    assert alone == [True]


def test_a_thread_may_write_while_another_one_waits_for_a_larger_map(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process has let the file grow. Who waits for readers has left its turn before."""
    with StateStore.open(path, max_bytes=1 << 24) as store:
        for number in range(5):
            store.put(a_record(number), values(number, 30_000))
        walk = store.records()
        next(walk)
        child = run(
            """
with StateStore.open(sys.argv[1], max_bytes=1 << 28) as store:
    for number in range(100, 220):
        store.put(a_record(number), values(number, 30_000))
""",
            path,
        )
        assert child.wait(PATIENCE_S) == 0, child.communicate()
        waits, alone = threading.Event(), Gate.alone

        def waiting(it: Gate, *args: Any, **kwargs: Any) -> bool:
            waits.set()
            return alone(it, *args, **kwargs)

        monkeypatch.setattr(Gate, "alone", waiting)
        thread = started(lambda: store.delete(a_record(1).key))
        assert waits.wait(PATIENCE_S)
        with pytest.raises(StoreError, match="made larger while this thread reads"):
            store.delete(a_record(0).key)
        cast(Generator[StateRecord, None, None], walk).close()
        assert ended(thread)
        assert a_record(1).key not in store
        assert a_record(0).key in store


def test_a_folder_in_the_place_of_the_copy_is_an_error_of_the_tree(path: Path) -> None:
    with StateStore.open(path) as store:
        fill(store)
        (path / "data.mdb.compact").mkdir()
        with pytest.raises(StoreError, match="cannot be compacted"):
            store.compact()
        assert_is_whole(store)
    with pytest.raises(StoreOpenError, match="cannot be opened"):
        StateStore.open(path)


# --- forks --------------------------------------------------------------------------------------


@forks
def test_a_fork_opens_no_gate_that_somebody_else_has_shut(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The map is exchanged behind it, and who reads meanwhile would read from nowhere."""
    monkeypatch.setattr(shared, "FORK_WAIT_S", 0.05)
    store = StateStore.open(path)
    store.put(a_record(1), values(1))
    resizing, go_on, resize = threading.Event(), threading.Event(), environment.Environment.resize

    def slow(env: environment.Environment, num_bytes: int) -> None:
        resizing.set()
        assert go_on.wait(PATIENCE_S)
        resize(env, num_bytes)

    monkeypatch.setattr(environment.Environment, "resize", slow)
    limiting = started(lambda: store._session.limit(1 << 26))
    assert resizing.wait(PATIENCE_S)
    its_gate = cast(LmdbBackend, store._live)._gate
    assert in_a_fork(lambda: None) == 0
    assert its_gate.is_used
    reading = started(lambda: stored(store, a_record(1).key))
    reading.join(0.05)
    assert reading.is_alive()
    go_on.set()
    assert ended(limiting, reading)
    store.close()


@forks
def test_a_child_cannot_use_what_was_used_when_it_was_forked(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told so; its parent goes on, and the next child can."""
    monkeypatch.setattr(shared, "FORK_WAIT_S", 0.05)
    with StateStore.open(path) as store:
        store.put(a_record(1), values(1))
        walk = cast(Generator[StateRecord, None, None], store.records())
        assert ended(started(lambda: next(walk)))

        def refused() -> None:
            with pytest.raises(StoreOpenError, match="forked while it was being used"):
                store.used_bytes()

        def used() -> None:
            assert stored(store, a_record(1).key) == list(values(1))

        assert in_a_fork(refused) == 0
        store.put(a_record(2), values(2))
        walk.close()
        assert in_a_fork(used) == 0
        assert in_a_fork(lambda: None if in_a_fork(used) == 0 else os._exit(1)) == 0


@forks
def test_a_child_can_use_a_store_that_was_compacted_when_it_was_forked(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As soon as its parent has ended that: there is another file then."""
    monkeypatch.setattr(shared, "FORK_WAIT_S", 0.05)
    copy, pids = environment.Environment.copy, list[int]()
    out_of_child, to_child = os.pipe(), os.pipe()

    def forking(env: environment.Environment, descriptor: int) -> None:
        copy(env, descriptor)
        pid = os.fork()
        if pid == 0:
            child()
        pids.append(pid)
        os.close(out_of_child[1])  # so that a child that fails is not waited for
        assert os.read(out_of_child[0], 1) == b"x"

    def child() -> None:
        status = 1
        try:
            with pytest.raises(StoreOpenError, match="forked while it was being used"):
                store.used_bytes()
            os.write(out_of_child[1], b"x")
            os.read(to_child[0], 1)
            assert_is_whole(store)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    with StateStore.open(path) as store:
        fill(store)
        with monkeypatch.context() as patch:
            patch.setattr(environment.Environment, "copy", forking)
            store.compact()
        os.write(to_child[1], b"x")
        assert os.waitpid(pids[0], 0)[1] == 0
        assert_is_whole(store)


@forks
def test_a_fork_while_another_thread_opens_a_store_finds_whole_sessions(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is half made keeps none of the others from getting new locks."""
    stores = [StateStore.open(path, namespace=f"n{number}") for number in range(6)]
    opening, go_on, describe = threading.Event(), threading.Event(), description.describe

    def slow(*args: Any, **kwargs: Any) -> Any:
        opening.set()
        assert go_on.wait(PATIENCE_S)
        return describe(*args, **kwargs)

    monkeypatch.setattr(session, "describe", slow)
    thread = started(lambda: StateStore.open(tmp_path / "other").close())
    assert opening.wait(PATIENCE_S)
    held = [store._session._lock for store in stores]
    for lock in held:
        lock.acquire()

    def use() -> None:
        assert all(store._session._lock not in held for store in stores)
        for store in stores:
            assert list(store.records()) == []

    assert in_a_fork(use) == 0
    for lock in held:
        lock.release()
    go_on.set()
    assert ended(thread)
    for store in stores:
        store.close()


@forks
def test_a_fork_cannot_commit_what_its_parent_writes(path: Path) -> None:
    """A block that both of them leave is the parent's."""
    with StateStore.open(path) as store:
        pid = -1
        try:
            with store._writing() as txn:
                txn.put("meta", b"mine", b"1")
                pid = os.fork()
        except StoreError:
            os._exit(7 if pid == 0 else 8)
        finally:
            if pid == 0:
                os._exit(9)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
        with store._session.reading() as txn:
            assert txn.get("meta", b"mine") == b"1"


def test_the_garbage_collector_may_end_a_transaction_at_any_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While its thread has the store's own lock, say; the last one closes the file."""

    class Request:
        me: Request
        walk: Iterator[StateRecord]

    gc.disable()
    try:
        store = StateStore.open(tmp_path / "x")
        for number in range(5):
            store.put(a_record(number), values(number))
        backend = cast(LmdbBackend, store._live)
        request = Request()
        request.me, request.walk = request, store.records()
        next(request.walk)
        store.close()
        del request
        opened = locks._opened

        def collecting(*args: Any, **kwargs: Any) -> tuple[int, bool]:
            gc.collect()
            return opened(*args, **kwargs)

        monkeypatch.setattr(locks, "_opened", collecting)
        assert backend._env.is_open
        assert ended(started(lambda: StateStore.open(tmp_path / "y").close()))
        assert not backend._env.is_open
    finally:
        gc.enable()


# --- readers that are killed, and files that are deleted ----------------------------------------


def test_a_killed_reader_holds_no_pages(path: Path) -> None:
    """Of a store that stays open elsewhere: it does not grow with each write."""
    with StateStore.open(path) as store:
        for number in range(5):
            store.put(a_record(number), values(number, 30_000))
        child = run(
            """
with StateStore.open(sys.argv[1], read_only=True) as store, store.reading():
    print("reading", flush=True)
    sys.stdin.readline()
""",
            path,
        )
        assert child.stdout is not None
        assert child.stdout.readline() == "reading\n"
        os.kill(child.pid, signal.SIGKILL)
        child.communicate()
        before = store.file_bytes()
        for fill_byte in range(20):
            for number in range(5):
                store.put(a_record(number), values(fill_byte, 30_000))
        assert store.file_bytes() < 2.5 * before


def test_a_lock_file_that_is_deleted_is_made_anew_by_who_is_alone(
    path: Path, writers: Callable[[], Writer]
) -> None:
    """With the next transaction; who comes in between is refused, and then nothing is lost."""
    with StateStore.open(path) as store:
        store.put(a_record(1), values(1))
        (path / "lock.mdb").unlink()
        assert "lock.mdb was deleted" in writers().end()
        assert stored(store, a_record(1).key) == list(values(1))
        other = writers()
        assert other.is_open()
        put_by_turns(store, other, range(20))


def test_a_lock_file_that_is_deleted_under_two_processes_is_made_anew(
    path: Path, writers: Callable[[], Writer]
) -> None:
    """By the one that is alone with the data, when the other one has let go of them."""
    other = writers()
    assert other.is_open()
    with StateStore.open(path) as store:
        store.put(a_record(1), values(1))
        (path / "lock.mdb").unlink()
        with pytest.raises(StoreBusyError, match=r"lock\.mdb was deleted"):
            store.put(a_record(2), values(2))
        other.put(3)
        store.put(a_record(4), values(4))
        put_by_turns(store, other, range(5, 20))
        assert len(list(store.records())) == 18


def test_a_lock_file_that_is_deleted_ends_nothing_that_is_read(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody writes before the reader has ended: it stands in a table that nobody finds."""
    monkeypatch.setattr(opening, "ALONE_WAIT_S", 0.05)
    with StateStore.open(path) as store:
        store.put(a_record(1), values(1))
        with store.reading() as reader:
            (path / "lock.mdb").unlink()
            said = list[BaseException]()

            def put() -> None:
                try:
                    store.put(a_record(1), values(2))
                except StoreError as error:
                    said.append(error)

            assert ended(started(put))
            assert isinstance(said[0], StoreBusyError)
            assert bytes(reader.value(a_record(1).key, 0, 0)) == next(values(1))[2]
        store.put(a_record(1), values(2))
        assert stored(store, a_record(1).key) == list(values(2))


def test_turns_are_taken_in_the_same_file(path: Path, writers: Callable[[], Writer]) -> None:
    """When it was deleted, and made anew by who came next."""
    with StateStore.open(path) as store:
        store.put(a_record(1), values(1))
        (path / "writer.lock").unlink()
        other = writers()
        assert other.is_open()
        put_by_turns(store, other, range(20))
        with pytest.raises(StoreBusyError, match="another process has"):
            store.compact()


def test_a_turn_ends_in_the_file_that_it_began_in(path: Path) -> None:
    """Or else another process may have had one of its own meanwhile: nothing is acknowledged."""
    with StateStore.open(path) as store:
        with ExitStack() as turn:
            turn.enter_context(store._writing())
            (path / "writer.lock").unlink()
            with pytest.raises(StoreError, match="taken the place"):
                turn.close()
        store.put(a_record(1), values(1))
        assert stored(store, a_record(1).key) == list(values(1))


def test_who_still_has_an_old_file_open_keeps_nobody_from_the_new_one(
    path: Path, tmp_path: Path
) -> None:
    """A backup is moved over a store that another process has open, and does not use."""
    with StateStore.open(path) as store:
        store.put(a_record(1), values(1))
        shutil.copytree(path, tmp_path / "backup")
        os.replace(tmp_path / "backup" / "data.mdb", path / "data.mdb")
        for number in (2, 3):
            child = run(
                f"""
with StateStore.open(sys.argv[1]) as store:
    store.put(a_record({number}), values({number}))
    store.compact()
""",
                path,
            )
            assert child.wait(PATIENCE_S) == 0, child.communicate()
        assert len(list(store.records())) == 3


@pytest.mark.skipif(not hasattr(fcntl, "F_OFD_SETLK"), reason="locks are a process's here")
def test_who_copies_its_own_store_keeps_its_locks(
    path: Path, tmp_path: Path, writers: Callable[[], Writer]
) -> None:
    """LMDB's are lost; nobody opens the store then, until they are taken again."""
    with StateStore.open(path) as store:
        fill(store)
        shutil.copytree(path, tmp_path / "backup")
        assert "copied there" in writers().end()
        with store.reading() as reader:
            child = run(
                """
with StateStore.open(sys.argv[1]) as store:
    for number in range(40):
        store.put(a_record(number), values(100, 60_000))
    try:
        store.compact()
    except StoreError as error:
        print(error)
""",
                path,
            )
            out, errors = child.communicate(timeout=PATIENCE_S)
            assert "another process has" in out, errors
            for number in KEPT:
                for layer, chunk, value in values(number, 60_000):
                    assert reader.value(a_record(number).key, layer, chunk) == value
    with StateStore.open(tmp_path / "backup") as backup:
        assert_is_whole(backup)


# --- disks that are full ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "free_bytes", "kind"),
    [
        (errno.EIO, 0, StoreFullError),
        (errno.EIO, 1 << 30, StoreError),
        (errno.ENOSPC, 1 << 30, StoreFullError),
        (errno.EDQUOT, 1 << 30, StoreFullError),
    ],
)
def test_a_full_disk_is_told_from_a_broken_one(
    path: Path,
    number: int,
    free_bytes: int,
    kind: type[StoreError],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """LMDB says of both that there was an input/output error."""
    with StateStore.open(path) as store:
        env = cast(LmdbBackend, store._live)._env
        disk = os.statvfs_result((4096, 4096, 1 << 20, 0, free_bytes // 4096, 0, 0, 0, 0, 255))
        with monkeypatch.context() as patch:
            patch.setattr(os, "statvfs", lambda _: disk)
            error = env._error("writing", lmdb.Error(f"mdb_put: {os.strerror(number)}"))
        assert type(error) is kind


def test_salvaging_without_room_leaves_nothing_behind(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The damaged file stays, and it can be tried again."""

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with StateStore.open(path) as store:
        fill(store)
    exchange_meta(path, b"nothing")
    with monkeypatch.context() as patch:
        patch.setattr(salvage, "_copy", fail)
        with pytest.raises(StoreFullError, match="cannot be repaired"):
            StateStore.salvage(path)
    assert sorted(p.name for p in path.iterdir()) == ["data.mdb", "lock.mdb", "writer.lock"]
    assert StateStore.salvage(path).kept is not None


def test_a_store_that_nobody_has_finished_making_says_so(path: Path) -> None:
    """To who may only read."""
    path.mkdir()
    backend = LmdbBackend.acquire(path, read_only=False, durability="fsync")
    with pytest.raises(StoreOpenError, match="nobody has finished making it"):
        StateStore.open(path, read_only=True)
    backend.close()
    StateStore.open(path).close()
    StateStore.open(path, read_only=True).close()


# --- namespaces that belong to others -----------------------------------------------------------


def test_deleting_a_namespace_deletes_what_belongs_to_it_and_nothing_else(path: Path) -> None:
    """Whatever a person calls another one; theirs and those are listed apart."""
    names = ["docs", "docs (old)", "docs (paths)", "docs2"]
    for name in names:
        with StateStore.open(path, namespace=name) as store:
            store.put(a_record(1), values(1))
    with StateStore.open(path, namespace="docs") as store, store.beside("paths") as paths:
        paths.put(a_record(2), values(2))
        assert store.has_beside("paths")
        assert store.namespaces() == names
        assert store.stats().namespaces.count("docs (paths)") == 2
        with _passed_on(paths) as again:
            assert stored(again, a_record(2).key) == list(values(2))
    with StateStore.open(path, namespace="docs2") as store:
        assert store.delete_namespace("docs")
        assert store.namespaces() == names[1:]
        assert store.all_namespaces() == names[1:]
    for name in names[1:]:
        with StateStore.open(path, namespace=name) as store:
            assert len(list(store.records())) == 1


def _passed_on(store: StateStore) -> StateStore:
    make, arguments = store.__reduce__()
    return make(*arguments)


def test_no_namespace_can_be_named_as_if_it_belonged_to_another(path: Path) -> None:
    with pytest.raises(ValueError, match="a character that no namespace may have"):
        StateStore.open(path, namespace="docs\x1fpaths")
