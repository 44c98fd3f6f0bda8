"""What is known of a link: how fast bytes come over it, and whether they come at all.

The rate is that of the last seconds in which something was on its way, whatever came side by side.
After a failure nobody asks for a while, so that a question does not wait for what will not come;
the while doubles with each failure, and ends with the first answer.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from hcache_rag.profile import ReadRate

MEMORY_S = 2.0
"""Of so many busy seconds half is forgotten."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0


class Link:
    """One link, as those see it who ask for something over it. Thread-safe.

    Args:
        now: a clock that never goes back, in seconds.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._lock = threading.Lock()
        self._asked = 0
        self._since = 0.0
        self._busy_s = 0.0
        self._bytes = 0.0
        self._pause_s = 0.0
        self._down_until = 0.0

    def begin(self) -> None:
        """Something is asked for."""
        with self._lock:
            if not self._asked:
                self._since = self._now()
            self._asked += 1

    def end(self, num_bytes: int) -> None:
        """So much has come of it."""
        with self._lock:
            now = self._now()
            self._busy_s += now - self._since
            self._since = now
            self._asked -= 1
            self._bytes += num_bytes
            if num_bytes:
                self._pause_s = self._down_until = 0.0
            if self._busy_s > MEMORY_S:
                self._busy_s, self._bytes = self._busy_s / 2, self._bytes / 2

    def left(self) -> None:
        """It was given up by who asked: nothing is seen by that."""
        with self._lock:
            self._since = self._now()
            self._asked -= 1

    def failed(self) -> None:
        """It does not come: nothing else is asked for, for a while."""
        with self._lock:
            now = self._now()
            if now >= self._down_until:
                self._pause_s = min(max(FIRST_PAUSE_S, 2 * self._pause_s), LONGEST_PAUSE_S)
                self._down_until = now + self._pause_s

    @property
    def is_down(self) -> bool:
        """Whether nothing is to be asked for now."""
        with self._lock:
            return self._now() < self._down_until

    @property
    def rate(self) -> ReadRate | None:
        """How fast bytes come; None where none have come yet."""
        with self._lock:
            if not self._bytes:
                return None
            return ReadRate(self._bytes / max(self._busy_s, 1e-6))
