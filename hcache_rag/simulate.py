"""The steps that the executor walks, on a virtual clock: any model on any machine. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hcache_rag.choice import Prompt, choose_layout, fixed_layout
from hcache_rag.lanes import Lane, VirtualLane, timeline_of, walk
from hcache_rag.layout import StateLayout
from hcache_rag.plan import Conditions, Cut, RestorePlan, SpanSize, piece_tokens_for, plan_restore
from hcache_rag.profile import HardwareProfile
from hcache_rag.schedule import schedule
from hcache_rag.spec import ModelSpec
from hcache_rag.timeline import COMPUTING, LANES, READING, Timeline


def simulate(
    spec: ModelSpec,
    spans: Sequence[SpanSize],
    plan: RestorePlan,
    profile: HardwareProfile,
    now: Conditions | None = None,
    *,
    fresh_tokens: int = 1,
) -> Timeline:
    """When each step of a plan would run on a machine."""
    work = schedule(
        spec,
        spans,
        plan,
        fresh_tokens=fresh_tokens,
        costs=profile.costs_of(spec),
        now=now or Conditions(profile.cold),
    )
    lanes: dict[str, Lane] = {lane: VirtualLane() for lane in LANES}
    return timeline_of(walk(work.steps, lanes))


@dataclass(frozen=True, slots=True)
class Method:
    """A way to get documents into the KV cache, and how it would go.

    Args:
        name: what a person calls it.
        layout: what is stored; None if nothing is.
        plan: how it is restored.
        timeline: when each step would run.
        bytes_per_token: on disk.
    """

    name: str
    layout: StateLayout | None
    plan: RestorePlan
    timeline: Timeline
    bytes_per_token: float

    @property
    def time_s(self) -> float:
        """Predicted makespan."""
        return self.timeline.makespan_s

    @property
    def lower_bound_s(self) -> float:
        """The busier lane's work."""
        return max(self.timeline.busy_s(READING), self.timeline.busy_s(COMPUTING))


def spans_of(prompt: Prompt, layout: StateLayout) -> list[SpanSize]:
    """The documents of a prompt as a planner sees them."""
    return [SpanSize(prompt.document_tokens, layout)] * prompt.documents


def recompute_all(spec: ModelSpec, prompt: Prompt) -> RestorePlan:
    """The plan that reads nothing."""
    cuts = (Cut(0, spec.num_layers),) * prompt.documents
    return RestorePlan(cuts, piece_tokens_for(prompt.restored_tokens), reason="nothing is read")


def read_all(prompt: Prompt) -> RestorePlan:
    """The plan that reads everything."""
    return RestorePlan((Cut(),) * prompt.documents, piece_tokens_for(prompt.restored_tokens))


def methods(
    spec: ModelSpec,
    profile: HardwareProfile,
    prompt: Prompt,
    *,
    hidden_dtype: str | None = None,
    kv_dtype: str | None = None,
    layout: StateLayout | None = None,
) -> list[Method]:
    """The pure methods, and last the plan: the best mix, or the best way to restore `layout`."""

    def method(name: str, kept: StateLayout | None, plan: RestorePlan) -> Method:
        fixed = kept or fixed_layout(spec, "kv").layout
        timeline = simulate(
            spec, spans_of(prompt, fixed), plan, profile, fresh_tokens=prompt.fresh_tokens
        )
        return Method(name, kept, plan, timeline, kept.bytes_per_token(spec) if kept else 0.0)

    kv = fixed_layout(spec, "kv", kv_dtype).layout
    hidden = fixed_layout(spec, "hidden", hidden_dtype).layout
    chosen = (
        layout
        or choose_layout(
            spec, profile, hidden_dtype=hidden_dtype, kv_dtype=kv_dtype, prompt=prompt
        ).layout
    )
    plan = plan_restore(spec, spans_of(prompt, chosen), profile, fresh_tokens=prompt.fresh_tokens)
    return [
        method("recompute", None, recompute_all(spec, prompt)),
        method("kv", kv, read_all(prompt)),
        method("hidden", hidden, read_all(prompt)),
        method("plan", chosen, plan),
    ]


def questions_to_break_even(spec: ModelSpec, found: Sequence[Method], prompt: Prompt) -> float:
    """After how many questions about a document its reading at indexing time has paid off.

    Indexing costs what reading the document costs; each question then saves the difference
    between recomputing and the plan. Infinite if the plan saves nothing.
    """
    by_name = {method.name: method for method in found}
    recompute_s = by_name["recompute"].timeline.busy_s(COMPUTING, "recompute")
    saved_s = by_name["recompute"].time_s - by_name["plan"].time_s
    return recompute_s / saved_s if saved_s > 0 else float("inf")
