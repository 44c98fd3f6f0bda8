"""Lanes: queues that run steps in order. One `walk` puts a plan on them, whatever their clock is.

    ThreadLane    its own thread runs the steps: the reading lane
    CallerLane    its owner runs the steps when it comes to them: the model's forward pass
    VirtualLane   nothing runs; a virtual clock moves on by each step's predicted cost

Knows not what a step does.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

from hcache_rag.timeline import Event, Step, Timeline


class Cancelled(Exception):  # noqa: N818 - not an error: the answer to closing a lane
    """A lane was closed, or its request cancelled, while somebody waited for one of its steps."""


class Ticket:
    """A submitted step: wait for it, and see when it ran."""

    __slots__ = ("_changed", "_error", "_is_done", "end_s", "start_s", "step", "waited_s")

    def __init__(self, step: Step, changed: threading.Condition) -> None:
        self.step = step
        self.start_s = self.end_s = self.waited_s = 0.0
        self._changed = changed
        self._is_done = False
        self._error: BaseException | None = None

    def wait(self) -> None:
        """Wait until the step has ended.

        Raises:
            BaseException: what the step, or one before it on its lane, raised.
            Cancelled: its lane was closed.
        """
        if not self._is_done:
            with self._changed:
                self._changed.wait_for(lambda: self._is_done or self._error is not None)
        if self._error is not None:
            raise self._error

    def finish(self, start_s: float, end_s: float, waited_s: float) -> None:
        """The step ran from `start_s` to `end_s`."""
        self.start_s, self.end_s, self.waited_s = start_s, end_s, waited_s
        with self._changed:
            self._is_done = True
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """The step will not end; whoever waits for it gets the error."""
        with self._changed:
            if not self._is_done:
                self._error = error
                self._changed.notify_all()

    @property
    def event(self) -> Event | None:
        """When the step ran, or None if it did not."""
        if not self._is_done:
            return None
        return Event(self.step, self.start_s, self.end_s, self.waited_s)


class Lane(Protocol):
    """A queue that runs steps in the order of their submission."""

    def submit(self, step: Step, after: Sequence[Ticket]) -> Ticket:
        """Queue a step that begins when those before it and those in `after` have ended.

        Does not wait.
        """


def walk(steps: Sequence[Step], lanes: Mapping[str, Lane]) -> list[Ticket]:
    """Put every step on its lane; the tickets are in the order of the steps."""
    tickets: list[Ticket] = []
    for step in steps:
        tickets.append(lanes[step.lane].submit(step, [tickets[i] for i in step.needs]))
    return tickets


def timeline_of(tickets: Sequence[Ticket]) -> Timeline:
    """What has run so far."""
    events = [ticket.event for ticket in tickets]
    return Timeline(tuple(event for event in events if event is not None))


class VirtualLane:
    """A lane on which time passes only as its steps' costs say."""

    def __init__(self) -> None:
        self._now_s = 0.0
        self._changed = threading.Condition()

    def submit(self, step: Step, after: Sequence[Ticket]) -> Ticket:
        """Run the step at once, on the virtual clock."""
        ticket = Ticket(step, self._changed)
        start_s = max([self._now_s, *(before.end_s for before in after)])
        ticket.finish(start_s, start_s + step.cost_s, start_s - self._now_s)
        self._now_s = ticket.end_s
        return ticket


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._began = time.perf_counter()

    def __call__(self) -> float:
        return time.perf_counter() - self._began


class ThreadLane:
    """A lane with a thread of its own. A context manager: leaving it joins the thread.

    Args:
        work: called on the lane's thread with each step.
        clock: gives the seconds of the timeline.
    """

    def __init__(self, work: Callable[[Step], None], clock: Callable[[], float]) -> None:
        self._work = work
        self._clock = clock
        self._queue: deque[tuple[Ticket, Sequence[Ticket]]] = deque()
        self._changed = threading.Condition()
        self._stopped: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="hcache-reading", daemon=True)

    def submit(self, step: Step, after: Sequence[Ticket]) -> Ticket:
        """Queue a step; after an error, or when the lane is closed, it fails at once."""
        ticket = Ticket(step, self._changed)
        with self._changed:
            if self._stopped is not None:
                ticket.fail(self._stopped)
            else:
                self._queue.append((ticket, after))
                self._changed.notify_all()
        return ticket

    def close(self) -> None:
        """Stop after the running step and wait for the thread to end."""
        self._stop(Cancelled())
        if self._thread.is_alive():
            self._thread.join()

    def __enter__(self) -> ThreadLane:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _stop(self, reason: BaseException) -> None:
        with self._changed:
            self._stopped = self._stopped or reason
            for ticket, _ in self._queue:
                ticket.fail(self._stopped)
            self._queue.clear()
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            idle_s = self._clock()
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._stopped is not None)
                if self._stopped is not None:
                    return
                ticket, after = self._queue.popleft()
            try:
                for before in after:
                    before.wait()
                start_s = self._clock()
                self._work(ticket.step)
            except BaseException as error:
                ticket.fail(error)
                self._stop(error)
                return
            ticket.finish(start_s, self._clock(), start_s - idle_s)


class CallerLane:
    """A lane whose owner runs the steps: it takes them one by one, in order, when it gets there.

    Args:
        clock: gives the seconds of the timeline.
        is_cancelled: asked before each step.
    """

    def __init__(
        self, clock: Callable[[], float], is_cancelled: Callable[[], bool] = lambda: False
    ) -> None:
        self._clock = clock
        self._is_cancelled = is_cancelled
        self._queue: deque[tuple[Ticket, Sequence[Ticket]]] = deque()
        self._changed = threading.Condition()
        self._open: tuple[Ticket, float, float] | None = None

    def submit(self, step: Step, after: Sequence[Ticket]) -> Ticket:
        """Queue a step."""
        ticket = Ticket(step, self._changed)
        self._queue.append((ticket, after))
        return ticket

    def begin(self) -> Step | None:
        """End the step in hand; wait for what the next one needs, and begin it.

        Returns:
            The step that was begun, None when there is none left.

        Raises:
            BaseException: what a step that it needs has raised.
            Cancelled: the request was cancelled.
        """
        self.end()
        if self._is_cancelled():
            raise Cancelled
        if not self._queue:
            return None
        ticket, after = self._queue.popleft()
        idle_s = self._clock()
        try:
            for before in after:
                before.wait()
        except BaseException as error:
            ticket.fail(error)
            raise
        start_s = self._clock()
        self._open = (ticket, start_s, start_s - idle_s)
        return ticket.step

    def end(self) -> None:
        """End the step in hand, if there is one."""
        if self._open is not None:
            ticket, start_s, waited_s = self._open
            self._open = None
            ticket.finish(start_s, self._clock(), waited_s)

    @contextmanager
    def step(self) -> Iterator[Step]:
        """Begin the next step, and end it with the block."""
        step = self.begin()
        if step is None:
            raise RuntimeError("the lane has no step left")
        try:
            yield step
        except BaseException as error:
            self._fail(error)
            raise
        self.end()

    def close(self) -> None:
        """Fail the steps that were not run, so that nobody waits for them."""
        self._fail(Cancelled())
        while self._queue:
            self._queue.popleft()[0].fail(Cancelled())

    def _fail(self, error: BaseException) -> None:
        if self._open is not None:
            self._open[0].fail(error)
            self._open = None
