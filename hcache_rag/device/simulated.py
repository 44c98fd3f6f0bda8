"""A device that is not there, to test what is written for one.

Work is queued, and runs late, in a random order that streams and events allow, on memory that is
poisoned when it is new and when it is freed. Accesses that are declared and that nothing puts in
order are found, see `hcache_rag.device.races`.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hcache_rag.device.protocol import Event, Stream
from hcache_rag.device.races import POISON, Clock, RaceError, Races, all_bytes, storage_of


@dataclass(slots=True)
class _Point:
    """An event."""

    device: SimulatedDevice
    clock: Clock
    is_reached: bool = False

    def wait(self) -> None:
        """See `Event`: work runs, in random order, until the stream has come there."""
        with self.device.lock:
            self.device.run(lambda: self.is_reached)
            self.device.races.follow(self.device.host, self.clock)


@dataclass(slots=True, eq=False)
class _Queue:
    """A stream: what it was given and has not done."""

    device: SimulatedDevice
    name: str
    is_eager: bool = False
    waiting: deque[tuple[_Point | None, Callable[[], object]]] = field(default_factory=deque)

    def wait_event(self, event: Event) -> None:
        """See `Stream`."""
        assert isinstance(event, _Point)
        with self.device.lock:
            self.device.races.follow(self.name, event.clock)
            self.put(event, lambda: None)

    def put(self, after: _Point | None, work: Callable[[], object]) -> None:
        self.waiting.append((after, work))
        if self.is_eager:
            self.device.run(lambda: not self.waiting)


class SimulatedDevice:
    """See `hcache_rag.device.Device`. Thread-safe; each thread is an actor of its own.

    Args:
        seed: of the order in which work runs; also decides how late it does.
        is_current_eager: work on the current stream runs when it is launched, as the forward pass
            of a model on the CPU does. It counts as a stream's all the same.
        checks_declarations: run all work twice as hard: whatever memory it has not declared is
            poisoned meanwhile, and must still be so afterwards.
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        is_current_eager: bool = False,
        checks_declarations: bool = False,
    ) -> None:
        self._random = random.Random(seed)
        self._haste = self._random.choice((0.0, 0.1, 0.5, 1.0))
        self._checks_declarations = checks_declarations
        self.races = Races()
        self._pinned: set[int] = set()
        self._names = threading.local()
        self._streams: list[_Queue] = []
        self._current = self._stream("current", is_current_eager)
        self.lock = threading.RLock()
        self.num_launched = 0

    @property
    def host(self) -> str:
        """The calling thread, as an actor."""
        name: str | None = getattr(self._names, "host", None)
        return name or f"thread {threading.get_ident()}"

    @contextmanager
    def acting_as(self, host: str) -> Iterator[None]:
        """In the block, the calling thread counts as another one."""
        before, self._names.host = getattr(self._names, "host", None), host
        try:
            yield
        finally:
            self._names.host = before

    def current_stream(self) -> Stream:
        """See `Device`."""
        return self._current

    def new_stream(self, name: str) -> Stream:
        """See `Device`."""
        with self.lock:
            return self._stream(f"{name} {len(self._streams)}", is_eager=False)

    def pinned_memory(self, num_bytes: int) -> Tensor:
        """See `Device`."""
        made = torch.full((num_bytes,), POISON, dtype=torch.uint8)
        with self.lock:
            self._pinned.add(storage_of(made))
            self.races.alive[storage_of(made)] = made
        return made

    def memory(self, num_bytes: int) -> Tensor:
        """See `Device`; poisoned by the current stream, late as all its work."""
        made = torch.empty(num_bytes, dtype=torch.uint8)
        self.launch(
            self._current, lambda: made.fill_(POISON), reads=[], writes=[made], name="new memory"
        )
        return made

    def free(self, memory: Tensor) -> None:
        """See `Device`; poisoned by who may use it next."""
        poison, name = partial_fill(memory), "freed memory"
        if storage_of(memory) in self._pinned:
            self.on_host(poison, reads=[], writes=[memory], name=name)
        else:
            self.launch(self._current, poison, reads=[], writes=[memory], name=name)
        self.races.free(memory)

    def launch(
        self,
        stream: Stream,
        work: Callable[[], object],
        *,
        reads: Sequence[Tensor],
        writes: Sequence[Tensor],
        name: str,
    ) -> None:
        """See `Device`.

        Raises:
            RaceError: it, or other work, is not put in order.
        """
        assert isinstance(stream, _Queue)
        with self.lock:
            self.num_launched += 1
            self.races.follow(stream.name, self.races.clock(self.host))
            self.races.note(stream.name, reads, writes, name)
            if self._checks_declarations:
                work = self.races.watched(work, reads, writes, name)
            stream.put(None, work)
            self._run_some()

    def on_host(
        self,
        work: Callable[[], object],
        *,
        reads: Sequence[Tensor],
        writes: Sequence[Tensor],
        name: str,
    ) -> None:
        """See `Device`.

        Raises:
            RaceError: it, or other work, is not put in order.
        """
        with self.lock:
            self.races.note(self.host, reads, writes, name)
            work()
            self._run_some()

    def record(self, stream: Stream) -> Event:
        """See `Device`."""
        assert isinstance(stream, _Queue)
        with self.lock:
            point = _Point(self, dict(self.races.clock(stream.name)))

            def reach() -> None:
                point.is_reached = True

            stream.put(None, reach)
            return point

    @torch.no_grad()
    def run(self, until: Callable[[], bool], at_most: int | None = None) -> None:
        """Run queued work, each next piece that of a random stream that may go on.

        Raises:
            RaceError: no stream may.
        """
        while not until() and at_most != 0:
            ready = [s for s in self._streams if s.waiting and _may_run(s.waiting[0][0])]
            if not ready:
                if any(stream.waiting for stream in self._streams):
                    raise RaceError("every stream waits for another one")
                return
            _, work = self._random.choice(ready).waiting.popleft()
            work()
            at_most = None if at_most is None else at_most - 1

    def _run_some(self) -> None:
        if self._random.random() < self._haste:
            self.run(lambda: False, self._random.randrange(1, 5))

    def _stream(self, name: str, is_eager: bool) -> _Queue:
        stream = _Queue(self, name, is_eager)
        self._streams.append(stream)
        return stream


def partial_fill(memory: Tensor) -> Callable[[], object]:
    """Work that poisons memory."""
    return lambda: all_bytes(memory).fill_(POISON)


def _may_run(after: _Point | None) -> bool:
    return after is None or after.is_reached
