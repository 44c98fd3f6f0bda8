"""What happened to a prompt, put together as its `Provenance`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields

from hcache_rag.compose import Composition
from hcache_rag.plan import RestorePlan
from hcache_rag.provenance import Provenance
from hcache_rag.resolved import ResolvedPiece
from hcache_rag.timeline import COMPUTING, READING, Timeline


@dataclass(frozen=True, slots=True)
class Served:
    """Sums over the prompts that an engine has answered, see `Provenance`."""

    prompts: int = 0
    exact_tokens: int = 0
    relocated_tokens: int = 0
    repaired_tokens: int = 0
    fresh_tokens: int = 0
    missed_tokens: int = 0
    documents_restored: int = 0
    documents_missed: int = 0
    documents_queued: int = 0
    bytes_read: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    def plus(self, answer: Provenance) -> Served:
        """With an answer more."""
        sums = {
            each.name: getattr(self, each.name) + getattr(answer, each.name)
            for each in fields(self)
            if each.name not in ("prompts", "seconds")
        }
        seconds = dict(self.seconds)
        for stage, spent in answer.seconds.items():
            seconds[stage] = seconds.get(stage, 0.0) + spent
        return Served(**sums, prompts=self.prompts + 1, seconds=seconds)


def misses(pieces: Iterable[ResolvedPiece]) -> list[str]:
    """A sentence for each cause of documents without a usable state."""
    causes = Counter(p.miss for p in pieces if p.document is not None and p.miss is not None)
    return [f"{count} document(s) read afresh: {cause}" for cause, count in causes.items()]


def provenance_of(
    composition: Composition,
    pieces: Sequence[ResolvedPiece],
    seconds: dict[str, float],
    timeline: Timeline | None,
    warnings: Sequence[str],
    *,
    repaired: int = 0,
    fidelity: str | float = "",
    plan: RestorePlan | None = None,
    queued: int = 0,
) -> Provenance:
    """The provenance of a prompt, or of the plan for one where `timeline` is None.

    Args:
        queued: documents that will be read afterwards.
    """
    missed = [p for p in pieces if p.document is not None and p.record is None]
    paths = {p.record.key for p in pieces if p.is_path and p.record is not None}
    spent = dict(seconds)
    if timeline is not None:
        spent.update(
            reading=timeline.busy_s(READING),
            waiting=timeline.waited_s(COMPUTING),
            recomputing=timeline.busy_s(COMPUTING, "recompute"),
            restoring=timeline.busy_s(COMPUTING, "restore"),
            restored=timeline.makespan_s,
        )
    if plan is not None and plan.makespan_s:
        spent["predicted"] = plan.makespan_s
    exact, num_restored = composition.num_exact, composition.num_restored
    return Provenance(
        prompt_tokens=len(composition.token_ids),
        exact_tokens=exact,
        relocated_tokens=num_restored - exact - repaired,
        repaired_tokens=repaired,
        fresh_tokens=len(composition.fresh_positions),
        missed_tokens=sum(len(p.token_ids) for p in missed),
        documents_restored=sum(
            not (span.record.is_preamble or span.record.key in paths) for span in composition.spans
        ),
        documents_missed=len(missed),
        documents_queued=queued,
        bytes_read=timeline.bytes_read if timeline is not None else 0,
        seconds=spent,
        fidelity=fidelity,
        plan=plan.reason if plan is not None else "",
        warnings=(*warnings, *misses(missed)),
    )
