"""Documents to index, one after another and always in one order, however many there are.

A corpus is a folder (one document a file), JSON lines or Parquet (one document a row, its text in a
column), or documents that a program has. Nothing of it is kept in memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from hcache_rag.errors import SourceError
from hcache_rag.readers import Unreadable, text_of
from hcache_rag.sources import walk

OnSkip: TypeAlias = Callable[[str, str], None]
"""Told the name of what is passed over, and the reason."""

LINES, TABLES = (".jsonl", ".ndjson"), (".parquet",)


@dataclass(frozen=True, slots=True)
class Document:
    """A text, and what a person calls it."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Corpus:
    """The documents of a folder, or of one file of JSON lines or Parquet.

    A folder's files are taken in order of their paths; those of JSON lines and Parquet in it are
    read row by row.

    Args:
        text_column: the field of a row that holds its text.
    """

    path: Path
    text_column: str = "text"

    def __post_init__(self) -> None:
        if not self.path.exists():
            raise SourceError(f"{self.path}: no such file or folder")

    def documents(self, on_skip: OnSkip = lambda _name, _reason: None) -> Iterator[Document]:
        """All documents that hold a text.

        Raises:
            SourceError: no row of a file has the column, or the file is no table.
        """
        for name, path in self._files():
            if path.suffix.lower() in LINES:
                yield from self._rows(name, _of_lines(path), on_skip)
            elif path.suffix.lower() in TABLES:
                yield from self._rows(name, _of_table(path, self.text_column), on_skip)
            else:
                try:
                    yield Document(name, text_of(path))
                except Unreadable as reason:
                    on_skip(name, str(reason))

    def count(self) -> int:
        """Documents, those without a text included: lines and rows are counted, not read."""
        total = 0
        for _, path in self._files():
            if path.suffix.lower() in LINES:
                with path.open("rb") as file:
                    total += sum(1 for line in file if not line.isspace())
            elif path.suffix.lower() in TABLES:
                total += _table(path).metadata.num_rows
            else:
                total += 1
        return total

    def _files(self) -> Iterator[tuple[str, Path]]:
        if not self.path.is_dir():
            yield self.path.name, self.path
            return
        for path in walk(self.path):
            yield str(path.relative_to(self.path)), path

    def _rows(self, file: str, rows: Iterable[object], on_skip: OnSkip) -> Iterator[Document]:
        is_seen = found = False
        for number, row in enumerate(rows):
            name = f"{file}:{number + 1}"
            if isinstance(row, Unreadable):
                on_skip(name, str(row))
                continue
            text = row.get(self.text_column) if isinstance(row, dict) else None
            is_seen, found = True, found or isinstance(text, str)
            if not isinstance(text, str):
                on_skip(name, f"no text in {self.text_column!r}")
            elif not text.strip():
                on_skip(name, "empty")
            else:
                yield Document(name, text)
        if is_seen and not found:
            raise SourceError(f"{file}: no row has a text in {self.text_column!r}")


def documents_of(texts: Iterable[str | Document]) -> Iterator[Document]:
    """Texts that a program has, numbered where they have no name."""
    for number, text in enumerate(texts):
        yield text if isinstance(text, Document) else Document(str(number), text)


def _of_lines(path: Path) -> Iterator[object]:
    with path.open("rb") as file:
        for line in file:
            if line.isspace():
                continue
            try:
                yield json.loads(line)
            except (ValueError, RecursionError):
                yield Unreadable("not a line of JSON")


def _of_table(path: Path, column: str) -> Iterator[object]:
    table = _table(path)
    if column not in table.schema_arrow.names:
        raise SourceError(f"{path} has no column {column!r}; it has {table.schema_arrow.names}")
    for batch in table.iter_batches(columns=[column]):
        yield from batch.to_pylist()


def _table(path: Path) -> Any:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise SourceError(f"{path}: pip install 'hcache-rag[parquet]' to read it") from error
    try:
        return ParquetFile(path)
    except (OSError, ArrowException) as error:
        raise SourceError(f"{path} is not a Parquet file: {error}") from error
