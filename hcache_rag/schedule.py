"""A plan as steps: what is read, restored and recomputed, piece by piece, on which lane. Pure.

The executor and the simulator walk the same steps. Rows are the restored tokens of the prompt,
span after span, in the order of their cache slots.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from hcache_rag.layout import LayerFormat, Representation
from hcache_rag.plan import Conditions, Cut, RestorePlan, SpanSize
from hcache_rag.profile import ModelCosts
from hcache_rag.spec import ModelSpec
from hcache_rag.timeline import COMPUTING, READING, Step

RECOMPUTE_BATCH_TOKENS = 2048
"""Tokens of one recomputed batch, padding included."""


@dataclass(frozen=True, slots=True)
class ChunkUse:
    """The first `tokens` tokens of a span's chunk, restored into rows from `row` on."""

    span: int
    chunk: int
    tokens: int
    row: int


@dataclass(frozen=True, slots=True)
class Piece:
    """Neighbouring chunks of one layer in one format, read and restored together."""

    fmt: LayerFormat
    chunks: tuple[ChunkUse, ...]

    @property
    def start(self) -> int:
        """The first row."""
        return self.chunks[0].row

    @property
    def stop(self) -> int:
        """The row behind the last."""
        return self.chunks[-1].row + self.chunks[-1].tokens


Rows: TypeAlias = tuple[tuple[int, int], ...]
"""Runs of rows, (begin, end)."""


@dataclass(frozen=True, slots=True)
class Recomputation:
    """First tokens of some spans, computed together through the first `layers` layers.

    Args:
        heads: (span, how many of its first tokens), the longest last.
    """

    heads: tuple[tuple[int, int], ...]
    layers: int


@dataclass(frozen=True, slots=True)
class Schedule:
    """A plan in full.

    Args:
        pieces: of every layer.
        recomputations: in their order, before the first layer's pieces.
        steps: all of it, reading steps first.
        left_out: rows of every layer that are not restored, since nothing looks at them; none of
            any layer where it is empty.
    """

    pieces: tuple[tuple[Piece, ...], ...]
    recomputations: tuple[Recomputation, ...]
    steps: tuple[Step, ...]
    left_out: tuple[Rows, ...] = ()


def schedule(
    spec: ModelSpec,
    spans: Sequence[SpanSize],
    plan: RestorePlan,
    *,
    fresh_tokens: int = 1,
    costs: ModelCosts | None = None,
    now: Conditions | None = None,
    unseen: Sequence[Rows] = (),
) -> Schedule:
    """Lay a plan out in steps.

    Args:
        unseen: rows of every layer that nothing looks at: chunks in these are left out.
        fresh_tokens: of the prompt, for the cost of the forward pass.
        costs, now: the machine; without them the steps have no costs.
    """
    pieces, left_out = _pieces(spec.num_layers, spans, plan, unseen)
    recomputations = tuple(_recomputations(spec.num_layers, spans, plan.cuts))
    steps = _Steps(spec, spans, fresh_tokens, costs, now).of(pieces, recomputations)
    return Schedule(pieces, recomputations, steps, left_out if any(left_out) else ())


def _pieces(
    num_layers: int, spans: Sequence[SpanSize], plan: RestorePlan, unseen: Sequence[Rows]
) -> tuple[tuple[tuple[Piece, ...], ...], tuple[Rows, ...]]:
    """The pieces of every layer, and the rows that are left out."""
    known: dict[object, tuple[tuple[Piece, ...], Rows]] = {}
    result = []
    for layer in range(num_layers):
        is_edge = layer in (0, num_layers - 1)
        piece_tokens = plan.edge_piece_tokens if is_edge else plan.piece_tokens
        column = tuple(
            span.layout.layers[layer] if layer >= cut.layers and cut.tokens < span.tokens else None
            for span, cut in zip(spans, plan.cuts, strict=True)
        )
        hidden_from_all = unseen[layer] if unseen else ()
        if (column, is_edge, hidden_from_all) not in known:
            uses = list(_uses(column, spans, plan.cuts))
            left_out = [use for _, use in uses if _is_in(use, hidden_from_all)]
            seen = [(fmt, use) for fmt, use in uses if use not in left_out] if left_out else uses
            rows = tuple((use.row, use.row + use.tokens) for use in left_out)
            known[column, is_edge, hidden_from_all] = _joined(seen, piece_tokens), rows
        result.append(known[column, is_edge, hidden_from_all])
    return tuple(pieces for pieces, _ in result), tuple(rows for _, rows in result)


def _is_in(use: ChunkUse, rows: Rows) -> bool:
    return any(begin <= use.row and use.row + use.tokens <= end for begin, end in rows)


