"""The backend on disk: one LMDB environment per path and process."""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

from hcache_rag.errors import (
    DamagedStoreError,
    StoreBusyError,
    StoreError,
    StoreFullError,
    StoreMovedError,
    StoreOpenError,
)
from hcache_rag.store import environment, pages
from hcache_rag.store.backend import Durability, Pins
from hcache_rag.store.environment import Environment, LmdbTransaction
from hcache_rag.store.files import DATA_FILE, LOCK_FILE, OpenFiles, found
from hcache_rag.store.presence import is_held
from hcache_rag.store.shared import Shared
from hcache_rag.store.turns import Turns

logger = logging.getLogger("hcache_rag")

RESERVE_BYTES = 1 << 22
"""So much room is left to a store that is filled beyond its limit: nothing can be deleted in none.
"""

ALONE_WAIT_S = 10.0
"""How long, in seconds, who changes the file or its map waits for those that read."""

LIMIT_WAIT_S = 1.0
"""The same of who sets a limit, which can be set later."""

LOCKS_WAIT_S = 1.0
"""How long, in seconds, another process may be there without LMDB's locks: it is about to open."""

COMPACT_FILE = "data.mdb.compact"
"""What takes the place of `data.mdb` when it is whole."""


class LmdbBackend(Shared):
    """See `hcache_rag.store.backend.Backend`.

    LMDB forbids to open a path twice in a process: use `acquire`, which counts the users.
    """

    _env: Environment

    def __init__(
        self,
        folder: Path,
        *,
        read_only: bool,
        durability: Durability,
        wait_s: float | None,
        before: LmdbBackend | None = None,
    ) -> None:
        super().__init__(folder)
        self.is_read_only = read_only
        self.pins = Pins()
        self.durability = durability
        # A folder that cannot be written has no writer that readers could be in the way of, and no
        # room for their table.
        self._is_seen = not read_only or os.access(folder, os.W_OK)
        self._files = OpenFiles(folder)
        self._max_bytes: int | None = None
        self._turns = Turns(folder, read_only=read_only)
        try:
            if not (read_only and self._is_opened_beside_writers()):
                with self._turns.taken(wait_s):
                    self._open_in_turn(before)
        except BaseException:
            self._turns.close()
            raise

    # Opening and closing.

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

    def _open_in_turn(self, before: LmdbBackend | None) -> None:
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
        others = [each for each in self._all if isinstance(each, LmdbBackend) and each is not self]
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
        cls,
        folder: Path,
        *,
        read_only: bool,
        durability: Durability,
        wait_s: float | None = None,
    ) -> LmdbBackend:
        """The environment in a folder, opened if this process has not opened it yet.

        Args:
            wait_s: for somebody who writes while it must be looked at, or made, in seconds.

        Raises:
            StoreOpenError: it cannot be opened, or is open in this process in another way.
            StoreBusyError: somebody else still writes after `wait_s`.
        """

        def make(before: LmdbBackend | None) -> LmdbBackend:
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

    # Transactions.

    @contextmanager
    def reading(self) -> Iterator[LmdbTransaction]:
        with self._transaction(write=False) as txn:
            try:
                yield txn
            finally:
                self._end(txn)

    @contextmanager
    def writing(self, wait_s: float | None = None) -> Iterator[LmdbTransaction]:
        with self._transaction(write=True, wait_s=wait_s) as txn:
            try:
                self._require_current()
                yield txn
                if self.pid != os.getpid():
                    raise StoreError(f"what a fork's parent writes to {self.path} is the parent's")
                if self.durability == "fast":
                    self._turns.note_unsynced(self._seen)
            except BaseException:
                self._end(txn)
                raise
            txn.commit()
            if self.durability == "fsync":
                self._env.sync()
            self._require_current()  # or else it is nowhere
            self._turns.note(self._seen, is_synced=self.durability == "fsync")

    def _end(self, txn: LmdbTransaction) -> None:
        if self.pid == os.getpid():
            txn.abort()
        else:
            txn.leave()

    @contextmanager
    def _transaction(
        self, *, write: bool, wait_s: float | None = None
    ) -> Iterator[LmdbTransaction]:
        try:
            with ExitStack() as stack:
                yield self._begin(stack, write=write, wait_s=wait_s)
        finally:
            self._close_after_others()

    def _begin(self, stack: ExitStack, *, write: bool, wait_s: float | None) -> LmdbTransaction:
        while True:
            with ExitStack() as attempt:
                if write:
                    attempt.enter_context(self._turns.taken(wait_s))
                attempt.enter_context(self._gate.inside())
                txn = self._env.begin(write=write)
                if txn is not None:
                    stack.push(attempt.pop_all())
                    return txn
            if not self._alone(lambda: self._env.follow(), ALONE_WAIT_S):
                raise StoreError(f"{self.path} was made larger while this thread reads from it")

    def _alone(self, action: Callable[[], None], wait_s: float) -> bool:
        try:
            return self._gate.alone(action, wait_s)
        finally:
            self._close_after_others()

    def _close_after_others(self) -> None:
        """If it was closed meanwhile. Who only reads does not hear of it."""
        try:
            self._close_if_unused()
        except StoreError as error:
            logger.error("%s", error)

    # The map and the file.

    def limit(self, max_bytes: int | None) -> bool:
        self._max_bytes = max_bytes
        if max_bytes is None or self.is_read_only:
            return True
        if self._env.is_cramped and max_bytes > self._env.map_bytes:
            return True  # `grow` tries it when it is needed
        with self.reading() as txn:
            is_over = txn.used_bytes() > max_bytes - RESERVE_BYTES // 4
        wanted = max(max_bytes, self._env.filled_bytes + RESERVE_BYTES) if is_over else max_bytes
        try:
            return self._alone(lambda: self._env.resize(wanted), LIMIT_WAIT_S)
        except StoreBusyError:
            return False

    def grow(self) -> bool:
        largest = environment.MAP_BYTES if self._max_bytes is None else self._max_bytes
        before = self._env.map_bytes
        if self.is_read_only or before >= largest:
            return False
        try:
            return self._alone(lambda: self._env.resize(min(2 * before, largest)), ALONE_WAIT_S)
        except StoreError:
            return False

    def compact(self, wait_s: float | None = None) -> None:
        with self.kept_open(), self._turns.taken(wait_s), self._turns.alone(self._seen):
            self._require_current()
            if self._gate.is_used_here:
                raise StoreBusyError(f"this thread reads from {self.path}")
            copy = self.path / COMPACT_FILE
            try:
                self._copy_to(copy)
                self._alone(partial(self._exchange, copy), ALONE_WAIT_S)
            except OSError as error:
                kind = StoreFullError if error.errno == errno.ENOSPC else StoreError
                raise kind(f"{self.path} cannot be compacted: {error}") from error
            finally:
                with suppress(OSError):
                    copy.unlink()
            self._turns.note(self._seen, is_synced=True)
            self.limit(self._max_bytes)

    def _copy_to(self, path: Path) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            with self._gate.inside():
                self._env.copy(descriptor)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _exchange(self, other: Path) -> None:
        """Go on with another file of the same content, which takes the place of the data."""
        with self.busy():
            self._require_current()
            self._turns.forget()  # it would say that the new file is none of this store's
            self._env.close()
            self._files.forget()  # nothing is current until all is well
            try:
                (self.path / LOCK_FILE).unlink(missing_ok=True)
                os.replace(other, self._data)
                _sync_folder(self.path)
            finally:
                self._env = self._environment()
                self._files.see()
                self._join()

    def file_bytes(self) -> int:
        return os.stat(self._data).st_blocks * 512

    def _note_sync(self) -> None:
        """Vouch for the file, if nothing else has changed it."""
        if self.is_current() and self._turns.is_noted():
            self._turns.note(self._seen, is_synced=True)

    def _require_current(self) -> None:
        if not self.is_current():
            raise StoreMovedError(f"another file has taken the place of {self.path}")

    def sync(self) -> None:
        if not self.is_read_only:
            with self._turns.taken(None), self._gate.inside():
                self._require_current()
                self._env.sync()
                self._note_sync()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
