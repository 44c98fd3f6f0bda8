"""A prompt in pieces, each with the state that it can be restored from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from hcache_rag.compose import paths_before
from hcache_rag.paths import Step
from hcache_rag.state import StateKey, StateRecord, TokenIds


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
        add_bos: the tokenizer's own first token was put in front.
        pieces: one behind another.
        walked: the path that it was found to begin with.
        documents_end: characters up to the end of its last document; 0 where it has none behind
            the path.
    """

    prompt: str
    add_bos: bool
    pieces: list[ResolvedPiece]
    walked: tuple[Step, ...]
    documents_end: int

    @property
    def opening(self) -> TokenIds | None:
        """Its tokens up to the end of its last document, if it has documents."""
        last = max((n for n, p in enumerate(self.pieces) if p.document is not None), default=None)
        if last is None:
            return None
        return np.concatenate([piece.token_ids for piece in self.pieces[: last + 1]])

    def path(self) -> list[Step]:
        """The states of its path that are used, and that it has all tokens of."""
        used = []
        for step, piece in zip(self.walked, self.pieces, strict=False):
            if piece.record is not step.record or len(piece.token_ids) < step.record.num_tokens:
                break
            used.append(step)
        return used


def exact_ones(pieces: Sequence[ResolvedPiece], root: StateKey) -> list[ResolvedPiece]:
    """The pieces, with a state that was computed after all that stands before, if there is one."""
    paths = paths_before([(piece.token_ids, piece.record) for piece in pieces], root)
    without = len(pieces) - len(paths)
    found = list(pieces[:without])
    for path, piece in zip(paths, pieces[without:], strict=True):
        exact = next((record for record in piece.others if record.parent == path), None)
        found.append(piece if exact is None else replace(piece, record=exact, others=()))
    return found


def beginning_only(
    pieces: Sequence[ResolvedPiece], root: StateKey, why_not: str
) -> list[ResolvedPiece]:
    """The pieces, with states only of those that the prompt begins with, each one exact.

    Args:
        why_not: what is missed of the others.
    """
    paths = paths_before([(piece.token_ids, piece.record) for piece in pieces], root)
    without, is_whole = len(pieces) - len(paths), True
    found = list(pieces[:without])
    for path, piece in zip(paths, pieces[without:], strict=True):
        record = piece.record
        is_whole = is_whole and record is not None and record.parent == path
        if record is not None and not is_whole:
            piece = replace(piece, record=None, others=(), miss=why_not)
        if record is None or len(piece.token_ids) < record.num_tokens:
            is_whole = False
        found.append(piece)
    return found
