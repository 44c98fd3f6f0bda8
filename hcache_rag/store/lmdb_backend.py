"""The backend on disk: one LMDB environment per path and process. The one door to lmdb."""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import lmdb

from hcache_rag.errors import (
    DamagedStoreError,
    StoreError,
    StoreFullError,
    StoreMovedError,
    StoreOpenError,
)
from hcache_rag.store import pages
from hcache_rag.store.backend import TABLES, Durability, Pins, Table
from hcache_rag.store.gate import Gate
from hcache_rag.store.turns import Turns

logger = logging.getLogger("hcache_rag")

MAP_BYTES = 1 << 40
"""Address space that is asked for. The file itself grows with what is stored."""

MIN_MAP_BYTES = 1 << 26
"""Where the system gives less: so much at least, and twice as much whenever it is full."""

RESERVE_BYTES = 1 << 22
"""So much room is left to a store that is filled beyond its limit: nothing can be deleted in none.
"""

FORK_WAIT_S = 5.0
"""How long a fork waits for what other threads read; they go on later."""

OPEN_WAIT_S = 60.0
"""How long opening waits for a writer before the file can be checked, or made."""


class LmdbTransaction:
    """See `hcache_rag.store.backend.Transaction`."""

    def __init__(self, txn: Any, databases: dict[Table, Any], fail: Callable[..., StoreError]):
        self._txn = txn
        self._databases = databases
        self._fail = fail

    def get(self, table: Table, key: bytes) -> bytes | None:
        value = self.view(table, key)
        return None if value is None else bytes(value)

    def view(self, table: Table, key: bytes) -> memoryview | None:
        try:
            value = self._txn.get(key, db=self._databases[table])
        except lmdb.Error as error:
            raise self._fail("reading", error) from error
        return None if value is None else memoryview(value)

    def put(self, table: Table, key: bytes, value: bytes | bytearray) -> None:
        try:
            self._txn.put(key, value, db=self._databases[table])
        except lmdb.Error as error:
            raise self._fail("writing", error) from error

    def delete(self, table: Table, key: bytes) -> bool:
        try:
            return bool(self._txn.delete(key, db=self._databases[table]))
        except lmdb.Error as error:
            raise self._fail("writing", error) from error

    def scan(
        self, table: Table, prefix: bytes = b"", start: bytes = b""
    ) -> Iterator[tuple[bytes, bytes]]:
        begin = max(prefix, start)
        try:
            cursor = self._txn.cursor(db=self._databases[table])
            if not (cursor.set_range(begin) if begin else cursor.first()):
                return
            last = b""
            for view, value in cursor.iternext():
                key = bytes(view)
                if not key.startswith(prefix):
                    return
                if key <= last:
                    raise self._fail("reading", lmdb.CorruptedError("keys are not in order"))
                last = key
                yield key, bytes(value)
        except lmdb.Error as error:
            raise self._fail("reading", error) from error

    def key_at_or_after(self, table: Table, key: bytes) -> bytes | None:
        try:
            cursor = self._txn.cursor(db=self._databases[table])
            found = bytes(cursor.key()) if cursor.set_range(key) else None
            if found is not None and found < key:
                raise lmdb.CorruptedError("keys are not in order")
            return found
        except lmdb.Error as error:
            raise self._fail("reading", error) from error

    def at_or_after(self, table: Table, key: bytes) -> tuple[bytes, bytes] | None:
        try:
            cursor = self._txn.cursor(db=self._databases[table])
            found = _row(cursor) if cursor.set_range(key) else None
            if found is not None and found[0] < key:
                raise lmdb.CorruptedError("keys are not in order")
            return found
        except lmdb.Error as error:
            raise self._fail("reading", error) from error

    def before(self, table: Table, key: bytes) -> tuple[bytes, bytes] | None:
        try:
            cursor = self._txn.cursor(db=self._databases[table])
            found = cursor.prev() if cursor.set_range(key) else cursor.last()
            return _row(cursor) if found else None
        except lmdb.Error as error:
            raise self._fail("reading", error) from error

    def count(self, table: Table) -> int:
        return int(self._stat(self._databases[table])["entries"])

    def used_bytes(self) -> int:
        stats = [self._stat(database) for database in self._databases.values()]
        pages = sum(s["branch_pages"] + s["leaf_pages"] + s["overflow_pages"] for s in stats)
        return int(pages * stats[0]["psize"])

    def _stat(self, database: Any) -> dict[str, int]:
        try:
            found: dict[str, int] = self._txn.stat(database)
            return found
        except lmdb.Error as error:
            raise self._fail("reading", error) from error


