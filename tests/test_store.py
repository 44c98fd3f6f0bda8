"""States in LMDB: whole or not at all, through errors, kills, damage and second openings."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import lmdb
import numpy as np
import pytest

import hcache_rag.store.environment
from hcache_rag.errors import (
    MissingStateError,
    StoreError,
    StoreFullError,
    StoreOpenError,
)
from hcache_rag.layout import LayerFormat, Representation, StateLayout
from hcache_rag.state import StateKey, StateRecord, child_key, root_key, token_array
from hcache_rag.store import StateStore

REPOSITORY = Path(__file__).parent.parent
LAYERS, CHUNKS = 3, 2
ROOT = root_key("model", "tokenizer")
LAYOUT = StateLayout((LayerFormat(Representation.KV, "float32"),) * LAYERS)


def a_record(number: int = 0, *, root: StateKey = ROOT, is_preamble: bool = False) -> StateRecord:
    """A state of 100 tokens; each number is another document."""
    ids = token_array([number, *range(99)])
    key = child_key(root, ids)
    return StateRecord(key, root, root, ids, f"document {number}", LAYOUT, 1.5, is_preamble)


def values(fill: int = 0, size: int = 5000) -> Iterator[tuple[int, int, bytes]]:
    """A value for every chunk of every layer, each with bytes of its own."""
    for layer in range(LAYERS):
        for chunk in range(CHUNKS):
            yield layer, chunk, bytes([fill, layer, chunk]) * (size // 3)


def stored(store: StateStore, key: StateKey) -> list[tuple[int, int, bytes]]:
    """All values of a state that are there."""
    found = []
    with store.reading() as reader:
        for layer in range(LAYERS):
            for chunk in range(CHUNKS):
                with suppress(MissingStateError):
                    found.append((layer, chunk, bytes(reader.value(key, layer, chunk))))
    return found


def run(script: str, *arguments: object) -> subprocess.Popen[str]:
    """A Python process with this file's helpers, and pipes to and from it."""
    names = f"from test_store import *; import sys; sys.path.insert(0, {str(REPOSITORY)!r})"
    path = os.pathsep.join(str(REPOSITORY / p) for p in ("", "tests"))
    return subprocess.Popen(
        [sys.executable, "-c", f"{names}\n{script}", *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )


# --- what was put is there ----------------------------------------------------------------------


def test_an_empty_store(store: StateStore) -> None:
    """Nothing is found, nothing is counted."""
    assert store.record(a_record().key) is None
    assert a_record().key not in store
    assert list(store.records()) == []
    assert store.model_names() == {}
    assert stored(store, a_record().key) == []
    assert not store.delete(a_record().key)
    stats = store.stats()
    assert (stats.documents, stats.preambles, stats.tokens, stats.models) == (0, 0, 0, {})


def test_what_was_put_is_found(store: StateStore) -> None:
    """Record and values, and the bytes of all values are returned."""
    record = a_record()

    num_bytes = store.put(record, values())

    found = store.record(record.key)
    assert found is not None
    assert found.to_bytes() == record.to_bytes()
    assert record.key in store
    assert stored(store, record.key) == list(values())
    assert num_bytes == sum(len(value) for _, _, value in values())


def test_values_may_be_bytearrays(store: StateStore) -> None:
    """`codec.encode` gives bytearrays."""
    store.put(a_record(), ((la, ch, bytearray(value)) for la, ch, value in values()))
    assert stored(store, a_record().key) == list(values())


def test_putting_again_replaces_the_whole_state(store: StateStore) -> None:
    """Chunks of the old state that the new one has not are gone."""
    store.put(a_record(), values(1))
    store.put(a_record(), [(0, 0, b"new")])
    assert stored(store, a_record().key) == [(0, 0, b"new")]
    assert store.stats().documents == 1


def test_neighbours_are_left_alone(store: StateStore) -> None:
    """Replacing and deleting one state does not touch those beside it in the tree."""
    records = sorted((a_record(number) for number in range(20)), key=lambda r: r.key)
    for fill, record in enumerate(records):
        store.put(record, values(fill))

    assert store.delete(records[7].key)
    store.put(records[11], [(0, 0, b"new")])

    assert not store.delete(records[7].key)
    assert stored(store, records[7].key) == []
    for fill, record in enumerate(records):
        if fill not in (7, 11):
            assert stored(store, record.key) == list(values(fill))


def test_records_come_in_order_of_their_keys(store: StateStore) -> None:
    """All of them, each once."""
    keys = [a_record(number).key for number in range(50)]
    for number in range(50):
        store.put(a_record(number), [])
    assert [record.key for record in store.records()] == sorted(keys)


def test_a_record_that_cannot_be_read_is_as_if_it_were_not_there(store: StateStore) -> None:
    """Not found, not listed, not contained: so that the document is stored anew, and then is."""
    for number in (1, 2):
        store.put(a_record(number), values())
    damaged = a_record(1).key
    with store._writing() as txn:
        txn.put("records", store._rows.prefix + damaged, replace(a_record(2)).to_bytes())

    assert store.record(damaged) is None
    assert [record.key for record in store.records()] == [a_record(2).key]
    assert store.find("document 1") == []
    assert damaged not in store
    store.put(a_record(1), values())
    assert [record.key for record in store.find("document 1")] == [damaged]


def test_a_record_under_a_foreign_key_is_refused(store: StateStore) -> None:
    """A key is made of the parent and the token ids."""
    with pytest.raises(ValueError, match=a_record(1).key.hex()):
        store.put(replace(a_record(1), parent=bytes(16)), values())
    assert list(store.records()) == []


def test_a_missing_chunk_says_which(store: StateStore) -> None:
    """The error carries the key and names layer and chunk."""
    store.put(a_record(), [(0, 0, b"x")])
    with (
        store.reading() as reader,
        pytest.raises(MissingStateError, match="layer 2, chunk 1") as caught,
    ):
        reader.value(a_record().key, 2, 1)
    assert caught.value.key == a_record().key


def test_a_reader_sees_one_moment(store: StateStore) -> None:
    """What is put or deleted while a reader reads does not change what it reads."""
    store.put(a_record(1), values(1))
    store.put(a_record(2), values(2))
    with store.reading() as reader:
        before = bytes(reader.value(a_record(1).key, 0, 0))
        store.put(a_record(1), values(9))
        store.delete(a_record(2).key)
        assert bytes(reader.value(a_record(1).key, 0, 0)) == before
        assert bytes(reader.value(a_record(2).key, 0, 0))[0] == 2
    assert stored(store, a_record(1).key) == list(values(9))
    assert stored(store, a_record(2).key) == []


@pytest.mark.parametrize("size", [4096, 5000, 100_000])
def test_payloads_start_on_a_cache_line(store: StateStore, size: int) -> None:
    """Large values lie so that what follows the codec's 48-byte header is 64-byte aligned."""
    store.put(a_record(), values(size=size))
    with store.reading() as reader:
        for layer in range(LAYERS):
            value = np.frombuffer(reader.value(a_record().key, layer, 1), np.uint8)
            assert (value.ctypes.data + 48) % 64 == 0


def test_stats_count_states_by_kind_and_model(store: StateStore) -> None:
    """Preambles apart; models by name where they have one, else by the start of their key."""
    other = root_key("other", "tokenizer")
    store.name_model(ROOT, "SmolLM2")
    store.put(a_record(0, is_preamble=True), values())
    for number in (1, 2):
        store.put(a_record(number), values())
    store.put(a_record(3, root=other), values())

    stats = store.stats()

    assert (stats.documents, stats.preambles, stats.tokens) == (3, 1, 400)
    assert stats.models == {"SmolLM2": 2, other.hex()[:8]: 1}
    assert stats.file_bytes >= 4 * LAYERS * CHUNKS * 4999


def test_a_model_can_be_renamed(store: StateStore) -> None:
    """The last name counts; names may be any text."""
    store.name_model(ROOT, "first")
    store.name_model(ROOT, "größer 🙂")
    assert store.model_names() == {ROOT: "größer 🙂"}


# --- one transaction per document ---------------------------------------------------------------


class MishapError(Exception):
    """What goes wrong midway."""


def failing(fill: int, kind: type[BaseException]) -> Iterator[tuple[int, int, bytes]]:
    """Most values of a state, then an error."""
    yield from list(values(fill))[:-1]
    raise kind


@pytest.mark.parametrize("kind", [MishapError, KeyboardInterrupt, MemoryError])
def test_a_put_that_fails_midway_leaves_nothing(
    store: StateStore, kind: type[BaseException]
) -> None:
    """The error comes out as it is; neither the record nor a chunk stays."""
    store.put(a_record(1), values(1))

    with pytest.raises(kind):
        store.put(a_record(2), failing(2, kind))

    assert a_record(2).key not in store
    assert stored(store, a_record(2).key) == []
    assert stored(store, a_record(1).key) == list(values(1))
    store.put(a_record(2), values(2))
    assert stored(store, a_record(2).key) == list(values(2))


def test_a_replacement_that_fails_midway_keeps_the_old_state(store: StateStore) -> None:
    """The old one stays whole."""
    store.put(a_record(1), values(1))
    with pytest.raises(MishapError):
        store.put(a_record(1), failing(2, MishapError))
    assert a_record(1).key in store
    assert stored(store, a_record(1).key) == list(values(1))


def test_a_full_store_says_so_and_keeps_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`StoreFullError`, nothing of the new state, the old ones whole, and room after a delete."""
    monkeypatch.setattr(hcache_rag.store.environment, "MAP_BYTES", 1 << 20)
    with StateStore.open(tmp_path / "small") as small:
        small.put(a_record(1), values(1, 90_000))
        with pytest.raises(StoreFullError) as caught:
            small.put(a_record(2), values(2, 90_000))
        assert "\n" not in str(caught.value)
        assert a_record(2).key not in small
        assert stored(small, a_record(2).key) == []
        assert stored(small, a_record(1).key) == list(values(1, 90_000))
        small.delete(a_record(1).key)
        small.put(a_record(3), values(3, 60_000))
        assert stored(small, a_record(3).key) == list(values(3, 60_000))


# --- processes that die -------------------------------------------------------------------------


def test_a_process_killed_in_a_put_leaves_no_half_state(tmp_path: Path) -> None:
    """SIGKILL in the middle of a transaction: earlier states are whole, and one can go on."""
    path = tmp_path / "store"
    child = run(
        """
def waits():
    yield from list(values(2, 200_000))[:-1]
    print("midway", flush=True)
    sys.stdin.read()
store = StateStore.open(sys.argv[1])
store.put(a_record(1), values(1))
store.put(a_record(2), waits())
""",
        path,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "midway\n"
    child.kill()
    assert child.wait() == -signal.SIGKILL
    child.communicate()

    with StateStore.open(path) as store:
        assert [record.key for record in store.records()] == [a_record(1).key]
        assert stored(store, a_record(1).key) == list(values(1))
        assert stored(store, a_record(2).key) == []
        store.put(a_record(2), values(3))
        assert stored(store, a_record(2).key) == list(values(3))


@pytest.mark.parametrize("acknowledged", [1, 7, 20])
def test_a_process_killed_at_any_time_loses_no_finished_put(
    tmp_path: Path, acknowledged: int
) -> None:
    """Every put that returned is whole, without `sync`; of the others all or nothing is there."""
    path = tmp_path / "store"
    child = run(
        """
store = StateStore.open(sys.argv[1])
for number in range(10_000):
    store.put(a_record(number), values(number % 256, 30_000))
    print(number, flush=True)
""",
        path,
    )
    assert child.stdout is not None
    for number in range(acknowledged):
        assert child.stdout.readline() == f"{number}\n"
    child.kill()
    assert child.wait() == -signal.SIGKILL
    child.communicate()

    with StateStore.open(path) as store:
        found = {record.key for record in store.records()}
        for number in range(acknowledged + 100):
            key = a_record(number).key
            is_whole = stored(store, key) == list(values(number % 256, 30_000))
            assert is_whole == (key in found)
            assert is_whole or stored(store, key) == []
            assert is_whole or number >= acknowledged
        store.put(a_record(0), values(7))
        assert stored(store, a_record(0).key) == list(values(7))


def test_a_process_killed_while_it_reads_does_not_stop_others(tmp_path: Path) -> None:
    """Its reader slot is stale; writing, replacing and reading go on."""
    path = tmp_path / "store"
    with StateStore.open(path) as store:
        store.put(a_record(1), values(1))
        child = run(
            """
store = StateStore.open(sys.argv[1], read_only=True)
with store.reading() as reader:
    print(reader.value(a_record(1).key, 0, 0)[0], flush=True)
    sys.stdin.read()
""",
            path,
        )
        assert child.stdout is not None
        assert child.stdout.readline() == "1\n"
        child.kill()
        assert child.wait() == -signal.SIGKILL
        child.communicate()
        store.put(a_record(1), values(2))
        assert stored(store, a_record(1).key) == list(values(2))


def test_another_process_sees_what_was_put_and_the_other_way_round(tmp_path: Path) -> None:
    """Two processes have the store open at once."""
    path = tmp_path / "store"
    with StateStore.open(path) as store:
        store.put(a_record(1), values(1))
        child = run(
            """
with StateStore.open(sys.argv[1]) as store:
    assert stored(store, a_record(1).key) == list(values(1))
    store.put(a_record(2), values(2))
""",
            path,
        )
        _, errors = child.communicate()
        assert child.returncode == 0, errors
        assert stored(store, a_record(2).key) == list(values(2))


def test_a_forked_process_can_open_the_store_anew(tmp_path: Path) -> None:
    """LMDB environments do not survive a fork; opening in the child gives one of its own."""
    child = run(
        """
parent = StateStore.open(sys.argv[1])
parent.put(a_record(1), values(1))
process = os.fork()
if not process:
    with StateStore.open(sys.argv[1]) as store:
        assert stored(store, a_record(1).key) == list(values(1))
        store.put(a_record(2), values(2))
    sys.exit(0)
_, status = os.waitpid(process, 0)
assert status == 0
assert stored(parent, a_record(2).key) == list(values(2))
parent.close()
""",
        tmp_path / "store",
    )
    _, errors = child.communicate()
    assert child.returncode == 0, errors


# --- opening, sharing, closing ------------------------------------------------------------------


def test_opening_again_finds_everything(tmp_path: Path) -> None:
    """States, names and the store's identity, with or without the right to write."""
    with StateStore.open(tmp_path / "store") as store:
        identity = store.store_id
        store.name_model(ROOT, "SmolLM2")
        store.put(a_record(), values())
    for read_only in (False, True):
        with StateStore.open(tmp_path / "store", read_only=read_only) as again:
            assert again.store_id == identity
            assert again.model_names() == {ROOT: "SmolLM2"}
            assert [record.text for record in again.records()] == ["document 0"]
            assert stored(again, a_record().key) == list(values())


def test_two_stores_have_two_identities(tmp_path: Path) -> None:
    """The identity is random, not a name of the path."""
    with StateStore.open(tmp_path / "a") as a, StateStore.open(tmp_path / "b") as b:
        assert a.store_id != b.store_id
        a.put(a_record(), values())
        assert a_record().key not in b


@pytest.mark.parametrize("first_to_close", [0, 1], ids=["first", "second"])
def test_two_openings_of_a_path_share_and_close_apart(tmp_path: Path, first_to_close: int) -> None:
    """What one puts the other finds; closing one, even twice, leaves the other usable."""
    both = [StateStore.open(tmp_path / "store") for _ in range(2)]
    both[0].put(a_record(1), values(1))
    assert stored(both[1], a_record(1).key) == list(values(1))

    closed, other = both[first_to_close], both[1 - first_to_close]
    closed.close()
    closed.close()

    other.put(a_record(2), values(2))
    assert stored(other, a_record(1).key) == list(values(1))
    with pytest.raises(StoreError):
        closed.record(a_record(1).key)
    other.close()
    with StateStore.open(tmp_path / "store") as again:
        assert stored(again, a_record(2).key) == list(values(2))


@pytest.mark.parametrize("spelling", ["string", "relative", "dots", "symlink", "home"])
def test_a_folder_may_be_spelt_in_many_ways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelling: str
) -> None:
    """The same folder under another name is the same store, while both are open too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "store")
    spellings: dict[str, str | Path] = {
        "string": str(tmp_path / "store"),
        "relative": Path("store"),
        "dots": tmp_path / "elsewhere" / ".." / "store",
        "symlink": tmp_path / "link",
        "home": "~/store",
    }
    with (
        StateStore.open(tmp_path / "store") as store,
        StateStore.open(spellings[spelling]) as again,
    ):
        assert again.store_id == store.store_id
        store.put(a_record(), values())
        assert stored(again, a_record().key) == list(values())


def test_a_read_only_opening_may_share_with_a_writer(tmp_path: Path) -> None:
    """It reads what the writer puts, and itself refuses to write."""
    with (
        StateStore.open(tmp_path / "store") as writer,
        StateStore.open(tmp_path / "store", read_only=True) as reader,
    ):
        writer.put(a_record(), values())
        assert stored(reader, a_record().key) == list(values())
        with pytest.raises(StoreError, match="reading only"):
            reader.put(a_record(1), values())


def test_a_writer_cannot_join_a_read_only_opening(tmp_path: Path) -> None:
    """One environment per process: the message says what is in the way."""
    StateStore.open(tmp_path / "store").close()
    with (
        StateStore.open(tmp_path / "store", read_only=True),
        pytest.raises(StoreOpenError, match="read-only"),
    ):
        StateStore.open(tmp_path / "store")
    StateStore.open(tmp_path / "store").close()


def test_a_read_only_store_refuses_to_change_anything(tmp_path: Path) -> None:
    """Neither put nor delete; a name is not worth an error and is not kept."""
    with StateStore.open(tmp_path / "store") as store:
        store.put(a_record(), values())
    before = (tmp_path / "store" / "data.mdb").read_bytes()
    with StateStore.open(tmp_path / "store", read_only=True) as store:
        with pytest.raises(StoreError, match="reading only"):
            store.put(a_record(1), values())
        with pytest.raises(StoreError, match="reading only"):
            store.delete(a_record().key)
        store.name_model(ROOT, "name")
        store.sync()
        assert stored(store, a_record().key) == list(values())
    assert (tmp_path / "store" / "data.mdb").read_bytes() == before


def test_a_folder_deleted_and_opened_again_is_an_empty_store(tmp_path: Path) -> None:
    """In the same process, while the old store is still open; the two do not mix."""
    path = tmp_path / "store"
    old = StateStore.open(path)
    old.put(a_record(1), values(1))
    shutil.rmtree(path)

    with StateStore.open(path) as new:
        assert list(new.records()) == []
        assert new.store_id != old.store_id
        new.put(a_record(2), values(2))
        old.close()
        assert [record.key for record in new.records()] == [a_record(2).key]
        with StateStore.open(path) as shared:
            assert stored(shared, a_record(2).key) == list(values(2))
    with StateStore.open(path) as again:
        assert stored(again, a_record(2).key) == list(values(2))


USES: dict[str, Callable[[StateStore], object]] = {
    "record": lambda store: store.record(a_record().key),
    "contains": lambda store: a_record().key in store,
    "records": lambda store: list(store.records()),
    "reading": lambda store: stored(store, a_record().key),
    "model_names": lambda store: store.model_names(),
    "name_model": lambda store: store.name_model(ROOT, "name"),
    "put": lambda store: store.put(a_record(), values()),
    "delete": lambda store: store.delete(a_record().key),
    "stats": lambda store: store.stats(),
    "sync": lambda store: store.sync(),
    "store_id": lambda store: store.store_id,
}


@pytest.mark.parametrize("read_only", [False, True], ids=["read-write", "read-only"])
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_closed_store_refuses_any_use(
    tmp_path: Path, use: Callable[[StateStore], object], read_only: bool
) -> None:
    """`StoreError`, whatever is asked of it."""
    StateStore.open(tmp_path / "store").close()
    store = StateStore.open(tmp_path / "store", read_only=read_only)
    store.close()
    with pytest.raises(StoreError):
        use(store)


def test_the_store_is_private(tmp_path: Path) -> None:
    """Documents may be: nobody else may read them, however permissive the umask."""
    old = os.umask(0)
    try:
        StateStore.open(tmp_path / "deep" / "store").close()
    finally:
        os.umask(old)
    for name, mode in {"data.mdb": 0o600, "lock.mdb": 0o600, ".": 0o700}.items():
        assert stat.S_IMODE((tmp_path / "deep" / "store" / name).stat().st_mode) == mode, name


# --- what cannot be opened ----------------------------------------------------------------------


def refuse(path: Path, *, read_only: bool = False) -> str:
    with pytest.raises(StoreOpenError) as caught:
        StateStore.open(path, read_only=read_only)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


BOTH = pytest.mark.parametrize("read_only", [False, True], ids=["read-write", "read-only"])


@BOTH
def test_a_file_is_not_a_store(tmp_path: Path, read_only: bool) -> None:
    path = tmp_path / "file"
    path.write_text("hello")
    assert "is a file" in refuse(path, read_only=read_only)
    assert path.read_text() == "hello"


@BOTH
def test_a_folder_cannot_be_made_below_a_file(tmp_path: Path, read_only: bool) -> None:
    (tmp_path / "file").write_text("hello")
    refuse(tmp_path / "file" / "store", read_only=read_only)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_not_writable(tmp_path: Path) -> None:
    path = tmp_path / "store"
    path.mkdir(mode=0o500)
    assert "not writable" in refuse(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "cannot create" in refuse(tmp_path / "locked" / "store")


@BOTH
@pytest.mark.skipif(os.geteuid() == 0, reason="root may look anywhere")
def test_a_folder_that_cannot_be_looked_into(tmp_path: Path, read_only: bool) -> None:
    (tmp_path / "locked").mkdir(mode=0o000)
    refuse(tmp_path / "locked" / "store", read_only=read_only)


@pytest.mark.parametrize("exists", [False, True], ids=["no-folder", "empty-folder"])
def test_nothing_cannot_be_read(tmp_path: Path, exists: bool) -> None:
    """Opening for reading makes nothing either."""
    path = tmp_path / "store"
    if exists:
        path.mkdir()
    assert "holds no state store" in refuse(path, read_only=True)
    assert path.exists() == exists
    assert not exists or list(path.iterdir()) == []


@BOTH
@pytest.mark.parametrize(
    "content",
    [b"x", b"garbage " * 1000, bytes(8192), b"PK\3\4" + bytes(20_000)],
    ids=["one-byte", "text", "zeros", "zip"],
)
def test_garbage_is_not_a_store(tmp_path: Path, content: bytes, read_only: bool) -> None:
    """It is left as it is, and does not stand in the way of a store put in its place."""
    path = tmp_path / "store"
    path.mkdir()
    (path / "data.mdb").write_bytes(content)
    assert "is not a state store" in refuse(path, read_only=read_only)
    assert (path / "data.mdb").read_bytes() == content
    (path / "data.mdb").unlink()
    StateStore.open(path).close()


@BOTH
def test_somebody_elses_database_is_left_alone(tmp_path: Path, read_only: bool) -> None:
    """An LMDB environment with other data is refused, and nothing is written into it."""
    path = tmp_path / "store"
    with lmdb.open(str(path), max_dbs=4) as env, env.begin(write=True) as txn:
        txn.put(b"theirs", b"data")
    refuse(path, read_only=read_only)
    with lmdb.open(str(path), max_dbs=4) as env, env.begin() as txn:
        assert [bytes(key) for key, _ in txn.cursor()] == [b"theirs"]


@BOTH
@pytest.mark.parametrize(
    ("meta", "expected"),
    [
        pytest.param(b'{"format": 99, "id": "x"}', "format 99", id="format-99"),
        pytest.param(b'{"id": "x"}', "format", id="no-format"),
        pytest.param(b"not json", "not a state store", id="not-json"),
        pytest.param(b"\xff", "not a state store", id="not-unicode"),
        pytest.param(b"[]", "", id="a-list"),
        pytest.param(b'{"format": 1}', "", id="no-id"),
    ],
)
def test_a_store_of_another_format_is_refused(
    tmp_path: Path, meta: bytes, expected: str, read_only: bool
) -> None:
    """The message names the format; a refused store can be opened again once it is right."""
    path = tmp_path / "store"
    StateStore.open(path).close()
    original = exchange_meta(path, meta)
    assert expected in refuse(path, read_only=read_only)
    exchange_meta(path, original)
    StateStore.open(path).close()


def exchange_meta(path: Path, meta: bytes) -> bytes:
    """Write the store's description, without its copy; returns what it was."""
    with lmdb.open(str(path), max_dbs=8) as env:
        database = env.open_db(b"meta")
        with env.begin(write=True, db=database) as txn:
            before = txn.get(b"store")
            txn.put(b"store", meta)
            txn.delete(b"store copy")
    assert before is not None
    return bytes(before)


