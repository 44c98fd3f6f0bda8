"""Transactions that come and go, and moments at which there must be none.

LMDB's map may be made larger, exchanged or closed, and a process may fork, only between
transactions.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hcache_rag.errors import StoreError, StoreMovedError

logger = logging.getLogger("hcache_rag")


class Gate:
    """Who is inside, and who must be alone. Thread-safe."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside: Counter[int] = Counter()  # by thread
        self._is_shut = False
        self._is_closed = False
        self._last: Callable[[], None] | None = None

    @contextmanager
    def inside(self) -> Iterator[None]:
        """A transaction of this thread; it may end in another one.

        Raises:
            StoreMovedError: `close` was called before.
        """
        thread = threading.get_ident()
        with self._changed:
            self._changed.wait_for(lambda: self._inside[thread] or not self._is_shut)
            if self._is_closed and not self._inside[thread]:
                raise StoreMovedError("it was closed by another thread")
            self._inside[thread] += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside[thread] -= 1
                self._inside += Counter()  # without those that are zero
                self._changed.notify_all()
                last, self._last = (self._last, None) if not self._inside else (None, self._last)
            if last is not None:
                try:
                    last()
                except StoreError as error:
                    logger.error("%s", error)

    def alone(self, action: Callable[[], None]) -> bool:
        """Run `action` while no transaction is open; False where this thread has one itself."""
        with self._changed:
            if self._inside[threading.get_ident()]:
                return False
            self._changed.wait_for(lambda: not self._is_shut)
            self._is_shut = True
        try:
            with self._changed:
                self._changed.wait_for(lambda: not self._inside.total())
            action()
        finally:
            self.open()
        return True

    @property
    def is_used(self) -> bool:
        """Whether a transaction is open."""
        return self._inside.total() > 0

    def shut(self, wait_s: float) -> None:
        """Let none but this thread's be open, if that comes true in time, and none begin."""
        thread = threading.get_ident()
        with self._changed:
            self._changed.wait_for(lambda: not self._is_shut, wait_s)
            self._is_shut = True
            self._changed.wait_for(lambda: self._inside.total() <= self._inside[thread], wait_s)

    def open(self) -> None:
        """Let them begin again."""
        with self._changed:
            self._is_shut = False
            self._changed.notify_all()

    def open_again(self) -> bool:
        """Take `close` back; False where its action has begun."""
        with self._changed:
            is_in_time = self._last is not None
            self._is_closed = not is_in_time
            self._last = None
            return is_in_time

    def renew_lock(self) -> None:
        """In a fork: a thread that is not there may have held it."""
        self._changed = threading.Condition()

    def close(self, action: Callable[[], None]) -> None:
        """Let none begin any more; run `action` when the last one has ended, or now."""
        with self._changed:
            self._is_closed = True
            if self._inside.total():
                self._last = action
                return
        action()
