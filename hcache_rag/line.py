"""Who computes next: first come, first served, so many at once."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hcache_rag.forks import ForkedLock


class Line:
    """A line in front of what only so many may do at once. Thread-safe.

    Nobody waits on a thread: who joins says what is to happen when its turn has come.
    """

    def __init__(self) -> None:
        self._lock = ForkedLock()
        self._waiting: deque[Place] = deque()
        self._inside = 0
        self._is_admitting = False
        self._pid = os.getpid()

    @contextmanager
    def turn(self, limit: int) -> Iterator[Place]:
        """Wait for a turn; it ends with the block, or before by `Place.leave`."""
        has_come = threading.Event()
        place = Place(self, limit, has_come.set)
        try:
            place.join()
            has_come.wait()
            yield place
        finally:
            place.leave()

    def _join(self, place: Place) -> None:
        with self._lock:
            if self._pid != os.getpid():  # who was inside is not there in a fork
                self._pid, self._inside, self._is_admitting = os.getpid(), 0, False
                self._waiting.clear()
            self._waiting.append(place)
        self._admit()

    def _admit(self) -> None:
        """Let in who may come in, on one thread at a time and never within itself."""
        is_first = True
        while (place := self._next(is_first)) is not None:
            is_first = False
            try:
                place.on_turn()
            except BaseException:
                self._is_admitting = False
                raise

    def _next(self, is_first: bool) -> Place | None:
        with self._lock:
            if is_first and self._is_admitting:
                return None  # who admits looks again
            self._is_admitting = bool(self._waiting) and self._inside < self._waiting[0].limit
            if not self._is_admitting:
                return None
            place = self._waiting.popleft()
            place.is_inside = True
            self._inside += 1
            return place

    def _leave(self, place: Place) -> None:
        with self._lock:
            if place.is_inside:
                place.is_inside = False
                self._inside -= 1
            elif place in self._waiting:
                self._waiting.remove(place)
        self._admit()

    def _give_up(self, place: Place) -> bool:
        with self._lock:
            is_waiting = place in self._waiting
            if is_waiting:
                self._waiting.remove(place)
        self._admit()  # who was behind it may have a higher limit
        return is_waiting


class Place:
    """A place in a `Line`.

    Args:
        limit: the turn comes when fewer than so many are inside, and nobody is in front.
        on_turn: called once, on some thread, perhaps by `join`; it does not raise.
    """

    def __init__(self, line: Line, limit: int, on_turn: Callable[[], None]) -> None:
        self._line = line
        self.limit = limit
        self.on_turn = on_turn
        self.is_inside = False

    def join(self) -> None:
        """Stand at the end of the line."""
        self._line._join(self)

    def leave(self) -> None:
        """End the turn, or the waiting for it."""
        self._line._leave(self)

    def give_up(self) -> bool:
        """Stop waiting; False where the turn has come already, which goes on then."""
        return self._line._give_up(self)
