"""Faults done to a store on purpose, and what its users get then: drivers for tests and benchmark.

A driver does faults that `seed` chooses, in child processes that may die of them, and counts what
came of each. `drive` runs one in a process of its own, which loads neither torch nor pytest and so
may be forked:

    PYTHONPATH=.:tests python -m faults flips '{"count": 100, "seed": 7}'
"""

from faults.disk import disk_full
from faults.drive import drive
from faults.files import FLIPS, flips, torn_writes, truncations
from faults.kills import kills
from faults.lies import hostile, lies
from faults.outcomes import Outcome
from faults.sharing import readers_and_a_writer

__all__ = [
    "FLIPS",
    "Outcome",
    "disk_full",
    "drive",
    "flips",
    "hostile",
    "kills",
    "lies",
    "readers_and_a_writer",
    "torn_writes",
    "truncations",
]
