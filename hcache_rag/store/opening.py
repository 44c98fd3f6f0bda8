"""A store's file as a process has it open: checked, opened beside others, and closed."""

from __future__ import annotations

import logging
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from hcache_rag.errors import (
    DamagedStoreError,
    StoreBusyError,
    StoreError,
    StoreMovedError,
    StoreOpenError,
)
from hcache_rag.store import pages
from hcache_rag.store.backend import Durability
from hcache_rag.store.environment import Environment
from hcache_rag.store.files import DATA_FILE, LOCK_FILE, OpenFiles, found
from hcache_rag.store.presence import is_held
from hcache_rag.store.shared import Shared
from hcache_rag.store.turns import Turns

logger = logging.getLogger("hcache_rag")

ALONE_WAIT_S = 10.0
"""How long, in seconds, who changes the file or its map waits for those that read."""

LOCKS_WAIT_S = 1.0
"""How long, in seconds, another process may be there without LMDB's locks: it is about to open."""

COMPACT_FILE = "data.mdb.compact"
"""What takes the place of `data.mdb` when it is whole."""

S = TypeVar("S", bound="OpenStore")


class OpenStore(Shared):
    """A folder's environment: the same as other processes have open. Use `acquire`."""

    _env: Environment

    def __init__(
        self,
        folder: Path,
        *,
        read_only: bool,
        durability: Durability,
        wait_s: float | None,
        before: OpenStore | None = None,
    ) -> None:
        super().__init__(folder)
        self.is_read_only = read_only
        self.durability = durability
        # A folder that cannot be written has no writer that readers could be in the way of, and no
        # room for their table.
        self._is_seen = not read_only or os.access(folder, os.W_OK)
        self._files = OpenFiles(folder)
        self._turns = Turns(folder, read_only=read_only)
        try:
            if not (read_only and self._is_opened_beside_writers()):
                with self._turns.taken(wait_s):
                    self._open_in_turn(before)
        except BaseException:
            self._all.discard(self)
            self._turns.close()
            raise

    def _is_opened_beside_writers(self) -> bool:
        """Open the file without waiting for one's turn, if it is known and stays in its place."""
        if not self._turns.is_noted() or self._turns.is_moved():
            return False
        self._files.see()
        if self._files.data is None or self._files.lock is None:
            return False
        if self._is_seen and not (
            self._is_held(self.path / LOCK_FILE) and self._turns.join(self._files.data)
        ):
            return False
        self._open_environment()
        if self.is_current():
            return True
        self._env.close()
        self._turns.leave()
        return False

    def _open_in_turn(self, before: OpenStore | None) -> None:
        """Open the file, checked; another one of this name may be open `before`."""
        if before is not None and before.is_current():
            raise StoreMovedError(f"{self.path} is again what it was before")
        is_noted, is_moved = self._turns.is_noted(), self._turns.is_moved()
        if before is not None and before._files.has_lock() and not before._files.has_data():
            is_moved = True
        if not is_noted:
            self._check_pages()
        try:
            if os.access(self.path, os.W_OK):
                self._clear_away(is_moved=is_moved)
        except OSError as error:
            raise StoreOpenError(f"{self.path} cannot be opened: {error}") from error
        then = found(self._data)
        self._open_environment()
        self._files.see()
        if not (then is None or os.path.samestat(then, self._seen)) or not self.is_current():
            self._env.close()
            raise StoreMovedError(f"another file has taken the place of {self.path}")
        self._join()
        if is_moved or not is_noted:
            self._turns.note(self._seen, is_synced=False)

    def _join(self) -> None:
        if self._is_seen and not self._turns.join(self._seen):
            raise StoreBusyError(f"another process must be the only one to use {self.path}")

    def _clear_away(self, *, is_moved: bool) -> None:
        """What was left behind, and readers of another file."""
        (self.path / COMPACT_FILE).unlink(missing_ok=True)
        lock = self.path / LOCK_FILE
        if is_moved:  # who has the other file open keeps its readers' table
            self._turns.forget()  # or else the next one would take this one's
            lock.unlink(missing_ok=True)
            return
        deadline = time.monotonic() + LOCKS_WAIT_S
        data = found(self._data)
        while data is not None and self._turns.can_be_alone and not self._is_held(lock):
            try:
                with self._turns.alone(data):
                    return
            except StoreBusyError as error:
                if time.monotonic() >= deadline:
                    raise StoreBusyError(
                        f"another process has {self.path} open, but its {LOCK_FILE} was deleted or "
                        "copied there: it must use the store again, or close it"
                    ) from error
            time.sleep(0.01)

    def _is_held(self, lock: Path) -> bool:
        """Whether somebody has LMDB's lock file open; this process perhaps by another name."""
        others = [each for each in self._all if isinstance(each, OpenStore) and each is not self]
        return any(each._files.lock_is(lock) for each in others) or is_held(lock)

    def _open_environment(self) -> None:
        """No fork comes in between."""
        self._gate.alone(lambda: setattr(self, "_env", self._environment()), ALONE_WAIT_S)

    def _environment(self) -> Environment:
        return Environment(
            self.path,
            read_only=self.is_read_only,
            durability=self.durability,
            has_readers_table=self._is_seen,
        )

    @property
    def _data(self) -> Path:
        return self.path / DATA_FILE

    @property
    def _seen(self) -> os.stat_result:
        if self._files.data is None:
            raise StoreMovedError(f"the file of {self.path} is gone")
        return self._files.data

    def _check_pages(self) -> None:
        """Something else than a writer has changed the file: LMDB must not be given any file.

        Raises:
            DamagedStoreError: it has pages that LMDB cannot be trusted with.
        """
        logger.info("%s is checked, since it was changed by something else", self.path)
        try:
            problems = pages.problems(self._data)
        except OSError as error:
            raise StoreOpenError(f"{self.path} cannot be read: {error.strerror}") from error
        if problems:
            raise DamagedStoreError(self.path, problems)

    @classmethod
    def acquire(
        cls: type[S],
        folder: Path,
        *,
        read_only: bool,
        durability: Durability,
        wait_s: float | None = None,
    ) -> S:
        """The environment in a folder, opened if this process has not opened it yet.

        Args:
            wait_s: for somebody who writes while it must be looked at, or made, in seconds.

        Raises:
            StoreOpenError: it cannot be opened, or is open in this process in another way.
            StoreBusyError: somebody else still writes after `wait_s`.
        """

        def make(before: S | None) -> S:
            if before is not None:
                before._make_way()
            return cls(
                folder,
                read_only=read_only,
                durability=durability,
                wait_s=wait_s,
                before=before,
            )

        backend = cls.share(folder, make, wait_s)
        try:
            if backend.is_read_only and not read_only:
                raise StoreOpenError(f"{folder} is already open in this process, read-only")
            if not read_only and backend.durability != durability:
                raise StoreOpenError(
                    f"{folder} is already open in this process with durability="
                    f"{backend.durability!r}, not {durability!r}"
                )
        except StoreOpenError:
            backend.close()
            raise
        return backend

    def is_current(self) -> bool:
        return self._files.are_in_place() and self._turns.is_in_place()

    def _make_way(self) -> None:
        """Nobody may read what is opened anew because its lock files were deleted."""
        if self._files.has_data():
            with suppress(StoreMovedError):  # it is closed
                if self._gate.alone(self._close, ALONE_WAIT_S, closes=True):
                    self._files.forget()
                    self._all.discard(self)
                else:
                    raise StoreBusyError(
                        f"the lock files of {self.path} were deleted while this thread reads"
                    )

    def _close(self) -> None:
        try:
            if not self.is_read_only and self._env.is_open:
                self._env.sync()
                with suppress(StoreError), self._turns.taken(0.0):
                    self._note_sync()
        finally:
            self._env.close()
            self._turns.close()

    def _let_go(self) -> None:
        if hasattr(self, "_env"):
            self._env.close()

    def _note_sync(self) -> None:
        """Vouch for the file, if nothing else has changed it."""
        if self.is_current() and self._turns.is_noted():
            self._turns.note(self._seen, is_synced=True)

    def _require_current(self) -> None:
        if not self.is_current():
            raise StoreMovedError(f"another file has taken the place of {self.path}")
