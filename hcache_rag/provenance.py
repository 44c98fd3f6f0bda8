"""Where an answer's prompt tokens came from, and what that cost. Facts only."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from hcache_rag.timeline import Timeline


@dataclass(frozen=True, slots=True)
class Provenance:
    """The account of one prompt.

    Args:
        prompt_tokens: all of them: exact + relocated + repaired + fresh.
        exact_tokens: restored from states computed after the very tokens in front of them.
        relocated_tokens: restored from states computed after something else, and left so.
        repaired_tokens: restored likewise, then read again by the model.
        fresh_tokens: read by the model now.
        missed_tokens: those of the fresh ones that belong to known documents without a usable
            state.
        documents_restored, documents_missed: the same, in documents.
        documents_queued: of those missed, so many are read and stored afterwards, when nobody waits
            for an answer.
        bytes_read: from the store, headers included.
        seconds: by stage: "match", "compose", "first_token" (from the call to the first token),
            and of these "reading" (on the reading lane), "waiting", "recomputing", "restoring",
            "restored" (from the beginning of reading to the end of the first forward pass) and
            what was "predicted" for that.
        fidelity: the dial's position, or the share, that the engine was set to.
        plan: what was read and recomputed, and why.
        warnings: why states that should have been used were not.
    """

    prompt_tokens: int
    exact_tokens: int
    relocated_tokens: int
    fresh_tokens: int
    repaired_tokens: int = 0
    missed_tokens: int = 0
    documents_restored: int = 0
    documents_missed: int = 0
    documents_queued: int = 0
    bytes_read: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    fidelity: str | float = ""
    plan: str = ""
    warnings: tuple[str, ...] = ()

    @property
    def restored_tokens(self) -> int:
        """Tokens that the model did not have to read now."""
        return self.exact_tokens + self.relocated_tokens

    def to_dict(self) -> dict[str, Any]:
        """A form that `json` writes."""
        return {**asdict(self), "restored_tokens": self.restored_tokens}


@dataclass(frozen=True, slots=True)
class Generation:
    """A finished answer."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    """"stop" (the model ended it, or a stop string), "length" or "cancelled"."""
    provenance: Provenance
    timeline: Timeline = field(default_factory=lambda: Timeline(()), repr=False)
    """When each step of restoring ran."""
