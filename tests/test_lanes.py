"""Lanes run steps in order and not before what they need, hand errors on, and leave no thread."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from threads import own_threads

from hcache_rag.lanes import (
    CallerLane,
    Cancelled,
    Clock,
    Lane,
    ThreadLane,
    Ticket,
    VirtualLane,
    timeline_of,
    walk,
)
from hcache_rag.timeline import COMPUTING, READING, Event, Step

LANE_THREAD = "hcache-reading"
pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")


class Watched(threading.Condition):
    """A condition that tells which threads have come to wait on it."""

    def __init__(self) -> None:
        super().__init__()
        self._arrivals: SimpleQueue[str] = SimpleQueue()
        self._seen: Counter[str] = Counter()

    def wait(self, timeout: float | None = None) -> bool:
        self._arrivals.put(threading.current_thread().name)  # its lock is held until it waits
        return super().wait(timeout)

    def until_waits(self, thread: str) -> None:
        """Return when a thread of this name waits, once for each time that it does."""
        while not self._seen[thread]:
            self._seen[self._arrivals.get()] += 1
        self._seen[thread] -= 1


class ManualClock:
    """A clock that goes on only by hand."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class MishapError(Exception):
    """What a step may raise."""


def still() -> float:
    """A clock for those who look at no times."""
    return 0.0


def read(index: int, *needs: int, cost_s: float = 0.0) -> Step:
    return Step(READING, "read", index, 0, needs, cost_s)


def restore(index: int, *needs: int, cost_s: float = 0.0) -> Step:
    return Step(COMPUTING, "restore", index, 0, needs, cost_s)


def watched(
    work: Callable[[Step], None], clock: Callable[[], float] = still
) -> tuple[ThreadLane, Watched]:
    """A lane that has not started, and the condition that it and its tickets wait on."""
    lane = ThreadLane(work, clock)
    condition = Watched()
    lane._changed = condition
    return lane, condition


def watched_caller(clock: Callable[[], float] = still) -> tuple[CallerLane, Watched]:
    """The same of a lane that its owner runs."""
    lane = CallerLane(clock)
    condition = Watched()
    lane._changed = condition
    return lane, condition


def nothing(_: Step) -> None:
    """A step's work."""


def blocked_by(gate: threading.Event) -> Callable[[Step], None]:
    """Work that ends when the gate is open."""

    def work(_: Step) -> None:
        gate.wait()

    return work


def submitted(lane: Lane, count: int) -> list[Ticket]:
    """Tickets of steps 0, 1, ... that need nothing."""
    return [lane.submit(read(index), ()) for index in range(count)]


class Waiter:
    """Waits for a ticket on a thread of its own, and keeps what came of it."""

    def __init__(self, ticket: Ticket, name: str = "waiter") -> None:
        self.name = name
        self.answers: list[BaseException | None] = []
        self._ticket = ticket
        self._thread = threading.Thread(target=self._wait, name=name, daemon=True)
        self._thread.start()

    def _wait(self) -> None:
        try:
            self._ticket.wait()
        except BaseException as error:
            self.answers.append(error)
        else:
            self.answers.append(None)

    def answer(self) -> BaseException | None:
        """What `wait` raised, None if it returned."""
        self._thread.join()
        (answer,) = self.answers
        return answer


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    """Whatever a test does to a lane, it leaves no thread."""
    yield
    assert own_threads(LANE_THREAD) == []


# --- a lane with a thread of its own ------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [0, 1, 2, 7])
def test_steps_run_once_each_in_order(num_steps: int) -> None:
    """On the lane's own thread, with the very step that was submitted."""
    ran: list[tuple[Step, str]] = []

    def work(step: Step) -> None:
        ran.append((step, threading.current_thread().name))

    with ThreadLane(work, still) as lane:
        tickets = submitted(lane, num_steps)
        for index, ticket in enumerate(tickets):
            ticket.wait()
            assert ran[index] == (ticket.step, LANE_THREAD)
    assert [step.layer for step, _ in ran] == list(range(num_steps))


