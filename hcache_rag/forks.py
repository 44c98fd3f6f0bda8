"""Locks that a fork does not inherit while another thread, which is not there, holds them."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from weakref import WeakSet

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows, where nothing is locked
    fcntl = None  # type: ignore[assignment]

_locks: WeakSet[ForkedLock] = WeakSet()
_descriptors: set[int] = set()
"""Of files whose lock this process holds, or waits for."""


class ForkedLock:
    """A `threading.Lock` that is free in a child process, whoever held it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        _locks.add(self)

    def __enter__(self) -> ForkedLock:
        self._lock.acquire()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lock.release()

    def renew(self) -> None:
        """Free it."""
        self._lock = threading.Lock()


@contextmanager
def locked_file(path: Path) -> Iterator[None]:
    """Hold the lock of a file, which is made where it is missing; others wait for it.

    Raises:
        OSError: the file can neither be opened nor made.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    _descriptors.add(descriptor)
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        if descriptor in _descriptors:  # not where a fork has come inside the block
            _descriptors.remove(descriptor)
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_UN)  # a fork may have the same open file
            os.close(descriptor)


def _renew_all() -> None:
    for lock in list(_locks):
        lock.renew()
    while _descriptors:
        os.close(_descriptors.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all)
