"""Reading documents once: capture in batches, encode, store. One transaction per document."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import DynamicCache

from hcache_kernels import (
    quantise_keys,
    quantise_rows,
    quantise_rows_smoothly,
    quantise_values,
    row_scale,
)
from hcache_rag import codec
from hcache_rag.choice import LayoutChoice
from hcache_rag.codec import ChunkShape
from hcache_rag.errors import StoreFullError
from hcache_rag.layout import GROUP_CHANNELS, LayerFormat, Representation, StateLayout
from hcache_rag.models import CapturedLayer, ModelAdapter, bit_words, torch_dtype
from hcache_rag.prefixes import Prefixes
from hcache_rag.profile import ModelCosts
from hcache_rag.prompt import Tokenizer
from hcache_rag.state import StateKey, StateRecord, TokenIds, child_key
from hcache_rag.store import NewState, StateStore

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


class Indexer:
    """Stores the states of texts, each after one preamble. Thread-safe.

    Args:
        choice: what states keep, and why.
        root: of the model's state tree.
        preamble: the state that texts are read after; its key is `root` where it has no tokens.
        is_kept: whether a state that is stored already in some layout will do.
        costs: of the model on this machine, where they are known.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        store: StateStore,
        tokenizer: Tokenizer,
        prefixes: Prefixes,
        choice: LayoutChoice,
        root: StateKey,
        preamble: PendingState,
        is_kept: Callable[[StateLayout], bool] = lambda _layout: True,
        costs: ModelCosts | None = None,
    ) -> None:
        self._adapter = adapter
        self._store = store
        self._tokenizer = tokenizer
        self._prefixes = prefixes
        self._choice = choice
        self._root = root
        self._preamble = preamble
        self._is_kept = is_kept
        self._costs = costs
        self._one_at_a_time = threading.Lock()

    def precompute(
        self,
        texts: Iterable[str],
        on_stored: Callable[[StateRecord], None],
        on_progress: Callable[[int, int], None] | None = None,
    ) -> PrecomputeReport:
        """See `HCacheEngine.precompute`; `on_stored` is told of each state that is stored."""
        if isinstance(texts, str):
            raise TypeError("texts are a list of strings, not one string")
        started = time.perf_counter()
        with self._one_at_a_time:
            pending, reused, skipped = self._pending(texts)
            total, done = reused + len(pending), reused
            stored_tokens = stored_bytes = 0
            if on_progress:
                on_progress(done, total)
            try:
                if pending:
                    self._begin(on_stored)
                for batch in batches(pending):
                    records, num_bytes = self._store_batch(batch, self._preamble.key)
                    for record in records:
                        on_stored(record)
                    stored_tokens += sum(record.num_tokens for record in records)
                    stored_bytes += num_bytes
                    done += len(records)
                    if on_progress:
                        on_progress(done, total)
            finally:
                if pending:
                    self._store.sync()
        seconds = time.perf_counter() - started
        return PrecomputeReport(
            len(pending), reused, tuple(skipped), stored_tokens, stored_bytes, seconds
        )

    def _pending(
        self, texts: Iterable[str]
    ) -> tuple[list[PendingState], int, list[tuple[str, str]]]:
        pending: dict[StateKey, PendingState] = {}
        reused: set[StateKey] = set()
        skipped: list[tuple[str, str]] = []
        room = self._adapter.spec.window_tokens - len(self._preamble.token_ids)
        for text in texts:
            stripped = text.strip()
            token_ids = self._tokenizer.document(stripped)
            key = child_key(self._preamble.key, token_ids)
            if not len(token_ids):
                skipped.append((stripped[:40], "empty"))
            elif len(token_ids) > room:
                reason = f"{len(token_ids)} tokens, but the window has room for {room}"
                skipped.append((stripped[:40], reason))
            elif key in pending or key in reused:
                continue
            elif self._has(key):
                reused.add(key)
            else:
                pending[key] = PendingState(key, token_ids, stripped)
        return list(pending.values()), len(reused), skipped

    def _has(self, key: StateKey) -> bool:
        record = self._store.record(key)
        return record is not None and self._is_kept(record.layout)

    def _begin(self, on_stored: Callable[[StateRecord], None]) -> None:
        """Say in the store what will be kept, and store the preamble's state if it is missing."""
        choice = self._choice
        name = self._adapter.spec.name
        self._store.name_model(self._root, name, str(choice.layout), choice.reason)
        preamble = self._preamble
        if preamble.key != self._root and not self._has(preamble.key):
            (record,), _ = self._store_batch([preamble], self._root, is_preamble=True)
            on_stored(record)

    def _store_batch(
        self, batch: Sequence[PendingState], parent: StateKey, *, is_preamble: bool = False
    ) -> tuple[list[StateRecord], int]:
        return store_batch(
            self._adapter,
            self._store,
            batch,
            self._choice.layout,
            self._root,
            parent,
            self._prefixes.cache(parent),
            is_preamble=is_preamble,
            costs=self._costs,
        )


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
    costs: ModelCosts | None = None,
) -> tuple[list[StateRecord], int]:
    """Read a batch of documents after a prefix and store their states.

    Args:
        costs: what reading a document again would cost, by which states are kept or let go.

    Returns:
        The records, and the bytes of all values.
    """
    token_ids = [state.token_ids.tolist() for state in batch]
    captured = adapter.capture(token_ids, [f.representation for f in layout.layers], after)
    new = []
    for row, state in enumerate(batch):
        record = StateRecord(
            state.key, parent, root, state.token_ids, state.text, layout, time.time(), is_preamble
        )
        values = list(_values(adapter, record, captured, row))
        saved_s = costs.layer(record.num_tokens) * adapter.spec.num_layers if costs else None
        new.append(NewState(record, values, saved_s))
    return [state.record for state in new], _put(store, new)


