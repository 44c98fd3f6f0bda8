"""What the model reads at once when it indexes: documents alone, or one behind another.

A document that is read alone has seen no other one, but in a prompt most stand behind others. Its
state is nearer to what it is there when it was read behind some others, whichever.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from hcache_rag.state import StateKey, TokenIds, child_key

BATCH_TOKENS = 2048
"""Tokens that are read at once, padding included."""
CHAIN_TOKENS = 2048
"""Of documents that are read one behind another."""
LEAD_TOKENS = 256
"""Of what is read in front of the first of these, for it to have seen something."""


@dataclass(frozen=True, slots=True, eq=False)
class PendingState:
    """A document whose state is to be computed.

    Args:
        parent: the key of the path that it is read after.
        token_ids: shape (T,).
        text: of these tokens.
    """

    parent: StateKey
    token_ids: TokenIds
    text: str

    @property
    def key(self) -> StateKey:
        """Of its state; its parent's where it has no tokens."""
        return child_key(self.parent, self.token_ids) if len(self.token_ids) else self.parent


@dataclass(frozen=True, slots=True, eq=False)
class TokenRow:
    """Tokens (T,) of one pass, and the states that come of it, with where each begins."""

    token_ids: TokenIds
    states: tuple[tuple[int, PendingState], ...]


def alone(state: PendingState) -> TokenRow:
    """A document read behind nothing but its parent."""
    return TokenRow(state.token_ids, ((0, state),))


def chained(
    pending: Sequence[PendingState], separator: TokenIds, max_tokens: int
) -> Iterator[TokenRow]:
    """Documents one behind another, in rows of at most `max_tokens`, in the order given.

    In front of each row is the end of the document before it, of the first row that of its last; a
    single document has nothing in front.

    Args:
        pending: states of one parent; in rows, theirs is the path that is read before them.
        separator: tokens between two documents.
        max_tokens: of a row; a longer document has a row of its own, with nothing in front.
    """
    before: PendingState | None = None
    for group in _groups(pending, len(separator), max(1, max_tokens - LEAD_TOKENS)):
        front = before if before is not None else group[-1] if len(group) > 1 else None
        room = max_tokens - sum(len(s.token_ids) + len(separator) for s in group)
        yield _row(group, _end(front, min(room, LEAD_TOKENS)), separator)
        before = group[-1]


def _groups(
    pending: Sequence[PendingState], between: int, max_tokens: int
) -> Iterator[list[PendingState]]:
    group: list[PendingState] = []
    tokens = 0
    for state in pending:
        more = len(state.token_ids) + between
        if group and tokens + more > max_tokens:
            yield group
            group, tokens = [], 0
        group.append(state)
        tokens += more
    if group:
        yield group


def _end(state: PendingState | None, tokens: int) -> TokenIds:
    """The last tokens of a document."""
    ids = np.empty(0, np.uint32) if state is None else state.token_ids
    return ids[max(0, len(ids) - tokens) :] if tokens > 0 else ids[:0]


def _row(group: Sequence[PendingState], lead: TokenIds, separator: TokenIds) -> TokenRow:
    path, parts, states = group[0].parent, list[TokenIds](), list[tuple[int, PendingState]]()

    def read(ids: TokenIds) -> StateKey:
        parts.append(ids)
        return child_key(path, ids) if len(ids) else path

    if len(lead):
        path = read(lead)
        path = read(separator)
    for number, state in enumerate(group):
        if number:
            path = read(separator)
        begin = sum(map(len, parts))
        states.append((begin, PendingState(path, state.token_ids, state.text)))
        path = read(state.token_ids)
    return TokenRow(np.concatenate(parts), tuple(states))


def batches(rows: Sequence[TokenRow], batch_tokens: int = BATCH_TOKENS) -> Iterator[list[TokenRow]]:
    """Rows in batches of similar length, at most `batch_tokens` tokens with padding."""
    batch: list[TokenRow] = []
    for row in sorted(rows, key=lambda row: len(row.token_ids)):
        if batch and (len(batch) + 1) * len(row.token_ids) > batch_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