def test_steps_run_one_at_a_time() -> None:
    """The next begins when the one before it has ended."""
    log: list[tuple[str, int]] = []

    def work(step: Step) -> None:
        log.append(("begins", step.layer))
        log.append(("ends", step.layer))

    with ThreadLane(work, still) as lane:
        submitted(lane, 100)[-1].wait()
    assert log == [(what, index) for index in range(100) for what in ("begins", "ends")]


def test_what_was_submitted_before_the_start_runs_after_it() -> None:
    """In front of what is submitted afterwards."""
    ran: list[int] = []
    lane = ThreadLane(lambda step: ran.append(step.layer), still)
    submitted(lane, 3)
    assert ran == []
    with lane:
        lane.submit(read(3), ()).wait()
    assert ran == [0, 1, 2, 3]


def test_a_lane_that_has_nothing_to_do_goes_on_when_there_is_something() -> None:
    """It waits, and a submission wakes it, more than once."""
    lane, condition = watched(nothing)
    with lane:
        for index in range(3):
            condition.until_waits(LANE_THREAD)
            lane.submit(read(index), ()).wait()


def test_submitting_does_not_wait() -> None:
    """Neither for a running step, nor for the step itself, nor for what it needs."""
    gate = threading.Event()
    never, _ = watched_caller()
    with ThreadLane(blocked_by(gate), still) as lane:
        tickets = submitted(lane, 5)
        tickets.append(lane.submit(read(5), [never.submit(restore(0), ())]))
        assert [ticket.event for ticket in tickets] == [None] * 6
        gate.set()
        tickets[4].wait()
        never.begin()
        never.end()
        tickets[5].wait()


def test_a_step_may_submit_another() -> None:
    """From the lane's own thread; it runs when those before it have."""
    ran: list[int] = []
    extra: list[Ticket] = []

    def work(step: Step) -> None:
        ran.append(step.layer)
        if step.layer == 0:
            extra.append(lane.submit(read(9), ()))

    lane = ThreadLane(work, still)
    last = submitted(lane, 3)[-1]
    with lane:
        last.wait()
        extra[0].wait()
    assert ran == [0, 1, 2, 9]


def test_waiting_returns_when_the_step_has_ended_and_not_before() -> None:
    """Somebody who waits already is woken by the end, not by the beginning."""
    log: list[str] = []
    gate, runs = threading.Event(), threading.Event()

    def work(_: Step) -> None:
        runs.set()
        gate.wait()
        log.append("ended")

    lane, condition = watched(work)
    with lane:
        waiter = Waiter(lane.submit(read(0), ()))
        runs.wait()
        condition.until_waits("waiter")
        assert (log, waiter.answers) == ([], [])
        gate.set()
        assert waiter.answer() is None
        assert log == ["ended"]


def test_all_who_wait_for_a_step_are_woken() -> None:
    gate = threading.Event()
    lane, condition = watched(blocked_by(gate))
    with lane:
        ticket = lane.submit(read(0), ())
        waiters = [Waiter(ticket, f"waiter {number}") for number in range(3)]
        for waiter in waiters:
            condition.until_waits(waiter.name)
        gate.set()
        assert [waiter.answer() for waiter in waiters] == [None] * 3


def test_waiting_for_an_earlier_step_returns_at_once() -> None:
    """Done is done, however often one asks."""
    with ThreadLane(nothing, still) as lane:
        tickets = submitted(lane, 5)
        tickets[4].wait()
        for ticket in [*tickets, *tickets]:
            ticket.wait()


def test_a_step_waits_for_what_it_needs_on_another_lane() -> None:
    """All of it, and not only the first; the step behind it waits too."""
    ran: list[int] = []
    caller, condition = watched_caller()
    with ThreadLane(lambda step: ran.append(step.layer), still) as lane:
        needed = [caller.submit(restore(index), ()) for index in range(2)]
        tickets = [lane.submit(read(0), needed), lane.submit(read(1), ())]
        for _ in needed:
            condition.until_waits(LANE_THREAD)
            assert ran == []
            caller.begin()
            caller.end()
        tickets[1].wait()
    assert ran == [0, 1]


