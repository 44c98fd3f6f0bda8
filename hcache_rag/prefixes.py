"""The KV caches of what states were computed after: read once, for indexing and recomputing."""

from __future__ import annotations

import threading
from collections import OrderedDict

import numpy as np
from transformers import DynamicCache

from hcache_rag.models import ModelAdapter
from hcache_rag.state import StateKey, TokenIds, child_key, token_array
from hcache_rag.store import StateStore

MAX_CACHES = 4
"""So many prefixes' KV caches are kept: an engine has its preamble, and perhaps an old one."""


class Prefixes:
    """Paths of the state tree, by the key of their last state. Thread-safe.

    Args:
        root: the root of the model's state tree, which is the empty path.
    """

    def __init__(self, adapter: ModelAdapter, store: StateStore, root: StateKey) -> None:
        self._adapter = adapter
        self._store = store
        self._tokens: dict[StateKey, TokenIds] = {root: token_array([])}
        self._caches: OrderedDict[StateKey, DynamicCache] = OrderedDict()
        self._lock = threading.RLock()

    def add(self, parent: StateKey, token_ids: TokenIds) -> StateKey:
        """Make the path of `token_ids` after a known path known; its key."""
        if not len(token_ids):
            return parent
        with self._lock:
            path = np.concatenate((self._tokens[parent], token_ids))
            key = child_key(parent, token_ids)
            self._tokens[key] = path
            return key

    def __contains__(self, key: StateKey) -> bool:
        return self.token_ids(key) is not None

    def token_ids(self, key: StateKey) -> TokenIds | None:
        """All token ids of a path (P,); None if one of its states is in no record."""
        with self._lock:
            if key not in self._tokens:
                record = self._store.record(key)
                if record is None or self.token_ids(record.parent) is None:
                    return None
                self.add(record.parent, record.token_ids)
            return self._tokens[key]

    def cache(self, key: StateKey) -> DynamicCache:
        """The KV cache of a known path, read by the model when it is first asked for.

        Raises:
            KeyError: the path is not known.
        """
        with self._lock:
            if key not in self._caches:
                token_ids = self.token_ids(key)
                if token_ids is None:
                    raise KeyError(key.hex())
                self._caches[key] = self._adapter.prefill(token_ids.tolist())
                while len(self._caches) > MAX_CACHES:
                    self._caches.popitem(last=False)
            self._caches.move_to_end(key)
            return self._caches[key]
