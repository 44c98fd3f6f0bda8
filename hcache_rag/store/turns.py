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
    """

    def __init__(self, folder: Path, *, read_only: bool) -> None:
        self._folder = folder
        self._data = folder / "data.mdb"
        self._file = LockFile.acquire(folder / FILE_NAME, read_only=read_only)
        self._is_closed = False
        self._joined: int | None = None

    def join(self, data: os.stat_result) -> bool:
        """Let others know that this process uses these data, and no others, until `close`.

        Returns:
            False where another one must be the only one, which it is in its turn.
        """
        if self._joined != data.st_ino:
            self.leave()
            if self._file.join(data.st_ino):
                self._joined = data.st_ino
        return self._joined is not None

    def leave(self) -> None:
        """Take `join` back."""
        if self._joined is not None:
            self._file.leave(self._joined)
            self._joined = None

    @property
    def can_be_alone(self) -> bool:
        """Whether it can be known here who else uses some data."""
        return self._file.can_be_alone

    def is_in_place(self) -> bool:
        """Whether others find the same file: it was not deleted, nor exchanged."""
        return self._file.is_in_place()

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
    def alone(self, data: os.stat_result) -> Iterator[None]:
        """In one's turn: be the only process that uses these data.

        Raises:
            StoreBusyError: another one has.
        """
        with self._file.alone(data.st_ino):
            yield

    def note(self, of: os.stat_result, *, is_synced: bool) -> None:
        """Write down what the data are like now, if they are in the file `of`. In one's turn."""
        line = self._line(of, is_synced=is_synced)
        try:
            if line is not None:
                os.pwrite(self._file.descriptor, line.encode(), 0)
        except OSError as error:  # the next one who opens the store checks its pages
            logger.warning("%s cannot be written: %s", self._folder / FILE_NAME, error)

    def forget(self) -> None:
        """Take the note back: what it says will not be true. In one's turn.

        Raises:
            StoreError: that cannot be written down.
        """
        if self._words():
            self._require_written(" " * (_NOTE_BYTES - 1) + "\n")

    def note_unsynced(self, of: os.stat_result) -> None:
        """Take back that everything is synced, before something is not.

        Raises:
            StoreError: that cannot be written down.
        """
        line = self._line(of, is_synced=False)
        if line is not None and self._words()[3:] == [_SYNCED]:
            self._require_written(line)

    def _require_written(self, line: str) -> None:
        try:
            os.pwrite(self._file.descriptor, line.encode(), 0)
            os.fsync(self._file.descriptor)
        except OSError as error:
            raise StoreError(f"{self._folder / FILE_NAME} cannot be written: {error}") from error

    def _line(self, of: os.stat_result, *, is_synced: bool) -> str | None:
        now = self._look()
        if not self._file.is_writable or now[2] != str(of.st_ino):
            return None
        since = _SYNCED if is_synced else _start_of_machine()
        return " ".join((*now, since)).ljust(_NOTE_BYTES - 1) + "\n"

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
            self.leave()
            self._file.release()


def _start_of_machine() -> str:
    """A random name of the machine's last start; one that never comes again where it has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return os.urandom(16).hex()
