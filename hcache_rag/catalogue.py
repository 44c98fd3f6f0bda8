"""Which texts are known, and which of them have a state that this model can use."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from hcache_rag.errors import StoreError
from hcache_rag.prompt import Tokenizer
from hcache_rag.state import StateKey, StateRecord, TokenIds, child_key
from hcache_rag.store import StateStore
from hcache_rag.texts import TextSet, find_texts

logger = logging.getLogger("hcache_rag")

NOT_STORED = "no stored state"


@dataclass(frozen=True, slots=True, eq=False)
class ResolvedPiece:
    """A stretch of the prompt with the state it can be restored from.

    Args:
        token_ids: shape (T,).
        document: the known text whose first tokens these are; None for a gap.
        record: the state; None where the tokens must be read afresh.
        miss: why a known document has none.
    """

    token_ids: TokenIds
    document: str | None
    record: StateRecord | None
    miss: str | None = None


class Catalogue:
    """The texts of a store and those that retrievers have announced. Thread-safe.

    Args:
        root: the root of the state tree of the model and tokenizer in use.
        parent: the path (preamble) that new states are stored after, looked up first.
    """

    def __init__(
        self, store: StateStore, tokenizer: Tokenizer, root: StateKey, parent: StateKey
    ) -> None:
        self._store = store
        self._tokenizer = tokenizer
        self._root = root
        self._parent = parent
        self._index = TextSet()
        self._states: dict[str, set[StateKey]] = {}
        self._foreign: dict[str, StateKey] = {}
        self._damaged: dict[str, str] = {}
        self._lock = threading.Lock()
        try:
            for record in store.records():
                self.add(record)
        except StoreError as error:
            logger.warning("%s; the states behind the damage are not used", error)

    @property
    def num_foreign(self) -> int:
        """Documents whose only states belong to other models or tokenizers."""
        return len(self._foreign)

    def add(self, record: StateRecord) -> None:
        """A state was stored, or found in the store."""
        if record.is_preamble:
            return
        with self._lock:
            if record.root == self._root:
                self._states.setdefault(record.text, set()).add(record.key)
                self._foreign.pop(record.text, None)
                self._damaged.pop(record.text, None)
            elif record.text not in self._states:
                self._foreign[record.text] = record.root
        self._index.add([record.text])

    def announce(self, texts: Iterable[str]) -> None:
        """These texts are documents, with a state or without."""
        self._index.add(texts)

    def mark_damaged(self, record: StateRecord, reason: str) -> None:
        """A state turned out to be unusable: do not look at it again."""
        with self._lock:
            self._states.get(record.text, set()).discard(record.key)
            self._damaged[record.text] = reason

    def resolve(self, prompt: str, *, add_bos: bool) -> list[ResolvedPiece]:
        """Cut a prompt into pieces and find their states."""
        matches = find_texts(prompt, [self._index])
        records = {match.text: self._record(match.text) for match in matches}

        def stored(text: str) -> TokenIds | None:
            record = records[text]
            return None if record is None else record.token_ids

        pieces = self._tokenizer.pieces(prompt, matches, add_bos=add_bos, stored=stored)
        return [
            ResolvedPiece(piece.token_ids, None, None)
            if piece.document is None
            else self._resolve(piece.token_ids, piece.document, records[piece.document])
            for piece in pieces
        ]

    def _record(self, text: str) -> StateRecord | None:
        """The state of a text: one computed after `parent` if there is one, else any."""
        with self._lock:
            keys = sorted(self._states.get(text, ()))
        records = [r for r in map(self._store.record, keys) if r is not None]
        if not records:  # another process may have stored it meanwhile
            token_ids = self._tokenizer.document(text)
            found = self._store.record(child_key(self._parent, token_ids))
            records = [found] if found is not None else []
        return max(records, key=lambda r: r.parent == self._parent, default=None)

    def _resolve(
        self, token_ids: TokenIds, document: str, record: StateRecord | None
    ) -> ResolvedPiece:
        miss: str | None = None
        if record is not None:
            if np.array_equal(record.token_ids[: len(token_ids)], token_ids):
                return ResolvedPiece(token_ids, document, record)
            miss = "stored token ids differ from the prompt's"
        with self._lock:
            miss = miss or self._damaged.get(document)
            foreign = self._foreign.get(document)
        if miss is None and foreign is not None:
            name = self._store.model_names().get(foreign, "another model")
            miss = f"state made by another model or tokenizer ({name})"
        return ResolvedPiece(token_ids, document, None, miss or NOT_STORED)
