"""`Planner`: plans each request from the machine's profile and from what the last requests saw."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hcache_rag.forks import ForkedLock
from hcache_rag.plan import Conditions, RestorePlan, SpanSize, plan_restore
from hcache_rag.profile import HardwareProfile, ReadRate
from hcache_rag.schedule import Rows, Schedule, schedule
from hcache_rag.spec import ModelSpec
from hcache_rag.timeline import COMPUTING, READING, Timeline

_WEIGHT = 0.5
"""How much of the truth the newest request is."""


class Planner:
    """Plans the restores of one model on one machine. Thread-safe.

    Without a profile everything that is stored is read. With one, the first request is planned
    for a cold store and an idle processor; each request then says what reading and computing took,
    so that a warm page cache, a slow network or a busy machine change the next plan.
    """

    def __init__(self, spec: ModelSpec, profile: HardwareProfile | None) -> None:
        self.spec = spec
        self.profile = profile
        self._now = Conditions(profile.cold) if profile is not None else None
        self._lock = ForkedLock()

    @property
    def now(self) -> Conditions | None:
        """What the next request is planned for."""
        with self._lock:
            return self._now

    def plan(
        self, spans: Sequence[SpanSize], fresh_tokens: int, unseen: Sequence[Rows] = ()
    ) -> tuple[RestorePlan, Schedule]:
        """The best plan as things are now, and its steps with what each should take.

        Args:
            unseen: see `schedule`.
        """
        now = self.now
        chosen = plan_restore(self.spec, spans, self.profile, now, fresh_tokens=fresh_tokens)
        costs = self.profile.costs_of(self.spec) if self.profile is not None else None
        work = schedule(
            self.spec,
            spans,
            chosen,
            fresh_tokens=fresh_tokens,
            costs=costs,
            now=now,
            unseen=unseen,
        )
        return chosen, work

    def observe(
        self,
        timeline: Timeline,
        plan: RestorePlan,
        *,
        sees_computing: bool = True,
        sees_reading: bool = True,
    ) -> None:
        """Learn from a request that has ended, and from what it was planned for.

        Args:
            timeline: when its steps ran.
            plan: what it was planned for.
            sees_computing: whether computing steps took what the timeline says; where they were
                only launched, nothing is learned from them.
            sees_reading: whether all that was read came from the store's disk.
        """
        with self._lock:
            if self._now is None or self.profile is None:
                return
            read_s, num_bytes = timeline.busy_s(READING), timeline.bytes_read
            # Where nothing was read, nothing was seen: forget slowly, so that it is tried again.
            has_read = read_s > 0 and num_bytes > 0
            seen = num_bytes / read_s if has_read else self.profile.cold.bytes_per_s
            rate = self._now.read_rate.bytes_per_s
            if sees_reading:
                rate = _mean(rate, seen)
            factor = self._now.compute_factor
            took_s = timeline.busy_s(COMPUTING)
            predicted_s = sum(e.step.cost_s for e in timeline.events if e.step.lane == COMPUTING)
            if sees_computing and predicted_s > 0 and took_s > 0:
                factor = _mean(factor, plan.compute_factor * took_s / predicted_s)
            self._now = Conditions(ReadRate(rate), factor)


def _mean(old: float, new: float) -> float:
    """Rates differ by factors, not by differences."""
    return math.exp((1 - _WEIGHT) * math.log(old) + _WEIGHT * math.log(new))
