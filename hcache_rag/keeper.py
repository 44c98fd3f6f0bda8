"""Keeps paths in the background: what was read and said, and what is asked for again and again.

A request leaves a copy of its K and V, which costs as long as copying memory; a thread turns them
into a state and writes it. The next turn of a conversation waits for that where it comes sooner.
"""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import torch

from hcache_rag.forks import ForkedLock
from hcache_rag.models import ModelAdapter
from hcache_rag.openmp import lent_threads
from hcache_rag.paths import MIN_TOKENS, Paths, Snapshot, Step
from hcache_rag.state import StateKey, TokenIds, child_key

logger = logging.getLogger("hcache_rag")

MAX_WAITING = 4
"""So many states may wait to be written; what comes then is not kept."""
WAIT_S = 2.0
"""So long a prompt waits for what it goes on from; then it is read: others may be writing."""
MAX_COUNTED = 4096
"""So many rows of documents are counted, those seen last."""
RECURS = 3
"""A row of documents that is seen so often is kept as a path."""


@dataclass(frozen=True, slots=True, eq=False)
class Opening:
    """A prompt's beginning up to the end of its last document, which other prompts may share."""

    token_ids: TokenIds
    text: str


class Keeper:
    """Writes the paths of one model, one after another. Thread-safe.

    Args:
        root: of the state tree.
        is_kept: rows of documents that recur are kept.
    """

    def __init__(
        self, adapter: ModelAdapter, paths: Paths, root: StateKey, *, recurring: bool = True
    ) -> None:
        self._adapter = adapter
        self._paths = paths
        self._root = root
        self._recurring = recurring
        self._is_closed = False
        self._counts: OrderedDict[StateKey, int] = OrderedDict()
        self._start()

    def _start(self) -> None:
        self._lock = ForkedLock()
        self._pid = os.getpid()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="hcache-paths")
        self._waiting: dict[Future[Any], str] = {}

    def walk(self, prompt: str, *, add_bos: bool) -> list[Step]:
        """See `Paths.walk`; what is being written of this prompt's beginning is waited for."""
        self._forget_in_a_fork()
        with self._lock:
            its = [f for f, text in self._waiting.items() if prompt.startswith(text)]
        wait(its, WAIT_S)
        return self._paths.walk(prompt, add_bos=add_bos)

    def keep(self, snapshot: Snapshot, prompt: str) -> bool:
        """Keep what was read and said; False where too much is waiting.

        Args:
            prompt: what a prompt that goes on from there begins with.
        """
        return self._later(lambda: self._paths.keep(snapshot), prompt)

    def count(self, opening: Opening) -> bool:
        """Documents were asked for in a row; whether they will be kept as a path, being common."""
        if not self._recurring or len(opening.token_ids) < MIN_TOKENS:
            return False
        key = child_key(self._root, opening.token_ids)
        self._forget_in_a_fork()
        with self._lock:
            self._counts[key] = self._counts.pop(key, 0) + 1
            while len(self._counts) > MAX_COUNTED:
                self._counts.popitem(last=False)
            if self._counts[key] != RECURS:
                return False
        return self._later(lambda: self._read(opening), opening.text)

    def _read(self, opening: Opening) -> None:
        """Read an opening as a whole, and keep it."""
        if self._paths.text_of(opening.token_ids) != opening.text:
            return  # it could not be found by its text
        cache: Any = self._adapter.prefill(opening.token_ids.tolist())
        if self._adapter.is_changed:
            return  # these may be another model's
        keys = torch.cat([layer.keys for layer in cache.layers])
        values = torch.cat([layer.values for layer in cache.layers])
        self._paths.keep(
            Snapshot(self._root, opening.token_ids, opening.text, 0, keys, values, False)
        )

    def _later(self, work: Callable[[], object], prompt: str) -> bool:
        def run() -> None:
            try:
                with lent_threads():
                    work()
            except Exception:
                logger.exception("a path is not kept")

        self._forget_in_a_fork()
        with self._lock:
            if self._is_closed:
                return False
            if len(self._waiting) >= MAX_WAITING:
                logger.info("a path is not kept: %d are waiting to be written", MAX_WAITING)
                return False
            future = self._pool.submit(run)
            self._waiting[future] = prompt
        future.add_done_callback(self._done)
        return True

    def _done(self, future: Future[Any]) -> None:
        with self._lock:
            self._waiting.pop(future, None)

    def _forget_in_a_fork(self) -> None:
        """The thread is not there."""
        if self._pid != os.getpid():
            self._start()

    def flush(self) -> None:
        """Wait until everything is written."""
        self._forget_in_a_fork()
        with self._lock:
            waiting = list(self._waiting)
        wait(waiting)

    def close(self) -> None:
        """Write what is waiting, and end."""
        self._forget_in_a_fork()
        with self._lock:
            self._is_closed = True
        self.flush()
        self._pool.shutdown()
        self._paths.close()