# --- its errors ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [MishapError, KeyboardInterrupt, SystemExit, MemoryError])
def test_an_error_in_a_step_reaches_whoever_waits(kind: type[BaseException]) -> None:
    """The very exception, for that step and all after it; steps before it are good."""
    error = kind("step 2")
    ran = []

    def work(step: Step) -> None:
        ran.append(step.layer)
        if step.layer == 2:
            raise error

    with ThreadLane(work, still) as lane:
        tickets = submitted(lane, 5)
        for ticket in tickets[2:]:
            with pytest.raises(kind) as caught:
                ticket.wait()
            assert caught.value is error
            assert ticket.event is None
        tickets[0].wait()
        tickets[1].wait()
    assert ran == [0, 1, 2]


def test_an_error_reaches_those_who_wait_already() -> None:
    """It wakes who waits for the step, and who waits for one behind it."""
    gate, error = threading.Event(), MishapError()

    def work(_: Step) -> None:
        gate.wait()
        raise error

    lane, condition = watched(work)
    with lane:
        waiters = [Waiter(t, f"waiter {i}") for i, t in enumerate(submitted(lane, 3))]
        for waiter in waiters:
            condition.until_waits(waiter.name)
        gate.set()
        assert [waiter.answer() for waiter in waiters] == [error] * 3


def test_what_is_submitted_after_an_error_fails_at_once() -> None:
    """With that error, while the lane is open and after it was closed: it came first."""
    error = MishapError()

    def work(_: Step) -> None:
        raise error

    with ThreadLane(work, still) as lane:
        first = lane.submit(read(0), ())
        with pytest.raises(MishapError):
            first.wait()
        lane._thread.join()  # has left the failed step behind
        while_open = lane.submit(read(1), ())
    for ticket in (first, while_open, lane.submit(read(2), ())):
        with pytest.raises(MishapError) as caught:
            ticket.wait()
        assert caught.value is error


def test_an_error_of_a_needed_step_stops_the_lane() -> None:
    """The very exception for the step that needs it and those behind it; none of them runs."""
    error, ran = MishapError(), []

    def fails(_: Step) -> None:
        raise error

    with (
        ThreadLane(fails, still) as first,
        ThreadLane(lambda step: ran.append(step.layer), still) as second,
    ):
        needed = first.submit(read(0), ())
        tickets = [
            second.submit(restore(0), ()),
            second.submit(restore(1), [needed]),
            second.submit(restore(2), ()),
        ]
        for ticket in tickets[1:]:
            with pytest.raises(MishapError) as caught:
                ticket.wait()
            assert caught.value is error
        tickets[0].wait()
    assert ran == [0]


def test_an_error_of_the_consumer_stops_the_lane() -> None:
    """Leaving the block by an exception joins the thread and lets the exception out."""
    gate, runs, ran = threading.Event(), threading.Event(), []

    def work(step: Step) -> None:
        ran.append(step.layer)
        runs.set()
        gate.wait()

    lane = ThreadLane(work, still)
    tickets = submitted(lane, 3)
    with pytest.raises(MishapError), lane:  # noqa: PT012
        runs.wait()
        threading.Thread(target=_open_when_stopped, args=(lane, gate)).start()
        raise MishapError
    assert ran == [0]
    tickets[0].wait()
    for ticket in tickets[1:]:
        with pytest.raises(Cancelled):
            ticket.wait()


def _open_when_stopped(lane: ThreadLane, gate: threading.Event) -> None:
    """Let the running step end, but not before the lane is being closed."""
    with lane._changed:
        lane._changed.wait_for(lambda: lane._stopped is not None)
    gate.set()


# --- closing it ---------------------------------------------------------------------------------


def test_closing_wakes_who_waits_for_queued_steps() -> None:
    """`Cancelled`, even while a step still runs; closing then waits for that step, which counts."""
    gate, runs = threading.Event(), threading.Event()
    finished = []

    def work(step: Step) -> None:
        runs.set()
        gate.wait()
        finished.append(step.layer)

    lane, condition = watched(work)
    with lane:
        tickets = submitted(lane, 3)
        runs.wait()
        waiters = [Waiter(t, f"waiter {i}") for i, t in enumerate(tickets)]
        for waiter in waiters:
            condition.until_waits(waiter.name)
        closer = threading.Thread(target=lane.close)
        closer.start()
        assert isinstance(waiters[1].answer(), Cancelled)
        assert isinstance(waiters[2].answer(), Cancelled)
        assert (finished, waiters[0].answers) == ([], [])
        assert closer.is_alive()
        gate.set()
        closer.join()
        assert finished == [0]
        assert waiters[0].answer() is None
    assert tickets[0].event is not None
    assert [ticket.event for ticket in tickets[1:]] == [None, None]


