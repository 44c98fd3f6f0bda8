"""One state on its way here, in blocks.

They come in the order in which values are stored, which is that of a restore, from the value on
that is asked for; what lies before it comes last.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import xxhash

from hcache_rag.errors import DamagedStateError, UnreachableStateError
from hcache_rag.state import StateKey
from hcache_rag.store.link import Link

BLOCK_BYTES = 1 << 20
"""Of one request: what comes early can be restored early."""

Place: TypeAlias = tuple[int, int, bytes]
"""Of a value in the object of all values: offset, size, checksum."""


def checksum(data: bytes | memoryview) -> bytes:
    """Of a value."""
    return xxhash.xxh3_64_digest(data)


@dataclass(frozen=True, slots=True)
class Source:
    """An object that holds values.

    Args:
        name: that no other one has.
        read: gives its bytes from one place to another; may raise anything.
        told: an error of `read` in words.
    """

    name: str
    link: Link
    read: Callable[[int, int], bytes]
    told: Callable[[Exception], str] = repr


class Flight:
    """One state on its way. Thread-safe.

    Args:
        places: (layer, chunk, place) of all its values, as they lie one behind another.
    """

    def __init__(
        self, source: Source, key: StateKey, places: Sequence[tuple[int, int, Place]]
    ) -> None:
        self.source = source
        self.key = key
        self.places = places
        self.is_wanted = False
        self.landed = threading.Event()
        self._by_chunk = {(layer, chunk): place for layer, chunk, place in places}
        self._begin = min((place[0] for *_, place in places), default=0)
        end = max((place[0] + place[1] for *_, place in places), default=0)
        self.num_bytes = end - self._begin
        self._data = bytearray(self.num_bytes)
        self._missing = dict.fromkeys(range(-(-self.num_bytes // BLOCK_BYTES)))
        self._next = 0
        self._error: str | None = None
        self._news = threading.Condition()
        self._progress = 0

    @property
    def missing_share(self) -> float:
        """What has not come yet, of the whole."""
        return min(1.0, len(self._missing) * BLOCK_BYTES / max(self.num_bytes, 1))

    @property
    def has_failed(self) -> bool:
        """Whether no more will come."""
        return self._error is not None

    def want(self, layer: int, chunk: int) -> None:
        """Somebody waits for a value and those behind it."""
        offset, size, _ = self._by_chunk[layer, chunk]
        with self._news:
            if not self._has(offset, size):
                self.is_wanted = True
                blocks = self._blocks(offset, size)
                self._next = min(block for block in blocks if block in self._missing)

    def carry(self) -> tuple[int, int, int]:
        """The number of the next block, and where it begins and ends in the object."""
        with self._news:
            self._progress += 1
            self._news.notify_all()
            behind = [block for block in self._missing if block >= self._next]
            block = min(behind or self._missing)
            begin = block * BLOCK_BYTES
            end = min(begin + BLOCK_BYTES, self.num_bytes)
            return block, self._begin + begin, self._begin + end

    def arrived(self, block: int, data: bytes) -> None:
        """A block has come."""
        begin = block * BLOCK_BYTES
        expected = min(BLOCK_BYTES, self.num_bytes - begin)
        if len(data) != expected:
            raise OSError(f"{len(data)} bytes came of {expected}")
        with self._news:
            self._data[begin : begin + expected] = data
            self._missing.pop(block, None)
            self._progress += 1
            if not any(block >= self._next for block in self._missing):
                self.is_wanted = False
            self._news.notify_all()

    def failed(self, why: str) -> None:
        """No more will come."""
        with self._news:
            self._error = self._error or why
            self._news.notify_all()

    def value(self, layer: int, chunk: int, wait_s: float) -> memoryview:
        """A value, when it has come; `wait_s` is how long nothing may come.

        Raises:
            UnreachableStateError: it does not come.
            DamagedStateError: it is not what was exported.
        """
        offset, size, expected = self._by_chunk[layer, chunk]
        self.want(layer, chunk)
        with self._news:
            while not self._has(offset, size):
                if self._error is not None:
                    raise UnreachableStateError(self.key, self._error)
                before = self._progress
                if not self._news.wait(wait_s) and self._progress == before:
                    raise UnreachableStateError(self.key, f"nothing has come for {wait_s:g} s")
        begin = offset - self._begin
        value = memoryview(self._data)[begin : begin + size]
        if checksum(value) != expected:
            what = f"layer {layer}, chunk {chunk} is not what was exported"
            raise DamagedStateError(self.key, what)
        return value

    def _blocks(self, offset: int, size: int) -> range:
        """Those that a value lies in."""
        begin = offset - self._begin
        return range(begin // BLOCK_BYTES, -(-(begin + size) // BLOCK_BYTES))

    def _has(self, offset: int, size: int) -> bool:
        return not any(block in self._missing for block in self._blocks(offset, size))
