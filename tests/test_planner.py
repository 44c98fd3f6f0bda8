"""A planner learns from what requests took, and forgets where nothing was seen."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from queue import SimpleQueue
from typing import Any

import pytest

from hcache_rag import planner as planner_module
from hcache_rag.lanes import Lane, VirtualLane, timeline_of, walk
from hcache_rag.layout import LayerFormat, Representation, StateLayout
from hcache_rag.plan import Conditions, Cut, RestorePlan, SpanSize, plan_restore
from hcache_rag.planner import Planner
from hcache_rag.presets import HARDWARE
from hcache_rag.profile import HardwareProfile, Rates, ReadRate
from hcache_rag.schedule import Schedule, schedule
from hcache_rag.spec import ModelSpec
from hcache_rag.timeline import COMPUTING, LANES, READING, Event, Step, Timeline

SPEC = ModelSpec(
    name="toy",
    family="llama",
    num_layers=8,
    hidden_size=256,
    num_heads=8,
    num_kv_heads=4,
    head_dim=32,
    window_tokens=4096,
    dtype="float32",
    mlp_size=512,
)
STORED = StateLayout((LayerFormat(Representation.KV, "float32"),) * 8, 64)
SIZES = [SpanSize(256, STORED), SpanSize(128, STORED)]
COLD, WARM = ReadRate(2e8), ReadRate(1e11)
PROFILE = HardwareProfile("toy", "made up", COLD, WARM, Rates(1e11, 1e11, 1e11, 1e11))
"""Reading takes longer than recomputing from the disk, and much less from the page cache."""
ENOUGH = 40
"""Each request halves, on a scale of factors, what is not known yet."""


def took(
    *,
    read_s: float = 0.0,
    num_bytes: int = 0,
    compute_s: float = 0.0,
    predicted_s: float = 0.0,
    waited_s: float = 0.0,
) -> Timeline:
    """A request that read and computed for so long, in two steps each."""
    events: list[Event] = []
    if num_bytes:
        halves = (num_bytes // 2, num_bytes - num_bytes // 2)
        events += [
            Event(Step(READING, "read", layer, num_bytes=half), start, start + read_s / 2, waited_s)
            for layer, (half, start) in enumerate(zip(halves, (0.0, read_s), strict=True))
        ]
    if predicted_s:
        events += [
            Event(Step(COMPUTING, verb, 0, cost_s=predicted_s / 2), 0.0, compute_s / 2, waited_s)
            for verb in ("restore", "forward")
        ]
    return Timeline(tuple(events))


def on_a_machine(work: Schedule, rate: ReadRate, slower: float) -> Timeline:
    """A request on a machine that reads so fast, and computes so much slower than predicted."""

    def really(step: Step) -> float:
        if step.lane == READING:
            return float(rate(step.num_bytes))
        return step.cost_s * slower

    steps = [
        Step(s.lane, s.verb, s.layer, s.piece, s.needs, really(s), s.num_bytes) for s in work.steps
    ]
    lanes: dict[str, Lane] = {lane: VirtualLane() for lane in LANES}
    events = timeline_of(walk(steps, lanes)).events
    return Timeline(
        tuple(
            Event(step, event.start_s, event.end_s, event.waited_s)
            for step, event in zip(work.steps, events, strict=True)
        )
    )


def conditions(planner: Planner) -> Conditions:
    now = planner.now
    assert now is not None
    return now


def seen(planner: Planner, timeline: Timeline) -> None:
    """A request that was planned as things are now has ended."""
    planner.observe(timeline, planner.plan(SIZES, 4)[0])


def asked(planner: Planner, rate: ReadRate, slower: float = 1.0, times: int = 1) -> RestorePlan:
    """The last plan of some requests on a machine that is so; the planner sees how they went."""
    for _ in range(times):
        plan, work = planner.plan(SIZES, 4)
        planner.observe(on_a_machine(work, rate, slower / plan.compute_factor), plan)
    return planner.plan(SIZES, 4)[0]


# --- planning -----------------------------------------------------------------------------------


def test_the_first_request_is_planned_for_a_cold_store_and_an_idle_processor() -> None:
    planner = Planner(SPEC, PROFILE)
    assert planner.now == Conditions(COLD, 1.0)
    plan, work = planner.plan(SIZES, 4)
    assert plan == plan_restore(SPEC, SIZES, PROFILE, Conditions(COLD), fresh_tokens=4)
    assert work == schedule(
        SPEC,
        SIZES,
        plan,
        fresh_tokens=4,
        costs=PROFILE.costs_of(SPEC),
        now=Conditions(COLD),
    )
    assert any(cut != Cut() for cut in plan.cuts)


def test_the_fresh_tokens_are_counted() -> None:
    """A long question hides reading behind its forward pass."""
    planner = Planner(SPEC, PROFILE)
    assert planner.plan(SIZES, 4)[0].cuts != planner.plan(SIZES, 4000)[0].cuts


def test_plans_and_steps_are_made_for_what_was_seen() -> None:
    """After a request the next one is planned for the machine as it is now."""
    planner = Planner(SPEC, PROFILE)
    seen(planner, took(read_s=1.0, num_bytes=10**10, compute_s=3.0, predicted_s=1.0))
    now = conditions(planner)
    plan, work = planner.plan(SIZES, 4)
    assert now.read_rate.bytes_per_s > COLD.bytes_per_s
    assert plan == plan_restore(SPEC, SIZES, PROFILE, now, fresh_tokens=4)
    costs = PROFILE.costs_of(SPEC)
    assert work == schedule(SPEC, SIZES, plan, fresh_tokens=4, costs=costs, now=now)


def test_a_cold_disk_and_a_warm_page_cache_get_different_plans() -> None:
    """From the disk something is recomputed; from memory everything is read, and back again."""
    planner = Planner(SPEC, PROFILE)
    cold = planner.plan(SIZES, 4)[0]
    warm = asked(planner, WARM, times=ENOUGH)
    assert warm.reason == "everything that is stored is read"
    assert cold.reason.startswith("the first ")
    assert warm.makespan_s < cold.makespan_s
    assert asked(planner, COLD, times=ENOUGH).cuts == cold.cuts


def test_a_busy_processor_gets_another_plan() -> None:
    """One that recomputes less: computing takes longer than the profile says."""
    planner = Planner(SPEC, PROFILE)
    idle = planner.plan(SIZES, 4)[0]
    busy = asked(planner, COLD, slower=50.0, times=ENOUGH)
    assert conditions(planner).compute_factor == pytest.approx(50.0)
    assert recomputed(busy) < recomputed(idle)


def recomputed(plan: RestorePlan) -> int:
    """Tokens times layers."""
    return sum(
        8 * cut.tokens + (span.tokens - cut.tokens) * cut.layers
        for span, cut in zip(SIZES, plan.cuts, strict=True)
    )


# --- learning -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [1e6, 2e8, 3e10], ids="{:.0e}".format)
def test_reading_is_as_fast_as_it_was_seen_to_be(rate: float) -> None:
    """Half-way at once, on a scale of factors; and all the way after some requests."""
    planner = Planner(SPEC, PROFILE)
    request = took(read_s=10**9 / rate, num_bytes=10**9)
    seen(planner, request)
    assert conditions(planner).read_rate.bytes_per_s == pytest.approx(math.sqrt(2e8 * rate))
    for _ in range(ENOUGH):
        seen(planner, request)
    assert conditions(planner).read_rate.bytes_per_s == pytest.approx(rate)
    assert conditions(planner).compute_factor == 1.0


@pytest.mark.parametrize("slower", [0.25, 1.0, 100.0])
def test_computing_takes_as_long_as_it_was_seen_to(slower: float) -> None:
    """Relative to what was predicted, which has what was known so far in it."""
    planner = Planner(SPEC, PROFILE)
    seen(planner, took(compute_s=2.0 * slower, predicted_s=2.0))
    assert conditions(planner).compute_factor == pytest.approx(math.sqrt(slower))
    for _ in range(ENOUGH):
        factor = conditions(planner).compute_factor
        seen(planner, took(compute_s=2.0 * slower, predicted_s=2.0 * factor))
    assert conditions(planner).compute_factor == pytest.approx(slower)


def test_the_newest_requests_count_most() -> None:
    """A machine that has just become slow is slow."""
    planner = Planner(SPEC, PROFILE)
    for rate in (1e12, 1e12, 1e12, 1e7, 1e7, 1e7, 1e7):
        seen(planner, took(read_s=1e9 / rate, num_bytes=10**9))
    assert conditions(planner).read_rate.bytes_per_s == pytest.approx(
        1e12 ** (7 / 128) * 1e7 ** (15 / 16) * 2e8 ** (1 / 128)
    )


def test_waiting_is_not_work() -> None:
    """Neither lane is slow because it stood still for the other."""
    planner = Planner(SPEC, PROFILE)
    patient = took(read_s=5.0, num_bytes=10**9, compute_s=1.0, predicted_s=1.0, waited_s=100.0)
    seen(planner, patient)
    assert conditions(planner).compute_factor == 1.0
    assert conditions(planner).read_rate.bytes_per_s == pytest.approx(2e8)


@pytest.mark.parametrize("rate", [WARM.bytes_per_s, 1e5], ids=["warm", "slow"])
def test_where_nothing_was_read_the_profile_is_believed_again(rate: float) -> None:
    """Slowly: a plan that reads nothing would never find out that reading is fast again."""
    planner = Planner(SPEC, PROFILE)
    for _ in range(ENOUGH):
        seen(planner, took(read_s=1e9 / rate, num_bytes=10**9))
    believed = []
    for _ in range(ENOUGH):
        seen(planner, took(compute_s=1.0, predicted_s=1.0))
        believed.append(conditions(planner).read_rate.bytes_per_s)
    assert believed[0] == pytest.approx(math.sqrt(rate * 2e8))
    assert believed == sorted(believed, reverse=rate > 2e8)
    assert believed[-1] == pytest.approx(2e8)


def test_where_nothing_was_computed_nothing_is_learnt_of_the_processor() -> None:
    planner = Planner(SPEC, PROFILE)
    seen(planner, took(compute_s=3.0, predicted_s=1.0))
    before = conditions(planner).compute_factor
    seen(planner, took(read_s=1.0, num_bytes=1000))
    seen(planner, Timeline(()))
    assert conditions(planner).compute_factor == before


def test_a_planner_that_read_nothing_reads_again_when_the_store_is_fast_again() -> None:
    """From a network volume's bad hour back to the disk's plan."""
    planner = Planner(SPEC, PROFILE)
    cold = planner.plan(SIZES, 4)[0]
    slow = asked(planner, ReadRate(1e4))
    assert recomputed(slow) == 8 * 384
    assert recomputed(cold) < 8 * 384
    assert asked(planner, COLD, times=ENOUGH).cuts == cold.cuts


# --- without a profile --------------------------------------------------------------------------


def test_without_a_profile_everything_is_read_whatever_was_seen() -> None:
    """Nothing is predicted, and nothing is learnt."""
    planner = Planner(SPEC, None)
    assert planner.now is None
    for _ in range(2):
        plan, work = planner.plan(SIZES, 4)
        assert plan.cuts == (Cut(), Cut())
        assert plan.makespan_s == 0.0
        assert {step.cost_s for step in work.steps} == {0.0}
        assert sum(step.num_bytes for step in work.steps) > 0
        seen(planner, took(read_s=1e6, num_bytes=1, compute_s=1.0, predicted_s=1e-6))
    assert planner.now is None


@pytest.mark.parametrize("profile", [None, PROFILE], ids=["no-profile", "profile"])
def test_nothing_to_restore_can_be_planned_and_observed(profile: HardwareProfile | None) -> None:
    planner = Planner(SPEC, profile)
    plan, work = planner.plan([], 4)
    assert plan.cuts == ()
    assert [step.verb for step in work.steps] == ["forward"] * 8
    planner.observe(Timeline(()), plan)


@pytest.mark.parametrize("name", HARDWARE)
def test_every_preset_can_be_planned_for(name: str) -> None:
    """What each request takes becomes a part of the rate that was seen."""
    cold = HARDWARE[name].cold
    planner = Planner(SPEC, HARDWARE[name])
    plan, work = planner.plan(SIZES, 4)
    planner.observe(on_a_machine(work, cold, 1.0), plan)
    now = conditions(planner)
    assert now.compute_factor == pytest.approx(1.0)
    if cold.per_request_s:
        assert 0 < now.read_rate.bytes_per_s <= cold.bytes_per_s
    else:
        assert now.read_rate.bytes_per_s == pytest.approx(cold.bytes_per_s)


# --- requests at once ---------------------------------------------------------------------------


class WatchedLock:
    """A lock that tells when somebody comes to it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.arrivals: SimpleQueue[str] = SimpleQueue()

    def __enter__(self) -> None:
        self.arrivals.put(threading.current_thread().name)
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


