"""The LMDB environment under a store: opened once per path and process, checked before use."""

from __future__ import annotations

import json
import os
import threading
import uuid
from pathlib import Path

import lmdb

from hcache_rag.errors import StoreOpenError
from hcache_rag.state import FORMAT_VERSION

MAP_BYTES = 1 << 40
"""Address space reserved for the map. The file itself grows with what is stored."""


class SharedEnvironment:
    """One LMDB environment per path and process (LMDB forbids a second), counted by its users."""

    _open: dict[Path, SharedEnvironment] = {}  # noqa: RUF012 - the process-wide table itself
    _lock = threading.Lock()

    def __init__(self, folder: Path, read_only: bool) -> None:
        self.folder = folder
        self.read_only = read_only
        self.users = 1
        self.pid = os.getpid()
        try:
            # sync=False: `put` survives a killed process at once; `sync` adds the power cut.
            self.env = lmdb.open(
                str(folder),
                map_size=MAP_BYTES,
                max_dbs=8,
                max_readers=512,
                mode=0o600,
                sync=read_only,
                readonly=read_only,
                lock=True,
            )
        except (lmdb.Error, OSError) as error:
            raise StoreOpenError(f"{folder} is not a state store: {error}") from error
        self._opened_stat = os.stat(folder / "data.mdb")
        try:
            self._mend_length()
            self._open_databases()
        except BaseException:
            self.env.close()
            raise

    def _mend_length(self) -> None:
        """Reading a page beyond the file's end is a SIGBUS; reading zeros is an error."""
        needed = (self.env.info()["last_pgno"] + 1) * self.env.stat()["psize"]
        if os.stat(self.folder / "data.mdb").st_size >= needed:
            return
        if self.read_only:
            raise StoreOpenError(f"{self.folder} is not whole: its end is missing")
        os.truncate(self.folder / "data.mdb", needed)

    def _open_databases(self) -> None:
        create = not self.read_only
        if create:
            with self.env.begin() as txn:
                names = {bytes(key) for key, _ in txn.cursor()}
            if names - {b"meta", b"records", b"chunks", b"models"}:
                raise StoreOpenError(f"{self.folder} is not a state store: it holds other data")
        try:
            self.meta = self.env.open_db(b"meta", create=create)
            self.records = self.env.open_db(b"records", create=create)
            self.chunks = self.env.open_db(b"chunks", create=create)
            self.models = self.env.open_db(b"models", create=create)
            with self.env.begin(db=self.meta) as txn:
                data = txn.get(b"store")
            if data is None:
                data = json.dumps({"format": FORMAT_VERSION, "id": uuid.uuid4().hex}).encode()
                with self.env.begin(db=self.meta, write=True) as txn:
                    txn.put(b"store", data)
            meta = json.loads(data)
            if not isinstance(meta, dict):
                raise ValueError("its description is not one")
        except (lmdb.Error, ValueError) as error:
            raise StoreOpenError(f"{self.folder} is not a state store: {error}") from error
        if meta.get("format") != FORMAT_VERSION:
            raise StoreOpenError(
                f"{self.folder} has store format {meta.get('format')}, "
                f"this release reads format {FORMAT_VERSION}"
            )
        if not isinstance(meta.get("id"), str):
            raise StoreOpenError(f"{self.folder} is not a state store: it has no id")
        self.store_id: str = meta["id"]

    @classmethod
    def acquire(cls, folder: Path, read_only: bool) -> SharedEnvironment:
        with cls._lock:
            shared = cls._open.get(folder)
            if shared is not None and shared.pid == os.getpid() and shared._is_on_disk():
                if shared.read_only and not read_only:
                    raise StoreOpenError(f"{folder} is already open in this process, read-only")
                shared.users += 1
                return shared
            if shared is not None and shared.pid != os.getpid():
                shared.env.close()
            shared = cls._open[folder] = cls(folder, read_only)
            return shared

    def _is_on_disk(self) -> bool:
        """Whether the open environment is still the file that the path names."""
        try:
            return os.path.samestat(self._opened_stat, os.stat(self.folder / "data.mdb"))
        except OSError:
            return False

    def release(self) -> None:
        with self._lock:
            self.users -= 1
            if self.users or self.pid != os.getpid():
                return
            if self._open.get(self.folder) is self:
                del self._open[self.folder]
            if not self.read_only:
                self.env.sync(True)
            self.env.close()
