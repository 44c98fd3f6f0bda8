"""Which texts are known, and which of them have a state that this model can use."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import numpy as np

from hcache_rag.errors import StoreError
from hcache_rag.paths import Step
from hcache_rag.prompt import Tokenizer
from hcache_rag.resolved import Resolved, ResolvedPiece
from hcache_rag.state import StateKey, StateRecord, TokenIds
from hcache_rag.store import StateStore
from hcache_rag.texts import Match, TextSet, find_texts

logger = logging.getLogger("hcache_rag")

NOT_STORED = "no stored state"


class Catalogue:
    """The texts of a store and those that retrievers have announced. Thread-safe.

    Args:
        root: the root of the state tree of the model and tokenizer in use.
        parent: the preamble's path: of several states of a text, one that was read right after it
            comes last, since it has seen no other document.
        announced: texts that are documents, with a state or without.
    """

    def __init__(
        self,
        store: StateStore,
        tokenizer: Tokenizer,
        root: StateKey,
        parent: StateKey,
        announced: TextSet,
    ) -> None:
        self._store = store
        self._tokenizer = tokenizer
        self._root = root
        self._parent = parent
        self._announced = announced
        self._damaged: dict[StateKey, tuple[str, str]] = {}

    def num_foreign(self) -> int:
        """Documents of other models or tokenizers, where there is none of this one."""
        totals = self._store.totals()
        if self._root in totals and totals[self._root].documents:
            return 0
        return sum(sums.documents for sums in totals.values())

    def mark_damaged(self, key: StateKey, text: str, reason: str) -> None:
        """A state turned out to be unusable: do not look at it again until it is stored anew."""
        self._damaged[key] = (text, reason)
        self._announced.add([text])  # it stays a document, whatever becomes of its state

    def mark_stored(self, key: StateKey) -> None:
        """A state has been stored."""
        self._damaged.pop(key, None)

    def is_damaged(self, key: StateKey) -> bool:
        """Whether a state turned out to be unusable."""
        return key in self._damaged

    def states(self, text: str) -> list[StateRecord]:
        """The states of a text that this model can use, best first."""
        return self._known(text)[0]

    def resolve(self, prompt: str, *, add_bos: bool, walked: Sequence[Step] = ()) -> Resolved:
        """Cut a prompt into pieces and find their states.

        Args:
            walked: the path that it begins with; documents are looked for behind it.
        """
        known_chars = sum(step.num_chars for step in walked)
        matches = self._matches(prompt, known_chars)
        known = {match.text: self._known(match.text) for match in matches}

        def stored(text: str) -> TokenIds | None:
            records = known[text][0]
            return records[0].token_ids if records else None

        pieces = self._tokenizer.pieces(
            prompt,
            matches,
            add_bos=add_bos,
            stored=stored,
            known=(_tokens_of(walked), known_chars) if walked else None,
        )
        resolved = list[ResolvedPiece]()
        for piece in pieces:
            if piece.is_known:
                resolved += _walked(piece.token_ids, walked)
            elif piece.document is None:
                resolved.append(ResolvedPiece(piece.token_ids, None, None))
            else:
                its = known[piece.document]
                resolved.append(self._resolve(piece.token_ids, piece.document, *its))
        end = matches[-1].end if matches else 0
        return Resolved(prompt, add_bos, resolved, tuple(walked), end)

    def _matches(self, prompt: str, start: int) -> list[Match]:
        rest = prompt[start:]
        try:
            found = find_texts(rest, [self._store, self._announced])
        except StoreError as error:
            logger.warning("%s; no stored document is looked for", error)
            found = find_texts(rest, [self._announced])
        return [Match(m.start + start, m.end + start, m.text) for m in found]

    def _known(self, text: str) -> tuple[list[StateRecord], str | None]:
        """The states of a text, or why there are none; first those that were read behind others."""
        try:
            records = self._store.find(text)
        except StoreError as error:
            return [], f"its state cannot be looked for ({error})"
        own = [r for r in records if r.root == self._root and r.key not in self._damaged]
        if own:
            return sorted(own, key=lambda record: record.parent == self._parent), None
        reasons = [reason for damaged, reason in self._damaged.values() if damaged == text]
        if reasons:
            return [], reasons[-1]
        for record in records:
            if record.root != self._root:
                name = self._store.model_names().get(record.root, "another model")
                return [], f"state made by another model or tokenizer ({name})"
        return [], NOT_STORED

    def _resolve(
        self, token_ids: TokenIds, document: str, records: list[StateRecord], miss: str | None
    ) -> ResolvedPiece:
        if not records:
            return ResolvedPiece(token_ids, document, None, miss)
        its = [r for r in records if np.array_equal(r.token_ids[: len(token_ids)], token_ids)]
        if its:
            return ResolvedPiece(token_ids, document, its[0], others=tuple(its[1:]))
        return ResolvedPiece(token_ids, document, None, "stored token ids differ from the prompt's")


def _tokens_of(steps: Sequence[Step]) -> TokenIds:
    return np.concatenate([step.record.token_ids[: step.num_tokens] for step in steps])


def _walked(token_ids: TokenIds, steps: Sequence[Step]) -> Iterator[ResolvedPiece]:
    """The tokens that a prompt has in common with a path, as pieces."""
    left = len(token_ids)
    for step in steps:
        tokens = min(step.num_tokens, left)
        if tokens:
            yield ResolvedPiece(step.record.token_ids[:tokens], None, step.record, is_path=True)
        left -= tokens
