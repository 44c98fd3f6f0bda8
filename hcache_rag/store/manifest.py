"""A store in shards, as files say it: which there are, what of each is done, which are final.

`shards.json` names the shards, each a folder beside it, a folder elsewhere, or a URL. Whatever
changes while many work at once is kept in the shard's own folder: `units.jsonl` has a line for each
unit of work that is in it whole, and `published.json` is there from the moment on in which nobody
writes to the shard any more. So shards are added, taken away, moved and copied as folders are.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from hcache_rag.errors import StoreError, StoreOpenError
from hcache_rag.state import read_json
from hcache_rag.store.urls import without_secrets

MANIFEST_FILE = "shards.json"
FORMAT = 1
UNIT_DOCUMENTS = 256
"""Documents of a unit of work, unless the manifest says otherwise."""
NEAR_MAX_BYTES = 8 << 30
"""What states from afar may take on this disk, unless the manifest says otherwise."""

_UNITS_FILE, _PUBLISHED_FILE = "units.jsonl", "published.json"


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit of work that is done: all that could be stored of its documents is in the shard.

    Args:
        id: a digest of its documents and of what is kept of them.
        documents: that have a state.
        tokens, num_bytes: of their states.
        seconds: that it took, where it was done at once.
        skipped: documents without a state, counted by reason.
    """

    id: str
    documents: int
    tokens: int
    num_bytes: int
    seconds: float
    skipped: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Shard:
    """One shard: where it is, and what of it is done.

    Args:
        name: by which documents are placed.
        place: its folder, or a URL.
    """

    name: str
    place: str = field(repr=False)  # a URL may hold a password

    @property
    def is_remote(self) -> bool:
        """Whether it is reached through fsspec."""
        return "://" in self.place

    @property
    def folder(self) -> Path:
        """Where a local shard is."""
        if self.is_remote:
            raise StoreError(f"shard {self.name} is at a URL, not in a folder")
        return Path(self.place)

    @property
    def is_published(self) -> bool:
        """Whether it is final."""
        return self.is_remote or (self.folder / _PUBLISHED_FILE).is_file()

    def units(self) -> dict[str, Unit]:
        """The units that are done, by id. A line that a crash cut short does not count."""
        try:
            lines = (self.folder / _UNITS_FILE).read_bytes().split(b"\n")
        except FileNotFoundError:
            return {}
        found = (_unit(line) for line in lines)
        return {unit.id: unit for unit in found if unit is not None}

    def commit(self, unit: Unit) -> None:
        """A unit is done, and stays so through a power cut; one writer of a shard at a time."""
        line = json.dumps(asdict(unit)).encode() + b"\n"
        with (self.folder / _UNITS_FILE).open("ab") as file:
            # Whatever a crash has left of the last line ends here.
            file.write((b"\n" if file.tell() else b"") + line)
            file.flush()
            os.fsync(file.fileno())

    def publish(self) -> None:
        """Nobody writes to it any more: readers need not look for changes."""
        done = self.units().values()
        summary = {
            "format": FORMAT,
            "documents": sum(unit.documents for unit in done),
            "tokens": sum(unit.tokens for unit in done),
            "num_bytes": sum(unit.num_bytes for unit in done),
        }
        write_whole(self.folder / _PUBLISHED_FILE, json.dumps(summary))

    def reopen(self) -> None:
        """It may be written again; who has it open must open it anew."""
        (self.folder / _PUBLISHED_FILE).unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class Manifest:
    """The shards of a store.

    Args:
        path: the file that names them.
        id: a random name, made with the manifest.
        unit_documents: documents of a unit of work.
        near_max_bytes: that states of remote shards may take on this disk.
    """

    path: Path
    id: str
    shards: tuple[Shard, ...]
    unit_documents: int = UNIT_DOCUMENTS
    near_max_bytes: int = NEAR_MAX_BYTES

    @classmethod
    def create(
        cls, folder: str | os.PathLike[str], shards: int, unit_documents: int = UNIT_DOCUMENTS
    ) -> Manifest:
        """The manifest of a folder; where it has none yet, one of so many empty shards.

        Many may do so at once: one of them makes it.

        Raises:
            ValueError: it has another number of shards, or units of another size.
            StoreOpenError: the folder cannot be used.
        """
        if shards < 1 or unit_documents < 1:
            raise ValueError(f"{shards} shards of units of {unit_documents} documents are none")
        path = Path(folder).expanduser().absolute() / MANIFEST_FILE
        names = [f"shard-{number:05}" for number in range(shards)]
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if any(path.parent.glob("data.mdb")):
                raise StoreOpenError(f"{path.parent} is a store of one file, not of shards")
            if not path.exists():
                text = _text(uuid.uuid4().hex, names, unit_documents)
                write_whole(path, text, only_if_new=True)
        except OSError as error:
            raise StoreOpenError(f"{path} cannot be written: {error.strerror}") from error
        found = cls.open(path)
        if len(found.shards) != shards or found.unit_documents != unit_documents:
            raise ValueError(
                f"{path} has {len(found.shards)} shards of units of {found.unit_documents} "
                f"documents, not {shards} of {unit_documents}"
            )
        return found

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Manifest:
        """Read a manifest, or that of a folder.

        Raises:
            StoreOpenError: there is none, or it is not one of this format.
        """
        file = Path(path).expanduser().absolute()
        file = file / MANIFEST_FILE if file.is_dir() else file
        try:
            text = file.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise StoreOpenError(f"cannot read {file}: {error}") from error
        return cls._parsed(file, text)

    @classmethod
    def _parsed(cls, file: Path, text: str) -> Manifest:
        try:
            head = read_json(text)
            if head["format"] != FORMAT:
                raise ValueError(f"format {head['format']}, this release reads {FORMAT}")
            shards = tuple(_shard(file.parent, place) for place in head["shards"])
            unit_documents = int(head.get("unit_documents", UNIT_DOCUMENTS))
            near_max_bytes = int(head.get("near_max_bytes", NEAR_MAX_BYTES))
            found = cls(file, str(head["id"]), shards, unit_documents, near_max_bytes)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreOpenError(f"{file} is not a manifest of shards: {error!r}") from error
        if len({shard.name for shard in shards}) != len(shards):
            raise StoreOpenError(f"{file} names a shard twice")
        return found

    def shard(self, name_or_number: str | int) -> Shard:
        """One of the shards.

        Raises:
            ValueError: there is none such.
        """
        for number, shard in enumerate(self.shards):
            if name_or_number in (number, shard.name):
                return shard
        raise ValueError(f"{self.path} has no shard {name_or_number!r}")

    def with_shard(self, place: str | os.PathLike[str]) -> Manifest:
        """The manifest with a shard more, written down; nothing that is stored is touched."""
        return self.with_shards([place])

    def without_shard(self, name: str) -> Manifest:
        """The manifest with a shard less, written down; the shard's files stay."""
        return self.with_shards([], without=[name])

    def with_shards(
        self, places: Iterable[str | os.PathLike[str]], without: Iterable[str] = ()
    ) -> Manifest:
        """The manifest with some shards more and some less, written down in one step.

        Raises:
            ValueError: a shard that is to go is not there.
            StoreOpenError: two shards would have one name.
        """
        gone = {self.shard(name).name for name in without}
        left = [self._entry(shard) for shard in self.shards if shard.name not in gone]
        every = [*left, *(os.fspath(place) for place in places)]
        text = _text(self.id, every, self.unit_documents, self.near_max_bytes)
        changed = Manifest._parsed(self.path, text)
        write_whole(self.path, text)
        return changed

    def with_near_max_bytes(self, num_bytes: int) -> Manifest:
        """The manifest with another limit of what is kept near, written down."""
        return replace(self, near_max_bytes=num_bytes).with_shards([])

    def _entry(self, shard: Shard) -> str:
        """A shard as the file names it."""
        with suppress(StoreError):
            if shard.folder.parent == self.path.parent:
                return shard.name
        return shard.place


