"""What happened to a prompt, put together as its `Provenance`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from hcache_rag.catalogue import ResolvedPiece
from hcache_rag.compose import Composition
from hcache_rag.executor import RestoreTimes
from hcache_rag.provenance import Provenance


def misses(pieces: Iterable[ResolvedPiece]) -> list[str]:
    """A sentence for each cause of documents without a usable state."""
    causes = Counter(p.miss for p in pieces if p.document is not None and p.miss is not None)
    return [f"{count} document(s) read afresh: {cause}" for cause, count in causes.items()]


def provenance_of(
    composition: Composition,
    pieces: Sequence[ResolvedPiece],
    seconds: dict[str, float],
    times: RestoreTimes | None,
    warnings: Sequence[str],
    repaired: int = 0,
) -> Provenance:
    """The provenance of a prompt, or of the plan for one where `times` is None."""
    missed = [p for p in pieces if p.document is not None and p.record is None]
    spent = dict(seconds)
    if times is not None:
        spent.update(
            reading=times.reading_s, waiting=times.waiting_s, projecting=times.projecting_s
        )
    exact, num_restored = composition.num_exact, composition.num_restored
    return Provenance(
        prompt_tokens=len(composition.token_ids),
        exact_tokens=exact,
        relocated_tokens=num_restored - exact - repaired,
        repaired_tokens=repaired,
        fresh_tokens=len(composition.fresh_positions),
        missed_tokens=sum(len(p.token_ids) for p in missed),
        documents_restored=sum(not span.record.is_preamble for span in composition.spans),
        documents_missed=len(missed),
        bytes_read=times.bytes_read if times is not None else 0,
        seconds=spent,
        warnings=(*warnings, *misses(missed)),
    )