@pytest.mark.parametrize("other", ["observe", "now"])
def test_a_request_that_ends_while_another_is_being_learnt_from_waits(
    monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    """No observation is lost, and nobody sees half of one."""
    planner, lock = Planner(SPEC, PROFILE), WatchedLock()
    inside, go_on = threading.Event(), threading.Event()
    mean = planner_module._mean
    order: list[str] = []

    def slow_mean(old: float, new: float) -> float:
        order.append(threading.current_thread().name)
        inside.set()
        go_on.wait()
        return mean(old, new)

    monkeypatch.setattr(planner_module, "_mean", slow_mean)
    request = took(read_s=1.0, num_bytes=10**9, compute_s=4.0, predicted_s=1.0)
    plan = planner.plan(SIZES, 4)[0]
    monkeypatch.setattr(planner, "_lock", lock)
    found: list[Any] = []
    work = {
        "observe": lambda: planner.observe(request, plan),
        "now": lambda: found.append(planner.now),
    }
    first = threading.Thread(target=planner.observe, args=(request, plan), name="first")
    second = threading.Thread(target=work[other], name="second")
    first.start()
    inside.wait()
    second.start()
    assert [lock.arrivals.get() for _ in range(2)] == ["first", "second"]
    go_on.set()
    first.join()
    second.join()
    observations = 2 if other == "observe" else 1
    assert order == ["first"] * 2 + ["second"] * (2 * observations - 2)
    assert found in ([], [planner.now])
    assert conditions(planner).compute_factor == pytest.approx(4 ** (1 - 0.5**observations))


def test_many_threads_plan_and_observe() -> None:
    """Each observation counts once, in whatever order they come."""
    planner, alone = Planner(SPEC, PROFILE), Planner(SPEC, PROFILE)
    request = took(read_s=1.0, num_bytes=10**9, compute_s=1.01, predicted_s=1.0)
    idle = planner.plan(SIZES, 4)[0]
    start = threading.Barrier(8)
    plans: list[Sequence[Cut]] = []

    def ask() -> None:
        start.wait()
        for _ in range(20):
            plans.append(planner.plan(SIZES, 4)[0].cuts)
            planner.observe(request, idle)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for _ in range(160):
        alone.observe(request, idle)
    assert len(plans) == 160
    assert planner.now == alone.now


def test_requests_that_were_planned_together_are_not_counted_on_top_of_each_other() -> None:
    """Ten at once on a machine that is four times slower: it is four times slower, not 1,024."""
    planner = Planner(SPEC, PROFILE)
    planned = [planner.plan(SIZES, 4) for _ in range(10)]
    for plan, work in planned:
        planner.observe(on_a_machine(work, COLD, 4.0), plan)
    assert conditions(planner).compute_factor <= 4.0


@pytest.mark.parametrize(
    "timeline",
    [
        pytest.param(took(compute_s=0.0, predicted_s=1.0), id="computing-took-no-time"),
        pytest.param(Timeline((Event(Step(READING, "read", 0), 0.0, 1.0),)), id="no-bytes"),
    ],
)
def test_a_request_too_short_for_its_clock_is_no_error(timeline: Timeline) -> None:
    """Learning happens after a question, and must not fail it."""
    seen(Planner(SPEC, PROFILE), timeline)
