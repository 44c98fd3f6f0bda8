"""Other shards of the same states: several merged into one, or one split into several.

States are copied as they are stored, with owners and uses, into folders that nobody knows yet; then
the manifest is exchanged in one step. Who has the old shards open goes on reading them: their files
are left, and may be deleted when nobody does any more.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from hcache_rag.state import StateRecord
from hcache_rag.store.manifest import Manifest, Shard
from hcache_rag.store.placement import Placement
from hcache_rag.store.states import StateStore, open_again


def merge_shards(manifest: Manifest, names: Sequence[str], into: str) -> Manifest:
    """The manifest with one shard in the place of some; it is published if all of these were.

    Raises:
        ValueError: a name is not known, or is taken.
        StoreError: a shard cannot be read or is encrypted; nothing has changed then.
    """
    shards = [manifest.shard(name) for name in names]
    with _NewShards(manifest, [into]) as new:
        for shard in shards:
            _copy(shard, new.folders[into], lambda _record: True)
            for unit in shard.units().values():
                new.shard(into).commit(unit)
        return new.take_the_place_of(shards)


def split_shard(manifest: Manifest, name: str, into: Sequence[str]) -> Manifest:
    """The manifest with some shards in the place of one, its documents placed among them.

    Preambles go to each. They are published if it was.

    Raises: as for `merge_shards`.
    """
    shard, placement = manifest.shard(name), Placement(into)
    with _NewShards(manifest, into) as new:
        for each, folder in new.folders.items():

            def belongs(record: StateRecord, to: str = each) -> bool:
                return record.is_preamble or placement.place(record.text) == to

            _copy(shard, folder, belongs)
        return new.take_the_place_of([shard])


class _NewShards:
    """Shards in the making: folders with other names, which go if something fails."""

    def __init__(self, manifest: Manifest, names: Sequence[str]) -> None:
        taken = {shard.name for shard in manifest.shards} & set(names)
        if taken or not names or len(set(names)) < len(names):
            raise ValueError(f"{', '.join(sorted(taken)) or names} cannot name new shards")
        self._manifest = manifest
        beside = manifest.path.parent
        self.folders = {name: beside / f".{name}.unfinished" for name in names}

    def __enter__(self) -> _NewShards:
        self._clear()
        for folder in self.folders.values():
            folder.mkdir(mode=0o700)
        return self

    def __exit__(self, *_: object) -> None:
        self._clear()

    def _clear(self) -> None:
        for folder in self.folders.values():
            shutil.rmtree(folder, ignore_errors=True)

    def shard(self, name: str) -> Shard:
        """One of them."""
        return Shard(name, str(self.folders[name]))

    def take_the_place_of(self, shards: Sequence[Shard]) -> Manifest:
        """Give the folders their names, and name these in the manifest instead of others."""
        for name, folder in self.folders.items():
            if all(shard.is_published for shard in shards):
                self.shard(name).publish()
            folder.rename(folder.with_name(name))
        return self._manifest.with_shards(list(self.folders), without=[s.name for s in shards])


def _copy(shard: Shard, folder: Path, wanted: Callable[[StateRecord], bool]) -> None:
    """Copy the wanted states of all namespaces of a shard."""
    with StateStore.open(shard.folder, read_only=True) as first:
        namespaces = first.all_namespaces()
    for namespace in namespaces:
        with (
            open_again(str(shard.folder), namespace, "fast", None, True) as source,
            open_again(str(folder), namespace, "fast", None, False) as target,
        ):
            source.copy_to(target, wanted)
