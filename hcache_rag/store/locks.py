"""Locks on single bytes of a file, by which processes agree who writes and who is there at all."""

from __future__ import annotations

import errno
import os
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hcache_rag.errors import StoreBusyError, StoreError, StoreMovedError, StoreOpenError
from hcache_rag.store.process import LOCK

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows: LMDB's own lock is all there is
    fcntl = None  # type: ignore[assignment]

_TURN = 0
"""The byte that is held by who writes."""

_HAS_OWNED_LOCKS = sys.platform == "linux"
"""Locks of an open file. Elsewhere they are a process's, and end with any descriptor."""


class LockFile:
    """A file whose bytes are locked: one object per file and process. Use `acquire`. Thread-safe.

    Attributes:
        descriptor: of the file; -1 where it can neither be opened nor made.
        is_writable: whether the descriptor is.
    """

    _open: dict[tuple[int, int], LockFile] = {}  # noqa: RUF012 - the process-wide table itself

    def __init__(self, path: Path, descriptor: int, *, is_writable: bool) -> None:
        self.path = path
        self.descriptor = descriptor
        self.is_writable = is_writable
        self._identity = _identity(os.fstat(descriptor)) if descriptor >= 0 else None
        self._pid = os.getpid()
        self._holders = 1
        self._joined: Counter[int] = Counter()  # by inode
        self._alone: int | None = None
        self._has_owned_locks = _HAS_OWNED_LOCKS
        self._thread = threading.Lock()

    @classmethod
    def acquire(cls, path: Path, *, read_only: bool) -> LockFile:
        """The lock file at a path, made where it is missing and may be.

        Args:
            read_only: one that cannot be written, or is not there, will do.

        Raises:
            StoreOpenError: it cannot be made.
        """
        with LOCK:
            found = _found(path)
            known = cls._open.get(found) if found is not None else None
            if known is None:
                descriptor, is_writable = _opened(path, read_only=read_only)
                known = cls(path, descriptor, is_writable=is_writable)
                if known._identity is not None:
                    cls._open[known._identity] = known
                return known
            if not (read_only or known.is_writable):
                raise StoreOpenError(f"{path.parent} is open in this process, read-only")
            known._holders += 1
            return known

    def retain(self) -> None:
        """Count one holder more.

        Raises:
            StoreMovedError: the last one has ended.
        """
        with LOCK:
            if not self._holders:
                raise StoreMovedError(f"{self.path.parent} was closed while this thread waited")
            self._holders += 1

    def release(self) -> None:
        """Count one holder less; the last one closes."""
        with LOCK:
            self._holders -= 1
            if self._holders or not self._is_mine:
                return
            if self._identity is not None and self._open.get(self._identity) is self:
                del self._open[self._identity]
            for byte in (_TURN, *map(_user, self._joined)):
                self._unlock(byte)  # a fork that knows nothing of this may have the file open
            os.close(self.descriptor)

    @property
    def _is_mine(self) -> bool:
        return self.descriptor >= 0 and self._pid == os.getpid()

    def is_in_place(self) -> bool:
        """Whether this is the file at its path: it may have been deleted, and made anew."""
        return self._identity is None or _found(self.path) == self._identity

    def join(self, inode: int) -> bool:
        """Let this process be a user of some data; False where another one must be the only one.

        Args:
            inode: of the data, which others may have exchanged.
        """
        with LOCK:
            if self._alone == inode:
                return False
            is_locked = self._joined[inode] > 0 or not self._is_mine
            if not (is_locked or self._lock(_user(inode), is_shared=True)):
                return False
            self._joined[inode] += 1
            return True

    def leave(self, inode: int) -> None:
        """Take `join` back."""
        with LOCK:
            self._joined[inode] -= 1
            if not self._joined[inode] and self._is_mine:
                self._unlock(_user(inode))

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
            self._wait_for_turn(wait_s)
            try:
                yield
            finally:
                if self._is_mine:
                    self._unlock(_TURN)
        finally:
            self._thread.release()

    def _wait_for_turn(self, wait_s: float | None) -> None:
        deadline = None if wait_s is None else time.monotonic() + wait_s
        pause_s = 0.001
        while self._is_mine:
            try:
                if self._lock(_TURN, is_shared=not self.is_writable, waits=deadline is None):
                    return
            except OSError as error:
                raise StoreError(f"{self.path.parent} cannot be locked: {error}") from error
            if deadline is not None and time.monotonic() >= deadline:
                raise StoreBusyError(
                    f"another process still writes to {self.path.parent} after {wait_s} s"
                )
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.05)

    @property
    def can_be_alone(self) -> bool:
        """Whether it can be known here who else uses some data."""
        return fcntl is not None and self.is_writable

    @contextmanager
    def alone(self, inode: int) -> Iterator[None]:
        """In one's turn: be the only process that uses some data.

        Raises:
            StoreBusyError: there is another one.
        """
        if not self.can_be_alone:
            raise StoreBusyError(f"others may use {self.path.parent}: that cannot be known here")
        with LOCK:
            if not self._lock(_user(inode), is_shared=False):
                raise StoreBusyError(f"another process has {self.path.parent} open")
            self._alone = inode
        try:
            yield
        finally:
            with LOCK:
                self._alone = None
                if self._is_mine and self._joined[inode]:
                    self._lock(_user(inode), is_shared=True)
                elif self._is_mine:
                    self._unlock(_user(inode))

    def _lock(self, byte: int, *, is_shared: bool, waits: bool = False) -> bool:
        """False where another process has it; `waits` for that where the system can."""
        if fcntl is None:
            return True
        try:
            if self._has_owned_locks:
                command = fcntl.F_OFD_SETLKW if waits else fcntl.F_OFD_SETLK
                kind = fcntl.F_RDLCK if is_shared else fcntl.F_WRLCK
                fcntl.fcntl(self.descriptor, command, lock_bytes(kind, byte))
            else:
                # Never waiting: with two processes and two files, the system sees a deadlock.
                kind = fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX
                fcntl.lockf(self.descriptor, kind | fcntl.LOCK_NB, 1, byte)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            if error.errno == errno.EINVAL and self._has_owned_locks:  # not every file system
                self._has_owned_locks = False
                return self._lock(byte, is_shared=is_shared)
            raise
        return True

    def _unlock(self, byte: int) -> None:
        if fcntl is None:
            return
        if self._has_owned_locks:
            fcntl.fcntl(self.descriptor, fcntl.F_OFD_SETLK, lock_bytes(fcntl.F_UNLCK, byte))
        else:
            fcntl.lockf(self.descriptor, fcntl.LOCK_UN, 1, byte)


def _user(inode: int) -> int:
    """The byte that is shared by all processes that use some data."""
    return 1 + inode % (1 << 62)


def lock_bytes(kind: int, byte: int) -> bytes:
    """A `struct flock` of Linux for one byte of a file."""
    return struct.pack("hhqqi0q", kind, os.SEEK_SET, byte, 1, 0)


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _found(path: Path) -> tuple[int, int] | None:
    try:
        return _identity(os.stat(path))
    except OSError:
        return None


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


def _after_fork_in_child() -> None:
    """The locks are the parent's, and stay with it."""
    for file in LockFile._open.values():
        os.close(file.descriptor)
        file.descriptor = -1
    LockFile._open = {}


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
