"""Where states are kept: knows bytes and keys, neither models nor tensors."""

from hcache_rag.store.backend import Durability
from hcache_rag.store.description import PATHS
from hcache_rag.store.models import StoredModel
from hcache_rag.store.rows import NewState
from hcache_rag.store.salvage import Salvaged
from hcache_rag.store.states import StateStore, StoreReader
from hcache_rag.store.stats import StoreStats

__all__ = [
    "PATHS",
    "Durability",
    "NewState",
    "Salvaged",
    "StateStore",
    "StoreReader",
    "StoreStats",
    "StoredModel",
]
