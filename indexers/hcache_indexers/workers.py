"""Which part of a job is this process's: as it was told, or as its launcher says it.

SLURM, torchrun and indexed Kubernetes jobs number the processes that they start in environment
variables; a job that is spread by such numbers needs nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

LAUNCHERS: tuple[tuple[str, str | None, str | None], ...] = (
    ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN"),
    ("SLURM_PROCID", "SLURM_NTASKS", None),
    ("RANK", "WORLD_SIZE", None),
    ("JOB_COMPLETION_INDEX", None, None),
)
"""Variables of number, count and first number, by launcher; Kubernetes tells no count."""


@dataclass(frozen=True, slots=True)
class Worker:
    """One of `count` workers, numbered from 0."""

    number: int
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.number < self.count:
            raise ValueError(
                f"worker {self.number} of {self.count}: numbers are from 0 to {self.count - 1}"
            )

    def shards(self, total: int) -> list[int]:
        """The numbers of its shards, of `total`.

        Raises:
            ValueError: there are more workers than shards.
        """
        if self.count > total:
            raise ValueError(f"{self.count} workers for {total} shards: --shards must be as many")
        return list(range(self.number, total, self.count))


def worker_of(text: str, environment: Mapping[str, str]) -> Worker:
    """The worker that `i/n`, `auto` or `auto/n` means.

    Raises:
        ValueError: it is none of these, or no launcher has left its number.
    """
    first, _, count = text.partition("/")
    try:
        if first != "auto":
            return Worker(int(first), int(count))
        known = int(count) if count else None
    except ValueError as error:
        if str(error).startswith("worker"):
            raise
        raise ValueError(f"--shard is i/n, auto or auto/n, not {text!r}") from error
    for number, total, least in LAUNCHERS:
        if number in environment:
            counted = known or (int(environment[total]) if total and total in environment else None)
            if counted is None:
                raise ValueError(f"{number} says no count: give it as --shard auto/N")
            begin = int(environment.get(least, 0)) if least else 0
            return Worker(int(environment[number]) - begin, counted)
    raise ValueError(
        "--shard auto needs the number of SLURM, torchrun or an indexed Kubernetes job in the "
        "environment; none of their variables is set"
    )
