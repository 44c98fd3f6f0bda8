"""Which texts are known, and which of them have a state that this model can use."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hcache_rag.compose import paths_before
from hcache_rag.errors import StoreError
from hcache_rag.keeper import Opening
from hcache_rag.paths import Step
from hcache_rag.prompt import Tokenizer
from hcache_rag.state import StateKey, StateRecord, TokenIds, token_array
from hcache_rag.store import StateStore
from hcache_rag.texts import Match, TextSet, find_texts

logger = logging.getLogger("hcache_rag")

NOT_STORED = "no stored state"

NO_TOKENS = token_array([])


@dataclass(frozen=True, slots=True, eq=False)
class ResolvedPiece:
    """A stretch of the prompt with the state it can be restored from.

    Args:
        token_ids: shape (T,).
        document: the known text whose first tokens these are; None for a gap.
        record: the state; None where the tokens must be read afresh.
        miss: why a known document has none.
        others: states of the same tokens after other paths.
        is_path: the state is one of the path that the prompt begins with.
    """

    token_ids: TokenIds
    document: str | None
    record: StateRecord | None
    miss: str | None = None
    others: tuple[StateRecord, ...] = ()
    is_path: bool = False


@dataclass(slots=True)
class Resolved:
    """A prompt in pieces.

    Args:
        prompt: its text.
        first: that of the tokens that were put in front of it.
        pieces: one behind another.
        walked: the path that it was found to begin with.
        documents_end: characters up to the end of its last document; 0 where it has none behind
            the path.
    """

    prompt: str
    first: str
    pieces: list[ResolvedPiece]
    walked: tuple[Step, ...]
    documents_end: int

    @property
    def opening(self) -> Opening | None:
        """Its beginning up to the end of its last document, if it has documents."""
        last = max((n for n, p in enumerate(self.pieces) if p.document is not None), default=None)
        if last is None:
            return None
        token_ids = np.concatenate([piece.token_ids for piece in self.pieces[: last + 1]])
        return Opening(token_ids, self.first + self.prompt[: self.documents_end])

    def path_end(self, root: StateKey) -> tuple[StateKey, int, int]:
        """The last state of its path that it has all tokens of, or `root`; tokens and characters up
        to there.
        """
        key, tokens, chars = root, 0, 0
        for step, piece in zip(self.walked, self.pieces, strict=False):
            if piece.record is not step.record or len(piece.token_ids) < step.record.num_tokens:
                break
            key, tokens = step.record.key, tokens + step.num_tokens
            chars += step.num_chars
        return key, tokens, chars


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

    def resolve(self, prompt: str, *, add_bos: bool, walked: Sequence[Step] = ()) -> Resolved:
        """Cut a prompt into pieces and find their states.

        Args:
            walked: the path that it begins with; documents are looked for behind it.
        """
        known_chars = sum(step.num_chars for step in walked)
        matches = self._matches(prompt, known_chars)
        path = np.concatenate([s.record.token_ids[: s.num_tokens] for s in walked] or [NO_TOKENS])
        known = {match.text: self._known(match.text) for match in matches}

        def stored(text: str) -> TokenIds | None:
            records = known[text][0]
            return records[0].token_ids if records else None

        pieces = self._tokenizer.pieces(
            prompt,
            matches,
            add_bos=add_bos,
            stored=stored,
            known=(path, known_chars) if walked else None,
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
        first = self._tokenizer.first(prompt, add_bos=add_bos)
        end = matches[-1].end if matches else 0
        return Resolved(prompt, first, resolved, tuple(walked), end)

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


def _walked(token_ids: TokenIds, steps: Sequence[Step]) -> Iterator[ResolvedPiece]:
    """The tokens that a prompt has in common with a path, as pieces."""
    left = len(token_ids)
    for step in steps:
        tokens = min(step.num_tokens, left)
        if tokens:
            yield ResolvedPiece(step.record.token_ids[:tokens], None, step.record, is_path=True)
        left -= tokens


def exact_ones(pieces: Sequence[ResolvedPiece], root: StateKey) -> list[ResolvedPiece]:
    """The pieces, with a state that was computed after all that stands before, if there is one."""
    paths = paths_before([(piece.token_ids, piece.record) for piece in pieces], root)
    without = len(pieces) - len(paths)
    found = list(pieces[:without])
    for path, piece in zip(paths, pieces[without:], strict=True):
        exact = next((record for record in piece.others if record.parent == path), None)
        found.append(piece if exact is None else replace(piece, record=exact, others=()))
    return found
