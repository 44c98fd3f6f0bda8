"""Which states go when room is needed: those that save least time for their bytes.

Greedy-Dual-Size-Frequency (Cherkasova, "Improving WWW Proxies Performance with Greedy-Dual-Size-
Frequency Caching Policy", 1998). A state's priority is

    clock + uses * saved seconds / bytes

set when it is stored (one use) and each time it is restored. The clock rises to the priority of
each state that has to go: what was used long ago was given its priority when the clock was low, and
falls behind however often it was used then.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

Id = TypeVar("Id")


def priority(clock: float, hits: int, saved_s: float, num_bytes: int) -> float:
    """The priority of a state that has been restored `hits` times."""
    return clock + (1 + hits) * saved_s / max(num_bytes, 1)


def victims(states: Iterable[tuple[float, int, Id]], num_bytes: int) -> tuple[list[Id], float]:
    """The states of lowest priority that have `num_bytes` together.

    Args:
        states: (priority, bytes, what identifies it).

    Returns:
        What identifies them, and the priority of the last one, to which the clock rises; 0 where
        there is none.
    """
    chosen: list[Id] = []
    freed, last = 0, 0.0
    for its_priority, its_bytes, identity in sorted(states, key=lambda state: state[0]):
        if freed >= num_bytes:
            break
        chosen.append(identity)
        freed += its_bytes
        last = its_priority
    return chosen, last
