"""What this library tells LlamaIndex's instrumentation."""

from __future__ import annotations

from typing import Any

from llama_index_instrumentation import get_dispatcher
from llama_index_instrumentation.base import BaseEvent

from hcache_rag.provenance import Generation

_dispatcher = get_dispatcher(__name__)


class StateRestoreEvent(BaseEvent):
    """A prompt was answered; sent once per call, when its answer is complete.

    Args:
        provenance: `hcache_rag.Provenance.to_dict()`: tokens, bytes and seconds.
    """

    provenance: dict[str, Any]

    @classmethod
    def class_name(cls) -> str:
        """The stable name in serialised forms."""
        return "StateRestoreEvent"


def report_restore(answer: Generation) -> None:
    """Send a `StateRestoreEvent`."""
    _dispatcher.event(StateRestoreEvent(provenance=answer.provenance.to_dict()))