def test_closing_wakes_a_lane_that_has_nothing_to_do() -> None:
    lane, condition = watched(nothing)
    with lane:
        condition.until_waits(LANE_THREAD)


def test_closing_before_starting() -> None:
    """Nothing runs, not even if it is started afterwards."""
    ran: list[Step] = []
    lane = ThreadLane(ran.append, still)
    ticket = lane.submit(read(0), ())
    lane.close()
    with pytest.raises(Cancelled):
        ticket.wait()
    with lane, pytest.raises(Cancelled):
        lane.submit(read(1), ()).wait()
    assert ran == []


@pytest.mark.parametrize("num_steps", [0, 1, 100])
def test_closing_without_consuming(num_steps: int) -> None:
    """Neither an unused lane nor a finished one hangs, and closing twice does nothing."""
    with ThreadLane(nothing, still) as lane:
        submitted(lane, num_steps)
    lane.close()
    lane.close()


def test_what_is_submitted_after_closing_is_cancelled() -> None:
    ran: list[Step] = []
    with ThreadLane(ran.append, still) as lane:
        pass
    with pytest.raises(Cancelled):
        lane.submit(read(0), ()).wait()
    assert ran == []


def test_results_stay_good_after_closing() -> None:
    """What was done before closing can still be waited for."""
    with ThreadLane(nothing, still) as lane:
        tickets = submitted(lane, 2)
        tickets[1].wait()
    for ticket in tickets:
        ticket.wait()
        assert ticket.event == Event(ticket.step, 0.0, 0.0)


# --- a lane that its owner runs -----------------------------------------------------------------


def test_the_owner_takes_the_steps_in_their_order() -> None:
    """Each once, then None, and None again; beginning one ends the one before it."""
    lane = CallerLane(still)
    tickets = submitted(lane, 3)
    for number, ticket in enumerate(tickets):
        assert lane.begin() is ticket.step
        assert [t.event is not None for t in tickets] == [i < number for i in range(3)]
    assert lane.begin() is None
    assert all(ticket.event is not None for ticket in tickets)
    assert lane.begin() is None


def test_ending_ends_the_step_in_hand_once() -> None:
    """Without a step in hand it does nothing."""
    clock = ManualClock()
    lane = CallerLane(clock)
    lane.end()
    ticket, other = submitted(lane, 2)
    lane.begin()
    clock.now_s = 2.0
    lane.end()
    clock.now_s = 3.0
    lane.end()
    assert (ticket.event, other.event) == (Event(ticket.step, 0.0, 2.0), None)


def test_a_block_is_a_step() -> None:
    """From its beginning to its end."""
    lane = CallerLane(still)
    tickets = submitted(lane, 2)
    with lane.step() as step:
        assert step is tickets[0].step
        assert tickets[0].event is None
    assert tickets[0].event is not None
    assert tickets[1].event is None


@pytest.mark.parametrize("kind", [MishapError, KeyboardInterrupt, SystemExit, MemoryError])
def test_an_error_in_a_block_fails_its_step(kind: type[BaseException]) -> None:
    """The very exception comes out, and reaches whoever waits; it cannot be ended later."""
    error = kind("in the block")
    lane, condition = watched_caller()
    before, ticket, behind = submitted(lane, 3)
    waiter = Waiter(ticket)
    condition.until_waits("waiter")
    with lane.step():
        pass
    with pytest.raises(kind) as caught, lane.step():
        raise error
    assert caught.value is error
    assert waiter.answer() is error
    with pytest.raises(kind):
        ticket.wait()
    lane.end()
    assert [t.event is not None for t in (before, ticket, behind)] == [True, False, False]
    assert lane.begin() is behind.step


