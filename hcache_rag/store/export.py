"""A published shard as objects that can be read from afar: values, their places, a summary.

`values.bin` holds all values, one behind another. `index.mdb` is a store that has the place and
checksum of each value in the place of the value. `export.json` says which index belongs to them; it
is written last: without it there is no shard.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import xxhash

from hcache_rag.errors import StoreError
from hcache_rag.state import StateKey
from hcache_rag.store.backend import TABLES
from hcache_rag.store.flight import Place, checksum
from hcache_rag.store.lmdb_backend import LmdbBackend
from hcache_rag.store.manifest import Shard
from hcache_rag.store.states import StoreReader
from hcache_rag.store.tables import chunk_of
from hcache_rag.store.urls import file_system, told

INDEX, VALUES, SUMMARY = "index.mdb", "values.bin", "export.json"
_PLACE = struct.Struct("<QI8s")
"""Of a value: offset, size, checksum."""
_ROWS_AT_ONCE = 4096
_HASHED_AT_ONCE = 1 << 20


def export_shard(shard: Shard, url: str) -> None:
    """Copy a published shard to a URL that fsspec can write, so that others read it from there.

    Raises:
        StoreError: the shard is not published, or the URL cannot be written.
    """
    if not shard.is_published:
        raise StoreError(f"shard {shard.name} is not published: it may still change")
    beside = shard.folder / "export"
    shutil.rmtree(beside, ignore_errors=True)
    try:
        fs, root = file_system(url)
        fs.makedirs(root, exist_ok=True)
        with fs.open(f"{root}/{VALUES}", "wb") as values:
            num_bytes = _write_index(shard, beside, values.write)
        data = beside / "data.mdb"
        fs.put_file(str(data), f"{root}/{INDEX}")
        summary = {"format": 1, "index": checksum_of(data), "num_bytes": num_bytes}
        fs.pipe_file(f"{root}/{SUMMARY}", json.dumps(summary).encode())
    except StoreError:
        raise
    except Exception as error:  # every file system has errors of its own
        raise StoreError(f"shard {shard.name} is not exported: {told(error, url)}") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _write_index(shard: Shard, folder: Path, write: Callable[[bytes], object]) -> int:
    """A store with the place of each value instead of the value; bytes that were written."""
    offset = 0
    source = LmdbBackend.acquire(shard.folder, read_only=True, durability="fast")
    folder.mkdir(mode=0o700)
    index = LmdbBackend.acquire(folder, read_only=False, durability="fast")
    try:
        with source.reading() as reading:
            for table in TABLES:
                rows = reading.scan(table)
                while some := list(islice(rows, _ROWS_AT_ONCE)):
                    with index.writing() as txn:
                        for key, value in some:
                            stored = value
                            if table == "chunks":
                                write(value)
                                stored = _PLACE.pack(offset, len(value), checksum(value))
                                offset += len(value)
                            txn.put(table, key, stored)
    finally:
        index.close()
        source.close()
    return offset


def places_of(index: StoreReader, key: StateKey) -> list[tuple[int, int, Place]]:
    """(layer, chunk, place) of all values of a state, in the order in which they are read."""
    txn, rows = index._txn, index._rows
    found = []
    for row_key in rows.chunk_keys(txn, key):
        offset, size, expected = _PLACE.unpack(txn.get("chunks", row_key) or bytes(_PLACE.size))
        found.append((*chunk_of(row_key), (offset, size, expected)))
    return found


def checksum_of(path: Path) -> str:
    """Of a file."""
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(_HASHED_AT_ONCE):
            digest.update(block)
    return digest.hexdigest()
