"""Which work has touched which bytes, and whether something puts it in order.

Every access gets a vector clock (Fidge 1988, Mattern 1989): two accesses to the same bytes, one of
them writing, of which neither has seen the other are a `RaceError`, whatever order they happened to
run in. What is declared is all that is known; `Races.watched` finds what is not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

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


class Races:
    """What actors, threads and streams, have seen of each other's work, and what they touch."""

    def __init__(self) -> None:
        self._clocks: dict[str, Clock] = {}
        self._accesses: dict[int, list[_Access]] = {}
        self._freed: set[int] = set()
        self.alive: dict[int, Tensor] = {}  # so that no two things have one address

    def clock(self, actor: str) -> Clock:
        """What an actor's next work comes after."""
        return self._clocks.setdefault(actor, {})

    def follow(self, actor: str, clock: Clock) -> None:
        """What `actor` does from now on comes after what `clock` has seen."""
        its = self.clock(actor)
        for other, time in clock.items():
            its[other] = max(its.get(other, 0), time)

    def free(self, memory: Tensor) -> None:
        """Nobody may touch it any more."""
        self._freed.add(storage_of(memory))

    def note(
        self, actor: str, reads: Sequence[Tensor], writes: Sequence[Tensor], name: str
    ) -> None:
        """An actor's next work touches memory.

        Raises:
            RaceError: nothing puts it behind what has touched the same bytes, or they were freed.
        """
        clock = self.clock(actor)
        clock[actor] = now = clock.get(actor, 0) + 1
        for tensor, is_write in [(t, False) for t in reads] + [(t, True) for t in writes]:
            storage = storage_of(tensor)
            if storage in self._freed:
                raise RaceError(f"{name!r} ({actor}) uses memory that was freed")
            self.alive.setdefault(storage, tensor)
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

    def watched(
        self,
        work: Callable[[], object],
        reads: Sequence[Tensor],
        writes: Sequence[Tensor],
        name: str,
    ) -> Callable[[], object]:
        """Work in a world where only what it has declared can be read, or written.

        It raises `RaceError` where it writes something else.
        """

        def run() -> None:
            held = {storage: all_bytes(tensor) for storage, tensor in self.alive.items()}
            before = {storage: memory.clone() for storage, memory in held.items()}
            for storage, memory in held.items():
                memory.fill_(POISON)
                for tensor in (*reads, *writes):
                    if storage_of(tensor) == storage:
                        for begin, end in byte_runs(tensor):
                            memory[begin:end] = before[storage][begin:end]
            work()
            for storage, memory in held.items():
                written = torch.zeros(len(memory), dtype=torch.bool)
                for tensor in writes:
                    if storage_of(tensor) == storage:
                        for begin, end in byte_runs(tensor):
                            written[begin:end] = True
                undeclared = torch.ones_like(written)
                for tensor in (*reads, *writes):
                    if storage_of(tensor) == storage:
                        for begin, end in byte_runs(tensor):
                            undeclared[begin:end] = False
                is_clean = bool((memory[undeclared] == POISON).all())
                kept = ~undeclared & ~written
                if not is_clean or not torch.equal(memory[kept], before[storage][kept]):
                    raise RaceError(f"{name!r} writes what it has not declared")
                memory.copy_(torch.where(written, memory, before[storage]))

        return run


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


def storage_of(tensor: Tensor) -> int:
    """Whose memory a tensor is a part of."""
    return tensor.untyped_storage().data_ptr()


def all_bytes(tensor: Tensor) -> Tensor:
    """All memory that a tensor is a part of, (bytes,) uint8."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
