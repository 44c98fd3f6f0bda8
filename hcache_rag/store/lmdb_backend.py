"""The backend on disk: one LMDB environment per path and process."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

from hcache_rag.errors import StoreBusyError, StoreError, StoreFullError
from hcache_rag.store import environment, opening
from hcache_rag.store.backend import Durability, Pins
from hcache_rag.store.environment import LmdbTransaction
from hcache_rag.store.files import LOCK_FILE, found
from hcache_rag.store.opening import OpenStore

logger = logging.getLogger("hcache_rag")

RESERVE_BYTES = 1 << 22
"""So much room is left to a store that is filled beyond its limit: nothing can be deleted in none.
"""

LIMIT_WAIT_S = 1.0
"""How long, in seconds, who sets a limit waits for those that read: it can be set later."""


class LmdbBackend(OpenStore):
    """See `hcache_rag.store.backend.Backend`.

    LMDB forbids to open a path twice in a process: use `acquire`, which counts the users.
    """

    def __init__(
        self,
        folder: Path,
        *,
        read_only: bool,
        durability: Durability,
        wait_s: float | None,
        before: OpenStore | None = None,
    ) -> None:
        self.pins = Pins()
        self._max_bytes: int | None = None
        super().__init__(
            folder, read_only=read_only, durability=durability, wait_s=wait_s, before=before
        )

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
            if not self._alone(lambda: self._env.follow(), opening.ALONE_WAIT_S):
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
        with self.reading() as txn:
            before = self._env.map_bytes
            if self._env.is_cramped and max_bytes > before:
                return True  # `grow` tries it when it is needed
            wanted = max_bytes
            if txn.used_bytes() > max_bytes - RESERVE_BYTES // 4:
                wanted = max(max_bytes, self._env.filled_bytes + RESERVE_BYTES)
            if 0 <= wanted - before < self._env.page_bytes:
                return True
        try:
            return self._alone(lambda: self._env.resize(wanted), LIMIT_WAIT_S)
        except StoreBusyError:
            return False

    def grow(self) -> bool:
        largest = environment.MAP_BYTES if self._max_bytes is None else self._max_bytes
        try:
            with self._gate.inside():
                before = self._env.map_bytes
            if self.is_read_only or before >= largest:
                return False
            return self._alone(
                lambda: self._env.resize(min(2 * before, largest)), opening.ALONE_WAIT_S
            )
        except StoreError:
            return False

    def compact(self, wait_s: float | None = None) -> None:
        with self.kept_open(), self._turns.taken(wait_s), self._turns.alone(self._seen):
            self._require_current()
            if self._gate.is_used_here:
                raise StoreBusyError(f"this thread reads from {self.path}")
            copy = self.path / opening.COMPACT_FILE
            try:
                self._copy_to(copy)
                self._alone(partial(self._exchange, copy), opening.ALONE_WAIT_S)
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
        now = found(self._data)
        if now is None:
            raise StoreError(f"the file of {self.path} is gone")
        return now.st_blocks * 512

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
