"""A prompt's way to its answer: plan, restore while the model reads, repair, decode, account."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from hcache_rag.account import provenance_of
from hcache_rag.bound import Bound
from hcache_rag.buffers import BufferPool
from hcache_rag.cache import RestoringCache
from hcache_rag.compose import Composition
from hcache_rag.errors import PromptTooLongError, StateError
from hcache_rag.executor import Execution, open_restoring, span_sizes
from hcache_rag.generation import GenerationOptions, decode
from hcache_rag.lanes import Cancelled
from hcache_rag.models import ModelAdapter
from hcache_rag.plan import RestorePlan, SpanSize
from hcache_rag.planner import Planner
from hcache_rag.provenance import Generation
from hcache_rag.repair import begin_repair
from hcache_rag.resolved import Resolved, ResolvedPiece
from hcache_rag.schedule import Rows, Schedule


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt to answer, and what becomes known of it on the way.

    Args:
        bound: the model and its states, to the end of the request.
        started: when it came, by `time.perf_counter`.
        seconds: that its stages took, by name.
        remember: whether its answer is kept as a path.
    """

    bound: Bound
    resolved: Resolved
    options: GenerationOptions
    started: float
    seconds: dict[str, float]
    remember: bool = False
    on_text: Callable[[str], None] | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)
    warnings: list[str] = field(default_factory=list)

    def emit(self, text: str) -> None:
        """Hand a piece of the answer on; the first tells when the first token was there."""
        if "first_token" not in self.seconds:
            self.seconds["first_token"] = time.perf_counter() - self.started
        if text and self.on_text:
            self.on_text(text)


class Answering:
    """Answers requests with the states of their prompts.

    Args:
        planner: plans what is read and what is computed, and learns from it.
        buffers: the K and V that requests are answered in.
        reference_mode: restore in transformers' own order of operations, slower.
        read_later: has missed documents read afterwards, and says how many will be.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        planner: Planner,
        buffers: BufferPool,
        *,
        reference_mode: bool,
        read_later: Callable[[Sequence[ResolvedPiece]], int],
    ) -> None:
        self.tokenizer = tokenizer
        self.planner = planner
        self.buffers = buffers
        self.reference_mode = reference_mode
        self._read_later = read_later

    def answer(self, request: Request) -> Generation:
        """Answer; a state that cannot be used is dropped, and all is begun anew.

        Raises:
            PromptTooLongError: the prompt fills the model's window.
            ValueError: an empty prompt.
        """
        bound, resolved = request.bound, request.resolved
        while True:
            composing = time.perf_counter()
            composition = bound.compose(resolved.pieces)
            request.seconds["compose"] = time.perf_counter() - composing
            try:
                return self._answer(composition, request)
            except StateError as error:
                resolved.pieces = bound.without(resolved.pieces, error, request.warnings)

    @contextmanager
    def restoring(
        self,
        bound: Bound,
        composition: Composition,
        pieces: Sequence[ResolvedPiece],
        work: Schedule,
        room_tokens: int,
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> Iterator[tuple[RestoringCache, Execution]]:
        """A cache that restores a composition, see `executor.open_restoring`.

        Args:
            room_tokens: that may follow the prompt.
        """
        with (
            self.buffers.borrow(len(composition.token_ids) + room_tokens) as buffers,
            open_restoring(
                bound.adapter,
                composition,
                buffers,
                bound.shelf(pieces),
                work=work,
                prefixes=bound.prefixes,
                reference_mode=self.reference_mode,
                is_cancelled=is_cancelled,
            ) as (cache, execution),
        ):
            yield cache, execution

    def plan(
        self, bound: Bound, composition: Composition, unseen: Sequence[Rows] = ()
    ) -> tuple[list[SpanSize], RestorePlan, Schedule]:
        """What to read and what to compute of a composition's spans, and in which order.

        Raises:
            UnreachableStateError: a state does not come now.
        """
        sizes = span_sizes(composition, bound.prefixes, bound.store.read_rate)
        plan, work = self.planner.plan(sizes, len(composition.fresh_positions), unseen)
        return sizes, plan, work

    def _answer(self, composition: Composition, request: Request) -> Generation:
        bound, pieces, adapter = request.bound, request.resolved.pieces, request.bound.adapter
        room_tokens = _room(composition, request.options, adapter.spec.window_tokens)
        is_relocated = composition.num_restored > composition.num_exact
        share = bound.repair_share if is_relocated else 0.0
        will_remember = request.remember and bound.paths.is_on
        # What is read again looks at everything, and what is remembered is kept as a whole.
        unseen = () if share or will_remember else _unseen(adapter, composition)
        sizes, plan, work = self.plan(bound, composition, unseen)
        repaired = 0
        with self.restoring(
            bound, composition, pieces, work, room_tokens, request.cancelled.is_set
        ) as (cache, execution):
            try:
                execution.recompute()
                if share:
                    repaired = begin_repair(adapter, cache, share)
                text, token_ids, reason = decode(
                    adapter.model,
                    self.tokenizer,
                    composition.token_ids,
                    cache,
                    request.options,
                    room_tokens,
                    request.emit,
                    request.cancelled,
                )
                if will_remember and reason != "cancelled":
                    bound.keeper.remember(request.resolved, cache, text, token_ids)
            except Cancelled:
                text, token_ids, reason = "", (), "cancelled"
        timeline = execution.timeline
        if reason != "cancelled":
            on_host = adapter.device.type == "cpu"
            is_here = all(size.read_rate is None for size in sizes)
            self.planner.observe(timeline, plan, sees_computing=on_host, sees_reading=is_here)
        provenance = provenance_of(
            composition,
            pieces,
            request.seconds,
            timeline,
            request.warnings,
            repaired=repaired,
            fidelity=bound.fidelity,
            plan=plan,
            queued=self._read_later(pieces),
        )
        bound.count_use(pieces)
        if bound.paths.is_on and (is_relocated or bound.fidelity == "exact"):
            bound.keeper.count(request.resolved, composition.num_exact)
        bound.warn_of(pieces)
        return Generation(text, token_ids, reason, provenance, timeline)


def _room(composition: Composition, options: GenerationOptions, window: int) -> int:
    """So many new tokens the window has room for, of those that are wanted."""
    num_tokens = len(composition.token_ids)
    if not num_tokens:
        raise ValueError("the prompt is empty")
    if num_tokens >= window:
        raise PromptTooLongError(num_tokens, options.max_new_tokens, window)
    return min(options.max_new_tokens, window - num_tokens)


def _unseen(adapter: ModelAdapter, composition: Composition) -> tuple[Rows, ...]:
    """Restored rows of every layer that no fresh token has in its window."""
    windows = adapter.windows
    rows = {w: composition.unseen_rows(w) for w in set(windows) if w is not None}
    if not any(rows.values()):
        return ()
    return tuple(() if window is None else rows[window] for window in windows)
