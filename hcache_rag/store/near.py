"""What of remote shards is on this disk: copies of their indexes, and states that came whole.

A cache: whatever is wrong with it, nothing is lost by doing without. States have a limit, and those
go that save least. Processes may share the folder.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import xxhash

from hcache_rag.errors import DamagedStoreError, StoreError
from hcache_rag.state import read_json
from hcache_rag.store.export import INDEX, SUMMARY, checksum_of
from hcache_rag.store.flights import WAIT_S, Flights
from hcache_rag.store.link import Link
from hcache_rag.store.manifest import NEAR_MAX_BYTES, write_whole
from hcache_rag.store.states import StateStore
from hcache_rag.store.urls import host_of, told, without_secrets

logger = logging.getLogger("hcache_rag")

IN_MEMORY_BYTES = 1 << 28
"""What states may take where this disk cannot keep them."""
WRITE_WAIT_S = 5.0
"""For another process that keeps something."""

DAMAGED = ".damaged"
"""What was found damaged is kept so for a look at it, until the next time."""


class Near:
    """A folder in front of remote shards, and the flights that come there. Thread-safe.

    Args:
        folder: of this machine alone; where it cannot be written, another one is used for now.
        max_bytes: that the states may take.
        wait_s: see `Flights`.
    """

    def __init__(
        self,
        folder: Path,
        namespace: str,
        max_bytes: int = NEAR_MAX_BYTES,
        wait_s: float | None = None,
    ) -> None:
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self.folder = folder
        try:
            (folder / "index").mkdir(mode=0o700, parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise PermissionError(f"{folder} cannot be written")
        except OSError as error:
            self._temporary = tempfile.TemporaryDirectory(prefix="hcache-near-")
            self.folder = Path(self._temporary.name)
            (self.folder / "index").mkdir()
            logger.warning("states from afar are kept for this process alone: %s", error)
        self.store = _states(self.folder / "states", namespace, max_bytes)
        self.flights = Flights(WAIT_S if wait_s is None else wait_s)
        self._links: dict[str, Link] = {}

    def link(self, url: str) -> Link:
        """The link over which a shard is reached."""
        return self._links.setdefault(host_of(url), Link())

    def index_of(self, url: str, fs: Any, root: str) -> Path:
        """The folder of a copy of a shard's index, made if that was not done yet.

        Where the shard cannot be reached, its index as it was when it was last seen.

        Raises: whatever the file system does.
        """
        seen = self.folder / "index" / f"{xxhash.xxh3_64_hexdigest(root.encode())}.json"
        try:
            summary = read_json(self._asked(lambda: fs.cat_file(f"{root}/{SUMMARY}"), url))
        except (FileNotFoundError, PermissionError, ValueError):
            raise
        except Exception as error:  # every file system has errors of its own
            self.link(url).failed()
            if not seen.is_file():
                raise
            logger.warning("%s cannot be reached: %s", without_secrets(url), told(error, url))
            return self._folder(read_json(seen.read_bytes()))
        folder = self._folder(summary)
        if not (folder / "data.mdb").is_file():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            unfinished = folder / f"data.mdb.{uuid.uuid4().hex}"
            try:
                self._asked(lambda: fs.get_file(f"{root}/{INDEX}", str(unfinished)), url)
                if checksum_of(unfinished) != summary["index"]:
                    raise ValueError("its index is not what was exported")
                os.replace(unfinished, folder / "data.mdb")
            finally:
                unfinished.unlink(missing_ok=True)
        write_whole(seen, json.dumps(summary))
        return folder

    def clear(self) -> None:
        """Leave what is on its way, and forget all states that are near."""
        self.flights.clear()
        for record in list(self.store.records()):
            self.store.delete(record.key)

    def _asked(self, ask: Callable[[], Any], url: str) -> Any:
        """What a file system answers, if it answers in time."""
        return self.flights.asked(ask, without_secrets(url))

    def _folder(self, summary: Any) -> Path:
        name = summary["index"]
        if not (isinstance(name, str) and name.isalnum()):
            raise ValueError(f"{name!r} names no index")
        return self.folder / "index" / name

    def close(self) -> None:
        """Leave what is on its way, and close the store."""
        self.flights.close()
        self.store.close()
        if self._temporary is not None:
            self._temporary.cleanup()


def _states(folder: Path, namespace: str, max_bytes: int) -> StateStore:
    """The store of states: made anew where it is damaged, in memory where the disk has none."""
    for _ in range(2):
        try:
            return StateStore.open(
                folder,
                namespace=namespace,
                max_bytes=max_bytes,
                durability="fast",
                write_wait_s=WRITE_WAIT_S,
            )
        except DamagedStoreError as error:
            logger.warning("states from afar that were kept are left: %s", error)
            aside = folder.with_name(folder.name + DAMAGED)
            shutil.rmtree(aside, ignore_errors=True)
            with suppress(OSError):
                folder.rename(aside)
        except StoreError as error:
            logger.warning("states from afar are kept in memory: %s", error)
            break
    return StateStore.in_memory(namespace=namespace, max_bytes=min(max_bytes, IN_MEMORY_BYTES))
