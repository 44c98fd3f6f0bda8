"""A folder of text files: which can be read, and why the others cannot."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hcache_rag.errors import SourceError
from hcache_rag.readers import Unreadable, text_of

_OWN_FILES = ("hcache-rag.json", "data.mdb", "vectors.faiss", "shards.json")
"""A folder that holds one of these is a store of ours, not documents."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One text file: its path relative to the folder, and its text."""

    path: str
    text: str


@dataclass(frozen=True, slots=True)
class FolderContents:
    """What was found in a folder: the texts, and the files passed over as (path, reason)."""

    files: tuple[SourceFile, ...]
    skipped: tuple[tuple[str, str], ...]


def read_folder(folder: str | os.PathLike[str]) -> FolderContents:
    """Read every text file under `folder`, HTML and PDF too, in order of their paths.

    Hidden ones are ignored.

    Raises:
        SourceError: there is no such folder, or no text in it.
    """
    root = Path(folder).expanduser()
    if not root.exists():
        raise SourceError(f"{folder}: no such folder")
    if not root.is_dir():
        raise SourceError(f"{folder} is a file; give the folder that holds it")
    files: list[SourceFile] = []
    skipped: list[tuple[str, str]] = []
    try:
        for path in walk(root):
            name = str(path.relative_to(root))
            try:
                files.append(SourceFile(name, text_of(path)))
            except Unreadable as reason:
                skipped.append((name, str(reason)))
    except PermissionError as error:
        raise SourceError(f"{error.filename} cannot be read: {error.strerror}") from error
    if not files:
        found = "no files"
        if skipped:
            name, why = skipped[0]
            found = f"{len(skipped)} file(s) that hold no text, first {name}: {why}"
        raise SourceError(f"nothing to index: {folder} holds {found}")
    return FolderContents(tuple(files), tuple(skipped))


def walk(root: Path) -> Iterator[Path]:
    """The files under a folder in order of their paths; hidden ones and our own stores are not."""
    for entry in sorted(root.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir() and not entry.is_symlink():
            if not any(os.path.exists(entry / name) for name in _OWN_FILES):
                yield from walk(entry)
        elif entry.is_file():
            yield entry
