"""What do kills, damaged files, full disks and lying content cost?

    python benchmarks/bench_faults.py [--quick] [--json] [--seed N] [--only NAME]

  kills          an indexing process is killed at any moment, the next one goes on in the same store
  flips          one byte of the store's file is another: in LMDB's own pages, or anywhere
  truncations    the file loses its end, or zeros stand there
  torn writes    one to eight pages are zeros, or as they were before
  disk full      files may not grow beyond some byte of a write
  readers        processes that verify all they read, while one puts, replaces, deletes and evicts
  hostile        checksums are right and content is not

After each fault everything is read that can be, and compared with what was stored (tests/faults/
has the drivers). Nothing acknowledged may be lost and nothing wrong be given out; no error may come
out that is not this library's, no process be ended by a signal or be silent for 20 s.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common import Target, arguments, at_most, finish, machine

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import faults
from faults import Outcome, drive

COLUMNS = {
    "count": "count",
    "right": "right",
    "missed": "missed",
    "refused": "refused",
    "acknowledged": "acked",
    "lost": "lost",
    "wrong": "wrong",
    "escaped": "other errors",
    "hangs": "hangs",
    "crashes": "crashes",
}
MUST_BE_NONE = ("lost", "wrong", "escaped", "hangs", "crashes")

Run = Callable[[], Outcome]


def runs(seed: int, quick: bool) -> dict[str, Run]:
    """All faults by name, with full or quick counts."""

    def of(driver: Callable[..., Outcome], few: int, many: int, **options: Any) -> Run:
        return lambda: in_parts(driver, few if quick else many, seed, options)

    def readers() -> Outcome:
        work = {"readers": 3, "operations": 400} if quick else {"readers": 8, "seconds": 120}
        return drive(faults.readers_and_a_writer, seed=seed, **work)

    return {
        "kills, fsync": of(faults.kills, 60, 500, durability="fsync"),
        "kills, fast": of(faults.kills, 60, 500, durability="fast"),
        "flips": of(faults.flips, 800, 10_000),
        "truncations": of(faults.truncations, 100, 1000),
        "torn writes": of(faults.torn_writes, 100, 500),
        "disk full": of(faults.disk_full, 40, 200),
        "readers": readers,
        # Every lie is told once; the seed decides which ones are, where only some are.
        "hostile": (lambda: drive(faults.hostile, count=120, seed=seed))
        if quick
        else (lambda: drive(faults.hostile, count=0, seed=seed)),
    }


def in_parts(
    driver: Callable[..., Outcome], count: int, seed: int, options: dict[str, Any]
) -> Outcome:
    """Do some faults on each core."""
    parts = min(os.cpu_count() or 1, 8)
    counts = [count // parts + (number < count % parts) for number in range(parts)]
    with ThreadPoolExecutor(parts) as pool:
        work = [
            pool.submit(drive, driver, count=part, seed=seed * 1000 + number, **options)
            for number, part in enumerate(counts)
        ]
        first, *others = [each.result() for each in work]
    for other in others:
        first.add(other)
    return first


def main() -> None:
    parser = arguments(__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", help="the faults whose names begin so")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    targets: list[Target] = []
    print(f"{'fault':14}" + "".join(f"{name:>13}" for name in COLUMNS.values()) + f"{'s':>8}")
    for name, run in runs(options.seed, options.quick).items():
        if not name.startswith(options.only or ""):
            continue
        started = time.perf_counter()
        outcome = run()
        seconds = time.perf_counter() - started
        counts = {column: getattr(outcome, column) for column in COLUMNS}
        print(
            f"{name:14}" + "".join(f"{count:13,}" for count in counts.values()) + f"{seconds:8.1f}",
            flush=True,
        )
        rows.append({**asdict(outcome), "fault": name, "seconds": round(seconds, 1)})
        targets += [at_most(f"{name}: {COLUMNS[c]}", counts[c], 0) for c in MUST_BE_NONE]
    for row in rows:
        for what, where in row.pop("notes").items():
            print(f"  {row['fault']}: {len(where)} x {what}: {where[0]}")
    finish(rows, targets, {**machine(), "seed": options.seed}, options.json)


if __name__ == "__main__":
    main()
