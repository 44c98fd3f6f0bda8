"""The backend on disk: one LMDB environment per path and process. The one door to lmdb."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lmdb

from hcache_rag.errors import StoreBusyError, StoreError, StoreFullError, StoreOpenError
from hcache_rag.store.backend import TABLES, Durability, Pins, Table

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows: LMDB's own lock is all there is
    fcntl = None  # type: ignore[assignment]

MAP_BYTES = 1 << 40
"""Address space that is asked for. The file itself grows with what is stored."""

MIN_MAP_BYTES = 1 << 26
"""Where the system gives less: so much at least, and twice as much whenever it is full."""

WRITER_LOCK = "writer.lock"


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


def _lock_descriptor(folder: Path) -> int:
    try:
        return os.open(folder / WRITER_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StoreOpenError(f"{folder} cannot be locked: {error.strerror}") from error


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
        self._gate = _Gate()
        self._writer = threading.Lock()
        self._max_bytes: int | None = None
        self._env = self._open_environment()
        self._lock_descriptor = -1 if read_only or fcntl is None else _lock_descriptor(folder)
        self._stat = os.stat(folder / "data.mdb")
        try:
            self._mend_length()
            self._databases = self._open_databases()
        except BaseException:
            self._close_files()
            raise

    def _open_environment(self) -> Any:
        map_bytes = MAP_BYTES
        while True:
            try:
                return lmdb.open(
                    str(self.path),
                    map_size=map_bytes,
                    max_dbs=len(TABLES) + 4,
                    max_readers=512,
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
                if map_bytes < MIN_MAP_BYTES:
                    raise StoreOpenError(f"{self.path} cannot be mapped: {error}") from error
            except (lmdb.Error, OSError) as error:
                raise StoreOpenError(f"{self.path} is not a state store: {error}") from error

    def _mend_length(self) -> None:
        """Reading a page beyond the file's end is a SIGBUS; reading zeros is an error."""
        needed = (self._env.info()["last_pgno"] + 1) * self._env.stat()["psize"]
        if os.stat(self.path / "data.mdb").st_size >= needed:
            return
        if self.is_read_only:
            raise StoreOpenError(f"{self.path} is not whole: its end is missing")
        os.truncate(self.path / "data.mdb", needed)

    def _open_databases(self) -> dict[Table, Any]:
        try:
            with self._env.begin() as txn:
                names = {bytes(key).decode(errors="replace") for key, _ in txn.cursor()}
            if names and names - set(TABLES):
                raise StoreOpenError(f"{self.path} is not a state store: it holds other data")
            if names and names < set(TABLES) and "records" in names:
                raise StoreOpenError(
                    f"{self.path} was written before there was a release; delete it and index again"
                )
            create = not self.is_read_only
            return {t: self._env.open_db(t.encode(), create=create) for t in TABLES}
        except lmdb.Error as error:
            raise StoreOpenError(f"{self.path} is not a state store: {error}") from error

    @classmethod
    def acquire(cls, folder: Path, *, read_only: bool, durability: Durability) -> LmdbBackend:
        """The environment in a folder, opened if this process has not opened it yet.

        Raises:
            StoreOpenError: it cannot be opened, or is open in this process in another way.
        """
        with cls._lock:
            backend = cls._open.get(folder)
            if backend is not None and backend.pid != os.getpid():
                backend._env.close()  # inherited by a fork: LMDB must not be used in both processes
                backend = None
            if backend is not None and backend._is_on_disk():
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

    def _is_on_disk(self) -> bool:
        """Whether the open environment is still the file that the path names."""
        try:
            return os.path.samestat(self._stat, os.stat(self.path / "data.mdb"))
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
        finally:
            self._close_files()

    def _close_files(self) -> None:
        self._env.close()
        if self._lock_descriptor >= 0:
            os.close(self._lock_descriptor)

    @contextmanager
    def reading(self) -> Iterator[LmdbTransaction]:
        with self._transaction(write=False) as txn:
            try:
                yield LmdbTransaction(txn, self._databases, self._error)
            finally:
                txn.abort()

    @contextmanager
    def writing(self, wait_s: float | None = None) -> Iterator[LmdbTransaction]:
        with self._turn(wait_s), self._transaction(write=True) as txn:
            try:
                yield LmdbTransaction(txn, self._databases, self._error)
            except BaseException:
                txn.abort()
                raise
            try:
                txn.commit()
                if self.durability == "fsync":
                    self._env.sync(True)
            except lmdb.Error as error:
                raise self._error("writing to", error) from error

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

    @contextmanager
    def _turn(self, wait_s: float | None) -> Iterator[None]:
        """Be the only writer, of all threads and processes."""
        deadline = None if wait_s is None else time.monotonic() + wait_s
        if not self._writer.acquire(timeout=-1 if wait_s is None else wait_s):
            raise StoreBusyError(f"another thread still writes to {self.path} after {wait_s} s")
        try:
            self._lock_file(deadline, wait_s)
            try:
                yield
            finally:
                if fcntl is not None:
                    fcntl.lockf(self._lock_descriptor, fcntl.LOCK_UN)
        finally:
            self._writer.release()

    def _lock_file(self, deadline: float | None, wait_s: float | None) -> None:
        """LMDB has a lock of its own, but one that waits for ever."""
        if fcntl is None:
            return
        pause_s = 0.001
        while True:
            try:
                mode = fcntl.LOCK_EX if deadline is None else fcntl.LOCK_EX | fcntl.LOCK_NB
                fcntl.lockf(self._lock_descriptor, mode)
                return
            except BlockingIOError as error:
                if deadline is None or time.monotonic() >= deadline:
                    raise StoreBusyError(
                        f"another process still writes to {self.path} after {wait_s} s"
                    ) from error
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, 0.05)
            except OSError as error:
                raise StoreError(f"{self.path} cannot be locked: {error.strerror}") from error

    def limit(self, max_bytes: int | None) -> None:
        self._max_bytes = max_bytes
        if max_bytes is None or self.is_read_only:
            return
        page = self._env.stat()["psize"]
        self._gate.alone(lambda: self._env.set_mapsize(max_bytes // page * page))

    def grow(self) -> bool:
        """Double the map, where it is full and nothing limits it."""
        if self._max_bytes is not None or self.is_read_only:
            return False
        map_bytes = 2 * self._env.info()["map_size"]
        return map_bytes <= MAP_BYTES and self._gate.alone(lambda: self._env.set_mapsize(map_bytes))

    def file_bytes(self) -> int:
        return os.stat(self.path / "data.mdb").st_blocks * 512

    def sync(self) -> None:
        if not self.is_read_only:
            with self._gate.inside():
                self._env.sync(True)

    def _error(self, doing: str, error: lmdb.Error) -> StoreError:
        if isinstance(error, lmdb.MapFullError):
            room = self._env.info()["map_size"]
            return StoreFullError(f"{self.path} has reached its {room:,}-byte map")
        kind = StoreFullError if "No space left" in str(error) else StoreError
        return kind(f"{doing} {self.path} failed: {error}")


def _renew_lock() -> None:
    LmdbBackend._lock = threading.Lock()  # another thread may have held it in the parent


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


class _Gate:
    """Transactions that come and go, and moments at which there must be none."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._is_shut = False
        self._own = threading.local()
        self._last: Callable[[], None] | None = None

    @contextmanager
    def inside(self) -> Iterator[None]:
        """A transaction of this thread."""
        own = getattr(self._own, "count", 0)
        with self._changed:
            self._changed.wait_for(lambda: own or not self._is_shut)
            self._inside += 1
        self._own.count = own + 1
        try:
            yield
        finally:
            self._own.count = own
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()
                last = self._last if not self._inside else None
            if last is not None:
                last()

    def alone(self, action: Callable[[], None]) -> bool:
        """Run `action` while no transaction is open; False where this thread has one itself."""
        if getattr(self._own, "count", 0):
            return False
        with self._changed:
            self._changed.wait_for(lambda: not self._is_shut)
            self._is_shut = True
        try:
            with self._changed:
                self._changed.wait_for(lambda: not self._inside)
            action()
        finally:
            with self._changed:
                self._is_shut = False
                self._changed.notify_all()
        return True

    def when_empty(self, action: Callable[[], None]) -> None:
        """Run `action` when the last transaction has ended, or now."""
        with self._changed:
            if self._inside:
                self._last = action
                return
        action()
