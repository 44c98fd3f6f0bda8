"""Keeps paths in the background: what was read and said, and what is asked for again and again.

A request leaves a copy of its K and V, which costs as long as copying memory; a thread turns them
into a state and writes it. The next turn of a conversation waits for that where it comes sooner.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from hcache_rag.background import Background
from hcache_rag.cache import RestoringCache
from hcache_rag.forks import ForkedLock
from hcache_rag.models import ModelAdapter
from hcache_rag.openmp import lent_threads
from hcache_rag.paths import MIN_TOKENS, Paths, Snapshot, Step, said
from hcache_rag.prompt import Tokenizer
from hcache_rag.resolved import Resolved
from hcache_rag.state import StateKey, StateRecord, TokenIds, child_key, token_array

logger = logging.getLogger("hcache_rag")

MAX_WAITING = 4
"""So many states may wait to be written; what comes then is not kept."""
WAIT_S = 2.0
"""So long a prompt waits for what it goes on from; then it is read: others may be writing."""
MAX_COUNTED = 4096
"""So many rows of documents are counted, those seen last."""
RECURS = 3
"""A row of documents that is seen so often is kept as a path."""


class Keeper:
    """Writes the paths of one model, one after another. Thread-safe.

    Args:
        recurring: rows of documents that recur are kept.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        paths: Paths,
        tokenizer: Tokenizer,
        root: StateKey,
        *,
        recurring: bool = True,
    ) -> None:
        self._adapter = adapter
        self._paths = paths
        self._tokenizer = tokenizer
        self._root = root
        self._recurring = recurring
        self._counts: OrderedDict[StateKey, int] = OrderedDict()
        self._lock = ForkedLock()
        self._background = Background(
            "hcache-paths", most=MAX_WAITING, failure="a path is not kept"
        )

    def walk(self, prompt: str, *, add_bos: bool) -> list[Step]:
        """See `Paths.walk`; what is being written of this prompt's beginning is waited for."""
        self._background.wait_for(prompt.startswith, WAIT_S)
        return self._paths.walk(prompt, add_bos=add_bos)

    def keep(self, snapshot: Snapshot, prompt: str, path: Sequence[StateRecord] = ()) -> bool:
        """Keep what was read and said; False where too much is waiting.

        Args:
            prompt: what a prompt that goes on from there begins with.
            path: the states that it was read after.
        """
        return self._later(lambda: self._paths.keep(snapshot, path), prompt)

    def remember(
        self, resolved: Resolved, cache: RestoringCache, answer: str, answer_ids: Sequence[int]
    ) -> bool:
        """Keep what was read and said behind the path that a prompt begins with.

        Args:
            answer, answer_ids: its text, and all tokens that were decoded.

        Returns:
            False where that is not worth a state, the model has changed or is in training mode, or
            too much is waiting.
        """
        if self._adapter.is_changed or self._adapter.is_training:
            return False
        path = resolved.path()
        first, chars = sum(step.num_tokens for step in path), sum(step.num_chars for step in path)
        its_ids, spans = cache.composition.token_ids, cache.composition.spans
        fed = answer_ids[: cache.num_filled - len(its_ids)]
        count, spoken = said(self._tokenizer, answer, fed)
        token_ids = np.concatenate((its_ids[first:], token_array(fed[:count])))
        if not count or len(token_ids) < MIN_TOKENS:
            return False
        text = resolved.prompt[chars:] + spoken
        if not path:
            text = self._tokenizer.first(resolved.prompt, add_bos=resolved.add_bos) + text
        dtype = self._adapter.spec.dtype
        snapshot = Snapshot(
            path[-1].record.key if path else self._root,
            token_ids,
            text,
            first,
            *cache.copied(first, len(token_ids)),
            is_approximate=not all(span.is_in_full(dtype) for span in spans),
        )
        return self.keep(snapshot, resolved.prompt, [step.record for step in path])

    def count(self, resolved: Resolved, num_exact: int) -> bool:
        """Documents were asked for in a row; whether they will be kept as a path, being common.

        Args:
            num_exact: so many of the prompt's first tokens are exact already.
        """
        opening = resolved.opening if self._recurring else None
        if opening is None or len(opening) < max(MIN_TOKENS, num_exact + 1):
            return False
        key = child_key(self._root, opening)
        with self._lock:
            self._counts[key] = self._counts.pop(key, 0) + 1
            while len(self._counts) > MAX_COUNTED:
                self._counts.popitem(last=False)
            if self._counts[key] != RECURS:
                return False
        first = self._tokenizer.first(resolved.prompt, add_bos=resolved.add_bos)
        text = resolved.prompt[: resolved.documents_end]
        return self._later(lambda: self._read(opening, first + text), text)

    def _read(self, token_ids: TokenIds, text: str) -> None:
        """Read a prompt's beginning as a whole, and keep it."""
        if self._adapter.is_training:
            return
        if self._tokenizer.text(token_ids.tolist()) != text:
            return  # it could not be found by its text
        cache: Any = self._adapter.prefill(token_ids.tolist())
        if self._adapter.is_changed:
            return  # these may be another model's
        pairs = [self._adapter.as_cached(layer.keys, layer.values) for layer in cache.layers]
        keys, values = (torch.cat(side) for side in zip(*pairs, strict=True))
        self._paths.keep(Snapshot(self._root, token_ids, text, 0, keys, values, False))

    def _later(self, work: Callable[[], object], prompt: str) -> bool:
        """Do it in the background; a prompt that goes on from this one waits for it."""

        def run() -> None:
            with lent_threads():
                work()

        is_taken = self._background.submit(run, prompt)
        if not is_taken:
            logger.info("a path is not kept: closed, or %d are waiting", MAX_WAITING)
        return is_taken

    def flush(self) -> None:
        """Wait until everything is written."""
        self._background.flush()

    def close(self) -> None:
        """Write what is waiting, and end."""
        self._background.close()
        self._paths.close()
