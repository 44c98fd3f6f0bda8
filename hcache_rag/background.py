"""One thread for what can wait."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

from hcache_rag.forks import ForkedLock

logger = logging.getLogger("hcache_rag")


class Background:
    """Does one thing after another on a thread of its own, made when it is needed. Thread-safe.

    In a process that was forked, what was waiting is forgotten: the parent does it.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._is_closed = False
        self._lock = ForkedLock()
        self._start()

    def _start(self) -> None:
        self._pid = os.getpid()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=self._name)
        self._waiting: set[Future[None]] = set()

    def submit(self, work: Callable[[], object]) -> bool:
        """Do it later; False where this is closed. Its errors are logged."""

        def run() -> None:
            try:
                work()
            except Exception:  # nobody is there to be told
                logger.exception("%s failed", self._name)

        with self._lock:
            self._follow_fork()
            if self._is_closed:
                return False
            future = self._pool.submit(run)
            self._waiting.add(future)
        future.add_done_callback(self._done)
        return True

    def _done(self, future: Future[None]) -> None:
        with self._lock:
            self._waiting.discard(future)

    def _follow_fork(self) -> None:
        if self._pid != os.getpid():
            self._start()

    def flush(self) -> None:
        """Wait until all is done that was waiting."""
        with self._lock:
            self._follow_fork()
            waiting = list(self._waiting)
        wait(waiting)

    def close(self) -> None:
        """Take no more, and wait until all is done. Closing twice does nothing."""
        with self._lock:
            self._follow_fork()
            self._is_closed = True
            pool = self._pool
        pool.shutdown()
