"""How to restore: which layers or tokens to recompute, what to read, in which order. Pure.

Two resources work at once: reading takes `bytes / B`, computing `work / F`. A plan is good when
both are busy to the end. Knows no torch, no disk and no clock; costs come from a profile.

The order is always that of the forward pass, layer after layer; the first layers (or the first
tokens) are recomputed while the rest is being read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from hcache_rag.layout import LayerFormat, Representation, StateLayout
from hcache_rag.profile import HardwareProfile, ReadRate
from hcache_rag.spec import ModelSpec

Seconds = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

MIN_PIECE_TOKENS, MAX_PIECE_TOKENS = 512, 1024
PIECES_OF_A_LAYER = 4
"""A layer is restored in about so many pieces, so that computing need not wait for all of it."""
EDGE_PIECES = 4
"""The first and the last layer have so many times more pieces: what is waited for at the beginning
is the first piece's reading, and at the end the last one's restoring."""
MAX_TOKEN_CUTS = 64
"""At so many places at most it is tried to stop recomputing the first tokens."""
MIN_GAIN = 0.03
"""What recomputing must save of the time before it is done: a plan stands on noisy figures."""


@dataclass(frozen=True, slots=True)
class SpanSize:
    """What the planner knows of a restored span.

    Args:
        tokens: how many of the state's tokens are restored.
        layout: what the state keeps.
        is_recomputable: whether the tokens that the state was computed after are known.
        unused_tokens: behind these, that the state has as well.
        read_rate: of its own, where it does not come from the store's disk but from afar.
    """

    tokens: int
    layout: StateLayout
    is_recomputable: bool = True
    unused_tokens: int = 0
    read_rate: ReadRate | None = None

    def tokens_of_chunk(self, chunk: int) -> int:
        """Tokens of a stored chunk, used or not."""
        step = self.layout.chunk_tokens
        return min(step, self.tokens + self.unused_tokens - chunk * step)

    @property
    def chunk_tokens(self) -> int:
        """Tokens that are recomputed or read as a whole: a chunk, or the span if it must be."""
        return self.tokens if self.layout.num_none else self.layout.chunk_tokens


@dataclass(frozen=True, slots=True)
class Conditions:
    """How the machine is now.

    Args:
        read_rate: what reading from the store takes now.
        compute_factor: how much longer computing takes than the profile says.
    """

    read_rate: ReadRate
    compute_factor: float = 1.0


@dataclass(frozen=True, slots=True)
class Cut:
    """What of a span is recomputed: all layers of its first tokens, which end where a chunk ends,
    and the first layers of the others."""

    tokens: int = 0
    layers: int = 0


@dataclass(frozen=True, slots=True)
class RestorePlan:
    """How to restore the spans of a prompt.

    Args:
        cuts: what of each span is recomputed; everything else is read.
        piece_tokens: about how many tokens are read, and restored, at once.
        makespan_s, reading_s, computing_s: predicted; 0 where nothing was known of the machine.
        compute_factor: how much longer than the profile says computing was predicted to take.
        reason: the choice in words.
    """

    cuts: tuple[Cut, ...]
    piece_tokens: int
    makespan_s: float = 0.0
    reading_s: float = 0.0
    computing_s: float = 0.0
    compute_factor: float = 1.0
    reason: str = "everything that is stored is read"

    @property
    def edge_piece_tokens(self) -> int:
        """`piece_tokens` of the first and of the last layer, see `EDGE_PIECES`."""
        return self.piece_tokens // EDGE_PIECES

    @property
    def lower_bound_s(self) -> float:
        """No overlap can be faster: the busier lane's work."""
        return max(self.reading_s, self.computing_s)


