"""Pieces and their states to one sequence: what is restored where, what is read afresh. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import dropwhile
from typing import Any

import numpy as np
import numpy.typing as npt

from hcache_rag.state import StateKey, StateRecord, TokenIds, child_key, common_prefix, token_array

MIN_PREAMBLE_TOKENS = 8
"""A shorter common head with the stored preamble is not worth reading."""


@dataclass(frozen=True, slots=True, eq=False)
class RestoredSpan:
    """The first `num_tokens` tokens of a state, put at `position` in the prompt.

    `is_exact`: the state was computed after the very tokens that precede it here.
    """

    record: StateRecord
    num_tokens: int
    position: int
    is_exact: bool

    def is_in_full(self, dtype: str) -> bool:
        """Whether it is what a model of this dtype would compute here, but for rounding."""
        return self.is_exact and self.record.is_in_full(dtype)


@dataclass(frozen=True, slots=True, eq=False)
class Composition:
    """One prompt: its token ids (N,), the restored spans in order, and the positions left (F,)."""

    token_ids: TokenIds
    spans: tuple[RestoredSpan, ...]
    fresh_positions: npt.NDArray[np.int64]

    @property
    def restored_positions(self) -> npt.NDArray[np.int64]:
        """The positions of all restored tokens, span after span, shape (R,)."""
        if not self.spans:
            return np.empty(0, dtype=np.int64)
        return np.concatenate(
            [np.arange(s.position, s.position + s.num_tokens) for s in self.spans]
        )

    def unseen_rows(self, window: int) -> tuple[tuple[int, int], ...]:
        """Runs of restored rows (begin, end) that no fresh token looks at.

        Args:
            window: how many tokens up to its own one sees in a layer.
        """
        rows = self.restored_positions
        next_fresh = np.searchsorted(self.fresh_positions, rows)
        fresh = np.append(self.fresh_positions, np.iinfo(np.int64).max)
        edges = np.diff((fresh[next_fresh] >= rows + window).astype(np.int8), prepend=0, append=0)
        begins, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
        return tuple(zip(begins.tolist(), ends.tolist(), strict=True))

    @property
    def num_restored(self) -> int:
        """`R`."""
        return sum(span.num_tokens for span in self.spans)

    @property
    def num_exact(self) -> int:
        """Restored tokens whose state was computed after these very tokens."""
        return sum(span.num_tokens for span in self.spans if span.is_exact)


def compose(
    pieces: Sequence[tuple[TokenIds, StateRecord | None]],
    root: StateKey,
    preamble: StateRecord | None,
    *,
    exact_only: bool = False,
    beginning_only: bool = False,
) -> Composition:
    """Place pieces one after another.

    Args:
        pieces: token ids, and the state whose first tokens they are (None: read afresh).
        root: the root of the state tree.
        preamble: the state of the head that documents were stored after, if there is one.
        exact_only: restore only states computed after the very tokens that precede them.
        beginning_only: restore only what the prompt begins with, without a gap.

    The last token is always read afresh: it gives the first answer token.
    """
    pieces = [(ids, record) for ids, record in pieces if len(ids)]
    head = _head(pieces)
    spans: list[RestoredSpan] = []
    if preamble is not None:
        common = common_prefix(head, preamble.token_ids)
        if common >= MIN_PREAMBLE_TOKENS:
            spans.append(RestoredSpan(preamble, common, 0, is_exact=True))
    position = len(head)
    paths = paths_before(pieces, root)
    for path, (ids, record) in zip(paths, _after_head(pieces), strict=True):
        is_exact = record is not None and record.parent == path
        if record is not None and (is_exact or not exact_only):
            spans.append(RestoredSpan(record, len(ids), position, is_exact))
        position += len(ids)
    token_ids = _joined([ids for ids, _ in pieces])
    if beginning_only:
        spans = list(_beginning(spans))
    return Composition(token_ids, *_leave_last(spans, len(token_ids)))


def _beginning(spans: Sequence[RestoredSpan]) -> Iterator[RestoredSpan]:
    end = 0
    for span in spans:
        if span.position != end or not span.is_exact:
            return
        end += span.num_tokens
        yield span


def paths_before(
    pieces: Sequence[tuple[TokenIds, StateRecord | None]], root: StateKey
) -> list[StateKey]:
    """The key of all that stands before each piece, from the first one with a state on."""
    head = _head(pieces)
    path = child_key(root, head) if len(head) else root
    paths = []
    for ids, _ in _after_head(pieces):
        paths.append(path)
        path = child_key(path, ids) if len(ids) else path
    return paths


def _head(pieces: Sequence[tuple[TokenIds, Any]]) -> TokenIds:
    """The token ids before the first piece that has a state."""
    head: list[TokenIds] = []
    for ids, record in pieces:
        if record is not None:
            break
        head.append(ids)
    return _joined(head)


def _joined(parts: Sequence[TokenIds]) -> TokenIds:
    return np.concatenate(parts) if parts else token_array([])


def _after_head(
    pieces: Sequence[tuple[TokenIds, StateRecord | None]],
) -> Iterator[tuple[TokenIds, StateRecord | None]]:
    return dropwhile(lambda piece: piece[1] is None, pieces)


def _leave_last(
    spans: list[RestoredSpan], num_tokens: int
) -> tuple[tuple[RestoredSpan, ...], npt.NDArray[np.int64]]:
    if spans and spans[-1].position + spans[-1].num_tokens == num_tokens:
        last = spans.pop()
        if last.num_tokens > 1:
            spans.append(
                RestoredSpan(last.record, last.num_tokens - 1, last.position, last.is_exact)
            )
    is_fresh = np.ones(num_tokens, dtype=bool)
    for span in spans:
        is_fresh[span.position : span.position + span.num_tokens] = False
    return tuple(spans), np.flatnonzero(is_fresh)
