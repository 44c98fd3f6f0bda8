"""Locks on single bytes of a file, by which processes agree who writes and who is there at all."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hcache_rag.errors import StoreBusyError, StoreError, StoreMovedError, StoreOpenError

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows: LMDB's own lock is all there is
    fcntl = None  # type: ignore[assignment]

_TURN, _USERS = 0, 1
"""The bytes: held by who writes, and, shared, by each process that uses the file."""

USERS_WAIT_S = 60.0
"""How long a process waits until somebody who must be the only user has ended."""


class LockFile:
    """A file whose bytes are locked: one object per file and process. Use `acquire`. Thread-safe.

    Locks belong to processes, not to threads or descriptors, and end when a process closes any
    descriptor of the file. As long as somebody uses the object, its process is one of the users.

    Attributes:
        descriptor: of the file; -1 where it can neither be opened nor made.
        is_writable: whether the descriptor is.
    """

    _open: dict[tuple[int, int], LockFile] = {}  # noqa: RUF012 - the process-wide table itself
    _lock = threading.Lock()

    def __init__(self, path: Path, descriptor: int, *, is_writable: bool) -> None:
        self.path = path
        self.descriptor = descriptor
        self.is_writable = is_writable
        self._pid = os.getpid()
        self._users = 1
        self._thread = threading.Lock()

    @classmethod
    def acquire(cls, path: Path, *, read_only: bool) -> LockFile:
        """The lock file at a path, made where it is missing and may be.

        Args:
            read_only: one that cannot be written, or is not there, will do.

        Raises:
            StoreOpenError: it cannot be made.
            StoreBusyError: somebody must be alone for longer than `USERS_WAIT_S`.
        """
        with cls._lock:
            known = cls._open.get(_identity(path))
            if known is not None:
                if not (read_only or known.is_writable):
                    raise StoreOpenError(f"{path.parent} is open in this process, read-only")
                known._users += 1
                return known
            descriptor, is_writable = _opened(path, read_only=read_only)
            made = cls(path, descriptor, is_writable=is_writable)
            if descriptor >= 0:
                try:
                    made._wait(_USERS, "LOCK_SH", USERS_WAIT_S, "must be the only one to use")
                except BaseException:
                    os.close(descriptor)
                    raise
                cls._open[_identity(path)] = made
            return made

    def retain(self) -> None:
        """Count one user more.

        Raises:
            StoreMovedError: the last one has ended.
        """
        with self._lock:
            if not self._users:
                raise StoreMovedError(f"{self.path.parent} was closed while this thread waited")
            self._users += 1

    def release(self) -> None:
        """Count one user less; the last one closes."""
        with self._lock:
            self._users -= 1
            if self._users or self._pid != os.getpid() or self.descriptor < 0:
                return
            for identity in [i for i, file in self._open.items() if file is self]:
                del self._open[identity]
            os.close(self.descriptor)

    @contextmanager
    def turn(self, wait_s: float | None) -> Iterator[None]:
        """Be the only writer; where the file cannot be written, have none meanwhile.

        Raises:
            StoreBusyError: somebody else is it for longer than `wait_s`.
        """
        if not self._thread.acquire(timeout=-1 if wait_s is None else wait_s):
            raise StoreBusyError(
                f"another thread still writes to {self.path.parent} after {wait_s} s"
            )
        try:
            self._wait(
                _TURN, "LOCK_EX" if self.is_writable else "LOCK_SH", wait_s, "still writes to"
            )
            try:
                yield
            finally:
                self._unlock(_TURN)
        finally:
            self._thread.release()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Be the only process that uses the file; others wait before they begin to.

        Raises:
            StoreBusyError: there is another one.
        """
        if fcntl is None or not self.is_writable:
            raise StoreBusyError(f"others may use {self.path.parent}: that cannot be known here")
        try:
            fcntl.lockf(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _USERS)
        except BlockingIOError as error:
            raise StoreBusyError(f"another process has {self.path.parent} open") from error
        try:
            yield
        finally:
            if self._pid == os.getpid():
                fcntl.lockf(self.descriptor, fcntl.LOCK_SH, 1, _USERS)

    def _wait(self, byte: int, kind: str, wait_s: float | None, doing: str) -> None:
        if fcntl is None or self.descriptor < 0:
            return
        flags = getattr(fcntl, kind)
        deadline = None if wait_s is None else time.monotonic() + wait_s
        pause_s = 0.001
        while True:
            try:
                now = flags if deadline is None else flags | fcntl.LOCK_NB
                fcntl.lockf(self.descriptor, now, 1, byte)
                return
            except BlockingIOError as error:
                if deadline is None or time.monotonic() >= deadline:
                    raise StoreBusyError(
                        f"another process {doing} {self.path.parent} after {wait_s} s"
                    ) from error
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, 0.05)
            except OSError as error:
                raise StoreError(f"{self.path.parent} cannot be locked: {error}") from error

    def _unlock(self, byte: int) -> None:
        if fcntl is not None and self.descriptor >= 0 and self._pid == os.getpid():
            fcntl.lockf(self.descriptor, fcntl.LOCK_UN, 1, byte)


def _identity(path: Path) -> tuple[int, int]:
    try:
        found = os.stat(path)
    except OSError:
        return (0, 0)
    return found.st_dev, found.st_ino


def _opened(path: Path, *, read_only: bool) -> tuple[int, bool]:
    """A descriptor, and whether it can be written to."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), True
    except OSError as error:
        if not read_only:
            raise StoreOpenError(f"{path.parent} cannot be locked: {error.strerror}") from error
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC), False
    except OSError:
        return -1, False


def _before_fork() -> None:
    LockFile._lock.acquire()


def _after_fork_in_parent() -> None:
    LockFile._lock.release()


def _after_fork_in_child() -> None:
    """The locks are the parent's, and stay with it."""
    for file in LockFile._open.values():
        os.close(file.descriptor)
        file.descriptor = -1
    LockFile._open, LockFile._lock = {}, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )
