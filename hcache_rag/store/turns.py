"""Whose turn it is to write to a folder, and what its file was like after the last one's."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hcache_rag.errors import StoreError, StoreMovedError
from hcache_rag.store.locks import LockFile

FILE_NAME = "writer.lock"
_NOTE_BYTES = 128
_SYNCED = "synced"

logger = logging.getLogger("hcache_rag")


class Turns:
    """One writer at a time, of all threads and processes, by a lock on a file of its own.

    LMDB has such a lock too, but one that waits for ever. The file also holds a note: size, time
    and inode of the data after the last change, and whether it was synced, or else since which
    start of the machine it has been written to. Data that differ from the note were changed by
    something else: a copy that broke off, a disk that failed, a power cut.

    Args:
        folder: of the store.
        read_only: a folder that cannot be written will do; there are no turns to take then.

    Raises:
        StoreOpenError: the file cannot be made.
        StoreBusyError: somebody must be the only one to use the folder for too long.
    """

    def __init__(self, folder: Path, *, read_only: bool) -> None:
        self._folder = folder
        self._data = folder / "data.mdb"
        self._file = LockFile.acquire(folder / FILE_NAME, read_only=read_only)
        self._is_closed = False

    @contextmanager
    def taken(self, wait_s: float | None) -> Iterator[None]:
        """Be the only writer; where that is not to be, have none.

        Raises:
            StoreBusyError: somebody else writes for longer than `wait_s`.
            StoreMovedError: `close` was called before.
        """
        self._file.retain()
        try:
            with self._file.turn(wait_s):
                if self._is_closed:
                    raise StoreMovedError(f"{self._folder} was closed while this thread waited")
                yield
        finally:
            self._file.release()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """In one's turn: be the only process that has the folder open.

        Raises:
            StoreBusyError: another one has.
        """
        with self._file.alone():
            yield

    def note(self, of: os.stat_result, *, is_synced: bool) -> None:
        """Write down what the data are like now, if they are in the file `of`. In one's turn."""
        try:
            self._note(of, is_synced=is_synced)
        except OSError as error:  # the next one who opens the store checks its pages
            logger.warning("%s cannot be written: %s", self._folder / FILE_NAME, error)

    def note_unsynced(self, of: os.stat_result) -> None:
        """Take back that everything is synced, before something is not.

        Raises:
            StoreError: that cannot be written down.
        """
        if self._words()[3:] == [_SYNCED]:
            try:
                self._note(of, is_synced=False)
                os.fsync(self._file.descriptor)
            except OSError as error:
                raise StoreError(
                    f"{self._folder / FILE_NAME} cannot be written: {error}"
                ) from error

    def _note(self, of: os.stat_result, *, is_synced: bool) -> None:
        now = self._look()
        if self._file.is_writable and now[2] == str(of.st_ino):
            since = _SYNCED if is_synced else _start_of_machine()
            line = " ".join((*now, since)).ljust(_NOTE_BYTES - 1) + "\n"
            os.pwrite(self._file.descriptor, line.encode(), 0)

    def _words(self) -> list[str]:
        if self._file.descriptor < 0:
            return []
        try:
            note = os.pread(self._file.descriptor, _NOTE_BYTES, 0)
        except OSError:
            return []
        return note.decode(errors="replace").split()

    def is_noted(self) -> bool:
        """Whether the data are as they were after the last turn, or are not there yet."""
        size, time_ns, _ = self._look()
        words = self._words()
        if size == "0":
            return not words
        return words[:2] == [size, time_ns] and words[3:] in ([_SYNCED], [_start_of_machine()])

    def is_moved(self) -> bool:
        """Whether the data are in another file than after the last turn, as far as is known."""
        words = self._words()
        return len(words) == 4 and words[2] != self._look()[2]

    def _look(self) -> tuple[str, str, str]:
        """Size, time and inode of the data."""
        try:
            found = self._data.stat()
        except OSError:
            return "0", "0", "0"
        return str(found.st_size), str(found.st_mtime_ns), str(found.st_ino)

    def close(self) -> None:
        """Nobody takes turns any more here; who has one ends it first."""
        if not self._is_closed:
            self._is_closed = True
            self._file.release()


def _start_of_machine() -> str:
    """A random name of the machine's last start; one that never comes again where it has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return os.urandom(16).hex()
