"""An LMDB environment that holds a store's tables. The one door to lmdb."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lmdb

from hcache_rag.errors import StoreError, StoreFullError, StoreOpenError
from hcache_rag.store.backend import TABLES, Durability, Table
from hcache_rag.store.files import DATA_FILE, LOCK_FILE
from hcache_rag.store.presence import Presence

MAP_BYTES = 1 << 40
"""Address space that is asked for. The file itself grows with what is stored."""

MIN_MAP_BYTES = 1 << 26
"""Where the system gives less: so much at least, and twice as much whenever it is full."""

NO_ROOM_BYTES = 1 << 20
"""A disk with less is full where a write fails: LMDB says only that less was written than asked."""


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

    def commit(self) -> None:
        """End it; what it has written is there for all that begin later.

        Raises:
            StoreError, StoreFullError: nothing of it is there.
        """
        try:
            self._txn.commit()
        except lmdb.Error as error:
            raise self._fail("writing to", error) from error

    def abort(self) -> None:
        """End it; nothing of it stays."""
        self._txn.abort()

    def leave(self) -> None:
        """In a fork: it is the parent's, and must not be ended here, not even by being freed."""
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._txn))

    def _stat(self, database: Any) -> dict[str, int]:
        try:
            found: dict[str, int] = self._txn.stat(database)
            return found
        except lmdb.Error as error:
            raise self._fail("reading", error) from error


def _row(cursor: Any) -> tuple[bytes, bytes]:
    return bytes(cursor.key()), bytes(cursor.value())


class Environment:
    """A folder's file as LMDB has it open, and the tables in it.

    Args:
        durability: "fsync": a commit syncs its pages, then writes where they begin; `sync` syncs
            that too.
        has_readers_table: who reads is seen by who writes.

    Attributes:
        is_open: `close` was not called.
        is_cramped: the system gave less than `MAP_BYTES` of addresses.

    Raises:
        StoreOpenError: it cannot be opened, or holds something else.
    """

    def __init__(
        self, folder: Path, *, read_only: bool, durability: Durability, has_readers_table: bool
    ) -> None:
        self.path = folder
        self._is_read_only = read_only
        self.is_cramped = False
        self.is_open = True
        self._has_readers_table = has_readers_table
        self._env = self._opened(syncs=read_only or durability == "fsync")
        self._presence = Presence(folder / LOCK_FILE) if has_readers_table else None
        try:
            self._mend_length()
            self._databases = self._open_databases()
        except BaseException:
            self.close()
            raise

    def _opened(self, *, syncs: bool) -> Any:
        map_bytes = MAP_BYTES
        while True:
            try:
                return lmdb.open(
                    str(self.path),
                    map_size=map_bytes,
                    max_dbs=len(TABLES) + 4,
                    max_readers=512,
                    max_spare_txns=0,  # a fork would free the parent's places for readers
                    mode=0o600,
                    sync=syncs,
                    metasync=False,  # LMDB's own way for what `sync` does takes six times as long
                    readonly=self._is_read_only,
                    lock=self._has_readers_table,
                )
            except lmdb.MemoryError as error:
                map_bytes //= 4
                self.is_cramped = True
                if map_bytes < MIN_MAP_BYTES:
                    raise StoreOpenError(f"{self.path} cannot be mapped: {error}") from error
            except (lmdb.Error, OSError) as error:
                raise StoreOpenError(f"{self.path} is not a state store: {error}") from error

    def _mend_length(self) -> None:
        """Free pages may be missing at the end: using one would be a SIGBUS."""
        data = self.path / DATA_FILE
        try:
            if not self._is_read_only and os.stat(data).st_size < self.filled_bytes:
                os.truncate(data, self.filled_bytes)
        except OSError as error:
            raise StoreOpenError(f"{self.path} cannot be opened: {error.strerror}") from error

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
            create = not self._is_read_only
            return {t: self._env.open_db(t.encode(), create=create) for t in TABLES}
        except lmdb.Error as error:
            raise StoreOpenError(f"{self.path} is not a state store: {error}") from error

    def begin(self, *, write: bool) -> LmdbTransaction | None:
        """A transaction; None where another process has let the map grow, see `follow`.

        Pages that a killed reader has seen can be written on from then on.
        """
        if self._presence is not None:
            self._presence.renew()
        try:
            if write:
                self._env.reader_check()
            try:
                txn = self._env.begin(write=write, buffers=True)
            except lmdb.ReadersFullError:
                if not self._env.reader_check():
                    raise
                txn = self._env.begin(write=write, buffers=True)
        except lmdb.MapResizedError:
            return None
        except lmdb.Error as error:
            raise self._error("writing to" if write else "reading", error) from error
        return LmdbTransaction(txn, self._databases, self._error)

    @property
    def map_bytes(self) -> int:
        """How far the file may grow."""
        return int(self._env.info()["map_size"])

    @property
    def page_bytes(self) -> int:
        """Of one page."""
        return int(self._env.stat()["psize"])

    @property
    def filled_bytes(self) -> int:
        """How far the file was ever filled."""
        return (int(self._env.info()["last_pgno"]) + 1) * self.page_bytes

    def follow(self) -> None:
        """Let the map be as large as another process has made it. Without transactions."""
        try:
            self._env.set_mapsize(0)
        except lmdb.Error as error:
            raise self._error("mapping", error) from error

    def resize(self, num_bytes: int) -> None:
        """Let the file grow to so many bytes. Without transactions.

        Raises:
            StoreError: that cannot be; it may grow as far as before.
        """
        before = self.map_bytes
        try:
            self._env.set_mapsize(num_bytes // self.page_bytes * self.page_bytes)
        except (lmdb.Error, OverflowError) as error:
            self._env.set_mapsize(before)
            raise StoreError(f"{self.path} cannot have {num_bytes:,} bytes: {error}") from error

    def copy(self, descriptor: int) -> None:
        """Write what is there now to another file, without what is free."""
        try:
            self._env.copyfd(descriptor, compact=True)
        except lmdb.Error as error:
            raise self._error("copying", error) from error

    def sync(self) -> None:
        """Write everything through to the disk."""
        try:
            self._env.sync(True)
        except lmdb.Error as error:
            raise self._error("syncing", error) from error

    def close(self) -> None:
        """Without transactions."""
        self.is_open = False
        self._env.close()
        if self._presence is not None:
            self._presence.close()

    def _error(self, doing: str, error: lmdb.Error) -> StoreError:
        if isinstance(error, lmdb.MapFullError):
            return StoreFullError(f"{self.path} has reached its {self.map_bytes:,}-byte map")
        kind = StoreFullError if self._is_disk_full(str(error)) else StoreError
        return kind(f"{doing} {self.path} failed: {error}")

    def _is_disk_full(self, message: str) -> bool:
        if os.strerror(errno.EIO) in message:
            try:
                disk = os.statvfs(self.path)
            except OSError:
                return False
            return disk.f_bavail * disk.f_frsize < NO_ROOM_BYTES
        return any(os.strerror(n) in message for n in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
