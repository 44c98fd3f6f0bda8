"""A backend in memory: the reference for the one on disk, and a store for one process."""

from __future__ import annotations

import threading
from bisect import bisect_left, insort
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hcache_rag.errors import StoreBusyError, StoreError, StoreFullError
from hcache_rag.store.backend import PAGE_BYTES, TABLES, Pins, Table


class _Rows:
    """A sorted table. Copies share their values."""

    def __init__(self, keys: list[bytes], values: dict[bytes, bytes]) -> None:
        self.keys = keys
        self.values = values

    def copy(self) -> _Rows:
        return _Rows(list(self.keys), dict(self.values))


class MemoryTransaction:
    """See `hcache_rag.store.backend.Transaction`. It copies each table that it changes."""

    def __init__(self, tables: dict[Table, _Rows], *, is_writing: bool) -> None:
        self.tables = dict(tables)
        self._own: set[Table] = set()
        self._is_writing = is_writing

    def _writable(self, table: Table) -> _Rows:
        if not self._is_writing:
            raise StoreError("a reading transaction cannot write")
        if table not in self._own:
            self.tables[table] = self.tables[table].copy()
            self._own.add(table)
        return self.tables[table]

    def get(self, table: Table, key: bytes) -> bytes | None:
        return self.tables[table].values.get(key)

    def view(self, table: Table, key: bytes) -> memoryview | None:
        value = self.get(table, key)
        return None if value is None else memoryview(value)

    def put(self, table: Table, key: bytes, value: bytes | bytearray) -> None:
        rows = self._writable(table)
        if key not in rows.values:
            insort(rows.keys, key)
        rows.values[key] = bytes(value)

    def delete(self, table: Table, key: bytes) -> bool:
        rows = self._writable(table)
        if rows.values.pop(key, None) is None:
            return False
        del rows.keys[bisect_left(rows.keys, key)]
        return True

    def scan(
        self, table: Table, prefix: bytes = b"", start: bytes = b""
    ) -> Iterator[tuple[bytes, bytes]]:
        rows = self.tables[table]
        for at in range(bisect_left(rows.keys, max(prefix, start)), len(rows.keys)):
            key = rows.keys[at]
            if not key.startswith(prefix):
                return
            yield key, rows.values[key]

    def key_at_or_after(self, table: Table, key: bytes) -> bytes | None:
        row = self.at_or_after(table, key)
        return None if row is None else row[0]

    def at_or_after(self, table: Table, key: bytes) -> tuple[bytes, bytes] | None:
        return self._row(table, bisect_left(self.tables[table].keys, key))

    def before(self, table: Table, key: bytes) -> tuple[bytes, bytes] | None:
        return self._row(table, bisect_left(self.tables[table].keys, key) - 1)

    def _row(self, table: Table, at: int) -> tuple[bytes, bytes] | None:
        rows = self.tables[table]
        if not 0 <= at < len(rows.keys):
            return None
        return rows.keys[at], rows.values[rows.keys[at]]

    def count(self, table: Table) -> int:
        return len(self.tables[table].keys)

    def used_bytes(self) -> int:
        return sum(
            len(key) + _on_pages(len(value))
            for rows in self.tables.values()
            for key, value in rows.values.items()
        )


def _on_pages(size: int) -> int:
    return size if size < PAGE_BYTES // 2 else -(-size // PAGE_BYTES) * PAGE_BYTES


class MemoryBackend:
    """See `hcache_rag.store.backend.Backend`."""

    def __init__(self) -> None:
        self.path = Path(":memory:")
        self.is_read_only = False
        self.pins = Pins()
        self._tables: dict[Table, _Rows] = {table: _Rows([], {}) for table in TABLES}
        self._writer = threading.Lock()
        self._max_bytes: int | None = None

    @contextmanager
    def reading(self) -> Iterator[MemoryTransaction]:
        yield MemoryTransaction(self._tables, is_writing=False)

    @contextmanager
    def writing(self, wait_s: float | None = None) -> Iterator[MemoryTransaction]:
        if not self._writer.acquire(timeout=-1 if wait_s is None else wait_s):
            raise StoreBusyError(f"another thread still writes after {wait_s} s")
        try:
            txn = MemoryTransaction(self._tables, is_writing=True)
            yield txn
            used = txn.used_bytes()
            if self._max_bytes is not None and used > max(self._max_bytes, self.file_bytes()):
                raise StoreFullError(f"more than {self._max_bytes:,} bytes")
            self._tables = txn.tables
        finally:
            self._writer.release()

    def limit(self, max_bytes: int | None) -> bool:
        self._max_bytes = max_bytes
        return True

    def grow(self) -> bool:
        return False

    def compact(self, wait_s: float | None = None) -> None:
        pass

    def file_bytes(self) -> int:
        with self.reading() as txn:
            return txn.used_bytes()

    def is_current(self) -> bool:
        return True

    def sync(self) -> None:
        pass

    def close(self) -> None:
        pass
