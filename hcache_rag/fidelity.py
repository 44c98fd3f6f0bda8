"""How close each position of the dial is to full prefill, and which one is enough."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from hcache_rag.engine import HCacheEngine
from hcache_rag.errors import HCacheError, SourceError, StateError, StoreError
from hcache_rag.judge import Judge, Judgement, LayerErrors, gold_tokens
from hcache_rag.openmp import lent_threads
from hcache_rag.quality import bootstrap_interval
from hcache_rag.repair import FIDELITY_SHARES, repair_share
from hcache_rag.store import StateStore
from hcache_rag.store.models import UNKNOWN
from hcache_rag.trial import read_as_a_whole, trying

POSITIONS = (*FIDELITY_SHARES, "exact")
"""The dial's named positions, the cheapest first."""

TOLERANCE_NATS = 0.1
"""Distributions so near to each other differ by at most sqrt(0.1 / 2), 22 %, of the probability
(Pinsker's inequality)."""


_ENOUGH = 4
"""So many prompts are read whatever they take."""


@dataclass(frozen=True, slots=True)
class Case:
    """A finished prompt, and the right answer to it where one is known."""

    prompt: str
    gold: str = ""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over prompts, and the ends of its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class PositionReport:
    """One position of the dial against full prefill, over all prompts.

    Args:
        position: its name, or the share of relocated tokens that it reads again.
        kl_first, kl, top1, nll, rouge_l: see `hcache_rag.judge.Judgement`.
        tokens: that the model reads, mean.
        seconds: from the prompt to the first token, median.
        layers: relative errors of K and V, means.
    """

    position: str | float
    kl_first: Estimate
    kl: Estimate
    top1: Estimate
    nll: Estimate
    rouge_l: Estimate
    tokens: float
    seconds: float
    layers: LayerErrors


@dataclass(frozen=True, slots=True)
class FidelityReport:
    """What `measure_fidelity` has found.

    Args:
        positions: the cheapest first.
        prompts: that were read.
        left_out: why others were not, a sentence for each.
        documents: different ones, restored in these prompts.
        prompt_tokens: mean.
        full_s: seconds of full prefill, median.
        tolerance_nats: what the recommendation is for.
        recommendation: the cheapest position that is near enough.
        reason: why.
    """

    positions: tuple[PositionReport, ...]
    prompts: int
    left_out: tuple[str, ...]
    documents: int
    prompt_tokens: float
    full_s: float
    tolerance_nats: float
    recommendation: str | float
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """A form that `json` writes."""
        return asdict(self)


@lent_threads()
def measure_fidelity(
    engine: HCacheEngine,
    cases: Sequence[Case],
    positions: Iterable[str | float] = POSITIONS,
    *,
    tolerance_nats: float = TOLERANCE_NATS,
    max_new_tokens: int = 32,
    budget_s: float = math.inf,
    on_progress: Callable[[int, int], None] | None = None,
) -> FidelityReport:
    """Read each prompt in full, and restored at each position of the dial, and compare.

    Args:
        engine: with states of the documents in the prompts, and any fidelity but "exact".
        positions: of the dial, or shares of relocated tokens.
        tolerance_nats: the most that the next token's distribution may differ in the mean.
        max_new_tokens: of the answers that are compared.
        budget_s: no prompt is begun, after four, that would probably take longer than this.
        on_progress: called with (prompts done, prompts to do), also before the first.

    Raises:
        ValueError: no position, one that is none, or numbers that are not positive.
        SourceError: the prompts cannot tell positions from each other: fewer than two can be read,
            or nothing in them is relocated.
        StoreError: a stored state is damaged.
    """
    ordered = _ordered(positions)
    if not (tolerance_nats > 0 and math.isfinite(tolerance_nats)):
        raise ValueError(f"tolerance_nats is a positive number, not {tolerance_nats}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be positive, not {max_new_tokens}")
    if engine.fidelity == "exact":
        raise ValueError('the engine restores too little to compare: its fidelity is "exact"')
    found: list[_Read] = []
    left_out: list[str] = []
    started = time.perf_counter()
    for number, case in enumerate(cases):
        if on_progress:
            on_progress(number, len(cases))
        spent_s = time.perf_counter() - started
        if len(found) >= _ENOUGH and spent_s * (1 + 1 / len(found)) > budget_s:
            left_out += ["the time was up"] * (len(cases) - number)
            break
        room = max(max_new_tokens, len(gold_tokens(engine, case.gold)))
        reason = _why_not(engine, case, room)
        if reason is None:
            found.append(_read(engine, case, ordered, max_new_tokens, room))
        else:
            left_out.append(reason)
    if on_progress:
        on_progress(len(cases), len(cases))
    _check(found, left_out)
    reports = tuple(
        _summary(position, [read.judgements[n] for read in found], [r.layers[n] for r in found])
        for n, position in enumerate(ordered)
    )
    recommendation, reason = recommend(reports, tolerance_nats)
    return FidelityReport(
        reports,
        len(found),
        tuple(left_out),
        len({key for read in found for key in read.documents}),
        statistics.mean(read.full.tokens for read in found),
        statistics.median(read.full.seconds for read in found),
        tolerance_nats,
        recommendation,
        reason,
    )


