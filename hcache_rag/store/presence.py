"""LMDB's own locks on `lock.mdb`, by which it knows who is there.

They are a process's, and end when it closes any descriptor of that file: a process that copies the
folder of its own open store loses them. Others would take its readers for dead then, and who opens
the store next would take itself for the first one, and make the table of readers anew.
"""

from __future__ import annotations

import os
import struct
import sys
from contextlib import suppress
from pathlib import Path

from hcache_rag.store.locks import lock_bytes

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows
    fcntl = None  # type: ignore[assignment]

_FIRST = 0
"""The byte that all who have the file open share; each has another one, at its process's id."""


def is_held(lock_file: Path) -> bool:
    """Whether somebody has a lock file open, as LMDB would see it. Not for one's own."""
    try:
        descriptor = os.open(lock_file, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        if sys.platform != "linux":  # pragma: no cover
            return True
        asked = lock_bytes(fcntl.F_WRLCK, _FIRST)
        kind = struct.unpack("h", fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, asked)[:2])[0]
        return bool(kind != fcntl.F_UNLCK)
    finally:
        os.close(descriptor)


class Presence:
    """This process's locks on a lock file that it has open. `close` after LMDB has closed it."""

    def __init__(self, lock_file: Path) -> None:
        self._descriptor = -1
        if fcntl is not None:
            with suppress(OSError):
                self._descriptor = os.open(lock_file, os.O_RDWR | os.O_CLOEXEC)

    def renew(self) -> None:
        """Take them again, where they were lost."""
        if self._descriptor >= 0:
            with suppress(OSError):
                fcntl.lockf(self._descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, _FIRST)
                fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, os.getpid())

    def close(self) -> None:
        """They end."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
