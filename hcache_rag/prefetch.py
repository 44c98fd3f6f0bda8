"""Reading ahead: the states of documents that were retrieved, before a prompt asks for them.

Between retrieving and restoring a prompt is built, and perhaps nodes are reranked. Meanwhile the
stored values are touched, in the order in which they will be restored, so that the system has them
in memory by then. Nothing is kept here: restoring reads from the store as ever, and need not wait.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from hcache_rag.background import Background
from hcache_rag.errors import StoreError
from hcache_rag.state import StateRecord
from hcache_rag.store import StateStore

logger = logging.getLogger("hcache_rag")

MAX_BYTES = 1 << 28
"""So much is read ahead for one question at most."""


class Prefetcher:
    """Reads states ahead on a thread of its own, for the last question only. Thread-safe.

    Args:
        find: the state that a text will be restored from, if there is one.
    """

    def __init__(self, store: StateStore, find: Callable[[str], StateRecord | None]) -> None:
        self._store = store
        self._find = find
        self._background = Background("hcache-prefetch")
        self._turn = 0

    def start(self, texts: Iterable[str]) -> None:
        """Begin to read the states of some texts; what was begun before is left."""
        self._turn += 1
        self._background.submit(partial(self._read, list(texts), self._turn))

    def _read(self, texts: Sequence[str], turn: int) -> None:
        try:
            records = [record for text in texts if (record := self._find(text)) is not None]
            left = MAX_BYTES
            for layer in range(max((len(r.layout.layers) for r in records), default=0)):
                with self._store.reading() as reader:  # not long: others may want to write
                    for record in records:
                        for chunk in range(record.layout.num_chunks(record.num_tokens)):
                            if turn != self._turn or left <= 0:
                                return
                            left -= reader.load(record.key, layer, chunk)
        except StoreError as error:
            logger.debug("nothing more is read ahead: %s", error)

    def flush(self) -> None:
        """Wait until all is read."""
        self._background.flush()

    def close(self) -> None:
        """Leave what was begun, and wait for the thread."""
        self._turn += 1
        self._background.close()
