"""What this library tells LlamaIndex's instrumentation: events, and the spans that they are in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from llama_index_instrumentation import get_dispatcher
from llama_index_instrumentation.base import BaseEvent
from llama_index_instrumentation.span import active_span_id

from hcache_rag.engine import HCacheEngine
from hcache_rag.indexing import PrecomputeReport
from hcache_rag.provenance import Generation
from hcache_rag.store import StateStore

_dispatcher = get_dispatcher(__name__)


class StateRestoreEvent(BaseEvent):
    """A prompt was answered; sent once per call, when its answer is complete.

    Args:
        provenance: `hcache_rag.Provenance.to_dict()`: tokens (exact, relocated, repaired, fresh,
            missed), bytes, seconds by stage, and the plan.
    """

    provenance: dict[str, Any]

    @classmethod
    def class_name(cls) -> str:
        """The stable name in serialised forms."""
        return "StateRestoreEvent"


class StatePrecomputeStartEvent(BaseEvent):
    """Documents are about to be read.

    Args:
        documents: so many, with those whose states are there already.
    """

    documents: int

    @classmethod
    def class_name(cls) -> str:
        """The stable name in serialised forms."""
        return "StatePrecomputeStartEvent"


class StatePrecomputeEndEvent(BaseEvent):
    """Documents have been read.

    Args:
        stored, reused, skipped: documents; the last are those that got no state.
        stored_tokens, stored_bytes: of the states that were stored.
        continued_tokens: of these, tokens that were not read again, see `PrecomputeReport`.
        seconds: that it took.
    """

    stored: int
    reused: int
    skipped: int
    stored_tokens: int
    stored_bytes: int
    continued_tokens: int
    seconds: float

    @classmethod
    def class_name(cls) -> str:
        """The stable name in serialised forms."""
        return "StatePrecomputeEndEvent"


class StateEvictEvent(BaseEvent):
    """States had to go, for others to have room.

    Args:
        evicted: so many.
        evicted_bytes: that they took.
    """

    evicted: int
    evicted_bytes: int

    @classmethod
    def class_name(cls) -> str:
        """The stable name in serialised forms."""
        return "StateEvictEvent"


def generate(
    engine: HCacheEngine, prompt: str, end_turn: Callable[[], None], **options: Any
) -> Generation:
    """`HCacheEngine.generate` in a span "restore", with a `StateRestoreEvent` at its end.

    The span is open while the answer is computed. It lies in that of the call, or is a root where
    that has ended, as LlamaIndex ends a stream's before it is read.

    Args:
        end_turn: called before the event is sent: who hears it may want to ask the same model.
    """
    with _outside_ended_spans():
        return restore(engine, prompt, end_turn, options)


@_dispatcher.span
def restore(
    engine: HCacheEngine, prompt: str, end_turn: Callable[[], None], options: dict[str, Any]
) -> Generation:
    """The span that `generate` opens."""
    answer = engine.generate(prompt, **options)
    end_turn()
    _dispatcher.event(StateRestoreEvent(provenance=answer.provenance.to_dict()))
    return answer


@contextmanager
def _outside_ended_spans() -> Iterator[None]:
    """OpenTelemetry's handler makes no span in one that it has ended."""
    around = active_span_id.get()
    handlers = get_dispatcher().span_handlers
    if around is None or any(around in handler.open_spans for handler in handlers):
        yield
        return
    token = active_span_id.set(None)
    try:
        yield
    finally:
        active_span_id.reset(token)


def report_precompute(report: PrecomputeReport) -> None:
    """Send a `StatePrecomputeEndEvent`."""
    _dispatcher.event(
        StatePrecomputeEndEvent(
            stored=report.stored,
            reused=report.reused,
            skipped=len(report.skipped),
            stored_tokens=report.stored_tokens,
            stored_bytes=report.stored_bytes,
            continued_tokens=report.continued_tokens,
            seconds=report.seconds,
        )
    )


def report_start(documents: int) -> None:
    """Send a `StatePrecomputeStartEvent`."""
    _dispatcher.event(StatePrecomputeStartEvent(documents=documents))


@contextmanager
def reporting_evictions(store: StateStore) -> Iterator[None]:
    """Send a `StateEvictEvent` if states have to go inside the block."""
    before = store.counters()
    yield
    after = store.counters()
    if after.evictions > before.evictions:
        _dispatcher.event(
            StateEvictEvent(
                evicted=after.evictions - before.evictions,
                evicted_bytes=after.evicted_bytes - before.evicted_bytes,
            )
        )