def test_an_error_in_a_block_stops_the_lane_that_waits_for_it() -> None:
    """With that error; the lanes end together, and neither hangs."""
    error, ran = MishapError(), []
    caller, condition = watched_caller()
    with ThreadLane(lambda step: ran.append(step.layer), still) as lane:
        needed = caller.submit(restore(0), ())
        tickets = [lane.submit(read(0), [needed]), lane.submit(read(1), ())]
        condition.until_waits(LANE_THREAD)
        with pytest.raises(MishapError), caller.step():
            raise error
        for ticket in tickets:
            with pytest.raises(MishapError) as caught:
                ticket.wait()
            assert caught.value is error
    assert ran == []


def test_a_block_without_a_step_is_a_mistake() -> None:
    """More was done than was planned."""
    lane = CallerLane(still)
    submitted(lane, 1)
    with lane.step():
        pass
    entered = []
    with pytest.raises(RuntimeError, match="no step left"), lane.step():
        entered.append(True)
    assert entered == []


def test_who_waits_for_the_owners_step_is_woken_by_its_end() -> None:
    """Not by its beginning."""
    lane, condition = watched_caller()
    ticket = lane.submit(restore(0), ())
    waiter = Waiter(ticket)
    condition.until_waits("waiter")
    lane.begin()
    assert waiter.answers == []
    lane.end()
    assert waiter.answer() is None


def test_beginning_waits_for_all_that_the_step_needs() -> None:
    """The owner stands still until the last of them has ended."""
    gates = [threading.Event(), threading.Event()]
    log: list[str] = []

    def work(step: Step) -> None:
        gates[step.layer].wait()
        log.append(f"read {step.layer}")

    lane, condition = watched(work)
    caller = CallerLane(still)

    def own() -> None:
        caller.begin()
        log.append("begun")
        caller.end()

    with lane:
        tickets = submitted(lane, 2)
        caller.submit(restore(0), tickets)
        owner = threading.Thread(target=own, name="owner")
        owner.start()
        for gate in gates:
            condition.until_waits("owner")
            assert "begun" not in log
            gate.set()
        owner.join()
    assert log == ["read 0", "read 1", "begun"]


def test_beginning_ends_the_step_in_hand_before_it_waits() -> None:
    """Or two lanes could wait for each other."""
    caller = CallerLane(still)
    with ThreadLane(nothing, still) as lane:
        first = caller.submit(restore(0), ())
        between = lane.submit(read(0), [first])
        last = caller.submit(restore(1), [between])
        assert caller.begin() is first.step
        assert caller.begin() is last.step


@pytest.mark.parametrize("kind", [MishapError, KeyboardInterrupt, SystemExit, MemoryError])
def test_an_error_of_a_needed_step_reaches_the_owner(kind: type[BaseException]) -> None:
    """The very exception, where the step would have begun; it has not, and the one before has."""
    error = kind("unreadable")

    def work(step: Step) -> None:
        if step.layer == 1:
            raise error

    caller = CallerLane(still)
    with ThreadLane(work, still) as lane:
        tickets = [caller.submit(restore(i), [t]) for i, t in enumerate(submitted(lane, 2))]
        assert caller.begin() is tickets[0].step
        with pytest.raises(kind) as caught:
            caller.begin()
        assert caught.value is error
        caller.end()
    assert tickets[0].event is not None
    assert tickets[1].event is None


@pytest.mark.parametrize("kind", [MishapError, KeyboardInterrupt, SystemExit, MemoryError])
def test_an_error_of_a_needed_step_fails_the_step_that_needs_it(kind: type[BaseException]) -> None:
    """So that whoever waits for that one is not left waiting, on whatever lane."""
    error = kind("unreadable")

    def fails(_: Step) -> None:
        raise error

    caller, condition = watched_caller()
    with ThreadLane(fails, still) as lane:
        ticket = caller.submit(restore(0), [lane.submit(read(0), ())])
        waiter = Waiter(ticket)
        condition.until_waits("waiter")
        with pytest.raises(kind), caller.step():
            raise AssertionError("the block was entered")
        assert waiter.answer() is error
    assert ticket.event is None


