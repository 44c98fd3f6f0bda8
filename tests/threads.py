"""The library's threads that a test has started."""

from __future__ import annotations

import threading

_before: frozenset[threading.Thread] = frozenset()


def begin() -> None:
    """Forget the threads that are alive now: an earlier test may have left an idle pool."""
    global _before
    _before = frozenset(threading.enumerate())


def own_threads(name: str = "hcache-") -> list[str]:
    """Names of the threads that began with the test, whose names begin so, and that are alive."""
    begun = [thread for thread in threading.enumerate() if thread not in _before]
    return [thread.name for thread in begun if thread.name.startswith(name)]
