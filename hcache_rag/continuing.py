"""A document that has changed: its state up to the first token that differs is an earlier one's.

States are causal: what stands behind a token does not change what was computed of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from hcache_rag import codec
from hcache_rag.buffers import Buffers
from hcache_rag.codec import ChunkShape
from hcache_rag.compose import Composition, RestoredSpan
from hcache_rag.executor import open_restoring
from hcache_rag.layout import LayerFormat, Representation, StateLayout
from hcache_rag.models import CapturedLayer, ModelAdapter
from hcache_rag.prefixes import Prefixes
from hcache_rag.state import StateKey, StateRecord, TokenIds, common_prefix
from hcache_rag.store import StateStore, StoreReader
from hcache_rag.values import chunk_arrays

MIN_COMMON_TOKENS, MIN_COMMON_SHARE = 64, 0.5
"""With less in common with another document, one is read as a whole, in a batch with others."""


@dataclass(frozen=True, slots=True, eq=False)
class Beginning:
    """The first `num_tokens` tokens of a stored state, with which another document begins."""

    record: StateRecord
    num_tokens: int


def beginning_of(
    store: StateStore, parent: StateKey, layout: StateLayout, text: str, token_ids: TokenIds
) -> Beginning | None:
    """The longest beginning of a document that is stored after `parent` in this layout.

    Only the stored texts beside `text` in sorted order are looked at: none shares more with it.
    """
    with store.looking() as view:
        beside = [other for other in view.around(text) if other is not None]
    best: Beginning | None = None
    for record in (record for other in beside for record in store.find(other)):
        if record.parent == parent and record.layout == layout:
            common = min(common_prefix(record.token_ids, token_ids), len(token_ids) - 1)
            if any(fmt.is_quantised for fmt, _ in layout.runs):
                common -= common % layout.chunk_tokens  # the scales are those of whole chunks
            if best is None or common > best.num_tokens:
                best = Beginning(record, common)
    least = max(MIN_COMMON_TOKENS, MIN_COMMON_SHARE * len(token_ids))
    return best if best is not None and best.num_tokens >= least else None


def cache_with(
    adapter: ModelAdapter, store: StateStore, prefixes: Prefixes, beginning: Beginning
) -> DynamicCache:
    """The KV cache of a document's beginning, after what it was computed after.

    Raises:
        StateError: the stored state cannot be used.
    """
    record, tokens = beginning.record, beginning.num_tokens
    path = prefixes.token_ids(record.parent)
    before = prefixes.cache(record.parent)
    position = 0 if path is None else len(path)
    span = RestoredSpan(record, tokens, position, is_exact=True)
    composition = Composition(record.token_ids[:tokens], (span,), np.empty(0, np.int64))
    buffers = Buffers(adapter, tokens)
    with (
        torch.no_grad(),
        open_restoring(adapter, composition, buffers, store, prefixes=prefixes) as (_, execution),
    ):
        execution.recompute()
        for layer in range(adapter.spec.num_layers):
            execution.restore_layer(layer)
        execution.end_forward()
    return _joined(adapter, before, buffers, tokens)


def _joined(
    adapter: ModelAdapter, before: DynamicCache, buffers: Buffers, tokens: int
) -> DynamicCache:
    joined = DynamicCache()
    for layer in range(adapter.spec.num_layers):
        sides = (buffers.keys[layer][:, :, :tokens], buffers.values[layer][:, :, :tokens])
        pair = adapter.as_cached(*sides)
        if before.get_seq_length():
            held: Any = before.layers[layer]
            pair = (torch.cat((held.keys, pair[0]), 2), torch.cat((held.values, pair[1]), 2))
        joined.update(*pair, layer)
    return joined


def continued_values(
    adapter: ModelAdapter,
    store: StateStore,
    beginning: Beginning,
    record: StateRecord,
    captured: Sequence[CapturedLayer],
) -> list[tuple[int, int, bytearray]]:
    """(layer, chunk, value) of a state: what is stored of its beginning, then what was captured.

    Raises:
        StateError: the stored state cannot be used.
    """
    values = []
    step, known = record.layout.chunk_tokens, beginning.num_tokens
    with store.reading([beginning.record.key]) as reader:
        for layer, (fmt, caught) in enumerate(zip(record.layout.layers, captured, strict=True)):
            for chunk in range(record.layout.num_chunks(record.num_tokens) if fmt.dtype else 0):
                begin, end = chunk * step, min((chunk + 1) * step, record.num_tokens)
                parts = []
                if begin < known:
                    tokens = min(end, known) - begin
                    parts.append(_stored_arrays(adapter, reader, beginning, layer, chunk, tokens))
                if end > known:
                    new = slice(max(begin - known, 0), end - known)
                    parts.append(chunk_arrays(adapter, layer, fmt, caught, 0, new))
                shape = ChunkShape(fmt, end - begin, adapter.spec)
                arrays = _one_behind_another(fmt, parts)
                values.append((layer, chunk, codec.encode(shape, record.key, layer, chunk, arrays)))
    return values


def _stored_arrays(
    adapter: ModelAdapter,
    reader: StoreReader,
    beginning: Beginning,
    layer: int,
    chunk: int,
    tokens: int,
) -> tuple[codec.Words, ...]:
    """The first tokens of a stored chunk; all of them, where it is quantised."""
    record = beginning.record
    fmt, step = record.layout.layers[layer], record.layout.chunk_tokens
    stored = min(step, record.num_tokens - chunk * step)
    value = reader.value(record.key, layer, chunk)
    shape = ChunkShape(fmt, stored, adapter.spec)
    arrays = codec.decode(shape, record.key, layer, chunk, value)
    if tokens == stored:
        return arrays
    return tuple(a[:, :tokens] if _axis(fmt) else a[:tokens] for a in arrays)


def _one_behind_another(
    fmt: LayerFormat, parts: Sequence[tuple[codec.Words, ...]]
) -> tuple[codec.Words, ...]:
    if len(parts) == 1:
        return parts[0]
    return tuple(np.concatenate(arrays, _axis(fmt)) for arrays in zip(*parts, strict=True))


def _axis(fmt: LayerFormat) -> int:
    """The axis of tokens in arrays that are not quantised."""
    return 1 if fmt.representation is Representation.KV else 0