def test_the_owner_of_a_step_that_needs_a_closed_lane_is_cancelled() -> None:
    """Also if he waits already."""
    lane, condition = watched(nothing)
    caller = CallerLane(still)
    caller.submit(restore(0), [lane.submit(read(0), ())])
    caught: list[BaseException] = []

    def own() -> None:
        try:
            caller.begin()
        except Cancelled as error:
            caught.append(error)

    owner = threading.Thread(target=own, name="owner")
    owner.start()
    condition.until_waits("owner")
    lane.close()
    owner.join()
    assert len(caught) == 1


def test_a_cancelled_request_begins_no_step() -> None:
    """It is asked before every step; the step in hand has ended."""
    answers = iter([False, False, True, True])
    lane = CallerLane(still, lambda: next(answers))
    tickets = submitted(lane, 3)
    assert lane.begin() is tickets[0].step
    assert lane.begin() is tickets[1].step
    for _ in range(2):
        with pytest.raises(Cancelled):
            lane.begin()
    assert [ticket.event is not None for ticket in tickets] == [True, True, False]


def test_a_cancelled_request_does_not_wait_for_what_its_step_needs() -> None:
    """Which might never come."""
    lane = CallerLane(still, lambda: True)
    lane.submit(restore(0), submitted(CallerLane(still), 1))
    with pytest.raises(Cancelled):
        lane.begin()


# --- closing the owners lane --------------------------------------------------------------------


def test_closing_the_owners_lane_wakes_who_waits_for_its_steps() -> None:
    """The step in hand and those behind it: none of them will end any more."""
    lane, condition = watched_caller()
    done, in_hand, queued = submitted(lane, 3)
    waiters = [Waiter(t, f"waiter {i}") for i, t in enumerate((in_hand, queued))]
    for waiter in waiters:
        condition.until_waits(waiter.name)
    lane.begin()
    lane.begin()
    lane.close()
    for waiter in waiters:
        assert isinstance(waiter.answer(), Cancelled)
    done.wait()
    assert done.event is not None
    assert (in_hand.event, queued.event) == (None, None)


def test_a_closed_lane_has_no_step_left() -> None:
    """And nothing in hand; closing it twice does nothing."""
    lane = CallerLane(still)
    tickets = submitted(lane, 2)
    lane.begin()
    lane.close()
    lane.end()
    lane.close()
    assert lane.begin() is None
    with pytest.raises(RuntimeError, match="no step left"), lane.step():
        raise AssertionError("the block was entered")
    for ticket in tickets:
        with pytest.raises(Cancelled):
            ticket.wait()


def test_closing_a_lane_that_has_run_everything_changes_nothing() -> None:
    """What was done stays done."""
    lane = CallerLane(still)
    tickets = submitted(lane, 2)
    while lane.begin() is not None:
        pass
    lane.close()
    for ticket in tickets:
        ticket.wait()
        assert ticket.event == Event(ticket.step, 0.0, 0.0)


def test_closing_the_owners_lane_lets_a_thread_go_that_waits_for_it() -> None:
    """Or leaving the block of the other lane would wait for ever."""
    caller, condition = watched_caller()
    with ThreadLane(nothing, still) as lane:
        ticket = lane.submit(read(0), [caller.submit(restore(0), ())])
        condition.until_waits(LANE_THREAD)
        caller.close()
        with pytest.raises(Cancelled):
            ticket.wait()


# --- when steps ran -----------------------------------------------------------------------------


def test_a_thread_lane_measures_its_steps() -> None:
    """From beginning to end; a lane that is kept busy has not waited."""
    clock = ManualClock()

    def work(step: Step) -> None:
        clock.now_s += 1.0 + step.layer

    lane = ThreadLane(work, clock)
    tickets = submitted(lane, 3)
    with lane:
        tickets[-1].wait()
    times = [(0.0, 1.0), (1.0, 3.0), (3.0, 6.0)]
    assert [t.event for t in tickets] == [
        Event(ticket.step, *span) for ticket, span in zip(tickets, times, strict=True)
    ]


