"""The cache that restores itself while the model's own forward pass runs through it.

The reading lane puts each layer's verified bytes into a staging slot ahead of the model; when
the forward pass reaches a layer and calls `update`, the layer turns them into K and V at their
positions, adds the fresh K and V, and from then on is an ordinary preallocated cache layer.

Restored tokens lie in the first slots of the buffers, in prompt order, the fresh ones behind
them: attention does not mind the order of keys, as long as the mask speaks of positions.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from hcache_kernels import project_kv, reference, rope_into
from hcache_rag import codec
from hcache_rag.compose import Composition
from hcache_rag.lanes import ReadingLane
from hcache_rag.layout import LayerFormat, Representation
from hcache_rag.models import ModelAdapter, bit_words
from hcache_rag.spec import ModelSpec
from hcache_rag.store import StateStore, StoreReader

STAGING_SLOTS = 4
_BLOCK_TOKENS = 256


class Buffers:
    """K and V of all layers for one request, and the staging ring. Fresh memory is slow: reuse it.

    Args:
        capacity_tokens: slots per layer.
    """

    def __init__(self, adapter: ModelAdapter, capacity_tokens: int) -> None:
        spec = adapter.spec
        self.capacity_tokens = capacity_tokens
        shape = (spec.num_layers, 1, spec.num_kv_heads, capacity_tokens, spec.head_dim)
        self.keys = torch.empty(shape, dtype=adapter.dtype, device=adapter.device)
        self.values = torch.empty_like(self.keys)
        width = max(spec.hidden_size, spec.kv_width)
        self.staging = torch.empty((STAGING_SLOTS, capacity_tokens * width), dtype=adapter.dtype)
        self.row_scales = torch.empty((STAGING_SLOTS, capacity_tokens))
        self.scratch = torch.empty(capacity_tokens * 2 * spec.kv_width, dtype=adapter.dtype)


class BufferPool:
    """Keeps the buffers of finished requests for the next ones. Thread-safe."""

    def __init__(self, adapter: ModelAdapter) -> None:
        self._adapter = adapter
        self._free: list[Buffers] = []
        self._lock = threading.Lock()

    @contextmanager
    def borrow(self, tokens: int) -> Iterator[Buffers]:
        """Buffers of at least `tokens` slots, for the length of the block."""
        with self._lock:
            fitting = [b for b in self._free if b.capacity_tokens >= tokens]
            buffers = min(fitting, key=lambda b: b.capacity_tokens) if fitting else None
            if buffers is not None:
                self._free.remove(buffers)
            else:
                self._free.clear()  # what is too small now will be too small again
        if buffers is None:
            buffers = Buffers(self._adapter, -(-tokens // _BLOCK_TOKENS) * _BLOCK_TOKENS)
        try:
            yield buffers
        finally:
            with self._lock:
                self._free.append(buffers)


@dataclass
class RestoreTimes:
    """Where the time of one restore went; seconds on either lane, and bytes read."""

    reading_s: float = 0.0
    waiting_s: float = 0.0
    projecting_s: float = 0.0
    bytes_read: int = 0
    layer_ready_s: list[float] = field(default_factory=list)


class RestoringCache(Cache):
    """A transformers cache that starts with the states of a composition.

    Use `open_restoring`, which starts its reading lane.

    Args:
        adapter: the model that will run through it.
        composition: what is restored and what is read afresh.
        buffers: at least as many slots as the sequence will have tokens.
        reference_mode: restore hidden states by the model's own norm and projections, in
            transformers' order of operations, instead of by the folded GEMM.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        composition: Composition,
        buffers: Buffers,
        *,
        reference_mode: bool = False,
    ) -> None:
        self.adapter = adapter
        self.composition = composition
        self.buffers = buffers
        self.reference_mode = reference_mode
        self.times = RestoreTimes()
        self.lane: ReadingLane | None = None
        restored = composition.restored_positions
        self.num_restored = len(restored)
        self._cos_sin = adapter.position_embeddings(torch.from_numpy(restored).to(adapter.device))
        num_layers = adapter.spec.num_layers
        self.restoring_layers = [RestoringLayer(self, i) for i in range(num_layers)]
        super().__init__(layers=list(self.restoring_layers))

    @property
    def is_restored(self) -> bool:
        """Whether the first forward pass has gone through all layers."""
        return self.restoring_layers[-1].is_initialized

    def read_layer(self, reader: StoreReader, layer: int) -> None:
        """Reading lane: verify one layer's chunks and put them into their staging slot.

        V goes to its final place at once; K and hidden rows wait for the compute lane.

        Raises:
            StateError: a chunk is missing or damaged.
        """
        started = time.perf_counter()
        spec, slot = self.adapter.spec, layer % STAGING_SLOTS
        begin = 0
        for span in self.composition.spans:
            fmt = span.record.layout.layers[layer]
            end = begin + span.num_tokens
            first, second = self._targets(layer, slot, fmt)
            self._read_span(reader, span, layer, fmt, spec, (first, second), begin)
            begin = end
        self.times.reading_s += time.perf_counter() - started

    def _read_span(
        self,
        reader: StoreReader,
        span: Any,
        layer: int,
        fmt: LayerFormat,
        spec: ModelSpec,
        targets: tuple[codec.Words, codec.Words],
        begin: int,
    ) -> None:
        record = span.record
        step = record.layout.chunk_tokens
        for chunk in range(record.layout.num_chunks(span.num_tokens)):
            tokens = min(step, record.num_tokens - chunk * step)
            shape = codec.ChunkShape.of(fmt, tokens, spec)
            value = reader.value(record.key, layer, chunk)
            sources = codec.decode(shape, record.key, layer, chunk, value)
            self.times.bytes_read += len(value)
            used = min(tokens, span.num_tokens - chunk * step)
            at = slice(begin + chunk * step, begin + chunk * step + used)
            if fmt.representation is Representation.HIDDEN:
                targets[0][at] = sources[0][:used]
                targets[1][at] = sources[1][:used]
            else:
                targets[0][:, at] = sources[0][:, :used]
                targets[1][:, at] = sources[1][:, :used]

    def _targets(self, layer: int, slot: int, fmt: LayerFormat) -> tuple[codec.Words, codec.Words]:
        if fmt.representation is Representation.HIDDEN:
            scales = self.buffers.row_scales[slot].numpy()
            return bit_words(self.staged_hidden(slot)), scales
        return bit_words(self.staged_keys(slot)), bit_words(self.buffers.values[layer, 0])

    def staged_hidden(self, slot: int) -> Tensor:
        """Staging of a `hidden` layer, (R, E)."""
        width = self.adapter.spec.hidden_size
        flat = self.buffers.staging[slot, : self.num_restored * width]
        return flat.view(self.num_restored, width)

    def staged_keys(self, slot: int) -> Tensor:
        """Staging of a `kv` layer's K before RoPE, (G, R, D)."""
        spec = self.adapter.spec
        flat = self.buffers.staging[slot, : self.num_restored * spec.kv_width]
        return flat.view(spec.num_kv_heads, self.num_restored, spec.head_dim)

    def restore_layer(self, layer: int) -> None:
        """Compute lane: wait for a layer's bytes and write its K and V into the first R slots.

        Raises:
            StateError: what the reading lane met.
        """
        if not self.num_restored:
            return
        if self.lane is None:
            raise RuntimeError("the cache's reading lane was not started")
        started = time.perf_counter()
        self.lane.wait(layer)
        ready = time.perf_counter()
        keys = self.buffers.keys[layer, 0, :, : self.num_restored]
        values = self.buffers.values[layer, 0, :, : self.num_restored]
        for fmt, rows in self._runs(layer):
            self._restore_rows(layer, fmt, rows, keys[:, rows], values[:, rows])
        self.lane.release(layer)
        self.times.waiting_s += ready - started
        self.times.projecting_s += time.perf_counter() - ready

    def _runs(self, layer: int) -> list[tuple[LayerFormat, slice]]:
        """Neighbouring spans that keep this layer in one format, as one run of rows."""
        runs: list[tuple[LayerFormat, slice]] = []
        begin = 0
        for span in self.composition.spans:
            fmt, end = span.record.layout.layers[layer], begin + span.num_tokens
            if runs and runs[-1][0] == fmt:
                runs[-1] = (fmt, slice(runs[-1][1].start, end))
            else:
                runs.append((fmt, slice(begin, end)))
            begin = end
        return runs

    def _restore_rows(
        self, layer: int, fmt: LayerFormat, rows: slice, keys: Tensor, values: Tensor
    ) -> None:
        slot = layer % STAGING_SLOTS
        cos, sin = (table[rows] for table in self._cos_sin)
        if fmt.representation is Representation.KV:
            staged = self.staged_keys(slot)[:, rows]
            if self.reference_mode:
                keys.copy_(reference.rope(staged, cos, sin))
            else:
                rope_into(staged, cos, sin, keys)
            return
        hidden = self.staged_hidden(slot)[rows]
        if self.reference_mode:
            self._project_by_modules(layer, hidden, cos, sin, keys, values)
            return
        projection = self.adapter.projections[layer]
        num_tokens = rows.stop - rows.start
        scratch = self.buffers.scratch[: num_tokens * 2 * self.adapter.spec.kv_width]
        project_kv(
            hidden,
            self.buffers.row_scales[slot, rows],
            projection.weight,
            projection.bias,
            cos,
            sin,
            keys,
            values,
            scratch.view(num_tokens, -1),
        )

    def _project_by_modules(
        self, layer: int, hidden: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor
    ) -> None:
        gain, eps = self.adapter.norm(layer)
        key, value = self.adapter.key_projections[layer], self.adapter.value_projections[layer]
        restored = reference.project_kv(
            hidden, gain, eps, key.weight, value.weight, key.bias, value.bias, cos, sin
        )
        keys.copy_(restored[0])
        values.copy_(restored[1])

    def first_inputs(self) -> dict[str, Tensor]:
        """What the first forward pass reads: the fresh tokens, at their positions, and the mask."""
        device = self.adapter.device
        fresh = torch.from_numpy(self.composition.fresh_positions)
        slots = torch.cat((torch.from_numpy(self.composition.restored_positions), fresh))
        visible = slots[None, :] <= fresh[:, None]
        # Additive, which both eager and SDPA attention take; SDPA would turn a boolean mask into
        # this one in every layer.
        lowest = torch.finfo(self.adapter.dtype).min
        mask = torch.zeros((1, 1, *visible.shape), dtype=self.adapter.dtype)
        mask.masked_fill_(~visible, lowest)
        token_ids = torch.from_numpy(self.composition.token_ids.astype(np.int64))
        return {
            "input_ids": token_ids[fresh].unsqueeze(0).to(device),
            "position_ids": fresh.unsqueeze(0).to(device),
            "attention_mask": mask.to(device),
        }

    def by_position(self, layer: int) -> tuple[Tensor, Tensor]:
        """K and V of a layer in the order of positions, (1, G, n, D) each; copies."""
        filled = self.restoring_layers[layer].get_seq_length()
        positions = np.concatenate(
            (self.composition.restored_positions, self.composition.fresh_positions)
        )
        order = np.concatenate((np.argsort(positions), np.arange(len(positions), filled)))
        index = torch.from_numpy(order[:filled]).to(self.adapter.device)
        return (
            self.buffers.keys[layer].index_select(2, index),
            self.buffers.values[layer].index_select(2, index),
        )


class RestoringLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer of a `RestoringCache`."""

    is_sliding = False

    def __init__(self, cache: RestoringCache, layer: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._cache = cache
        self._layer = layer
        self._length = cache.num_restored
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Restore the layer; called by the first `update`."""
        if key_states.shape[0] != 1:
            raise ValueError(f"the cache holds one sequence, not a batch of {key_states.shape[0]}")
        self._cache.restore_layer(self._layer)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add K and V, (1, G, n, D) each, behind what is there; return views of all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        buffers = self._cache.buffers
        end = self._length + key_states.shape[-2]
        if end > buffers.capacity_tokens:
            raise ValueError(f"{end} tokens do not fit into {buffers.capacity_tokens} cache slots")
        keys, values = buffers.keys[self._layer], buffers.values[self._layer]
        keys[:, :, self._length : end] = key_states
        values[:, :, self._length : end] = value_states
        self._length = end
        return keys[:, :, :end], values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that a query of this length will see."""
        return self._length + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens in the layer; restored ones count from the beginning."""
        return self._length

    def get_max_length(self) -> int:
        """No limit that transformers needs to know."""
        return -1


@contextmanager
def open_restoring(
    adapter: ModelAdapter,
    composition: Composition,
    buffers: Buffers,
    store: StateStore,
    *,
    reference_mode: bool = False,
) -> Iterator[RestoringCache]:
    """A `RestoringCache` whose reading lane runs, and whose first forward pass reads only what is
    fresh; leaving the block stops the lane and takes the hook off the model.
    """
    cache = RestoringCache(adapter, composition, buffers, reference_mode=reference_mode)

    def read_only_fresh(
        _module: object, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if kwargs.get("past_key_values") is cache and not cache.is_restored:
            kwargs.update(cache.first_inputs())
        return args, kwargs

    if not cache.num_restored:
        yield cache
        return
    hook = adapter.model.register_forward_pre_hook(read_only_fresh, with_kwargs=True)
    try:
        with (
            store.reading() as reader,
            ReadingLane(
                lambda layer: cache.read_layer(reader, layer),
                adapter.spec.num_layers,
                STAGING_SLOTS,
            ) as lane,
        ):
            cache.lane = lane
            yield cache
    finally:
        hook.remove()
