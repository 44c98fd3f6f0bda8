"""Reading documents once: capture in batches, encode, store. One transaction per document."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import DynamicCache

from hcache_kernels import row_scale
from hcache_rag import codec
from hcache_rag.codec import ChunkShape
from hcache_rag.layout import Representation, StateLayout
from hcache_rag.models import CapturedLayer, ModelAdapter, bit_words
from hcache_rag.state import StateKey, StateRecord, TokenIds
from hcache_rag.store import StateStore

BATCH_TOKENS = 2048
"""Tokens of one captured batch, padding included."""


@dataclass(frozen=True, slots=True)
class PrecomputeReport:
    """What a call of `HCacheEngine.precompute` did.

    Args:
        stored, reused: documents whose state was computed now, and whose state was there already.
        skipped: documents without a state and why, as (first words, reason).
        stored_tokens, stored_bytes: of the states computed now.
        seconds: wall time.
    """

    stored: int = 0
    reused: int = 0
    skipped: tuple[tuple[str, str], ...] = ()
    stored_tokens: int = 0
    stored_bytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class PendingState:
    """A document whose state is to be computed."""

    key: StateKey
    token_ids: TokenIds
    text: str


def batches(pending: Sequence[PendingState]) -> Iterator[list[PendingState]]:
    """Documents in batches of similar length, at most `BATCH_TOKENS` tokens with padding."""
    batch: list[PendingState] = []
    for state in sorted(pending, key=lambda s: len(s.token_ids)):
        if batch and (len(batch) + 1) * len(state.token_ids) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(state)
    if batch:
        yield batch


def store_batch(
    adapter: ModelAdapter,
    store: StateStore,
    batch: Sequence[PendingState],
    layout: StateLayout,
    root: StateKey,
    parent: StateKey,
    after: DynamicCache,
    *,
    is_preamble: bool = False,
) -> tuple[list[StateRecord], int]:
    """Read a batch of documents after a prefix and store their states.

    Returns:
        The records, and the bytes of all values.
    """
    captured = adapter.capture([s.token_ids.tolist() for s in batch], layout, after)
    records, stored_bytes = [], 0
    for row, state in enumerate(batch):
        record = StateRecord(
            state.key, parent, root, state.token_ids, state.text, layout, time.time(), is_preamble
        )
        stored_bytes += store.put(record, _values(adapter, record, captured, row))
        records.append(record)
    return records, stored_bytes


def _values(
    adapter: ModelAdapter, record: StateRecord, captured: Sequence[CapturedLayer], row: int
) -> Iterator[tuple[int, int, bytearray]]:
    spec, layout, length = adapter.spec, record.layout, record.num_tokens
    for layer, (fmt, caught) in enumerate(zip(layout.layers, captured, strict=True)):
        first, second = _arrays(adapter, layer, fmt.representation, caught, row, length)
        token_axis = 0 if fmt.representation is Representation.HIDDEN else 1
        for chunk in range(layout.num_chunks(length)):
            begin = chunk * layout.chunk_tokens
            tokens = min(layout.chunk_tokens, length - begin)
            shape = ChunkShape.of(fmt, tokens, spec)
            at = (slice(None),) * token_axis + (slice(begin, begin + tokens),)
            value = codec.encode(shape, record.key, layer, chunk, first[at], second[at])
            yield layer, chunk, value


def _arrays(
    adapter: ModelAdapter,
    layer: int,
    representation: Representation,
    caught: CapturedLayer,
    row: int,
    length: int,
) -> tuple[codec.Words, codec.Words]:
    """A captured document's (rows (T, E), row scales (T,)) or (K, V), each (G, T, D)."""
    first = caught.first[row, :length].detach()
    if representation is Representation.HIDDEN:
        scales = row_scale(first, adapter.norm(layer)[1])
        return bit_words(first.contiguous()), scales.numpy()
    if caught.second is None:
        raise ValueError(f"layer {layer} was captured without V")
    shape = (length, adapter.spec.num_kv_heads, adapter.spec.head_dim)
    second = caught.second[row, :length].detach()
    keys, values = (t.contiguous().view(shape).transpose(0, 1) for t in (first, second))
    return bit_words(keys), bit_words(values)