def test_a_thread_lane_measures_how_long_it_stood_still() -> None:
    """For something to do, then for what a step needs; neither is a part of the step."""
    clock = ManualClock()

    def work(_: Step) -> None:
        clock.now_s += 1.0

    lane, condition = watched(work, clock)
    caller, caller_condition = watched_caller(clock)
    needed = caller.submit(restore(0), ())
    with lane:
        condition.until_waits(LANE_THREAD)
        clock.now_s = 5.0
        first = lane.submit(read(0), ())
        first.wait()
        condition.until_waits(LANE_THREAD)
        second = lane.submit(read(1), [needed])
        caller_condition.until_waits(LANE_THREAD)
        caller.begin()
        clock.now_s = 9.0
        caller.end()
        second.wait()
    assert first.event == Event(first.step, 5.0, 6.0, waited_s=5.0)
    assert second.event == Event(second.step, 9.0, 10.0, waited_s=3.0)
    assert needed.event == Event(needed.step, 6.0, 9.0)


def test_a_caller_lane_measures_steps_and_waiting_apart() -> None:
    """What its owner does between two steps is neither."""
    clock = ManualClock()
    gate = threading.Event()
    lane, condition = watched(blocked_by(gate), clock)
    caller = CallerLane(clock)
    first = caller.submit(restore(0), ())

    def own() -> None:
        caller.begin()
        clock.now_s += 2.0
        caller.end()
        clock.now_s += 10.0
        caller.begin()
        clock.now_s += 1.0
        caller.end()

    with lane:
        second = caller.submit(restore(1), [lane.submit(read(0), ())])
        owner = threading.Thread(target=own, name="owner")
        owner.start()
        condition.until_waits("owner")
        clock.now_s += 4.0
        gate.set()
        owner.join()
    assert first.event == Event(first.step, 0.0, 2.0)
    assert second.event == Event(second.step, 16.0, 17.0, waited_s=4.0)


def test_a_clock_counts_from_when_it_was_made() -> None:
    """Forwards."""
    older = Clock()
    younger = Clock()
    times = [younger(), older(), older()]
    assert times == sorted(times)
    assert times[0] >= 0


# --- lanes on which nothing runs ----------------------------------------------------------------


def test_virtual_time_passes_as_the_costs_say() -> None:
    """Two pieces read, each then restored; the second is read while the first is restored."""
    steps = [
        read(0, cost_s=3.0),
        read(1, cost_s=1.0),
        restore(0, 0, cost_s=2.0),
        restore(1, 1, cost_s=2.0),
        restore(2, cost_s=0.5),
        read(2, 4, cost_s=1.0),
    ]
    tickets = walk(steps, {READING: VirtualLane(), COMPUTING: VirtualLane()})
    for ticket in tickets:
        ticket.wait()
    timeline = timeline_of(tickets)
    assert [(e.start_s, e.end_s, e.waited_s) for e in timeline.events] == [
        (0.0, 3.0, 0.0),
        (3.0, 4.0, 0.0),
        (3.0, 5.0, 3.0),
        (5.0, 7.0, 0.0),
        (7.0, 7.5, 0.0),
        (7.5, 8.5, 3.5),
    ]
    assert [event.step for event in timeline.events] == steps
    assert timeline.makespan_s == 8.5


