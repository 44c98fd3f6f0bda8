"""The files of a store's folder: which are open, and whether they are still in their places."""

from __future__ import annotations

import os
from pathlib import Path

from hcache_rag.errors import StoreOpenError

DATA_FILE, LOCK_FILE = "data.mdb", "lock.mdb"


class OpenFiles:
    """The data that are open, and LMDB's lock file, in which its readers stand."""

    def __init__(self, folder: Path) -> None:
        self._data, self._lock = os.fspath(folder / DATA_FILE), os.fspath(folder / LOCK_FILE)
        self.data: os.stat_result | None = None
        self.lock: os.stat_result | None = None

    def see(self) -> None:
        """These are open from now on: what is there now."""
        self.data, self.lock = found(self._data), found(self._lock)

    def forget(self) -> None:
        """None is."""
        self.data = self.lock = None

    def are_in_place(self) -> bool:
        """Whether a transaction would be seen by others: nothing was deleted or exchanged."""
        return self.has_data() and (self.lock is None or self.has_lock())

    def has_data(self) -> bool:
        """Whether the data in the folder are those that are open."""
        return _are_same(self.data, found(self._data))

    def lock_is(self, path: Path) -> bool:
        """Whether a file is the lock file that is open, perhaps by another name."""
        return _are_same(self.lock, found(path))

    def has_lock(self) -> bool:
        """Whether the lock file in the folder is the one that is open."""
        return _are_same(self.lock, found(self._lock))


def found(path: str | Path) -> os.stat_result | None:
    """What is at a path; None where nothing is, or where that cannot be seen."""
    try:
        return os.stat(path)
    except OSError:
        return None


def _are_same(one: os.stat_result | None, other: os.stat_result | None) -> bool:
    return one is not None and other is not None and os.path.samestat(one, other)


def folder_at(path: str | os.PathLike[str], *, read_only: bool) -> Path:
    """The folder at a path, made if it is missing and may be.

    Raises:
        StoreOpenError: it cannot be one.
    """
    folder = Path(path).expanduser().absolute()
    try:
        folder = folder.resolve()
        if folder.exists() and not folder.is_dir():
            raise StoreOpenError(f"{folder} is a file; a state store is a folder")
        if read_only and not (folder / DATA_FILE).is_file():
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
