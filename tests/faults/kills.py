"""Indexing processes that are killed."""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from faults.documents import Known, a_record, a_state
from faults.looking import is_well
from faults.outcomes import Outcome, Sight
from faults.processes import Child, Report, supervised
from hcache_rag.store import Durability, NewState, StateStore

KILLS_OF_A_STORE = 25


def kills(count: int, seed: int, durability: Durability = "fsync") -> Outcome:
    """An indexing process is killed at any moment; the next one goes on in the same store.

    `lost` are documents whose write had returned and that are not whole afterwards, or that a later
    process stored again.
    """
    outcome = Outcome(f"kills, {durability}")
    records = [a_record(number, tokens=120) for number in range(40)]
    states = [a_state(record) for record in records]
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        folder, gap_s = Path(name), 0.01
        present: set[int] = set()
        for number in range(count):
            path = folder / f"store-{number // KILLS_OF_A_STORE}"
            if not number % KILLS_OF_A_STORE:
                shutil.rmtree(folder / f"store-{number // KILLS_OF_A_STORE - 1}", True)
                present = set()
            source = random.Random(f"{seed}/{number}")
            started = time.perf_counter()
            reports = _index_until_killed(path, states, durability, source, gap_s, folder)
            gap_s = 0.9 * gap_s + 0.1 * (time.perf_counter() - started) / (len(reports) + 1)
            must, again = set(present), list[int]()
            for sign, numbers in reports:
                if sign == "+":
                    again += must.intersection(numbers)
                    must.update(numbers)
                    outcome.acknowledged += len(numbers)
                else:
                    must.difference_update(numbers)
            absent = [record for n, record in enumerate(records) if n not in must]
            known = Known.of(records, without=absent)

            def check(_: int, path: Path = path, known: Known = known) -> Sight:
                return is_well(path, known, durability=durability)

            about = f"[kill {number} of seed {seed}, after {len(reports)} reports]"
            for _, sight, end in supervised(check, [number], folder):
                present = {n for n, r in enumerate(records) if r.key.hex() in sight.present}
                if end:
                    outcome.count_end(end, about)
                    continue
                for n in again:
                    sight.add("lost", "stored again", f"document {n}")
                outcome.count_sight(sight, about)
    return outcome


def _index_until_killed(
    path: Path,
    states: Sequence[NewState],
    durability: Durability,
    source: random.Random,
    gap_s: float,
    folder: Path,
) -> list[tuple[str, list[int]]]:
    """Let a process index and kill it; ("+", what it has stored) and ("-", what it deletes)."""
    child_seed = source.random()
    child = Child.start(
        lambda report: _index(path, states, durability, child_seed, report), folder / "indexer"
    )
    reports = child.reports()
    found = [next(reports) for _ in range(source.randrange(12))]
    until = time.perf_counter() + source.uniform(0, 2 * gap_s)
    while time.perf_counter() < until:  # a random moment of what comes next
        pass
    os.kill(child.pid, signal.SIGKILL)
    found += reports
    child.end()
    return [(sign, numbers) for sign, numbers in found]


def _index(
    path: Path, states: Sequence[NewState], durability: Durability, seed: float, report: Report
) -> None:
    """Store what is not there yet, in small batches; when all is there, delete some again."""
    source = random.Random(seed)
    while True:
        with StateStore.open(path, durability=durability) as store:
            for _ in range(10):
                absent = [n for n, state in enumerate(states) if state.record.key not in store]
                if not absent or source.random() < 0.2:
                    gone = source.sample(range(len(states)), 3)
                    report(("-", gone))
                    for number in gone:
                        store.delete(states[number].record.key)
                batch = source.sample(absent, min(len(absent), source.randint(1, 4)))
                store.put_all([states[number] for number in batch])
                report(("+", batch))
