"""What this library tells LlamaIndex's instrumentation: events, and the spans that they are in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from llama_index_instrumentation import get_dispatcher
from llama_index_instrumentation.base import BaseEvent

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


@_dispatcher.span
def restore(
    engine: HCacheEngine, prompt: str, end_turn: Callable[[], None], **options: Any
) -> Generation:
    """`HCacheEngine.generate` in a span of its own, with a `StateRestoreEvent` at its end.

    The span is open while the answer is computed, also where that is on another thread than the
    call, or after it.

    Args:
        end_turn: called before the event is sent: who hears it may want to ask the same model.
    """
    answer = engine.generate(prompt, **options)
    end_turn()
    _dispatcher.event(StateRestoreEvent(provenance=answer.provenance.to_dict()))
    return answer


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