def recommend(reports: Sequence[PositionReport], tolerance_nats: float) -> tuple[str | float, str]:
    """The cheapest position whose mean KL at the first token is within a tolerance, and why.

    Within means that the upper end of its 95 % interval is. "exact" is what is left where none is.

    Args:
        reports: the cheapest first.
    """
    others = [report for report in reports if report.position != "exact"]
    for report in others:
        if report.kl_first.high <= tolerance_nats:
            return report.position, (
                f"the cheapest position whose mean KL from full prefill at the first token is "
                f"surely at most {tolerance_nats:g} nats: {in_words(report.kl_first)}"
            )
    most = f"; {others[-1].position} has {in_words(others[-1].kl_first)}" if others else ""
    return "exact", (
        f"no other position has a KL from full prefill of at most {tolerance_nats:g} nats at the "
        f"first token in the mean{most}"
    )


def in_words(estimate: Estimate) -> str:
    """An estimate in a sentence."""
    return f"{estimate.mean:.2g} (95 %: {estimate.low:.2g} to {estimate.high:.2g})"


def keep_recommendation(report: FidelityReport, store: StateStore, engine: HCacheEngine) -> None:
    """Let engines with fidelity="auto" on this store follow a report.

    Those follow it whose states are made as in this store now, and as the engine makes them; not
    those of an index that is made with other options later.

    Args:
        engine: which was measured.

    Raises:
        HCacheError: "exact" is recommended, which is not taken from a store.
        StoreError: the store cannot be written.
    """
    if report.recommendation == "exact":
        raise HCacheError(
            "not written: exact is recommended, and no store can ask for it, since it needs states "
            "that are kept in full; index with --storage-dtype float32 (or bfloat16, as the model) "
            "and ask with --fidelity exact, or allow more with --tolerance"
        )
    known = store.models().get(engine.root, UNKNOWN)
    store.set_fidelity(engine.root, report.recommendation, engine.measured_with(known))


@dataclass(frozen=True, slots=True)
class _Read:
    """One prompt: full prefill, and each position."""

    full: Judgement
    judgements: list[Judgement]
    layers: list[LayerErrors]
    documents: frozenset[bytes]
    num_relocated: int


def _ordered(positions: Iterable[str | float]) -> list[str | float]:
    cost = {p: math.inf if p == "exact" else repair_share(p) for p in positions}
    if not cost:
        raise ValueError("no position of the dial is given")
    return sorted(cost, key=lambda position: (cost[position], str(position)))


def _why_not(engine: HCacheEngine, case: Case, room_tokens: int) -> str | None:
    """Why a prompt cannot be compared; None if it can."""
    plan, window = engine.plan(case.prompt), engine.adapter.spec.window_tokens
    if plan.prompt_tokens + room_tokens > window:
        return (
            f"a prompt of {plan.prompt_tokens:,} tokens and its answer of up to {room_tokens:,} do "
            f"not fit into the model's window of {window:,}"
        )
    if not plan.documents_restored:
        return "a prompt holds no document with a usable state"
    return None


def _read(
    engine: HCacheEngine,
    case: Case,
    positions: Sequence[str | float],
    max_new_tokens: int,
    room_tokens: int,
) -> _Read:
    try:
        with trying(engine, case.prompt, room_tokens) as trial:
            ids = trial.composition.token_ids.tolist()
            with read_as_a_whole(engine.adapter, ids) as (reader, reading):
                judge = Judge(
                    engine, reader, reading, gold=case.gold, max_new_tokens=max_new_tokens
                )
            judgements, layers = [], []
            for position in positions:
                if position == "exact" and len(trial.inexact) == trial.cache.num_restored:
                    nothing = (0.0,) * engine.adapter.spec.num_layers  # it is full prefill
                    judgements.append(judge.full)
                    layers.append(LayerErrors(nothing, nothing))
                else:
                    judgements.append(judge.judge(trial, trial.at(position)))
                    layers.append(judge.layer_errors(trial))
            records = [span.record for span in trial.composition.spans]
            documents = frozenset(record.key for record in records if not record.is_preamble)
            return _Read(judge.full, judgements, layers, documents, len(trial.relocated))
    except StateError as error:
        raise StoreError(f"{error}; `hcache-rag verify --repair` reads it again") from error


def _check(found: Sequence[_Read], left_out: Sequence[str]) -> None:
    if len(found) < 2:
        why = f": {left_out[0]}" if left_out else ""
        raise SourceError(f"{len(found)} prompt(s) can be compared, but two are needed{why}")
    if not any(read.num_relocated for read in found):
        raise SourceError(
            "no document is relocated in any prompt, so that all positions of the dial are the "
            "same; it takes two documents in a prompt"
        )


def _summary(
    position: str | float, judgements: Sequence[Judgement], layers: Sequence[LayerErrors]
) -> PositionReport:
    def estimate(metric: str) -> Estimate:
        samples = [float(getattr(judgement, metric)) for judgement in judgements]
        return Estimate(statistics.mean(samples), *bootstrap_interval(samples))

    def means(rows: list[tuple[float, ...]]) -> tuple[float, ...]:
        return tuple(np.mean(rows, axis=0).tolist())

    return PositionReport(
        position,
        kl_first=estimate("kl_first"),
        kl=estimate("kl"),
        top1=estimate("top1"),
        nll=estimate("nll"),
        rouge_l=estimate("rouge_l"),
        tokens=statistics.mean(judgement.tokens for judgement in judgements),
        seconds=statistics.median(judgement.seconds for judgement in judgements),
        layers=LayerErrors(means([e.keys for e in layers]), means([e.values for e in layers])),
    )
