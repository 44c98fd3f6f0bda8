"""A `VectorIndex` in a folder. Whatever happens, a reader finds the old index or the new one.

`hcache-rag.json` names a folder with all nodes and vectors. What has changed since is behind them,
a line for each change; when that is more than half of the rest, all is written anew. A line counts
when it is there as a whole.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from llama_index.core.storage.docstore.utils import doc_to_json, json_to_doc

from hcache_rag.errors import SourceError
from hcache_rag.forks import locked_file
from hcache_rag.llama_index.nearest import IndexKind, Nearest
from hcache_rag.llama_index.vectors import Change, VectorIndex

logger = logging.getLogger("hcache_rag")

MANIFEST = "hcache-rag.json"
_FORMAT = 2
_READABLE = (1, 2)
"""Format 1 has no numbers of nodes, and no changes."""
_NODES, _VECTORS, _CHANGES, _LOCK = "nodes.jsonl", "vectors.faiss", "changes.jsonl", ".lock"
_LEAST_BYTES = 1 << 20
"""So many bytes of changes are always kept apart."""


class IndexFolder:
    """An index in a folder, as this process has read and changed it.

    Others may change it too; they take turns, and each goes on from what the last one left.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._generation: str | None = None
        self._read_bytes = 0

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Nobody else changes the folder inside the block.

        Raises:
            SourceError: it cannot be written.
        """
        with ExitStack() as stack:
            try:
                self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
                stack.enter_context(locked_file(self.path / _LOCK))
            except OSError as error:
                raise self._unwritable(error) from error
            yield

    def save(self, index: VectorIndex) -> None:
        """In a turn: put an index into the folder instead of what is there.

        Raises:
            SourceError: it cannot be written; what was there stays.
        """
        try:
            self._save(index)
        except OSError as error:
            raise self._unwritable(error) from error

    def load(self, kind: IndexKind = "auto") -> VectorIndex:
        """Read what is there.

        Raises:
            SourceError: there is no index in the folder, or one that this release cannot read.
        """
        while True:
            before = read_manifest(self.path).get("vectors")
            try:
                index = self._load(kind)
            except _UNREADABLE as error:
                if read_manifest(self.path).get("vectors") == before:
                    raise self._unreadable(error) from error
            else:
                if read_manifest(self.path).get("vectors") == self._generation:
                    return index  # else it may be without the last changes

    def caught_up(self, index: VectorIndex) -> VectorIndex:
        """In a turn: an index that was saved or loaded here, as others have left it.

        Returns:
            Another one where somebody else has written the folder anew.

        Raises:
            SourceError: the folder cannot be read any more.
        """
        is_another = read_manifest(self.path).get("vectors") != self._generation
        if is_another or self._has_lost_changes():
            return self.load(index.nearest.kind)
        try:
            self._apply_changes(index)
        except _UNREADABLE as error:
            raise self._unreadable(error) from error
        return index

    def change(self, index: VectorIndex, change: Change) -> None:
        """In a turn: change an index that is caught up, and the folder.

        Raises:
            SourceError: it cannot be written; both stay as they were.
            ValueError: see `VectorIndex.check`; the same.
        """
        index.check(change)
        try:
            if not (self.path / str(self._generation) / _CHANGES).exists():  # format 1
                self._save(index)
            self._append(change)
        except OSError as error:
            raise self._unwritable(error) from error
        index.apply(change)
        if self._is_due():
            try:
                self._save(index)
            except OSError as error:  # the change is there; it will be tried again
                logger.warning("%s", self._unwritable(error))

    def _unreadable(self, error: BaseException) -> SourceError:
        if isinstance(error, SourceError):
            return error
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        return SourceError(f"the index in {self.path} cannot be read: {reason}")

    def _unwritable(self, error: OSError) -> SourceError:
        return SourceError(f"the index in {self.path} cannot be written: {error.strerror or error}")

    def _save(self, index: VectorIndex) -> None:
        generation = self.path / f"vectors-{uuid.uuid4().hex[:12]}"
        try:
            self._publish(index, generation)
        except BaseException:
            shutil.rmtree(generation, ignore_errors=True)
            raise
        self._generation, self._read_bytes = generation.name, 0
        for old in self.path.glob("vectors-*"):
            if old != generation:
                shutil.rmtree(old, ignore_errors=True)

    def _publish(self, index: VectorIndex, generation: Path) -> None:
        generation.mkdir(mode=0o700)
        with (generation / _NODES).open("w", encoding="utf-8") as lines:
            for number, node in index.numbered:
                lines.write(json.dumps({"number": number, **doc_to_json(node)}) + "\n")
        index.nearest.write(generation / _VECTORS)
        (generation / _CHANGES).touch(mode=0o600)
        manifest = {
            "format": _FORMAT,
            "vectors": generation.name,
            "embedding": index.embedding_name,
            "nodes": len(index),
        }
        unfinished = generation / MANIFEST
        unfinished.write_text(json.dumps(manifest, indent=1) + "\n")
        for path in (*generation.iterdir(), generation):
            _sync(path)
        os.replace(unfinished, self.path / MANIFEST)
        _sync(self.path)

    def _load(self, kind: IndexKind) -> VectorIndex:
        manifest = read_manifest(self.path)
        vectors = self.path / str(manifest.get("vectors"))
        with (vectors / _NODES).open(encoding="utf-8") as lines:
            found = [json.loads(line) for line in lines]
        nodes = [(each.get("number", row), json_to_doc(each)) for row, each in enumerate(found)]
        nearest = Nearest.read(vectors / _VECTORS, [number for number, _ in nodes], kind)
        index = VectorIndex.of(str(manifest.get("embedding")), nodes, nearest)
        self._generation, self._read_bytes = vectors.name, 0
        self._apply_changes(index)
        return index

    def _has_lost_changes(self) -> bool:
        """Whether a change was read that could not be written to its end."""
        path = self.path / str(self._generation) / _CHANGES
        return self._read_bytes > 0 and path.stat().st_size < self._read_bytes

    def _apply_changes(self, index: VectorIndex) -> None:
        """Apply the changes that have come since the last time."""
        path = self.path / str(self._generation) / _CHANGES
        if not path.exists():  # format 1
            return
        with path.open("rb") as lines:
            lines.seek(self._read_bytes)
            rest = lines.read()
        whole = rest[: rest.rfind(b"\n") + 1].splitlines(keepends=True)
        for place, line in enumerate(whole):
            change = _change_of(line)
            if change is None and place == len(whole) - 1:
                return  # the power went while it was written
            if change is None:
                raise ValueError(f"change {place + 1} in {path.name} is damaged")
            index.apply(change)
            self._read_bytes += len(line)

    def _append(self, change: Change) -> None:
        path = self.path / str(self._generation) / _CHANGES
        line = _line_of(change)
        with path.open("ab", buffering=0) as lines:
            lines.truncate(self._read_bytes)  # what somebody has left unfinished
            try:
                left = memoryview(line)
                while left:
                    left = left[lines.write(left) :]
                os.fsync(lines.fileno())
            except BaseException:
                lines.truncate(self._read_bytes)
                raise
        self._read_bytes += len(line)

    def _is_due(self) -> bool:
        """Whether all is written anew."""
        generation = self.path / str(self._generation)
        its = sum(path.stat().st_size for path in generation.iterdir())
        return self._read_bytes > max(_LEAST_BYTES, (its - self._read_bytes) // 2)


_UNREADABLE = (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError)


def load_index(folder: Path, kind: IndexKind = "auto") -> VectorIndex:
    """The index in a folder, see `IndexFolder.load`."""
    return IndexFolder(folder).load(kind)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a persisted folder.

    Raises:
        SourceError: there is none, or one that this release cannot read.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        raise SourceError(f"{folder} holds no index; make one with `hcache-rag index`") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SourceError(f"the index in {folder} cannot be read: {reason}") from error
    if not isinstance(manifest, dict) or manifest.get("format") not in _READABLE:
        raise SourceError(f"the index in {folder} is not of format {_FORMAT}, nor older")
    return manifest


def _line_of(change: Change) -> bytes:
    vectors = np.ascontiguousarray(change.vectors, np.float32)
    content = {
        "sources": sorted(change.sources),
        "nodes": [doc_to_json(node) for node in change.nodes],
        "shape": vectors.shape,
        "vectors": base64.b64encode(vectors.tobytes()).decode(),
    }
    data = json.dumps(content).encode()
    return xxhash.xxh3_64_hexdigest(data).encode() + b" " + data + b"\n"


def _change_of(line: bytes) -> Change | None:
    """What a line says; None where it is not whole."""
    checksum, _, data = line.rstrip(b"\n").partition(b" ")
    if xxhash.xxh3_64_hexdigest(data).encode() != checksum:
        return None
    content = json.loads(data)
    vectors = np.frombuffer(base64.b64decode(content["vectors"]), np.float32)
    nodes = [json_to_doc(each) for each in content["nodes"]]
    return Change(content["sources"], nodes, vectors.reshape(content["shape"]))


def _sync(path: Path) -> None:
    """Write a file, or which files a folder holds, through to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