def manifest_at(path: str | os.PathLike[str]) -> Path | None:
    """The manifest that a path means: itself, or that of the folder; None where it means none."""
    found = Path(path).expanduser()
    if found.is_dir():
        found = found / MANIFEST_FILE
    return found if found.suffix == ".json" and found.is_file() else None


def write_whole(path: Path, text: str, *, only_if_new: bool = False) -> None:
    """Write a small file so that nobody ever sees a part of it, and a power cut leaves it whole."""
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with unfinished.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    try:
        if only_if_new:
            with suppress(FileExistsError):
                os.link(unfinished, path)
        else:
            os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _text(
    store_id: str,
    places: Iterable[str],
    unit_documents: int,
    near_max_bytes: int = NEAR_MAX_BYTES,
) -> str:
    head = {
        "format": FORMAT,
        "id": store_id,
        "unit_documents": unit_documents,
        "near_max_bytes": near_max_bytes,
        "shards": list(places),
    }
    return json.dumps(head, indent=1) + "\n"


def _shard(beside: Path, place: str) -> Shard:
    is_remote = "://" in place
    path = place.partition("?")[0] if is_remote else place
    name = path.rstrip("/").rpartition("/")[2].rpartition("@")[2]
    if not name:
        raise ValueError(f"{without_secrets(place)!r} names no shard")
    return Shard(name, place if is_remote else str(beside / place))


def _unit(line: bytes) -> Unit | None:
    try:
        data: dict[str, Any] = read_json(line)
        return Unit(**{each.name: data[each.name] for each in fields(Unit)})
    except (ValueError, KeyError, TypeError):
        return None
