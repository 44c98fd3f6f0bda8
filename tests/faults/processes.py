"""Processes that may die."""

from __future__ import annotations

import faulthandler
import json
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

from faults.outcomes import Outcome, Sight

HANG_S = 20.0
MAX_HANGS = 3
"""After so many a driver does no more faults: each costs `HANG_S`."""

Report: TypeAlias = Callable[[Any], None]


@dataclass(frozen=True)
class Child:
    """A forked process that reports JSON values, line by line."""

    pid: int
    descriptor: int
    trace: Path

    @classmethod
    def start(cls, work: Callable[[Report], None], trace: Path) -> Child:
        """Run `work`, which is given what to report with; `trace` is where it says how it dies."""
        reading, writing = os.pipe()
        pid = os.fork()
        if pid:
            os.close(writing)
            return cls(pid, reading, trace)
        status = 1
        try:
            os.close(reading)
            with trace.open("w") as log:
                os.dup2(log.fileno(), 2)
                faulthandler.enable(2)
                work(lambda value: _write(writing, value))
            status = 0
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(status)

    def reports(self, silence_s: float = HANG_S) -> Iterator[Any]:
        """What it reports, until its end.

        Raises:
            TimeoutError: nothing for `silence_s`.
        """
        pending = b""
        while True:
            if not select.select([self.descriptor], [], [], silence_s)[0]:
                raise TimeoutError
            data = os.read(self.descriptor, 1 << 16)
            if not data:
                return
            *lines, pending = (pending + data).split(b"\n")
            yield from map(json.loads, lines)

    def end(self, number: int | None = None) -> str:
        """Send it a signal, wait for its end, and say what it was: "" where all went well."""
        if number is not None:
            os.kill(self.pid, number)
        os.close(self.descriptor)
        _, status = os.waitpid(self.pid, 0)
        lines = self.trace.read_text(errors="replace").splitlines() if self.trace.exists() else []
        if os.WIFSIGNALED(status):
            frames = [line.split("/")[-1].replace('"', "") for line in lines if ", line" in line]
            said = [line[line.find("Assert") :] for line in lines if "Assert" in line]
            name = signal.Signals(os.WTERMSIG(status)).name
            return ", ".join((name, *said[:1], " < ".join(frames[:4])))
        if status:
            raise RuntimeError("a child failed:\n" + "\n".join(lines))
        return ""


def _write(descriptor: int, value: Any) -> None:
    os.write(descriptor, json.dumps(value).encode() + b"\n")


def supervised(
    work: Callable[[int], Sight], numbers: Iterable[int], folder: Path
) -> Iterator[tuple[int, Sight, str]]:
    """Run `work` on numbers in a forked process, and in a new one wherever it dies.

    Yields:
        (number, what was seen, ""), or (number, nothing, what ended the process).
    """
    left = list(numbers)

    def rest(report: Report) -> None:
        for number in left:
            report(asdict(work(number)))

    while left:
        child = Child.start(rest, folder / "trace")
        try:
            for report in child.reports():
                yield left.pop(0), Sight(**report), ""
            end = child.end()
        except TimeoutError:
            end = "hang: " + child.end(signal.SIGABRT)  # on which it says where it is
        if end:
            yield left.pop(0), Sight(), end


def one_by_one(
    outcome: Outcome,
    work: Callable[[int], Sight],
    about: Callable[[int], str],
    count: int,
    folder: Path,
) -> Outcome:
    """Do faults 0, 1, ... in forked processes, each followed by a look."""
    for number, sight, end in supervised(work, range(count), folder):
        if end:
            outcome.count_end(end, about(number))
        else:
            outcome.count_sight(sight, about(number))
        if outcome.hangs == MAX_HANGS:
            outcome.note("given up", f"after {outcome.count} of {count}")
            break
    return outcome