def piece_tokens_for(tokens: int) -> int:
    """About how many tokens of a layer are restored at once, of `tokens` in all."""
    return max(MIN_PIECE_TOKENS, min(MAX_PIECE_TOKENS, -(-tokens // PIECES_OF_A_LAYER)))


def pieces_of_layers(num_layers: int, tokens: int, piece_tokens: int, chunk_tokens: int) -> Seconds:
    """In about how many pieces each layer is read and restored, (L,); none is less than a chunk."""
    pieces = np.full(num_layers, tokens / max(piece_tokens, chunk_tokens))
    pieces[[0, -1]] = tokens / max(piece_tokens // EDGE_PIECES, chunk_tokens)
    result: Seconds = np.maximum(pieces, 1.0)
    return result


def makespan(
    reading: Seconds, restoring: Seconds, forward_s: float, upfront: Any, pieces: Any
) -> Seconds:
    """When the last layer is done, if layer after layer is read, restored and passed through.

    Args:
        reading, restoring: seconds of each layer, (..., L).
        forward_s: seconds of one layer's forward pass over the fresh tokens.
        upfront: seconds of computing before the first layer, (...).
        pieces: in how many equal pieces each layer is read and restored, (L,) or one number.

    Returns:
        (...). A piece cannot be restored before it has been read, and everything behind it is
        computed after it; the last piece and the first one of each layer bind.
    """
    computing = restoring + forward_s
    remaining = np.cumsum(computing[..., ::-1], axis=-1)[..., ::-1]
    read = np.cumsum(reading, axis=-1)
    after_first = read - reading * (1 - 1 / pieces) + remaining
    after_last = read + remaining - restoring * (1 - 1 / pieces)
    bound = np.maximum(after_first, after_last).max(axis=-1)
    result: Seconds = np.maximum(bound, upfront + remaining[..., 0])
    return result


def plan_restore(
    spec: ModelSpec,
    spans: Sequence[SpanSize],
    profile: HardwareProfile | None,
    now: Conditions | None = None,
    *,
    fresh_tokens: int = 1,
) -> RestorePlan:
    """Choose how many first layers, or first tokens, to recompute instead of reading.

    Args:
        spans: what is to be restored, in the order of the prompt.
        profile: the machine; None reads all that is stored.
        now: how it is now; by default as it is when nothing is in the page cache.
        fresh_tokens: of the prompt, which the forward pass reads anyway.

    Raises:
        ValueError: a span must be recomputed and cannot be.
    """
    total = sum(span.tokens for span in spans)
    piece_tokens = piece_tokens_for(total)
    least = [span.layout.num_none for span in spans]
    if any(none and not s.is_recomputable for none, s in zip(least, spans, strict=True)):
        raise ValueError("a span keeps nothing of its first layers and cannot be recomputed")
    as_stored = tuple(Cut(0, none) for none in least)
    if profile is None or not total:
        return RestorePlan(as_stored, piece_tokens)
    return _Candidates(
        spec, spans, profile, now or Conditions(profile.cold), fresh_tokens, piece_tokens
    ).best()


class _Candidates:
    """All plans for some spans: arrays with one row per plan and one column per layer.

    The first L + 1 plans recompute 0, 1, ... L layers of every span; the others recompute the
    first tokens, up to the end of some chunk, in all layers.
    """

    def __init__(
        self,
        spec: ModelSpec,
        spans: Sequence[SpanSize],
        profile: HardwareProfile,
        now: Conditions,
        fresh_tokens: int,
        piece_tokens: int,
    ) -> None:
        costs, slower = profile.costs_of(spec), now.compute_factor
        self.slower = slower
        self.spans, self.num_layers, self.piece_tokens = spans, spec.num_layers, piece_tokens
        self.tokens = np.array([span.tokens for span in spans])
        self.least = np.array([span.layout.num_none for span in spans])
        self.is_recomputable = np.array([span.is_recomputable for span in spans])
        self.layer_cost = costs.layer.times(slower)
        self.layer_s = self.layer_cost(self.tokens)
        total = int(self.tokens.sum())
        self.forward_s = slower * costs.suffix(fresh_tokens, float(total))
        smallest = min(span.layout.chunk_tokens for span in spans)
        self.pieces = pieces_of_layers(spec.num_layers, total, piece_tokens, smallest)

        def reading(fmt: LayerFormat, span: SpanSize) -> float:
            count = span.layout.num_chunks(span.tokens)
            chunks = tuple(span.tokens_of_chunk(chunk) for chunk in range(count))
            return float((span.read_rate or now.read_rate)(_value_bytes(fmt, spec, chunks), 0))

        def requesting(_fmt: LayerFormat, span: SpanSize) -> float:
            rate = span.read_rate or now.read_rate
            return span.layout.num_chunks(span.tokens) * rate.per_request_s

        def moving(fmt: LayerFormat, span: SpanSize) -> float:
            return slower * span.tokens * costs.restore(fmt).per_token_s

        def calling(fmt: LayerFormat, span: SpanSize) -> float:
            return slower * span.tokens / total * costs.restore(fmt).fixed_s

        self.reading = _seconds_of_layers(spans, reading)
        self.requesting = _seconds_of_layers(spans, requesting)
        self.restoring = _seconds_of_layers(spans, moving)
        self.restoring += _seconds_of_layers(spans, calling) * self.pieces
        self.end_spans, self.end_tokens = self._chunk_ends()

    def best(self) -> RestorePlan:
        """The plan with the least makespan: reading all that is stored, unless another gains."""
        tokens_gone = self.end_tokens / self.tokens[self.end_spans]
        chunks = np.array([span.layout.num_chunks(span.tokens) for span in self.spans])
        steps = np.array([span.layout.chunk_tokens for span in self.spans])
        chunks_gone = np.ceil(self.end_tokens / steps[self.end_spans]) / chunks[self.end_spans]
        reading = np.concatenate(
            (
                self._by_layers(self.reading + self.requesting),
                self._by_tokens(self.reading, tokens_gone)
                + self._by_tokens(self.requesting, chunks_gone),
            )
        )
        restoring = np.concatenate(
            (self._by_layers(self.restoring), self._by_tokens(self.restoring, tokens_gone))
        )
        upfront = np.concatenate((self._layers_upfront(), self._tokens_upfront()))
        times = makespan(reading, restoring, self.forward_s, upfront, self.pieces)
        chosen = int(np.argmin(times))
        if times[chosen] > (1 - MIN_GAIN) * times[0]:
            chosen = 0
        return RestorePlan(
            cuts=self._cuts(chosen),
            piece_tokens=self.piece_tokens,
            makespan_s=float(times[chosen]),
            reading_s=float(reading[chosen].sum()),
            computing_s=float(
                upfront[chosen] + restoring[chosen].sum() + self.forward_s * self.num_layers
            ),
            compute_factor=self.slower,
            reason=self._reason(chosen, float(times[chosen]), float(times[0])),
        )

    def _chunk_ends(self) -> tuple[Indices, Indices]:
        """Where recomputing may stop, at the ends of chunks: spans (K,), tokens of them (K,)."""
        ends = [
            (index, min(end, span.tokens))
            for index, span in enumerate(self.spans)
            if span.is_recomputable
            for end in range(span.chunk_tokens, span.tokens + span.chunk_tokens, span.chunk_tokens)
        ]
        some = ends[:: -(-len(ends) // MAX_TOKEN_CUTS) or 1]
        spans, tokens = np.array(some, dtype=np.int64).reshape(-1, 2).T
        return spans, tokens

    def _by_layers(self, seconds: Seconds) -> Seconds:
        """(S, L) to (L + 1, L): what is left if the first 0, 1, ... L layers are recomputed."""
        layer = np.arange(self.num_layers)
        is_left = layer[None, :] >= np.arange(self.num_layers + 1)[:, None]
        recomputable = seconds[self.is_recomputable].sum(0)
        others = seconds[~self.is_recomputable].sum(0)
        result: Seconds = recomputable * is_left + others
        return result

    def _by_tokens(self, seconds: Seconds, share_gone: Seconds) -> Seconds:
        """(S, L) to (K, L): what is left if the tokens before each chunk's end are recomputed.

        Of the span in which the end lies, the share (K,) is gone.
        """
        gone = np.cumsum(seconds * self.is_recomputable[:, None], axis=0)
        kept_s = (1 - share_gone)[:, None]
        left = seconds.sum(0) - gone[self.end_spans]
        result: Seconds = left + seconds[self.end_spans] * kept_s
        return result

    def _layers_upfront(self) -> Seconds:
        layers = np.maximum(np.arange(self.num_layers + 1)[:, None], self.least)
        result: Seconds = (layers * (self.layer_s * self.is_recomputable)).sum(1)
        return result

    def _tokens_upfront(self) -> Seconds:
        least = self.least * self.layer_s
        more = (self.num_layers - self.least) * self.layer_s * self.is_recomputable
        before = np.cumsum(more) - more
        of_last = (self.num_layers - self.least)[self.end_spans] * self.layer_cost(self.end_tokens)
        result: Seconds = least.sum() + before[self.end_spans] + of_last
        return result

    def _cuts(self, chosen: int) -> tuple[Cut, ...]:
        if chosen <= self.num_layers:
            return tuple(
                Cut(0, max(chosen, span.layout.num_none) if span.is_recomputable else 0)
                for span in self.spans
            )
        number = chosen - self.num_layers - 1
        last, end = int(self.end_spans[number]), int(self.end_tokens[number])
        return tuple(
            Cut(span.tokens if index < last else end, span.layout.num_none)
            if index <= last and span.is_recomputable
            else Cut(0, span.layout.num_none)
            for index, span in enumerate(self.spans)
        )

    def _reason(self, chosen: int, time_s: float, as_stored_s: float) -> str:
        if chosen == 0:
            return "everything that is stored is read"
        gain = f"{time_s * 1e3:,.1f} ms instead of {as_stored_s * 1e3:,.1f} ms"
        if chosen <= self.num_layers:
            return f"the first {chosen} of {self.num_layers} layers are recomputed: {gain}"
        tokens = sum(cut.tokens for cut in self._cuts(chosen))
        total = int(self.tokens.sum())
        return f"the first {tokens:,} of {total:,} tokens are recomputed: {gain}"


def _seconds_of_layers(
    spans: Sequence[SpanSize], seconds: Callable[[LayerFormat, SpanSize], float]
) -> Seconds:
    """What a format costs a span, for all spans and their layers, (S, L)."""
    runs = [
        [
            0.0 if f.representation is Representation.NONE else seconds(f, s)
            for f, _ in s.layout.runs
        ]
        for s in spans
    ]
    layouts = {id(span.layout): span.layout for span in spans}
    result = np.empty((len(spans), len(spans[0].layout.layers)))
    for identity, layout in layouts.items():
        rows = [index for index, span in enumerate(spans) if id(span.layout) == identity]
        counts = np.array([count for _, count in layout.runs])
        result[rows] = np.repeat(np.array([runs[row] for row in rows]), counts, axis=1)
    return result


@lru_cache(maxsize=4096)
def _value_bytes(fmt: LayerFormat, spec: ModelSpec, chunks: tuple[int, ...]) -> int:
    return sum(fmt.value_bytes(spec, tokens) for tokens in chunks)