def _put(store: StateStore, new: Sequence[NewState]) -> int:
    """Store a batch at once, or, where there is no room for that, one state after another."""
    try:
        return store.put_all(new)
    except StoreFullError:
        if len(new) == 1:
            raise
        return sum(store.put_all([state]) for state in new)


def _values(
    adapter: ModelAdapter, record: StateRecord, captured: Sequence[CapturedLayer], row: int
) -> Iterator[tuple[int, int, bytearray]]:
    layout, length = record.layout, record.num_tokens
    for layer, (fmt, caught) in enumerate(zip(layout.layers, captured, strict=True)):
        for chunk in range(layout.num_chunks(length)):
            begin = chunk * layout.chunk_tokens
            tokens = slice(begin, min(begin + layout.chunk_tokens, length))
            arrays = _arrays(adapter, layer, fmt, caught, row, tokens)
            if arrays:
                shape = ChunkShape(fmt, tokens.stop - tokens.start, adapter.spec)
                yield layer, chunk, codec.encode(shape, record.key, layer, chunk, arrays)


def _arrays(
    adapter: ModelAdapter,
    layer: int,
    fmt: LayerFormat,
    caught: CapturedLayer,
    row: int,
    tokens: slice,
) -> tuple[codec.Words, ...]:
    """Some tokens of a captured document as the arrays that `LayerFormat.parts` names."""
    if caught.first is None:
        return ()
    first = caught.first[row, tokens]
    if fmt.representation is Representation.HIDDEN:
        scales = row_scale(first, adapter.norm(layer)[1]).numpy()
        if not fmt.is_quantised:
            return _stored(first, fmt), scales
        if fmt.dtype == "int8-smooth":
            smooth, quant_scales, channel_scales = quantise_rows_smoothly(first)
            return smooth.numpy(), scales, quant_scales.numpy(), channel_scales.numpy()
        group = GROUP_CHANNELS if fmt.dtype == "int8-g64" else None
        integers, quant_scales = quantise_rows(first, group)
        return integers.numpy(), scales, quant_scales.numpy()
    if caught.second is None:
        raise ValueError(f"layer {layer} was captured without V")
    shape = (len(first), adapter.spec.num_kv_heads, adapter.spec.head_dim)
    keys, values = (t.view(shape).transpose(0, 1) for t in (first, caught.second[row, tokens]))
    if not fmt.is_quantised:
        return _stored(keys, fmt), _stored(values, fmt)
    (stored_keys, key_scales), (stored_values, value_scales) = (
        quantise_keys(keys),
        quantise_values(values),
    )
    return tuple(t.numpy() for t in (stored_keys, stored_values, key_scales, value_scales))


def _stored(values: Tensor, fmt: LayerFormat) -> codec.Words:
    """Floating-point values in the storage dtype, as words."""
    return bit_words(values.to(torch_dtype(fmt.dtype)).contiguous())
