"""Carries a plan out: reads ahead on one lane while the model's forward pass is the other.

The reading lane verifies stored values where they lie in the store's map. When the forward pass
comes to a layer, the layer's pieces are turned into K and V at their positions, straight from the
map: the bytes are moved once. First layers, or tokens, that the plan recomputes are run before.

On a device with streams the reading lane also sends each piece through the device's pipeline, and
the forward pass only goes on behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from hcache_rag import codec
from hcache_rag.buffers import Buffers
from hcache_rag.cache import RestoringCache
from hcache_rag.compose import Composition
from hcache_rag.device import Event
from hcache_rag.lanes import CallerLane, Clock, Lane, ThreadLane, Ticket, timeline_of, walk
from hcache_rag.layout import Representation
from hcache_rag.models import ModelAdapter, in_heads
from hcache_rag.pipeline import Pipeline
from hcache_rag.plan import SpanSize, plan_restore
from hcache_rag.prefixes import Prefixes
from hcache_rag.profile import ReadRate
from hcache_rag.restoring import Restorer
from hcache_rag.schedule import ChunkUse, Piece, Schedule, schedule
from hcache_rag.staging import Chunk, chunk_tensors
from hcache_rag.state import StateKey
from hcache_rag.timeline import COMPUTING, READING, Step, Timeline


class ValueReader(Protocol):
    """Gives stored values as they are, valid while the reading block lasts."""

    def expect(self, first: Mapping[StateKey, tuple[int, int]]) -> None:
        """These states are about to be read, each from a (layer, chunk) on."""

    def value(self, key: StateKey, layer: int, chunk: int) -> memoryview:
        """The value.

        Raises:
            StateError: there is none, or it cannot be read.
        """


class Readable(Protocol):
    """What states are read from: a `StateStore`, or what stands in front of one."""

    def reading(self, keys: Collection[StateKey] = ()) -> AbstractContextManager[ValueReader]:
        """A consistent view for one thread, in which the states of `keys` stay."""


def span_sizes(
    composition: Composition,
    prefixes: Prefixes | None,
    read_rate: Callable[[StateKey], ReadRate | None] = lambda _key: None,
) -> list[SpanSize]:
    """What the planner needs to know of a composition's spans.

    Args:
        read_rate: of a state that comes from afar, see `StateStore.read_rate`.
    """
    return [
        SpanSize(
            span.num_tokens,
            span.record.layout,
            prefixes is not None and span.record.parent in prefixes,
            span.record.num_tokens - span.num_tokens,
            read_rate(span.record.key),
        )
        for span in composition.spans
    ]


class Execution:
    """One restore under way: its schedule, its lanes, and what has been read but not used yet.

    Args:
        adapter: the model.
        composition: what is restored and what is read afresh.
        work: the plan in steps.
        buffers: where K and V go.
        prefixes: what states were computed after; None if nothing is recomputed.
        reference_mode: restore hidden states by the model's own norm and projections, in
            transformers' order of operations, instead of by the folded GEMM.
        is_cancelled: asked before each step of computing.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        composition: Composition,
        work: Schedule,
        buffers: Buffers,
        *,
        prefixes: Prefixes | None = None,
        reference_mode: bool = False,
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        self.adapter = adapter
        self.composition = composition
        self.work = work
        self.buffers = buffers
        self.prefixes = prefixes
        positions = torch.from_numpy(composition.restored_positions).to(adapter.device)
        self.restorer = Restorer(adapter, buffers, positions, reference_mode=reference_mode)
        self._first_row = np.cumsum([0, *(span.num_tokens for span in composition.spans)])
        self._pipeline = Pipeline(buffers.ring, adapter.spec) if buffers.ring else None
        self._read: dict[tuple[int, int], list[Chunk]] = {}
        self._submitted: dict[tuple[int, int], Event] = {}
        self._clock = Clock()
        self._computing = CallerLane(self._clock, is_cancelled)
        self._tickets: list[Ticket] = []
        self._num_recomputed = 0

    @contextmanager
    def running(self, reader: ValueReader) -> Iterator[None]:
        """The lanes, with the reading lane under way; leaving the block stops it."""
        reader.expect(self._first_chunks())
        try:
            with (
                self._device_running(),
                ThreadLane(partial(self._read_piece, reader), self._clock) as reading,
            ):
                lanes: dict[str, Lane] = {READING: reading, COMPUTING: self._computing}
                self._tickets = walk(self.work.steps, lanes)
                try:
                    yield
                finally:
                    self._computing.close()
        finally:
            self._read.clear()  # the views end with the reader

    def _first_chunks(self) -> dict[StateKey, tuple[int, int]]:
        """The first (layer, chunk) that is read of each state."""
        first: dict[StateKey, tuple[int, int]] = {}
        for layer, pieces in enumerate(self.work.pieces):
            for use in sorted((u for p in pieces for u in p.chunks), key=lambda use: use.chunk):
                key = self.composition.spans[use.span].record.key
                first.setdefault(key, (layer, use.chunk))
        return first

    def _device_running(self) -> AbstractContextManager[None]:
        if self._pipeline is None:
            return nullcontext()
        # Made by the model's stream, in front of all others' work.
        _ = self.adapter.projections, self.adapter.key_norms
        pieces = {id(piece): piece for layer in self.work.pieces for piece in layer}
        return self._pipeline.running(pieces.values())

    @property
    def timeline(self) -> Timeline:
        """What has run so far."""
        return timeline_of(self._tickets)

    def end_forward(self) -> None:
        """The forward pass through the last layer is done."""
        self._computing.end()

    def _read_piece(self, reader: ValueReader, step: Step) -> None:
        """Reading lane: find and verify a piece's chunks; where there is no device, uncopied.

        Raises:
            StateError: a chunk is missing or damaged.
        """
        piece = self.work.pieces[step.layer][step.piece]
        chunks = [self._read_chunk(reader, step.layer, piece, use) for use in piece.chunks]
        if self._pipeline is None:
            self._read[step.layer, step.piece] = chunks
            return
        restore = partial(self.restorer.restore_staged, step.layer, piece)
        targets = self.restorer.targets(step.layer, piece.start, piece.stop)
        self._submitted[step.layer, step.piece] = self._pipeline.submit(
            piece, chunks, restore, targets
        )

    def _read_chunk(self, reader: ValueReader, layer: int, piece: Piece, use: ChunkUse) -> Chunk:
        record = self.composition.spans[use.span].record
        step = record.layout.chunk_tokens
        tokens = min(step, record.num_tokens - use.chunk * step)
        shape = codec.ChunkShape(piece.fmt, tokens, self.adapter.spec)
        value = reader.value(record.key, layer, use.chunk)
        arrays = codec.decode(shape, record.key, layer, use.chunk, value)
        return chunk_tensors(piece.fmt, arrays, use.tokens)

    def recompute(self) -> None:
        """Run what the plan recomputes, while the rest is being read."""
        for job in self.work.recomputations:
            with self._computing.step():
                spans = [(self.composition.spans[index].record, n) for index, n in job.heads]
                by_parent: dict[bytes, list[int]] = {}
                for number, (record, _) in enumerate(spans):
                    by_parent.setdefault(record.parent, []).append(number)
                for parent, numbers in by_parent.items():
                    heads = [job.heads[number] for number in numbers]
                    self._recompute(parent, heads, job.layers)

    def _recompute(self, parent: bytes, heads: Sequence[tuple[int, int]], num_layers: int) -> None:
        """Compute K and V of spans' first tokens as they were computed when they were stored."""
        if self.prefixes is None:
            raise RuntimeError("a plan that recomputes needs to know what comes before")
        batch = [self.composition.spans[i].record.token_ids[:n].tolist() for i, n in heads]
        captured = self.adapter.capture(
            batch, [Representation.KV] * num_layers, self.prefixes.cache(parent)
        )
        for layer, caught in enumerate(captured):
            for number, (index, tokens) in enumerate(heads):
                sides = [
                    self._by_heads(side, number, tokens) for side in (caught.first, caught.second)
                ]
                self.restorer.write(layer, int(self._first_row[index]), *sides)

    def _by_heads(self, states: Tensor | None, row: int, tokens: int) -> Tensor:
        """One document of a captured (B, T, G * D), as (G, T, D)."""
        if states is None:
            raise RuntimeError("K or V was not captured")
        return in_heads(states[row, :tokens], self.adapter.spec.num_kv_heads).transpose(0, 1)

    def restore_layer(self, layer: int) -> None:
        """Write a layer's K and V into the first slots, as fast as its pieces have been read.

        Raises:
            StateError: what the reading lane met.
            Cancelled: the request was cancelled.
        """
        for begin, end in self.work.left_out[layer] if self.work.left_out else ():
            for side in self.restorer.targets(layer, begin, end):
                side.zero_()  # nobody looks at it, but what is no number spoils all sums
        for index, piece in enumerate(self.work.pieces[layer]):
            with self._computing.step():
                if self._pipeline is None:
                    self.restorer.restore(layer, piece, self._read.pop((layer, index)))
                else:
                    self._pipeline.join(self._submitted.pop((layer, index)))
        self._computing.begin()  # the layer's forward pass


