"""Whose turn it is to write to a folder, and what its file was like after the last one's."""

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

FILE_NAME = "writer.lock"
_NOTE_BYTES = 128
_SYNCED = "synced"


class Turns:
    """One writer at a time, of all threads and processes, by a lock on a file of its own.

    LMDB has such a lock too, but one that waits for ever. The file also holds a note: size and time
    of the data's last change, and whether it was synced, or else since which start of the machine
    it has been written to. Data that differ from the note were changed by something else: a copy
    that broke off, a disk that failed, a power cut.

    Args:
        folder: of the store.
        read_only: turns are waited for but never taken; without a file there are no writers.
    """

    def __init__(self, folder: Path, *, read_only: bool) -> None:
        self._folder = folder
        self._data = folder / "data.mdb"
        self._thread = threading.Lock()
        self._is_read_only = read_only
        self._is_closed = False
        flags = os.O_RDONLY if read_only else os.O_RDWR | os.O_CREAT
        try:
            self._descriptor = os.open(folder / FILE_NAME, flags | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if not read_only:
                raise StoreOpenError(f"{folder} cannot be locked: {error.strerror}") from error
            self._descriptor = -1

    @contextmanager
    def taken(self, wait_s: float | None) -> Iterator[None]:
        """Be the only writer; where that is not to be, have none.

        Raises:
            StoreBusyError: somebody else writes for longer than `wait_s`.
        """
        deadline = None if wait_s is None else time.monotonic() + wait_s
        if not self._thread.acquire(timeout=-1 if wait_s is None else wait_s):
            raise StoreBusyError(f"another thread still writes to {self._folder} after {wait_s} s")
        try:
            if self._is_closed:
                raise StoreMovedError(f"{self._folder} was closed while this thread waited")
            self._lock(deadline, wait_s)
            try:
                yield
            finally:
                if fcntl is not None and self._descriptor >= 0:
                    fcntl.lockf(self._descriptor, fcntl.LOCK_UN)
        finally:
            self._thread.release()
            if self._is_closed:  # meanwhile
                self.close()

    def _lock(self, deadline: float | None, wait_s: float | None) -> None:
        if fcntl is None or self._descriptor < 0:
            return
        kind = fcntl.LOCK_SH if self._is_read_only else fcntl.LOCK_EX
        pause_s = 0.001
        while True:
            try:
                fcntl.lockf(self._descriptor, kind if deadline is None else kind | fcntl.LOCK_NB)
                return
            except BlockingIOError as error:
                if deadline is None or time.monotonic() >= deadline:
                    raise StoreBusyError(
                        f"another process still writes to {self._folder} after {wait_s} s"
                    ) from error
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, 0.05)
            except OSError as error:
                raise StoreError(f"{self._folder} cannot be locked: {error.strerror}") from error

    def note(self, *, is_synced: bool) -> None:
        """Write down what the data are like now. In one's turn."""
        if self._is_read_only:
            return
        since = _SYNCED if is_synced else _start_of_machine()
        line = f"{self._size_and_time()} {since}".ljust(_NOTE_BYTES - 1) + "\n"
        os.pwrite(self._descriptor, line.encode(), 0)

    def note_unsynced(self) -> None:
        """Take back that everything is synced, before something is not."""
        if self._words()[2:] == [_SYNCED]:
            self.note(is_synced=False)
            os.fsync(self._descriptor)

    def _words(self) -> list[str]:
        if self._descriptor < 0:
            return []
        return os.pread(self._descriptor, _NOTE_BYTES, 0).decode(errors="replace").split()

    def is_noted(self) -> bool:
        """Whether the data are as they were after the last turn, or are not there yet."""
        size_and_time = self._size_and_time()
        words = self._words()
        if size_and_time.startswith("0 "):
            return not words
        known, since = " ".join(words[:2]), "".join(words[2:])
        return known == size_and_time and since in (_SYNCED, _start_of_machine())

    def _size_and_time(self) -> str:
        try:
            found = self._data.stat()
        except OSError:
            return "0 0"
        return f"{found.st_size} {found.st_mtime_ns}"

    def close(self) -> None:
        """Nobody takes turns any more here; who has one ends it first."""
        self._is_closed = True
        if self._thread.acquire(blocking=False):
            try:
                if self._descriptor >= 0:
                    os.close(self._descriptor)
                    self._descriptor = -1
            finally:
                self._thread.release()


def _start_of_machine() -> str:
    """A random name of the machine's last start; one that never comes again where it has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return os.urandom(16).hex()
