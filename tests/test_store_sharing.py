"""One store, several threads and processes: turns, forks, growth, and ends in the middle."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import lmdb
import pytest
from test_store import a_record, run, stored, values

import hcache_rag.store.environment as environment
from hcache_rag.errors import StoreBusyError, StoreError, StoreFullError
from hcache_rag.state import StateRecord
from hcache_rag.store import StateStore

PATIENCE_S = 60.0


@contextmanager
def another_process_writing(path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that is in the middle of a write until it is told to go on."""
    child = run(
        """
with StateStore.open(sys.argv[1]) as store:
    with store._writing() as txn:
        print("writing", flush=True)
        sys.stdin.readline()
    store.put(a_record(1), values(1))
""",
        path,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "writing\n"
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def let_go_on(child: subprocess.Popen[str]) -> None:
    assert child.stdin is not None
    child.stdin.write("\n")
    child.stdin.flush()


@pytest.mark.parametrize("wait_s", [0.0, 0.05])
def test_a_writer_may_refuse_to_wait_for_another_process(tmp_path: Path, wait_s: float) -> None:
    """It is told so, nothing is stored, and the next time it can write."""
    path = tmp_path / "store"
    with StateStore.open(path, write_wait_s=wait_s) as store:
        with another_process_writing(path) as child:
            with pytest.raises(StoreBusyError, match="another process still writes"):
                store.put(a_record(2), values(2))
            assert list(store.records()) == []
            let_go_on(child)
            assert child.wait(PATIENCE_S) == 0
        store.put(a_record(2), values(2))
        assert {r.key for r in store.records()} == {a_record(1).key, a_record(2).key}


def test_a_writer_waits_for_another_process(tmp_path: Path) -> None:
    """Both writes are there."""
    path = tmp_path / "store"
    with StateStore.open(path) as store, another_process_writing(path) as child:
        threading.Timer(0.1, let_go_on, [child]).start()
        store.put(a_record(2), values(2))
        assert child.wait(PATIENCE_S) == 0
        assert {r.key for r in store.records()} == {a_record(1).key, a_record(2).key}


def test_a_writer_that_is_killed_lets_the_next_one_write(tmp_path: Path) -> None:
    """Its lock ends with it."""
    path = tmp_path / "store"
    with StateStore.open(path, write_wait_s=PATIENCE_S) as store:
        with another_process_writing(path) as child:
            child.kill()
            assert child.wait() == -signal.SIGKILL
        store.put(a_record(2), values(2))
        assert [record.key for record in store.records()] == [a_record(2).key]


def test_a_writer_may_refuse_to_wait_for_another_thread(tmp_path: Path) -> None:
    with (
        StateStore.open(tmp_path / "store") as patient,
        StateStore.open(tmp_path / "store", write_wait_s=0.05) as other,
        patient._writing(),
        pytest.raises(StoreBusyError, match="another thread still writes"),
    ):
        other.put(a_record(2), values(2))


def test_uses_are_written_down_later_where_somebody_writes(tmp_path: Path) -> None:
    """A request does not wait for an indexing job; nothing of the count is lost."""
    path = tmp_path / "store"
    with StateStore.open(path) as store:
        key = a_record(7).key
        store.put(a_record(7), values(7))
        with another_process_writing(path) as child:
            for _ in range(600):
                store.count_use([key])
            assert store.counters().hits == 0
            let_go_on(child)
            assert child.wait(PATIENCE_S) == 0
        store.flush_uses()
        entry = store.entry(key)
        assert entry is not None
        assert (entry.hits, store.counters().hits) == (600, 600)


# --- processes that come of this one ------------------------------------------------------------


def in_a_fork(work: Callable[[], None]) -> int:
    """The exit status of a fork that does some work: 0 if it was done."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_store_that_a_fork_inherits_is_opened_anew(tmp_path: Path) -> None:
    """Parent and child read and write on, with one and the same object."""
    with StateStore.open(tmp_path / "store") as store:
        store.put(a_record(1), values(1))

        def work() -> None:
            assert stored(store, a_record(1).key) == list(values(1))
            store.put(a_record(2), values(2))
            store.close()

        assert in_a_fork(work) == 0
        assert stored(store, a_record(2).key) == list(values(2))
        store.put(a_record(3), values(3))
        assert len(list(store.records())) == 3


def count_in_a_spawned_process(store: StateStore, queue: Any) -> None:
    queue.put(len(list(store.records())))
    store.close()


def test_a_store_can_be_passed_to_a_spawned_process(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    with StateStore.open(tmp_path / "store", namespace="one") as store:
        store.put(a_record(1), values(1))
        process = context.Process(target=count_in_a_spawned_process, args=(store, queue))
        process.start()
        assert queue.get(timeout=PATIENCE_S) == 1
        process.join(PATIENCE_S)
        again = pickle.loads(pickle.dumps(store))
        assert (again.path, again.namespace) == (store.path, "one")
        again.close()


def test_a_store_in_memory_stays_in_its_process() -> None:
    with pytest.raises(TypeError, match="in memory"):
        pickle.dumps(StateStore.in_memory())


# --- ends and growth while others read ----------------------------------------------------------


def test_a_store_closed_while_a_thread_reads_is_closed_when_it_has_read(tmp_path: Path) -> None:
    """What a thread sees stays until its block ends, and the path can be opened again."""
    store = StateStore.open(tmp_path / "store")
    store.put(a_record(1), values(1))
    with store.reading() as reader:
        value = reader.value(a_record(1).key, 0, 0)
        closing = threading.Thread(target=store.close)
        closing.start()
        closing.join(PATIENCE_S)
        assert bytes(value) == next(values(1))[2]
        with pytest.raises(StoreError, match="closed"):
            store.record(a_record(1).key)
        with StateStore.open(tmp_path / "other") as other:
            other.put(a_record(2), values(2))
        assert bytes(reader.value(a_record(1).key, 1, 0)) == list(values(1))[2][2]
    with StateStore.open(tmp_path / "store") as again:
        assert stored(again, a_record(1).key) == list(values(1))


def test_a_store_that_a_thread_still_reads_can_be_opened_again(tmp_path: Path) -> None:
    """LMDB opens no file twice in a process: the one that was to be closed goes on."""
    store = StateStore.open(tmp_path / "store")
    store.put(a_record(1), values(1))
    with store.reading() as reader:
        store.close()
        with StateStore.open(tmp_path / "store") as again:
            again.put(a_record(2), values(2))
            assert bytes(reader.value(a_record(1).key, 0, 0)) == next(values(1))[2]
        again = StateStore.open(tmp_path / "store")
    assert stored(again, a_record(2).key) == list(values(2))
    again.close()
    again.close()


@pytest.fixture
def _small_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that gives 4 MiB of address space at once, and more when it is asked again."""
    opening = lmdb.open

    def open_small(path: str, *, map_size: int, **more: Any) -> Any:
        if map_size > 4 << 20:
            raise lmdb.MemoryError("Cannot allocate memory")
        return opening(path, map_size=map_size, **more)

    monkeypatch.setattr(environment, "MIN_MAP_BYTES", 1 << 20)
    monkeypatch.setattr(lmdb, "open", open_small)


@pytest.mark.usefixtures("_small_map")
def test_the_map_grows_where_little_was_given(tmp_path: Path) -> None:
    """A dozen times as much as was given; a process that reads meanwhile sees all of it."""
    path = tmp_path / "store"
    with StateStore.open(path) as store:
        store.put(a_record(0), values(0))
        child = run(
            """
with StateStore.open(sys.argv[1], read_only=True) as store:
    print(len(list(store.records())), flush=True)
    sys.stdin.readline()
    print(all(stored(store, r.key) for r in store.records()), len(list(store.records())))
""",
            path,
        )
        assert child.stdout is not None
        assert child.stdout.readline() == "1\n"
        for number in range(1, 40):
            store.put(a_record(number), values(number, 200_000))
        let_go_on(child)
        out, errors = child.communicate(timeout=PATIENCE_S)
        assert out == "True 40\n", errors
        assert stored(store, a_record(39).key) == list(values(39, 200_000))


@pytest.mark.usefixtures("_small_map")
def test_the_map_grows_when_the_last_reader_has_ended(tmp_path: Path) -> None:
    """A thread that reads is waited for, and what it reads stays right."""
    with StateStore.open(tmp_path / "store") as store:
        store.put(a_record(0), values(0))
        with store.reading() as reader:
            writing = threading.Thread(
                target=lambda: [store.put(a_record(n), values(n, 300_000)) for n in range(1, 9)]
            )
            writing.start()
            for _ in range(1000):
                assert bytes(reader.value(a_record(0).key, 2, 1)) == list(values(0))[-1][2]
        writing.join(PATIENCE_S)
        assert len(list(store.records())) == 9


@pytest.mark.usefixtures("_small_map")
def test_a_thread_that_reads_itself_cannot_wait_for_itself(tmp_path: Path) -> None:
    """An error instead of a deadlock, and what was there stays."""
    with StateStore.open(tmp_path / "store") as store:
        store.put(a_record(0), values(0))
        with store.reading(), pytest.raises(StoreFullError):
            store.put(a_record(1), values(1, 900_000))
        assert stored(store, a_record(0).key) == list(values(0))
        store.put(a_record(9), values(9, 900_000))
        assert stored(store, a_record(9).key) == list(values(9, 900_000))


def test_durabilities_do_not_mix_in_a_process(tmp_path: Path) -> None:
    """One environment cannot do both; a reader does not mind."""
    with StateStore.open(tmp_path / "store", durability="fast") as store:
        store.put(a_record(1), values(1))
        with pytest.raises(StoreError, match="durability='fast', not 'fsync'"):
            StateStore.open(tmp_path / "store")
        with StateStore.open(tmp_path / "store", read_only=True) as reader:
            assert stored(reader, a_record(1).key) == list(values(1))


# --- files that are replaced --------------------------------------------------------------------


def test_a_store_that_is_deleted_while_it_is_open_takes_no_more(tmp_path: Path) -> None:
    """Writing into a file that nobody can open would lose it: an error, and closing is none."""
    path = tmp_path / "store"
    with StateStore.open(path) as store:
        store.put(a_record(1), values(1))
        shutil.rmtree(path)
        with pytest.raises(StoreError):
            store.put(a_record(2), values(2))
        assert a_record(1).key not in store


def test_generators_may_end_in_any_order(tmp_path: Path) -> None:
    """Two walks over all records, of which the first ends first; then the map is changed."""
    with StateStore.open(tmp_path / "store") as store:
        for number in range(3):
            store.put(a_record(number), values(number))
        first, second = (
            cast(Generator[StateRecord, None, None], store.records()) for _ in range(2)
        )
        next(first), next(second)
        first.close()
        StateStore.open(tmp_path / "store", max_bytes=1 << 24).close()
        second.close()
        with StateStore.open(tmp_path / "store", max_bytes=1 << 23) as limited:
            assert limited.max_bytes == 1 << 23


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_leaves_what_its_parent_reads(tmp_path: Path) -> None:
    """A thread reads while another one forks; the child may not end that, nor end it by ending."""
    with StateStore.open(tmp_path / "store") as store:
        store.put(a_record(1), values(1))
        with store.reading() as reader:
            assert in_a_fork(lambda: None) == 0
            readers = store._live._env._env.readers()  # type: ignore[attr-defined]
            assert str(os.getpid()) in readers
            for number in range(20):
                thread = threading.Thread(
                    target=store.put, args=(a_record(1), list(values(number)))
                )
                thread.start()
                thread.join()
            for layer, chunk, value in values(1):
                assert reader.value(a_record(1).key, layer, chunk) == value