@contextmanager
def open_restoring(
    adapter: ModelAdapter,
    composition: Composition,
    buffers: Buffers,
    store: Readable,
    *,
    work: Schedule | None = None,
    prefixes: Prefixes | None = None,
    reference_mode: bool = False,
    is_cancelled: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[RestoringCache, Execution]]:
    """A cache that restores a composition, and whose first forward pass reads only what is fresh.

    Reading has begun when the block is entered; call `Execution.recompute` before the first pass.
    Leaving the block stops the reading lane and takes the hooks off the model.

    Args:
        work: the plan in steps; by default, everything that is stored is read.
        prefixes: needed if the plan recomputes something.
    """
    if work is None:
        sizes = span_sizes(composition, prefixes)
        work = schedule(adapter.spec, sizes, plan_restore(adapter.spec, sizes, None))
    execution = Execution(
        adapter,
        composition,
        work,
        buffers,
        prefixes=prefixes,
        reference_mode=reference_mode,
        is_cancelled=is_cancelled,
    )
    cache = RestoringCache(adapter, composition, buffers, execution.restore_layer)
    if not cache.num_restored:
        yield cache, execution
        return

    def read_only_the_pass(
        _module: object, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # torch leaves kwargs out if the hook is removed while another thread's call runs.
        if kwargs is None or kwargs.get("past_key_values") is not cache or not cache.is_in_pass:
            return None
        return args, {**kwargs, **cache.pass_inputs()}

    def end_forward(
        _module: object, _args: object, kwargs: dict[str, Any] | None = None, *_: object
    ) -> None:
        if kwargs is not None and kwargs.get("past_key_values") is cache:
            execution.end_forward()

    hooks = [
        adapter.model.register_forward_pre_hook(read_only_the_pass, with_kwargs=True),
        adapter.decoder.register_forward_hook(end_forward, with_kwargs=True),
    ]
    try:
        keys = {span.record.key for span in composition.spans}
        with store.reading(keys) as reader, execution.running(reader):
            yield cache, execution
    finally:
        for hook in hooks:
            hook.remove()
