"""hcache-rag: a local language model reads each document once; its states are restored from LMDB.

Importing this package imports neither torch nor llama_index; names are loaded when first used.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hcache_rag.engine import HCacheEngine
    from hcache_rag.errors import (
        DamagedStateError,
        DamagedStoreError,
        HCacheError,
        MissingStateError,
        ModelError,
        ModelNotFoundError,
        ProfileError,
        PromptTooLongError,
        SourceError,
        StateError,
        StoreBusyError,
        StoreError,
        StoreFullError,
        StoreMovedError,
        StoreOpenError,
        UnreachableStateError,
        UnsupportedModelError,
    )
    from hcache_rag.generation import GenerationOptions
    from hcache_rag.indexing import PrecomputeReport
    from hcache_rag.provenance import Generation, Provenance
    from hcache_rag.store import StateStore
    from hcache_rag.streaming import GenerationStream

logging.getLogger("hcache_rag").addHandler(logging.NullHandler())

__version__ = "0.1.0"

__all__ = [
    "DamagedStateError",
    "DamagedStoreError",
    "Generation",
    "GenerationOptions",
    "GenerationStream",
    "HCacheEngine",
    "HCacheError",
    "MissingStateError",
    "ModelError",
    "ModelNotFoundError",
    "PrecomputeReport",
    "ProfileError",
    "PromptTooLongError",
    "Provenance",
    "SourceError",
    "StateError",
    "StateStore",
    "StoreBusyError",
    "StoreError",
    "StoreFullError",
    "StoreMovedError",
    "StoreOpenError",
    "UnreachableStateError",
    "UnsupportedModelError",
]

_HOME = {
    "Generation": "provenance",
    "GenerationOptions": "generation",
    "GenerationStream": "streaming",
    "HCacheEngine": "engine",
    "PrecomputeReport": "indexing",
    "Provenance": "provenance",
    "StateStore": "store",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'hcache_rag' has no attribute {name!r}")
    return getattr(import_module(f"hcache_rag.{_HOME.get(name, 'errors')}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
