"""Opens the shards of a manifest, each by itself: one that cannot be opened takes no other down."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from hcache_rag.errors import StoreError, StoreOpenError
from hcache_rag.store.backend import Durability
from hcache_rag.store.cipher import KeySource
from hcache_rag.store.manifest import Manifest, Shard
from hcache_rag.store.near import Near
from hcache_rag.store.remote import RemoteStore
from hcache_rag.store.states import StateStore

logger = logging.getLogger("hcache_rag")


@dataclass(frozen=True, slots=True)
class Opened:
    """A shard that is open; it may be written unless its store is read-only.

    Args:
        is_final: it never changes any more.
    """

    shard: Shard
    store: StateStore
    is_final: bool

    @property
    def name(self) -> str:
        """The shard's."""
        return self.shard.name


def open_shards(
    manifest: Manifest,
    *,
    namespace: str,
    key: KeySource | None,
    durability: Durability,
    write_wait_s: float | None,
    read_only: bool,
) -> tuple[list[Opened], dict[str, str], Near | None]:
    """The shards that can be opened, why others cannot, and what is near of remote ones.

    Raises:
        StoreOpenError: there are shards, and none can be opened.
    """
    opened: list[Opened] = []
    down: dict[str, str] = {}
    near = None
    if any(shard.is_remote for shard in manifest.shards):
        near = Near(manifest.path.parent / "near", namespace, manifest.near_max_bytes)

    def store_of(shard: Shard, *, is_fixed: bool) -> StateStore:
        if near is not None and shard.is_remote:
            if key is not None:
                raise StoreOpenError("what is encrypted is not read from afar")
            return RemoteStore.open_url(shard.place, near, namespace=namespace)
        return StateStore.open(
            shard.folder,
            namespace=namespace,
            key=key,
            durability=durability,
            write_wait_s=write_wait_s,
            read_only=is_fixed,
        )

    for shard in manifest.shards:
        is_fixed = read_only or shard.is_published
        if is_fixed and _is_not_begun(shard):
            continue
        try:
            opened.append(Opened(shard, store_of(shard, is_fixed=is_fixed), shard.is_published))
        except StoreError as error:
            down[shard.name] = str(error)
            logger.warning("shard %s cannot be used: %s", shard.name, error)
    if down and not opened:
        if near is not None:
            near.close()
        why = next(iter(down.values()))
        raise StoreOpenError(f"no shard of {manifest.path} can be opened: {why}")
    return opened, down, near


def _is_not_begun(shard: Shard) -> bool:
    """Whether nobody has stored anything in it yet."""
    return not shard.is_remote and not (shard.folder / "data.mdb").exists()
