"""Saves what is whole from a store whose file LMDB must not be given."""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import dataclass
from functools import partial
from itertools import chain, count, islice
from pathlib import Path
from typing import cast

from hcache_rag.errors import StoreFullError, StoreOpenError
from hcache_rag.store.backend import TABLES, Table
from hcache_rag.store.description import (
    describe,
    forget,
    is_damaged,
    namespace_in,
    namespaces_in,
)
from hcache_rag.store.files import DATA_FILE, LOCK_FILE, folder_at
from hcache_rag.store.lmdb_backend import LmdbBackend
from hcache_rag.store.pages import DamagedPagesError, problems, rows
from hcache_rag.store.rows import NamespaceRows
from hcache_rag.store.turns import Turns
from hcache_rag.store.verify import repair, verify

DAMAGED_FILE = "data.mdb.damaged"
OPEN_WAIT_S = 60.0
"""How long, in seconds, salvaging waits for somebody who writes."""

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

    Raises:
        StoreOpenError: nothing can be found in the file, or it is open in this process.
        StoreBusyError: another process has the store open.
        StoreFullError: the disk has no room for both files; nothing has changed.
    """
    if LmdbBackend.is_open_here(folder):
        raise StoreOpenError(f"{folder} is open in this process, and cannot be repaired then")
    turns = Turns(folder, read_only=False)
    try:
        with turns.taken(OPEN_WAIT_S), turns.alone(os.stat(folder / DATA_FILE)):
            said = problems(folder / DATA_FILE) or _unsaid(folder / DATA_FILE)
            if not said:
                return Salvaged(())
            states, kept = _rebuild(folder, turns)
            turns.note(os.stat(folder / DATA_FILE), is_synced=False)
            return Salvaged(tuple(said), states, kept)
    except DamagedPagesError as error:
        raise StoreOpenError(f"nothing can be saved of {folder}: {error}") from error
    except OSError as error:
        kind = StoreFullError if error.errno == errno.ENOSPC else StoreOpenError
        raise kind(f"{folder} cannot be repaired: {error.strerror}") from error
    finally:
        turns.close()


def _unsaid(path: Path) -> list[str]:
    """What a file whose pages are whole does not say of itself."""
    said = {key: value for _, key, value in rows(path, ("meta",))}
    return ["its description cannot be read"] if is_damaged(said.get) else []


def _rebuild(folder: Path, turns: Turns) -> tuple[int, Path]:
    """How many states the new file has, and where the damaged one is."""
    beside = folder_at(folder / "salvage", read_only=False)
    shutil.rmtree(beside)
    beside.mkdir(mode=0o700)
    try:
        states = _rebuilt(folder / DATA_FILE, beside)
        kept = _kept(folder)
        turns.forget()
        (folder / LOCK_FILE).unlink(missing_ok=True)  # it speaks of the damaged file
        os.replace(beside / DATA_FILE, folder / DATA_FILE)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return states, kept


def _rebuilt(damaged: Path, beside: Path) -> int:
    """How many states were copied to a store of their own."""
    backend = LmdbBackend.acquire(beside, read_only=False, durability="fast")
    try:
        _copy(damaged, backend)
        with backend.writing() as txn:
            if is_damaged(partial(txn.get, "meta")):
                forget(txn)
        describe(backend, None, read_only=False)
        return sum(_put_right(backend, name) for name in _namespaces(backend))
    finally:
        backend.close()


def _kept(folder: Path) -> Path:
    """A second name of the damaged file, so that the first one is never missing."""
    names = chain([DAMAGED_FILE], (f"{DAMAGED_FILE}.{n}" for n in count(2)))
    kept = next(folder / name for name in names if not (folder / name).exists())
    try:
        os.link(folder / DATA_FILE, kept)
    except OSError:  # not every file system knows such names
        shutil.copy2(folder / DATA_FILE, kept)
    return kept


def _copy(path: Path, backend: LmdbBackend) -> None:
    every = rows(path)
    while some := list(islice(every, _ROWS_AT_ONCE)):
        with backend.writing() as txn:
            for table, key, value in some:
                txn.put(cast(Table, table), key, value)


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
