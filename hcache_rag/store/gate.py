"""Transactions that come and go, and moments at which there must be none.

LMDB's map may be made larger, exchanged or closed, and a process may fork, only between
transactions.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hcache_rag.errors import StoreBusyError, StoreMovedError
from hcache_rag.store.process import LOCK

HOLD_S = 0.1
"""So long, in seconds, none may begin while who must be alone waits for those that are open; then
they may, for a while that doubles each time."""


class Gate:
    """Who is inside, and who must be alone. Thread-safe.

    Attributes:
        is_closed: none may begin any more.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition(LOCK)
        self._inside: dict[object, int] = {}  # the thread of each transaction
        self._is_shut = False
        self.is_closed = False

    @contextmanager
    def inside(self) -> Iterator[None]:
        """A transaction of this thread; it may end in another one.

        Raises:
            StoreMovedError: `close` was called before.
        """
        transaction = object()
        with self._changed:
            self._changed.wait_for(lambda: self.is_used_here or self.is_closed or not self._is_shut)
            if self.is_closed:
                raise StoreMovedError("it was closed by another thread")
            self._inside[transaction] = threading.get_ident()
        try:
            yield
        finally:
            with self._changed:
                del self._inside[transaction]
                self._changed.notify_all()

    def alone(self, action: Callable[[], None], wait_s: float, *, closes: bool = False) -> bool:
        """Run `action` while no transaction is open; False where this thread has one itself.

        Args:
            closes: none may begin afterwards.

        Raises:
            StoreBusyError: other threads have some for longer than `wait_s`.
            StoreMovedError: `close` was called before.
        """
        if self.is_used_here:
            return False
        if not self.shut(wait_s):
            raise StoreBusyError(f"other threads still read after {wait_s} s")
        try:
            if self.is_closed:
                raise StoreMovedError("it was closed by another thread")
            self.is_closed = closes
            action()
        finally:
            self.open()
        return True

    def shut(self, wait_s: float) -> bool:
        """Let none but this thread's transactions be open, and none begin, until `open`.

        Returns:
            False, and all is as before, where others are open for longer than `wait_s`.
        """
        deadline, pause_s = time.monotonic() + wait_s, HOLD_S
        with self._changed:
            while not self._hold(min(HOLD_S, wait_s)):
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    return False
                self._changed.wait_for(lambda: not self.is_used, min(pause_s, left_s))
                pause_s *= 2
        return True

    def _hold(self, wait_s: float) -> bool:
        """`shut`, while none may begin."""
        if not self._changed.wait_for(lambda: not self._is_shut, wait_s):
            return False
        self._is_shut = True
        is_alone = False
        try:
            is_alone = self._changed.wait_for(self._has_no_others, wait_s)
        finally:
            if not is_alone:
                self.open()
        return is_alone

    def _has_no_others(self) -> bool:
        threads = list(self._inside.values())
        return threads.count(threading.get_ident()) == len(threads)

    def open(self) -> None:
        """Let them begin again."""
        with self._changed:
            self._is_shut = False
            self._changed.notify_all()

    @property
    def is_used(self) -> bool:
        """Whether a transaction is open, or somebody is alone."""
        return bool(self._inside) or self._is_shut

    @property
    def is_used_here(self) -> bool:
        """Whether this thread has a transaction."""
        return threading.get_ident() in list(self._inside.values())

    def close(self) -> bool:
        """Shut it, and let none begin any more; False, and all is as before, where it is used."""
        with self._changed:
            if self.is_used or self.is_closed:
                return False
            self._is_shut = self.is_closed = True
            self._changed.notify_all()
            return True
