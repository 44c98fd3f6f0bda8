"""The cache that restores itself while the model's own forward pass runs through it.

The reading lane puts each layer's verified bytes into a staging slot ahead of the model; when
the forward pass reaches a layer and calls `update`, the layer turns them into K and V at their
positions, adds the fresh K and V, and from then on is an ordinary preallocated cache layer.

Restored tokens lie in the first slots of the buffers, in prompt order, the fresh ones behind
them: attention does not mind the order of keys, as long as the mask speaks of positions.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from hcache_kernels import project_kv, reference, rope_into
from hcache_rag import codec
from hcache_rag.buffers import STAGING_SLOTS, Buffers
from hcache_rag.compose import Composition, RestoredSpan
from hcache_rag.lanes import ReadingLane
from hcache_rag.layout import LayerFormat, Representation
from hcache_rag.models import ModelAdapter, bit_words
from hcache_rag.store import StateStore, StoreReader


@dataclass
class RestoreTimes:
    """Where the time of one restore went; seconds on either lane, and bytes read."""

    reading_s: float = 0.0
    waiting_s: float = 0.0
    projecting_s: float = 0.0
    bytes_read: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class _Pass:
    """A forward pass over some positions (F,) of the prompt, and the slots (F,) they belong to."""

    positions: Tensor
    slots: Tensor
    is_contiguous: bool


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """Restored rows `start` to `stop` of one layer in one format, staged from `offset` on."""

    fmt: LayerFormat
    start: int
    stop: int
    offset: int
    spans: tuple[RestoredSpan, ...]


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
        self.position_of_slot = torch.from_numpy(
            np.concatenate((restored, composition.fresh_positions))
        )
        self._slot_of_position = torch.argsort(self.position_of_slot)
        self._pass: _Pass | None = None
        num_layers = adapter.spec.num_layers
        self.restoring_layers = [RestoringLayer(self, i) for i in range(num_layers)]
        super().__init__(layers=list(self.restoring_layers))
        if self.num_restored:
            self.begin_pass(composition.fresh_positions)

    def begin_pass(self, positions: npt.NDArray[np.int64]) -> None:
        """Make the next forward pass read the prompt's tokens at `positions` (F,), ascending.

        What it writes goes to the slots of these positions, over what is there.
        """
        at = torch.from_numpy(positions)
        slots = self._slot_of_position[at]
        self._pass = _Pass(at, slots, bool((slots.diff() == 1).all()))
        for layer in self.restoring_layers:
            layer.rewind()

    @property
    def is_in_pass(self) -> bool:
        """Whether a pass was begun and has not gone through all layers."""
        return self._pass is not None

    def write(self, layer: int, key_states: Tensor, value_states: Tensor) -> int | None:
        """Write a pass's K and V to their slots; the filled length, or None outside a pass."""
        if self._pass is None:
            return None
        slots = self._pass.slots
        if key_states.shape[-2] != len(slots):
            raise ValueError(f"{key_states.shape[-2]} tokens in a pass over {len(slots)} positions")
        for buffer, states in (
            (self.buffers.keys, key_states),
            (self.buffers.values, value_states),
        ):
            if self._pass.is_contiguous:
                buffer[layer][:, :, slots[0] : slots[-1] + 1] = states
            else:
                buffer[layer].index_copy_(2, slots.to(states.device), states)
        if layer == len(self.restoring_layers) - 1:
            self._pass = None
        return len(self.position_of_slot)

    def read_layer(self, reader: StoreReader, layer: int) -> None:
        """Reading lane: verify one layer's chunks and put them into their staging slot.

        V goes to its final place at once; K and hidden rows wait for the compute lane.

        Raises:
            StateError: a chunk is missing or damaged.
        """
        started = time.perf_counter()
        slot = layer % STAGING_SLOTS
        for run in self._runs(layer):
            rows = slice(run.start, run.stop)
            staged = bit_words(self._staged(slot, run))
            if run.fmt.representation is Representation.HIDDEN:
                targets = staged, self.buffers.row_scales[slot, rows].numpy()
            else:
                targets = staged, bit_words(self.buffers.values[layer, 0, :, rows])
            begin = 0
            for span in run.spans:
                self._read_span(reader, layer, run.fmt, span, targets, begin)
                begin += span.num_tokens
        self.times.reading_s += time.perf_counter() - started

    def _read_span(
        self,
        reader: StoreReader,
        layer: int,
        fmt: LayerFormat,
        span: RestoredSpan,
        targets: tuple[codec.Words, codec.Words],
        begin: int,
    ) -> None:
        record, step = span.record, span.record.layout.chunk_tokens
        tokens_first = fmt.representation is Representation.HIDDEN
        for chunk in range(record.layout.num_chunks(span.num_tokens)):
            first = chunk * step
            tokens = min(step, record.num_tokens - first)
            shape = codec.ChunkShape.of(fmt, tokens, self.adapter.spec)
            value = reader.value(record.key, layer, chunk)
            self.times.bytes_read += len(value)
            sources = codec.decode(shape, record.key, layer, chunk, value)
            used = min(tokens, span.num_tokens - first)
            at = slice(begin + first, begin + first + used)
            for target, source in zip(targets, sources, strict=True):
                if tokens_first:
                    target[at] = source[:used]
                else:
                    target[:, at] = source[:, :used]

    def _runs(self, layer: int) -> list[_Run]:
        """Neighbouring spans that keep this layer in one format, each run with its own staging."""
        runs: list[_Run] = []
        start = offset = 0
        for fmt, group in groupby(self.composition.spans, lambda s: s.record.layout.layers[layer]):
            spans = tuple(group)
            stop = start + sum(span.num_tokens for span in spans)
            runs.append(_Run(fmt, start, stop, offset, spans))
            offset += (stop - start) * self._width(fmt)
            start = stop
        return runs

    def _width(self, fmt: LayerFormat) -> int:
        """Staged elements of one token."""
        spec = self.adapter.spec
        is_hidden = fmt.representation is Representation.HIDDEN
        return spec.hidden_size if is_hidden else spec.kv_width

    def _staged(self, slot: int, run: _Run) -> Tensor:
        """A run's staging: hidden rows (r, E), or K before RoPE (G, r, D)."""
        rows = run.stop - run.start
        end = run.offset + rows * self._width(run.fmt)
        flat = self.buffers.staging[slot, run.offset : end]
        if run.fmt.representation is Representation.HIDDEN:
            return flat.view(rows, -1)
        return flat.view(self.adapter.spec.num_kv_heads, rows, -1)

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
        for run in self._runs(layer):
            self._restore_run(layer, run)
        self.lane.release(layer)
        self.times.waiting_s += ready - started
        self.times.projecting_s += time.perf_counter() - ready

    def _restore_run(self, layer: int, run: _Run) -> None:
        slot, rows = layer % STAGING_SLOTS, slice(run.start, run.stop)
        keys = self.buffers.keys[layer, 0, :, rows]
        values = self.buffers.values[layer, 0, :, rows]
        staged = self._staged(slot, run)
        cos, sin = (table[rows] for table in self._cos_sin)
        if run.fmt.representation is Representation.KV:
            if self.reference_mode:
                keys.copy_(reference.rope(staged, cos, sin))
            else:
                rope_into(staged, cos, sin, keys)
            return
        if self.reference_mode:
            self._project_by_modules(layer, staged, cos, sin, keys, values)
            return
        projection = self.adapter.projections[layer]
        num_rows = run.stop - run.start
        scratch = self.buffers.scratch[: num_rows * 2 * self.adapter.spec.kv_width]
        project_kv(
            staged,
            self.buffers.row_scales[slot, rows],
            projection.weight,
            projection.bias,
            cos,
            sin,
            keys,
            values,
            scratch.view(num_rows, -1),
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

    def pass_inputs(self) -> dict[str, Tensor]:
        """What the pass reads: its tokens, their positions, and which slots each of them sees."""
        if self._pass is None:
            raise RuntimeError("no pass was begun")
        device, positions = self.adapter.device, self._pass.positions
        visible = self.position_of_slot[None, :] <= positions[:, None]
        # Additive, which both eager and SDPA attention take; SDPA would turn a boolean mask into
        # this one in every layer.
        mask = torch.zeros((1, 1, *visible.shape), dtype=self.adapter.dtype)
        mask.masked_fill_(~visible, torch.finfo(self.adapter.dtype).min)
        token_ids = torch.from_numpy(self.composition.token_ids.astype(np.int64))
        return {
            "input_ids": token_ids[positions].unsqueeze(0).to(device),
            "position_ids": positions.unsqueeze(0).to(device),
            "attention_mask": mask.to(device),
        }

    def by_position(self, layer: int) -> tuple[Tensor, Tensor]:
        """K and V of a layer in the order of positions, (1, G, n, D) each; copies."""
        filled = self.restoring_layers[layer].get_seq_length()
        decoded = torch.arange(len(self.position_of_slot), filled)
        index = torch.cat((self._slot_of_position, decoded)).to(self.adapter.device)
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
        end = self._cache.write(self._layer, key_states, value_states)
        if end is not None:
            self._length = end
            return self._views()
        end = self._length + key_states.shape[-2]
        if end > buffers.capacity_tokens:
            raise ValueError(f"{end} tokens do not fit into {buffers.capacity_tokens} cache slots")
        keys, values = buffers.keys[self._layer], buffers.values[self._layer]
        keys[:, :, self._length : end] = key_states
        values[:, :, self._length : end] = value_states
        self._length = end
        return self._views()

    def rewind(self) -> None:
        """Count only restored tokens again, so that a pass can follow."""
        self._length = self._cache.num_restored

    def _views(self) -> tuple[Tensor, Tensor]:
        buffers = self._cache.buffers
        return (
            buffers.keys[self._layer][:, :, : self._length],
            buffers.values[self._layer][:, :, : self._length],
        )

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

    def read_only_the_pass(
        _module: object, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # torch leaves kwargs out if the hook is removed while another thread's call runs.
        if kwargs is None or kwargs.get("past_key_values") is not cache or not cache.is_in_pass:
            return None
        return args, {**kwargs, **cache.pass_inputs()}

    if not cache.num_restored:
        yield cache
        return
    hook = adapter.model.register_forward_pre_hook(read_only_the_pass, with_kwargs=True)
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