def _uses(
    column: Sequence[LayerFormat | None], spans: Sequence[SpanSize], cuts: Sequence[Cut]
) -> Iterator[tuple[LayerFormat, ChunkUse]]:
    """The chunks of one layer that are read."""
    row = 0
    for index, (fmt, span, cut) in enumerate(zip(column, spans, cuts, strict=True)):
        step = span.layout.chunk_tokens
        for chunk in range(span.layout.num_chunks(span.tokens)) if fmt is not None else ():
            first = chunk * step
            if first >= cut.tokens and fmt is not None:
                yield fmt, ChunkUse(index, chunk, min(step, span.tokens - first), row + first)
        row += span.tokens


def _joined(uses: Sequence[tuple[LayerFormat, ChunkUse]], piece_tokens: int) -> tuple[Piece, ...]:
    """Neighbouring chunks as pieces, those that need computing most in front."""
    pieces: list[Piece] = []
    for fmt, use in uses:
        last = pieces[-1] if pieces else None
        if (
            last is not None
            and last.fmt == fmt
            and last.stop == use.row
            and last.stop - last.start < piece_tokens
        ):
            pieces[-1] = Piece(fmt, (*last.chunks, use))
        else:
            pieces.append(Piece(fmt, (use,)))
    return tuple(sorted(pieces, key=lambda piece: piece.fmt.representation is Representation.KV))


def _recomputations(
    num_layers: int, spans: Sequence[SpanSize], cuts: Sequence[Cut]
) -> list[Recomputation]:
    """In batches of similar length; those that go through more layers in front."""
    by_layers: dict[int, list[tuple[int, int]]] = {}
    for index, (span, cut) in enumerate(zip(spans, cuts, strict=True)):
        if cut.tokens:
            by_layers.setdefault(num_layers, []).append((index, cut.tokens))
        elif cut.layers:
            by_layers.setdefault(cut.layers, []).append((index, span.tokens))
    return [
        Recomputation(tuple(batch), layers)
        for layers, heads in sorted(by_layers.items(), reverse=True)
        for batch in _batches(sorted(heads, key=lambda head: head[1]))
    ]


def _batches(heads: Sequence[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    batch: list[tuple[int, int]] = []
    for index, tokens in heads:
        if batch and (len(batch) + 1) * tokens > RECOMPUTE_BATCH_TOKENS:
            yield batch
            batch = []
        batch.append((index, tokens))
    if batch:
        yield batch


@dataclass(frozen=True, slots=True)
class _Steps:
    spec: ModelSpec
    spans: Sequence[SpanSize]
    fresh_tokens: int
    costs: ModelCosts | None
    now: Conditions | None

    def of(
        self, pieces: Sequence[Sequence[Piece]], recomputations: Sequence[Recomputation]
    ) -> tuple[Step, ...]:
        known: dict[int, tuple[float, float, int]] = {}

        def facts(piece: Piece) -> tuple[float, float, int]:
            if id(piece) not in known:
                known[id(piece)] = self._piece(piece)
            return known[id(piece)]

        steps = [
            Step(READING, "read", layer, index, (), facts(piece)[0], facts(piece)[2])
            for layer, row in enumerate(pieces)
            for index, piece in enumerate(row)
        ]
        for index, job in enumerate(recomputations):
            steps.append(
                Step(COMPUTING, "recompute", job.layers, index, (), self._recomputing_s(job))
            )
        read, forward_s = 0, self._forward_s()
        for layer, row in enumerate(pieces):
            for index, piece in enumerate(row):
                restore_s = facts(piece)[1]
                steps.append(Step(COMPUTING, "restore", layer, index, (read,), restore_s))
                read += 1
            steps.append(Step(COMPUTING, "forward", layer, 0, (), forward_s))
        return tuple(steps)

    def _piece(self, piece: Piece) -> tuple[float, float, int]:
        """Seconds of reading and of restoring a piece, and its bytes."""
        spans = [self.spans[use.span] for use in piece.chunks]
        sizes = [
            piece.fmt.value_bytes(self.spec, span.tokens_of_chunk(use.chunk))
            for span, use in zip(spans, piece.chunks, strict=True)
        ]
        num_bytes = sum(sizes)
        if self.costs is None or self.now is None:
            return 0.0, 0.0, num_bytes
        restore_s = self.costs.restore(piece.fmt)(piece.stop - piece.start)
        rates = [span.read_rate or self.now.read_rate for span in spans]
        read_s = sum(rate(size) for rate, size in zip(rates, sizes, strict=True))
        return float(read_s), self.now.compute_factor * float(restore_s), num_bytes

    def _recomputing_s(self, job: Recomputation) -> float:
        if self.costs is None or self.now is None:
            return 0.0
        seconds = sum(float(self.costs.layer(tokens)) for _, tokens in job.heads)
        return self.now.compute_factor * job.layers * seconds

    def _forward_s(self) -> float:
        if self.costs is None or self.now is None:
            return 0.0
        context = sum(span.tokens for span in self.spans)
        return self.now.compute_factor * self.costs.suffix(self.fresh_tokens, context)