Plan = list[Step]


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Steps on both lanes, each needing some of those before it."""
    steps: Plan = []
    for index in range(draw(st.integers(0, 12))):
        needs = draw(st.sets(st.integers(0, index - 1), max_size=3)) if index else ()
        make = draw(st.sampled_from([read, restore]))
        steps.append(make(index, *sorted(needs), cost_s=draw(st.integers(0, 8))))
    return steps


@settings(deadline=None, derandomize=True, max_examples=200)
@given(plans())
def test_any_plan_in_virtual_time_is_the_one_found_second_by_second(steps: Plan) -> None:
    """Each second, a lane whose next step has all it needs begins it; costs are whole seconds."""
    tickets = walk(steps, {READING: VirtualLane(), COMPUTING: VirtualLane()})

    queues = {
        lane: [i for i, step in enumerate(steps) if step.lane == lane]
        for lane in (READING, COMPUTING)
    }
    begins: dict[int, int] = {}
    ends: dict[int, int] = {}
    now = 0
    while len(ends) < len(steps):
        has_changed = True
        while has_changed:  # steps without a cost end as they begin
            has_changed = False
            for queue in queues.values():
                if not queue:
                    continue
                index = queue[0]
                step = steps[index]
                if index not in begins and all(need in ends for need in step.needs):
                    begins[index] = now
                if index in begins and now >= begins[index] + step.cost_s:
                    ends[index] = now
                    queue.pop(0)
                    has_changed = True
        now += 1

    assert [(t.start_s, t.end_s) for t in tickets] == [
        (begins[i], ends[i]) for i in range(len(steps))
    ]
    timeline = timeline_of(tickets)
    for lane in (READING, COMPUTING):
        last_s = max((ends[i] for i, step in enumerate(steps) if step.lane == lane), default=0)
        assert timeline.busy_s(lane) + timeline.waited_s(lane) == last_s


# --- walking a plan -----------------------------------------------------------------------------


class Recorder:
    """A lane that keeps what was submitted to it."""

    def __init__(self) -> None:
        self.submissions: list[tuple[Step, list[Ticket], Ticket]] = []

    def submit(self, step: Step, after: Sequence[Ticket]) -> Ticket:
        """Keep it."""
        ticket = Ticket(step, threading.Condition())
        self.submissions.append((step, list(after), ticket))
        return ticket


def test_walking_puts_every_step_on_its_lane_after_what_it_needs() -> None:
    """Each with the tickets that it names; the tickets come back in the order of the steps."""
    steps = [read(0), restore(0, 0), read(1), restore(1, 0, 2), read(2, 1)]
    reading, computing = Recorder(), Recorder()

    tickets = walk(steps, {READING: reading, COMPUTING: computing})

    assert [ticket.step for ticket in tickets] == steps
    assert reading.submissions == [
        (steps[0], [], tickets[0]),
        (steps[2], [], tickets[2]),
        (steps[4], [tickets[1]], tickets[4]),
    ]
    assert computing.submissions == [
        (steps[1], [tickets[0]], tickets[1]),
        (steps[3], [tickets[0], tickets[2]], tickets[3]),
    ]


def test_walking_nothing() -> None:
    assert walk([], {}) == []
    assert timeline_of([]).events == ()


def test_a_timeline_holds_what_has_run_so_far() -> None:
    """In the order of the steps, whichever lane was first."""
    lane = CallerLane(still)
    other = CallerLane(still)
    tickets = walk([restore(0), read(0), restore(1)], {READING: other, COMPUTING: lane})
    assert timeline_of(tickets).events == ()
    other.begin()
    assert timeline_of(tickets).events == ()
    other.end()
    assert [event.step for event in timeline_of(tickets).events] == [read(0)]
    lane.begin()
    lane.begin()
    assert [event.step for event in timeline_of(tickets).events] == [restore(0), read(0)]


@settings(deadline=None, derandomize=True, max_examples=100)
@given(plans())
def test_any_plan_on_real_lanes_runs_in_order_and_after_what_it_needs(steps: Plan) -> None:
    """A thread and an owner, neither of which hangs, whatever they need of each other."""
    log: list[tuple[str, int]] = []

    def work(step: Step) -> None:
        log.append(("begins", step.layer))
        log.append(("ends", step.layer))

    caller = CallerLane(still)
    with ThreadLane(work, still) as lane:
        tickets = walk(steps, {READING: lane, COMPUTING: caller})
        while (step := caller.begin()) is not None:
            work(step)
        for ticket in tickets:
            ticket.wait()

    assert len(log) == 2 * len(steps)
    at = {entry: place for place, entry in enumerate(log)}
    last = {READING: -1, COMPUTING: -1}
    for index, step in enumerate(steps):
        begins, ends = at["begins", index], at["ends", index]
        assert last[step.lane] < begins < ends
        assert all(at["ends", need] < begins for need in step.needs)
        last[step.lane] = ends
    assert [event.step for event in timeline_of(tickets).events] == steps
