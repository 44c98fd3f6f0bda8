"""The backend on disk: one LMDB environment per path and process."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from hcache_rag.errors import (
    DamagedStoreError,
    StoreBusyError,
    StoreError,
    StoreMovedError,
    StoreOpenError,
)
from hcache_rag.store import environment, pages
from hcache_rag.store.backend import Durability, Pins
from hcache_rag.store.environment import (
    DATA_FILE,
    LOCK_FILE,
    Environment,
    LmdbTransaction,
)
from hcache_rag.store.gate import Gate
from hcache_rag.store.turns import Turns

logger = logging.getLogger("hcache_rag")

RESERVE_BYTES = 1 << 22
"""So much room is left to a store that is filled beyond its limit: nothing can be deleted in none.
"""

FORK_WAIT_S = 5.0
"""How long a fork waits for what other threads read; they go on later."""

OPEN_WAIT_S = 60.0
"""How long opening waits for a writer before the file can be checked, or made."""

COMPACT_FILE = "data.mdb.compact"
"""What takes the place of `data.mdb` when it is whole."""


class LmdbBackend:
    """See `hcache_rag.store.backend.Backend`.

    LMDB forbids to open a path twice in a process: use `acquire`, which counts the users.
    """

    _open: dict[Path, LmdbBackend] = {}  # noqa: RUF012 - the process-wide table itself
    _lock = threading.Lock()

    def __init__(
        self,
        folder: Path,
        *,
        read_only: bool,
        durability: Durability,
        before: LmdbBackend | None = None,
    ) -> None:
        self.path = folder
        self.is_read_only = read_only
        self.pins = Pins()
        self.durability = durability
        self.pid = os.getpid()
        self._users = 1
        self._gate = Gate()
        self._lock_stat: os.stat_result | None = None
        self._max_bytes: int | None = None
        self._turns = Turns(folder, read_only=read_only)
        try:
            if not (read_only and self._is_opened_beside_writers()):
                with self._turns.taken(OPEN_WAIT_S):
                    self._open_in_turn(before)
        except BaseException:
            self._turns.close()
            raise

    def _is_opened_beside_writers(self) -> bool:
        """Open the file without waiting for one's turn, if it is known and stays in its place."""
        lock = self.path / LOCK_FILE
        if not self._turns.is_noted() or self._turns.is_moved() or not lock.exists():
            return False
        try:
            self._stat, before = os.stat(self._data), os.stat(lock)
            self._env = self._environment()
            if self.is_current() and os.path.samestat(before, os.stat(lock)):
                self._lock_stat = before
                return True
        except FileNotFoundError:
            return False
        self._env.close()
        return False

    def _open_in_turn(self, before: LmdbBackend | None) -> None:
        """Open the file, checked; another one of this name may be open `before`."""
        is_noted, is_moved = self._turns.is_noted(), self._turns.is_moved()
        is_moved |= before is not None and before._has_lock_file()
        if not is_noted:
            self._check_pages()
        if os.access(self.path, os.W_OK):
            (self.path / COMPACT_FILE).unlink(missing_ok=True)
            if is_moved:  # who has the other file open keeps its readers' table
                (self.path / LOCK_FILE).unlink(missing_ok=True)
        then = os.stat(self._data) if self._data.exists() else None
        self._env = self._environment()
        self._see_files()
        if then is not None and not os.path.samestat(then, self._stat):
            self._env.close()
            raise StoreMovedError(f"another file has taken the place of {self.path}")
        if is_moved or not is_noted:
            self._turns.note(self._stat, is_synced=False)

    def _see_files(self) -> None:
        """Remember which files are open."""
        self._stat = os.stat(self._data)
        lock = self.path / LOCK_FILE
        self._lock_stat = os.stat(lock) if lock.exists() else None

    def _has_lock_file(self) -> bool:
        """Whether LMDB's lock file in the folder is the one that is open here."""
        try:
            now = os.stat(self.path / LOCK_FILE)
        except OSError:
            return False
        return self._lock_stat is not None and os.path.samestat(now, self._lock_stat)

    def _environment(self) -> Environment:
        return Environment(self.path, read_only=self.is_read_only, durability=self.durability)

    @property
    def _data(self) -> Path:
        return self.path / DATA_FILE

    def _check_pages(self) -> None:
        """Something else than a writer has changed the file: LMDB must not be given any file.

        Raises:
            DamagedStoreError: it has pages that LMDB cannot be trusted with.
        """
        logger.info("%s is checked, since it was changed by something else", self.path)
        try:
            found = pages.problems(self._data)
        except OSError as error:
            raise StoreOpenError(f"{self.path} cannot be read: {error.strerror}") from error
        if found:
            raise DamagedStoreError(self.path, found)

    @staticmethod
    def folder(path: str | os.PathLike[str], *, read_only: bool) -> Path:
        """The folder at a path, made if it is missing and may be.

        Raises:
            StoreOpenError: it cannot be one.
        """
        folder = Path(path).expanduser().absolute()
        try:
            folder = folder.resolve()
            if folder.exists() and not folder.is_dir():
                raise StoreOpenError(f"{folder} is a file; a state store is a folder")
            if read_only and not (folder / "data.mdb").is_file():
                raise StoreOpenError(f"{folder} holds no state store")
        except OSError as error:
            raise StoreOpenError(f"cannot look into {folder}: {error.strerror}") from error
        if not read_only:
            try:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as error:
                raise StoreOpenError(f"cannot create {folder}: {error.strerror}") from error
            if not os.access(folder, os.W_OK):
                raise StoreOpenError(f"{folder} is not writable")
        return folder

    @classmethod
    def acquire(cls, folder: Path, *, read_only: bool, durability: Durability) -> LmdbBackend:
        """The environment in a folder, opened if this process has not opened it yet.

        Raises:
            StoreOpenError: it cannot be opened, or is open in this process in another way.
        """
        with cls._lock:
            backend = cls._open.get(folder)
            if backend is not None and backend.pid != os.getpid():
                if backend._gate.is_used:  # closing would end what the parent reads there
                    raise StoreOpenError(
                        f"{folder} cannot be used in this process, which was forked by a thread "
                        "that was reading from it"
                    )
                backend._env.close()  # LMDB must not be used in both processes
                backend = None
            if backend is not None and backend.is_current():
                if backend.is_read_only and not read_only:
                    raise StoreOpenError(f"{folder} is already open in this process, read-only")
                if not read_only and backend.durability != durability:
                    raise StoreOpenError(
                        f"{folder} is already open in this process with durability="
                        f"{backend.durability!r}, not {durability!r}"
                    )
                if backend._users or backend._gate.open_again():
                    backend._users += 1
                    return backend
            cls._open[folder] = cls(
                folder, read_only=read_only, durability=durability, before=backend
            )
            return cls._open[folder]

    @classmethod
    def is_open_here(cls, folder: Path) -> bool:
        """Whether this process uses the environment in a folder."""
        with cls._lock:
            backend = cls._open.get(folder)
            return backend is not None and backend.pid == os.getpid() and backend.is_current()

    def is_current(self) -> bool:
        try:
            return os.path.samestat(self._stat, os.stat(self._data))
        except OSError:
            return False

    def close(self) -> None:
        """Count one user less; the last one closes when the last reader has ended.

        Raises:
            StoreError: what was stored cannot be synced.
        """
        with self._lock:
            self._users -= 1
            if self._users or self.pid != os.getpid():
                return
        self._gate.close(self._close)

    def _close(self) -> None:
        is_locked = self._lock.acquire(timeout=FORK_WAIT_S / 5)  # who opens a store waits for this
        try:
            if not self.is_read_only and self._env.is_open:
                self._env.sync()
                with suppress(StoreError), self._turns.taken(0.0):
                    self._note_sync()
        finally:
            self._env.close()
            self._turns.close()
            if self._open.get(self.path) is self:
                del self._open[self.path]
            if is_locked:
                self._lock.release()

    @contextmanager
    def reading(self) -> Iterator[LmdbTransaction]:
        with self._transaction(write=False) as txn:
            try:
                yield txn
            finally:
                self._end(txn)

    @contextmanager
    def writing(self, wait_s: float | None = None) -> Iterator[LmdbTransaction]:
        with self._turns.taken(wait_s), self._transaction(write=True) as txn:
            self._require_current()
            try:
                yield txn
                if self.durability == "fast":
                    self._turns.note_unsynced(self._stat)
            except BaseException:
                self._end(txn)
                raise
            txn.commit()
            if self.durability == "fsync":
                self._env.sync()
            self._require_current()  # or else it is nowhere
            self._turns.note(self._stat, is_synced=self.durability == "fsync")

    def _end(self, txn: LmdbTransaction) -> None:
        if self.pid == os.getpid():
            txn.abort()
        else:
            txn.leave()

    @contextmanager
    def _transaction(self, *, write: bool) -> Iterator[LmdbTransaction]:
        while True:
            with self._gate.inside():
                txn = self._env.begin(write=write)
                if txn is not None:
                    yield txn
                    return
            if not self._gate.alone(lambda: self._env.follow()):
                raise StoreError(f"{self.path} was made larger while this thread reads from it")

    def limit(self, max_bytes: int | None) -> bool:
        self._max_bytes = max_bytes
        if max_bytes is None or self.is_read_only:
            return True
        if self._env.is_cramped and max_bytes > self._env.map_bytes:
            return True  # `grow` tries it when it is needed
        with self.reading() as txn:
            is_over = txn.used_bytes() > max_bytes - RESERVE_BYTES // 4
        wanted = max(max_bytes, self._env.filled_bytes + RESERVE_BYTES) if is_over else max_bytes
        return self._gate.alone(lambda: self._env.resize(wanted))

    def grow(self) -> bool:
        largest = environment.MAP_BYTES if self._max_bytes is None else self._max_bytes
        before = self._env.map_bytes
        if self.is_read_only or before >= largest:
            return False
        try:
            return self._gate.alone(lambda: self._env.resize(min(2 * before, largest)))
        except StoreError:
            return False

    def compact(self, wait_s: float | None = None) -> None:
        copy = self.path / COMPACT_FILE
        with self._turns.taken(wait_s), self._turns.alone():
            self._require_current()
            try:
                self._copy_to(copy)
                if not self._gate.alone(partial(self._exchange, copy)):
                    raise StoreBusyError(f"this thread reads from {self.path}")
            except OSError as error:
                raise StoreError(f"{self.path} cannot be compacted: {error}") from error
            finally:
                copy.unlink(missing_ok=True)
            self._turns.note(self._stat, is_synced=True)
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
        if not self._lock.acquire(timeout=FORK_WAIT_S / 5):
            raise StoreBusyError(f"stores are being opened beside {self.path}")
        try:
            self._env.close()
            self._stat = os.stat(self.path)  # nothing is current until all is well
            (self.path / LOCK_FILE).unlink(missing_ok=True)
            os.replace(other, self._data)
            _sync_folder(self.path)
            self._env = self._environment()
            self._see_files()
        finally:
            self._lock.release()

    def file_bytes(self) -> int:
        return os.stat(self._data).st_blocks * 512

    def _note_sync(self) -> None:
        """Vouch for the file, if nothing else has changed it."""
        if self.is_current() and self._turns.is_noted():
            self._turns.note(self._stat, is_synced=True)

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


def _before_fork() -> None:
    """Wait for other threads' transactions: a child would end those that it inherits."""
    LmdbBackend._lock.acquire()
    for backend in LmdbBackend._open.values():
        backend._gate.shut(FORK_WAIT_S)


def _after_fork_in_parent() -> None:
    for backend in LmdbBackend._open.values():
        backend._gate.open()
    LmdbBackend._lock.release()


def _after_fork_in_child() -> None:
    LmdbBackend._lock = threading.Lock()
    for backend in LmdbBackend._open.values():
        backend._gate.renew_lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )
