"""A device that is not there, to test what is written for one.

Work is queued, and runs late, in a random order that streams and events allow, on memory that is
poisoned when it is new and when it is freed. Every access that is declared gets a vector clock
(Fidge 1988, Mattern 1989): two accesses to the same bytes, one of them writing, that nothing puts
in order are a `RaceError`, whatever order they happened to run in.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from hcache_rag.device.protocol import Event, Stream

Clock: TypeAlias = dict[str, int]
"""How far of every actor's work something comes after."""

POISON = 0xFF
"""Bytes of memory that nobody wrote: not a number in every floating-point dtype."""


class RaceError(AssertionError):
    """Two accesses in no order, memory used after it was freed, or work that never runs."""


@dataclass(slots=True)
class _Access:
    """What an actor's work at a time of its own clock touches of one storage."""

    actor: str
    time: int
    is_write: bool
    runs: list[tuple[int, int]]
    name: str


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
            self.device.follow(self.device.host, self.clock)


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
            self.device.follow(self.name, event.clock)
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
        self._clocks: dict[str, Clock] = {}
        self._accesses: dict[int, list[_Access]] = {}
        self._alive: dict[int, Tensor] = {}  # so that no two things have one address
        self._pinned: set[int] = set()
        self._freed: set[int] = set()
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
            self._pinned.add(_storage(made))
            self._alive[_storage(made)] = made
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
        if _storage(memory) in self._pinned:
            self.on_host(poison, reads=[], writes=[memory], name=name)
        else:
            self.launch(self._current, poison, reads=[], writes=[memory], name=name)
        self._freed.add(_storage(memory))

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
            self.follow(stream.name, self._clock(self.host))
            self._note(stream.name, reads, writes, name)
            if self._checks_declarations:
                work = self._watched(work, reads, writes, name)
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
            self._note(self.host, reads, writes, name)
            work()
            self._run_some()

    def record(self, stream: Stream) -> Event:
        """See `Device`."""
        assert isinstance(stream, _Queue)
        with self.lock:
            point = _Point(self, dict(self._clock(stream.name)))

            def reach() -> None:
                point.is_reached = True

            stream.put(None, reach)
            return point

    def follow(self, actor: str, clock: Clock) -> None:
        """What `actor` does from now on comes after what `clock` has seen."""
        its = self._clock(actor)
        for other, time in clock.items():
            its[other] = max(its.get(other, 0), time)

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

    def _clock(self, actor: str) -> Clock:
        return self._clocks.setdefault(actor, {})

    def _note(
        self, actor: str, reads: Sequence[Tensor], writes: Sequence[Tensor], name: str
    ) -> None:
        clock = self._clock(actor)
        clock[actor] = now = clock.get(actor, 0) + 1
        for tensor, is_write in [(t, False) for t in reads] + [(t, True) for t in writes]:
            storage = _storage(tensor)
            if storage in self._freed:
                raise RaceError(f"{name!r} ({actor}) uses memory that was freed")
            self._alive.setdefault(storage, tensor)
            runs = byte_runs(tensor)
            before = self._accesses.setdefault(storage, [])
            for other in before:
                if (
                    (is_write or other.is_write)
                    and clock.get(other.actor, 0) < other.time
                    and _overlap(runs, other.runs)
                ):
                    raise RaceError(
                        f"{name!r} ({actor}) and {other.name!r} ({other.actor}) touch the same "
                        "bytes in no order"
                    )
            before.append(_Access(actor, now, is_write, runs, name))

    def _watched(
        self,
        work: Callable[[], object],
        reads: Sequence[Tensor],
        writes: Sequence[Tensor],
        name: str,
    ) -> Callable[[], object]:
        """Work in a world where only what it has declared can be read, or written."""

        def run() -> None:
            held = {storage: _all_bytes(tensor) for storage, tensor in self._alive.items()}
            before = {storage: memory.clone() for storage, memory in held.items()}
            for storage, memory in held.items():
                memory.fill_(POISON)
                for tensor in (*reads, *writes):
                    if _storage(tensor) == storage:
                        for begin, end in byte_runs(tensor):
                            memory[begin:end] = before[storage][begin:end]
            work()
            for storage, memory in held.items():
                written = torch.zeros(len(memory), dtype=torch.bool)
                for tensor in writes:
                    if _storage(tensor) == storage:
                        for begin, end in byte_runs(tensor):
                            written[begin:end] = True
                undeclared = torch.ones_like(written)
                for tensor in (*reads, *writes):
                    if _storage(tensor) == storage:
                        for begin, end in byte_runs(tensor):
                            undeclared[begin:end] = False
                is_clean = bool((memory[undeclared] == POISON).all())
                kept = ~undeclared & ~written
                if not is_clean or not torch.equal(memory[kept], before[storage][kept]):
                    raise RaceError(f"{name!r} writes what it has not declared")
                memory.copy_(torch.where(written, memory, before[storage]))

        return run


def partial_fill(memory: Tensor) -> Callable[[], object]:
    """Work that poisons memory."""
    return lambda: _all_bytes(memory).fill_(POISON)


def byte_runs(tensor: Tensor) -> list[tuple[int, int]]:
    """The bytes of its storage that a tensor has, as stretches (begin, end)."""
    item = tensor.element_size()
    begins = torch.tensor([tensor.storage_offset() * item])
    length = item
    for size, stride in sorted(
        zip(tensor.shape, tensor.stride(), strict=True), key=lambda dim: dim[1]
    ):
        if size == 0:
            return []
        if stride * item == length and len(begins) == 1:
            length *= size
        elif size > 1:
            steps = torch.arange(size) * stride * item
            begins = (begins[:, None] + steps[None, :]).flatten()
    return [(begin, begin + length) for begin in sorted(begins.tolist())]


def _overlap(some: list[tuple[int, int]], others: list[tuple[int, int]]) -> bool:
    """Whether two sorted lists of stretches have a byte in common."""
    i = j = 0
    while i < len(some) and j < len(others):
        if some[i][1] <= others[j][0]:
            i += 1
        elif others[j][1] <= some[i][0]:
            j += 1
        else:
            return True
    return False


def _may_run(after: _Point | None) -> bool:
    return after is None or after.is_reached


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _all_bytes(tensor: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
