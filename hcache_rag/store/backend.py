"""What a state store stands on: named tables of sorted keys, in transactions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from itertools import chain
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

Table: TypeAlias = Literal[
    "meta",
    "namespaces",
    "records",
    "entries",
    "chunks",
    "texts",
    "anchors",
    "owners",
    "owned",
    "totals",
    "models",
]

TABLES: tuple[Table, ...] = (
    "meta",
    "namespaces",
    "records",
    "entries",
    "chunks",
    "texts",
    "anchors",
    "owners",
    "owned",
    "totals",
    "models",
)

Durability: TypeAlias = Literal["fsync", "fast"]
"""When a write has returned: "fsync", it survives a power cut; "fast", it survives the process."""

PAGE_BYTES = 4096
"""Values take whole pages, from about half a page on."""


class Pins:
    """Rows that somebody reads at the moment, and that must stay. Thread-safe, without a lock.

    Who reads may be ended by the garbage collector while its thread is in here.
    """

    def __init__(self) -> None:
        self._held: dict[int, list[bytes]] = {}

    def add(self, rows: list[bytes]) -> None:
        """They are read."""
        self._held[id(rows)] = rows

    def remove(self, rows: list[bytes]) -> None:
        """These, which were given to `add`, are not any more."""
        self._held.pop(id(rows), None)

    def __iter__(self) -> Iterator[bytes]:
        return chain.from_iterable(list(self._held.values()))


class Transaction(Protocol):
    """One consistent moment. Errors of the backend come out as `StoreError`."""

    def get(self, table: Table, key: bytes) -> bytes | None:
        """The value of a key, copied."""

    def view(self, table: Table, key: bytes) -> memoryview | None:
        """The value of a key where it lies; it dies with the transaction."""

    def put(self, table: Table, key: bytes, value: bytes | bytearray) -> None:
        """Set a key's value."""

    def delete(self, table: Table, key: bytes) -> bool:
        """Delete a key; False where there was none."""

    def scan(
        self, table: Table, prefix: bytes = b"", start: bytes = b""
    ) -> Iterator[tuple[bytes, bytes]]:
        """Keys that begin with `prefix`, from `start` on, in order, with their values.

        The table must not be changed meanwhile.
        """

    def key_at_or_after(self, table: Table, key: bytes) -> bytes | None:
        """The first key not before `key`; its value is not read."""

    def at_or_after(self, table: Table, key: bytes) -> tuple[bytes, bytes] | None:
        """The first key not before `key`, and its value."""

    def before(self, table: Table, key: bytes) -> tuple[bytes, bytes] | None:
        """The last key before `key`, and its value."""

    def count(self, table: Table) -> int:
        """Keys in a table."""

    def used_bytes(self) -> int:
        """Bytes that everything takes, as this transaction would leave it."""


class Backend(Protocol):
    """Where tables are kept. Thread-safe."""

    path: Path
    is_read_only: bool
    pins: Pins

    def reading(self) -> AbstractContextManager[Transaction]:
        """A transaction that sees one moment, for one thread; it must not write."""

    def writing(self, wait_s: float | None = None) -> AbstractContextManager[Transaction]:
        """A transaction that is committed at the end of its block, or not at all on an error.

        Args:
            wait_s: how long to wait while somebody else writes; None for as long as it takes.

        Raises:
            StoreBusyError: somebody else still writes after `wait_s`.
            StoreFullError: no room for the transaction.
        """

    def limit(self, max_bytes: int | None) -> bool:
        """Let the file grow to so many bytes at most, or as far as it can.

        Returns:
            False where this thread reads, and it must be said again later.
        """

    def grow(self) -> bool:
        """Make room after a `StoreFullError`, where that can be done at once."""

    def compact(self, wait_s: float | None = None) -> None:
        """Give the disk back what is free inside the file.

        Raises:
            StoreBusyError: another process has it open, or this thread reads, or others do for too
                long.
            StoreError: the disk failed, or has no room for a second file.
        """

    def file_bytes(self) -> int:
        """Bytes on disk."""

    def is_current(self) -> bool:
        """Whether this is what its path names: another file may have taken its place."""

    def sync(self) -> None:
        """Write everything through to the disk."""

    def close(self) -> None:
        """End the use of this backend; a transaction that is open elsewhere ends well."""
