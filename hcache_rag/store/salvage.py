"""Saves what is whole from a store whose file LMDB must not be given."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from hcache_rag.errors import StoreOpenError
from hcache_rag.store.backend import TABLES
from hcache_rag.store.description import describe, namespace_in, namespaces_in
from hcache_rag.store.lmdb_backend import OPEN_WAIT_S, LmdbBackend
from hcache_rag.store.pages import DamagedPagesError, problems, rows
from hcache_rag.store.rows import NamespaceRows
from hcache_rag.store.turns import Turns
from hcache_rag.store.verify import repair, verify

DAMAGED_FILE = "data.mdb.damaged"
_ROWS_AT_ONCE = 1000


@dataclass(frozen=True, slots=True)
class Salvaged:
    """What was done.

    Args:
        problems: what was wrong with the file; with none, nothing was done.
        states: that were saved.
        kept: where the damaged file is now.
    """

    problems: tuple[str, ...]
    states: int = 0
    kept: Path | None = None


def salvage(folder: Path) -> Salvaged:
    """Put a new file in the place of a damaged one, with all states that are whole in it.

    Nobody may have the store open.

    Raises:
        StoreOpenError: nothing can be found in the file, or it is open in this process.
        StoreBusyError: somebody writes to the store.
    """
    if LmdbBackend.is_open_here(folder):
        raise StoreOpenError(f"{folder} is open in this process, and cannot be repaired then")
    turns = Turns(folder, read_only=False)
    try:
        with turns.taken(OPEN_WAIT_S):
            found = problems(folder / "data.mdb")
            if not found:
                return Salvaged(())
            states = _rebuild(folder)
            turns.note(is_synced=False)
            return Salvaged(tuple(found), states, folder / DAMAGED_FILE)
    except DamagedPagesError as error:
        raise StoreOpenError(f"nothing can be saved of {folder}: {error}") from error
    except OSError as error:
        raise StoreOpenError(f"{folder} cannot be repaired: {error.strerror}") from error
    finally:
        turns.close()


def _rebuild(folder: Path) -> int:
    """How many states the new file has."""
    beside = LmdbBackend.folder(folder / "salvage", read_only=False)
    shutil.rmtree(beside)
    beside.mkdir(mode=0o700)
    backend = LmdbBackend.acquire(beside, read_only=False, durability="fast")
    try:
        _copy(folder / "data.mdb", backend)
        describe(backend, None, read_only=False)
        states = sum(_put_right(backend, name) for name in _namespaces(backend))
    finally:
        backend.close()
    os.replace(folder / "data.mdb", folder / DAMAGED_FILE)
    os.replace(beside / "data.mdb", folder / "data.mdb")
    (folder / "lock.mdb").unlink(missing_ok=True)  # it speaks of the other file
    shutil.rmtree(beside)
    return states


def _copy(path: Path, backend: LmdbBackend) -> None:
    every = ((t, key, value) for t, key, value in rows(path) if t in TABLES)
    while some := list(islice(every, _ROWS_AT_ONCE)):
        with backend.writing() as txn:
            for table, key, value in some:
                txn.put(table, key, value)


def _namespaces(backend: LmdbBackend) -> list[str]:
    """Those that are named; what belongs to none is deleted, so that none ever gets it."""
    with backend.writing() as txn:
        named = namespaces_in(txn)
        for table in TABLES:
            row_key = b""
            while table not in ("meta", "namespaces"):
                row = txn.key_at_or_after(table, row_key)
                if row is None:
                    break
                row_key = row + b"\0"
                if row[:4] not in named.values():
                    txn.delete(table, row)
    return list(named)


def _put_right(backend: LmdbBackend, name: str) -> int:
    """Drop what is not whole in a namespace; how many states are left.

    Encrypted states cannot be looked into: they are, when they are used.
    """
    with backend.reading() as txn:
        its = namespace_in(txn, name)
        its_rows = NamespaceRows(namespaces_in(txn)[name])
    repair(backend, its_rows, verify(backend, its_rows, is_locked=its.key_check is not None), None)
    with backend.reading() as txn:
        return sum(1 for _ in its_rows.entries(txn))