def _row(cursor: Any) -> tuple[bytes, bytes]:
    return bytes(cursor.key()), bytes(cursor.value())


class LmdbBackend:
    """See `hcache_rag.store.backend.Backend`.

    LMDB forbids to open a path twice in a process: use `acquire`, which counts the users.
    """

    _open: dict[Path, LmdbBackend] = {}  # noqa: RUF012 - the process-wide table itself
    _lock = threading.Lock()

    def __init__(self, folder: Path, *, read_only: bool, durability: Durability) -> None:
        self.path = folder
        self.is_read_only = read_only
        self.pins = Pins()
        self.durability = durability
        self.pid = os.getpid()
        self._users = 1
        self._gate = Gate()
        self._max_bytes: int | None = None
        self._turns = Turns(folder, read_only=read_only)
        try:
            if not (read_only and self._is_opened_beside_writers()):
                with self._turns.taken(OPEN_WAIT_S):
                    if not self._turns.is_noted():
                        self._check_pages()
                    self._env, self._databases = self._opened()
                    self._stat = os.stat(self._data)
                    if not self._turns.is_noted():
                        self._turns.note(is_synced=False)
        except BaseException:
            self._turns.close()
            raise

    def _is_opened_beside_writers(self) -> bool:
        """Open the file without waiting for one's turn, if it is known and stays in its place."""
        lock = self.path / "lock.mdb"
        if not self._turns.is_noted() or not lock.exists():
            return False
        try:
            self._stat, before = os.stat(self._data), os.stat(lock)
            self._env, self._databases = self._opened()
            if self.is_current() and os.path.samestat(before, os.stat(lock)):
                return True
        except FileNotFoundError:
            return False
        self._env.close()
        return False

    @property
    def _data(self) -> Path:
        return self.path / "data.mdb"

    def _check_pages(self) -> None:
        """Something else than a writer has changed the file: LMDB must not be given any file.

        Raises:
            DamagedStoreError: it has pages that LMDB cannot be trusted with.
        """
        logger.info("%s is checked, since it was changed by something else", self.path)
        try:
            found = pages.problems(self._data)
        except OSError as error:
            raise StoreOpenError(f"{self.path} cannot be read: {error.strerror}") from error
        if found:
            raise DamagedStoreError(self.path, found)

    def _opened(self) -> tuple[Any, dict[Table, Any]]:
        env = self._open_environment()
        try:
            self._mend_length(env)
            return env, self._open_databases(env)
        except BaseException:
            env.close()
            raise

    def _open_environment(self) -> Any:
        map_bytes = MAP_BYTES
        self._is_cramped = False
        while True:
            try:
                return lmdb.open(
                    str(self.path),
                    map_size=map_bytes,
                    max_dbs=len(TABLES) + 4,
                    max_readers=512,
                    max_spare_txns=0,  # a fork would free the parent's places for readers
                    mode=0o600,
                    # "fsync": a commit syncs the pages, then writes where they begin; `writing`
                    # syncs that too. LMDB's own way for the second takes six times as long.
                    sync=self.is_read_only or self.durability == "fsync",
                    metasync=False,
                    readonly=self.is_read_only,
                    # A folder that cannot be written has no writer that readers could be in the
                    # way of, and no room for their table.
                    lock=not self.is_read_only or os.access(self.path, os.W_OK),
                )
            except lmdb.MemoryError as error:
                map_bytes //= 4
                self._is_cramped = True
                if map_bytes < MIN_MAP_BYTES:
                    raise StoreOpenError(f"{self.path} cannot be mapped: {error}") from error
            except (lmdb.Error, OSError) as error:
                raise StoreOpenError(f"{self.path} is not a state store: {error}") from error

    def _mend_length(self, env: Any) -> None:
        """Free pages may be missing at the end: using one would be a SIGBUS."""
        needed = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
        if not self.is_read_only and os.stat(self._data).st_size < needed:
            os.truncate(self._data, needed)

    def _open_databases(self, env: Any) -> dict[Table, Any]:
        try:
            with env.begin() as txn:
                names = {bytes(key).decode(errors="replace") for key, _ in txn.cursor()}
            if names and names - set(TABLES):
                raise StoreOpenError(f"{self.path} is not a state store: it holds other data")
            if names and names < set(TABLES) and "records" in names:
                raise StoreOpenError(
                    f"{self.path} was written before there was a release; delete it and index again"
                )
            create = not self.is_read_only
            return {t: env.open_db(t.encode(), create=create) for t in TABLES}
        except lmdb.Error as error:
            raise StoreOpenError(f"{self.path} is not a state store: {error}") from error

    @staticmethod
    def folder(path: str | os.PathLike[str], *, read_only: bool) -> Path:
        """The folder at a path, made if it is missing and may be.

        Raises:
            StoreOpenError: it cannot be one.
        """
        folder = Path(path).expanduser().absolute()
        try:
            folder = folder.resolve()
            if folder.exists() and not folder.is_dir():
                raise StoreOpenError(f"{folder} is a file; a state store is a folder")
            if read_only and not (folder / "data.mdb").is_file():
                raise StoreOpenError(f"{folder} holds no state store")
        except OSError as error:
            raise StoreOpenError(f"cannot look into {folder}: {error.strerror}") from error
        if not read_only:
            try:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as error:
                raise StoreOpenError(f"cannot create {folder}: {error.strerror}") from error
            if not os.access(folder, os.W_OK):
                raise StoreOpenError(f"{folder} is not writable")
        return folder

    @classmethod
    def acquire(cls, folder: Path, *, read_only: bool, durability: Durability) -> LmdbBackend:
        """The environment in a folder, opened if this process has not opened it yet.

        Raises:
            StoreOpenError: it cannot be opened, or is open in this process in another way.
        """
        with cls._lock:
            backend = cls._open.get(folder)
            if backend is not None and backend.pid != os.getpid():
                if backend._gate.is_used:  # closing would end what the parent reads there
                    raise StoreOpenError(
                        f"{folder} cannot be used in this process, which was forked by a thread "
                        "that was reading from it"
                    )
                backend._env.close()  # LMDB must not be used in both processes
                backend = None
            if backend is not None and backend.is_current():
                if backend.is_read_only and not read_only:
                    raise StoreOpenError(f"{folder} is already open in this process, read-only")
                if not read_only and backend.durability != durability:
                    raise StoreOpenError(
                        f"{folder} is already open in this process with durability="
                        f"{backend.durability!r}, not {durability!r}"
                    )
                backend._users += 1
                return backend
            cls._open[folder] = cls(folder, read_only=read_only, durability=durability)
            return cls._open[folder]

    @classmethod
    def is_open_here(cls, folder: Path) -> bool:
        """Whether this process uses the environment in a folder."""
        with cls._lock:
            backend = cls._open.get(folder)
            return backend is not None and backend.pid == os.getpid() and backend.is_current()

    def is_current(self) -> bool:
        try:
            return os.path.samestat(self._stat, os.stat(self._data))
        except OSError:
            return False

    def close(self) -> None:
        """Count one user less; the last one closes when the last reader has ended."""
        with self._lock:
            self._users -= 1
            if self._users or self.pid != os.getpid():
                return
            if self._open.get(self.path) is self:
                del self._open[self.path]
        self._gate.when_empty(self._close)

    def _close(self) -> None:
        try:
            if not self.is_read_only:
                self._env.sync(True)
                with suppress(StoreError), self._turns.taken(0.0):
                    self._note_sync()
        finally:
            self._env.close()
            self._turns.close()

    @contextmanager
    def reading(self) -> Iterator[LmdbTransaction]:
        with self._transaction(write=False) as txn:
            try:
                yield LmdbTransaction(txn, self._databases, self._error)
            finally:
                self._abort(txn)

    @contextmanager
    def writing(self, wait_s: float | None = None) -> Iterator[LmdbTransaction]:
        with self._turns.taken(wait_s), self._transaction(write=True) as txn:
            self._require_current()
            try:
                yield LmdbTransaction(txn, self._databases, self._error)
            except BaseException:
                self._abort(txn)
                raise
            if self.durability == "fast":
                self._turns.note_unsynced()
            try:
                txn.commit()
                if self.durability == "fsync":
                    self._env.sync(True)
            except lmdb.Error as error:
                raise self._error("writing to", error) from error
            self._turns.note(is_synced=self.durability == "fsync")

    def _abort(self, txn: Any) -> None:
        """End a transaction; one that a fork has inherited is the parent's, and stays as it is."""
        if self.pid == os.getpid():
            txn.abort()
        else:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(txn))  # freeing it would end it too

    @contextmanager
    def _transaction(self, *, write: bool) -> Iterator[Any]:
        while True:
            with self._gate.inside():
                txn = self._begin(write)
                if txn is not None:
                    yield txn
                    return
            if not self._gate.alone(lambda: self._env.set_mapsize(0)):
                raise StoreError(f"{self.path} was made larger while this thread reads from it")

    def _begin(self, write: bool) -> Any:
        """An LMDB transaction; None where another process has let the map grow."""
        try:
            try:
                return self._env.begin(write=write, buffers=True)
            except lmdb.ReadersFullError:
                if not self._env.reader_check():
                    raise
                return self._env.begin(write=write, buffers=True)
        except lmdb.MapResizedError:
            return None
        except lmdb.Error as error:
            raise self._error("writing to" if write else "reading", error) from error

    def limit(self, max_bytes: int | None) -> None:
        self._max_bytes = max_bytes
        if max_bytes is None or self.is_read_only:
            return
        before = self._env.info()["map_size"]
        if self._is_cramped and max_bytes > before:
            return  # `grow` tries it when it is needed
        with self.reading() as txn:
            is_over = txn.used_bytes() > max_bytes - RESERVE_BYTES // 4
        filled = (self._env.info()["last_pgno"] + 1) * self._env.stat()["psize"]
        wanted = max(max_bytes, filled + RESERVE_BYTES) if is_over else max_bytes
        self._gate.alone(lambda: self._map(wanted, before))

    def grow(self) -> bool:
        """Double the map, where it is full and nothing limits it."""
        largest = MAP_BYTES if self._max_bytes is None else self._max_bytes
        before = self._env.info()["map_size"]
        if self.is_read_only or before >= largest:
            return False
        try:
            return self._gate.alone(lambda: self._map(min(2 * before, largest), before))
        except StoreError:
            return False

    def _map(self, num_bytes: int, before: int) -> None:
        """Let the file grow to so many bytes, or to as many as before."""
        page = self._env.stat()["psize"]
        try:
            self._env.set_mapsize(num_bytes // page * page)
        except (lmdb.Error, OverflowError) as error:
            self._env.set_mapsize(before)
            raise StoreError(f"{self.path} cannot have {num_bytes:,} bytes: {error}") from error

    def file_bytes(self) -> int:
        return os.stat(self._data).st_blocks * 512

    def _note_sync(self) -> None:
        """Vouch for the file, if nothing else has changed it."""
        if self.is_current() and self._turns.is_noted():
            self._turns.note(is_synced=True)

    def _require_current(self) -> None:
        if not self.is_current():
            raise StoreMovedError(f"another file has taken the place of {self.path}")

    def sync(self) -> None:
        if not self.is_read_only:
            with self._turns.taken(None), self._gate.inside():
                self._require_current()
                self._env.sync(True)
                self._note_sync()

    def _error(self, doing: str, error: lmdb.Error) -> StoreError:
        if isinstance(error, lmdb.MapFullError):
            room = self._env.info()["map_size"]
            return StoreFullError(f"{self.path} has reached its {room:,}-byte map")
        kind = StoreFullError if "No space left" in str(error) else StoreError
        return kind(f"{doing} {self.path} failed: {error}")


def _before_fork() -> None:
    """Wait for other threads' transactions: a child would end those that it inherits."""
    LmdbBackend._lock.acquire()
    for backend in LmdbBackend._open.values():
        backend._gate.shut(FORK_WAIT_S)


def _after_fork_in_parent() -> None:
    for backend in LmdbBackend._open.values():
        backend._gate.open()
    LmdbBackend._lock.release()


def _after_fork_in_child() -> None:
    LmdbBackend._lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )
