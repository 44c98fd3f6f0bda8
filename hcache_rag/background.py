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
        most: so many things may wait; None is as many as there are.
        failure: what is logged with an error.
    """

    def __init__(
        self, name: str, *, most: int | None = None, failure: str = "work in the background failed"
    ) -> None:
        self._name = name
        self._most = most
        self._failure = failure
        self._is_closed = False
        self._lock = ForkedLock()
        self._start()

    def _start(self) -> None:
        self._pid = os.getpid()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=self._name)
        self._waiting: dict[Future[None], str] = {}

    def submit(self, work: Callable[[], object], about: str = "") -> bool:
        """Do it later; False where this is closed, or too much is waiting. Its errors are logged.

        Args:
            about: a text to know it by, see `wait_for`.
        """

        def run() -> None:
            try:
                work()
            except Exception:  # nobody is there to be told
                logger.exception(self._failure)

        with self._lock:
            self._follow_fork()
            if self._is_closed or (self._most is not None and len(self._waiting) >= self._most):
                return False
            future = self._pool.submit(run)
            self._waiting[future] = about
        future.add_done_callback(self._done)
        return True

    def _done(self, future: Future[None]) -> None:
        with self._lock:
            self._waiting.pop(future, None)

    def _follow_fork(self) -> None:
        if self._pid != os.getpid():
            self._start()

    def wait_for(self, is_wanted: Callable[[str], bool], wait_s: float | None = None) -> None:
        """Wait, for so long at most, until what is about such texts is done."""
        with self._lock:
            self._follow_fork()
            waiting = [future for future, about in self._waiting.items() if is_wanted(about)]
        wait(waiting, wait_s)

    def flush(self) -> None:
        """Wait until all is done that was waiting."""
        self.wait_for(lambda _: True)

    def close(self) -> None:
        """Take no more, and wait until all is done. Closing twice does nothing."""
        with self._lock:
            self._follow_fork()
            self._is_closed = True
            pool = self._pool
        pool.shutdown()