@BOTH
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9], ids=["tenth", "half", "nine-tenths"])
@pytest.mark.parametrize("is_filled_up", [False, True], ids=["cut", "cut-and-zeroed"])
def test_a_file_without_its_end_costs_states_but_not_the_process(
    tmp_path: Path, is_filled_up: bool, share: float, read_only: bool
) -> None:
    """Cut by a full disk or a broken copy: an error of this library, where LMDB gets a SIGBUS."""
    path = tmp_path / "store"
    with StateStore.open(path) as store:
        for number in range(5):
            store.put(a_record(number), values(number))
    size = (path / "data.mdb").stat().st_size
    os.truncate(path / "data.mdb", int(size * share) // 4096 * 4096)
    if is_filled_up:
        os.truncate(path / "data.mdb", size)
    child = run(
        """
from hcache_rag.errors import HCacheError
damage = 0
try:
    store = StateStore.open(sys.argv[1], read_only=sys.argv[2] == "True")
except StoreOpenError:
    sys.exit("refused")
for use in (store.records, store.model_names, store.stats):
    try:
        list(use()) if use == store.records else use()
    except HCacheError:
        damage += 1
for number in range(5):
    key = a_record(number).key
    try:
        damage += store.record(key) is None
        damage += key not in store
        damage += stored(store, key) != list(values(number))
    except HCacheError:
        damage += 1
sys.exit(f"damage: {damage > 0}")
""",
        path,
        read_only,
    )
    _, errors = child.communicate()
    assert child.returncode == 1, f"exit status {child.returncode}: {errors}"
    assert errors.strip() in ("refused", "damage: True")


def test_a_model_is_remembered_with_its_layout_and_the_reason(store: StateStore) -> None:
    """The choice of representation is stored beside the states, and shown by `stats`."""
    store.name_model(ROOT, "SmolLM2", "30 x kv (float32)", "kv is smaller")
    assert store.models()[ROOT].reason == "kv is smaller"
    assert store.stats().layouts == {"SmolLM2": "30 x kv (float32); kv is smaller"}
