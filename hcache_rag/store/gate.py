"""Transactions that come and go, and moments at which there must be none.

LMDB's map may be made larger or closed, and a process may fork, only between transactions.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Gate:
    """Who is inside, and who must be alone. Thread-safe."""

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
            self._own.count -= 1  # not what it was: generators may end in any order
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

    @property
    def is_used(self) -> bool:
        """Whether a transaction is open."""
        return self._inside > 0

    def shut(self, wait_s: float) -> None:
        """Let none but this thread's be open, if that comes true in time, and none begin."""
        own = getattr(self._own, "count", 0)
        with self._changed:
            self._changed.wait_for(lambda: not self._is_shut, wait_s)
            self._is_shut = True
            self._changed.wait_for(lambda: self._inside <= own, wait_s)

    def open(self) -> None:
        """Let them begin again."""
        with self._changed:
            self._is_shut = False
            self._changed.notify_all()

    def when_empty(self, action: Callable[[], None]) -> None:
        """Run `action` when the last transaction has ended, or now."""
        with self._changed:
            if self._inside:
                self._last = action
                return
        action()
