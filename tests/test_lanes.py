"""A lane runs its steps in order, never too far ahead, and always lets go of its thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from hcache_rag.lanes import Cancelled, ReadingLane


class Watched(threading.Condition):
    """A condition that tells which threads wait on it."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = threading.Semaphore(0)
        self.waiting: list[str] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.waiting.append(threading.current_thread().name)
        self.waits.release()
        return super().wait(timeout)


class MishapError(Exception):
    """What a step may raise."""


def watched(step: Callable[[int], None], num_steps: int, depth: int) -> tuple[ReadingLane, Watched]:
    """A lane that has not started, and the condition it waits on."""
    lane = ReadingLane(step, num_steps, depth)
    condition = Watched()
    lane._changed = condition
    return lane, condition


def nothing(_: int) -> None:
    """A step."""


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    """Whatever a test does to a lane, it leaves no thread."""
    yield
    assert "hcache-reading" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize("depth", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("num_steps", [0, 1, 2, 7])
def test_steps_run_once_each_in_order(num_steps: int, depth: int) -> None:
    """On the lane's own thread, the consumer following behind."""
    ran: list[tuple[int, str]] = []

    def step(index: int) -> None:
        ran.append((index, threading.current_thread().name))

    with ReadingLane(step, num_steps, depth) as lane:
        for index in range(num_steps):
            lane.wait(index)
            assert ran[index] == (index, "hcache-reading")
            lane.release(index)
    assert ran == [(index, "hcache-reading") for index in range(num_steps)]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_lane_stops_when_depth_results_are_unreleased(depth: int) -> None:
    """It runs exactly `depth` steps ahead, then exactly one more for each release."""
    ran: list[int] = []
    too_far = threading.Event()
    allowed = depth

    def step(index: int) -> None:
        ran.append(index)
        if index >= allowed:
            too_far.set()
            condition.waits.release()

    lane, condition = watched(step, 10, depth)
    with lane:
        for released in range(4):
            condition.waits.acquire()  # the lane waits for room, or has run too far
            assert not too_far.is_set()
            assert ran == list(range(depth + released))
            allowed += 1
            lane.release(released)
        condition.waits.acquire()
    assert ran == list(range(depth + 4))
    assert set(condition.waiting) == {"hcache-reading"}


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_a_slot_is_not_written_while_it_is_used(depth: int) -> None:
    """Steps that write into a ring of `depth` slots never meet the consumer in one."""
    in_use = [threading.Lock() for _ in range(depth)]
    collisions = []

    def step(index: int) -> None:
        if not in_use[index % depth].acquire(blocking=False):
            collisions.append(index)

    with ReadingLane(step, 200, depth) as lane:
        for index in range(200):
            lane.wait(index)
            in_use[index % depth].release()
            lane.release(index)
    assert collisions == []


def test_releasing_out_of_order_frees_what_came_before() -> None:
    """Releasing step 2 means that 0 and 1 have been used; a late release takes nothing back."""
    lane, condition = watched(nothing, 6, 3)
    with lane:
        condition.waits.acquire()
        lane.release(2)
        lane.release(0)
        lane.wait(5)


def test_waiting_for_an_earlier_step_returns_at_once() -> None:
    """Done is done."""
    with ReadingLane(nothing, 5, 5) as lane:
        lane.wait(4)
        for index in range(5):
            lane.wait(index)


@pytest.mark.parametrize("depth", [0, -1])
def test_a_lane_needs_room(depth: int) -> None:
    with pytest.raises(ValueError, match=str(depth)):
        ReadingLane(nothing, 1, depth)


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [MishapError, KeyboardInterrupt, SystemExit, MemoryError])
def test_an_error_in_a_step_reaches_whoever_waits(kind: type[BaseException]) -> None:
    """The very exception, for that step and all after it; steps before it are good."""
    error = kind("step 2")
    ran = []

    def step(index: int) -> None:
        ran.append(index)
        if index == 2:
            raise error

    with ReadingLane(step, 5, 5) as lane:
        for index in (2, 3, 4):
            with pytest.raises(kind) as caught:
                lane.wait(index)
            assert caught.value is error
        lane.wait(0)
        lane.wait(1)
    assert ran == [0, 1, 2]


def test_an_error_reaches_a_consumer_that_waits_already() -> None:
    """The error wakes it."""
    is_waiting = threading.Event()

    def step(_: int) -> None:
        is_waiting.wait()
        raise MishapError

    lane, condition = watched(step, 1, 1)
    caught: list[BaseException] = []

    def consume() -> None:
        try:
            lane.wait(0)
        except MishapError as error:
            caught.append(error)

    consumer = threading.Thread(target=consume)
    with lane:
        consumer.start()
        condition.waits.acquire()
        is_waiting.set()
        consumer.join()
    assert len(caught) == 1


def test_an_error_of_the_consumer_stops_the_lane() -> None:
    """Leaving the block by an exception joins the thread and lets the exception out."""
    lane, condition = watched(nothing, 100, 2)
    with pytest.raises(MishapError), lane:  # noqa: PT012
        condition.waits.acquire()
        raise MishapError
    with pytest.raises(Cancelled):
        lane.wait(99)


# --- closing ------------------------------------------------------------------------------------


def test_closing_wakes_a_waiting_consumer() -> None:
    """`Cancelled`, even while a step still runs; closing then waits for that step."""
    gate, step_runs = threading.Event(), threading.Event()
    finished = []

    def step(index: int) -> None:
        step_runs.set()
        gate.wait()
        finished.append(index)

    lane, condition = watched(step, 3, 3)
    answers: list[str] = []

    def consume() -> None:
        try:
            lane.wait(0)
        except Cancelled:
            answers.append("cancelled")

    lane.start()
    consumer = threading.Thread(target=consume)
    consumer.start()
    step_runs.wait()
    condition.waits.acquire()  # the consumer waits
    closer = threading.Thread(target=lane.close)
    closer.start()
    consumer.join()
    assert answers == ["cancelled"]
    assert finished == []
    assert closer.is_alive()
    gate.set()
    closer.join()
    assert finished == [0]


def test_closing_wakes_a_lane_that_waits_for_room() -> None:
    """The consumer has gone away without releasing anything."""
    lane, condition = watched(nothing, 100, 1)
    lane.start()
    condition.waits.acquire()
    lane.close()
    lane.wait(0)
    with pytest.raises(Cancelled):
        lane.wait(1)


def test_closing_before_starting() -> None:
    """Nothing runs, not even if it is started afterwards."""
    ran: list[int] = []
    lane = ReadingLane(ran.append, 3, 3)
    lane.close()
    with pytest.raises(Cancelled):
        lane.wait(0)
    lane.start()
    lane.close()
    assert ran == []


def test_closing_without_consuming() -> None:
    """Neither an unused lane nor a finished one hangs, and closing twice does nothing."""
    for num_steps in (0, 1, 100):
        with ReadingLane(nothing, num_steps, 3) as lane:
            pass
        lane.close()


def test_results_stay_good_after_closing() -> None:
    """What was done before closing can still be waited for."""
    with ReadingLane(nothing, 2, 2) as lane:
        lane.wait(1)
    lane.wait(0)
    lane.wait(1)
