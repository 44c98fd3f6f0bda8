"""Commands as a person gives them, run in this process, and what they leave behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """What a run left behind."""

    code: object
    out: str
    err: str

    @property
    def complaints(self) -> list[str]:
        """Lines on stderr that do not name a file that was passed over."""
        lines = [line for line in self.err.splitlines() if line.strip()]
        return [line for line in lines if not line.startswith("skipped ")]


Run = Callable[..., Outcome]


def assert_one_error_line(outcome: Outcome, expected: str) -> None:
    """Failed with one line on stderr that says `expected`, and nothing on stdout."""
    assert outcome.code not in (0, None)
    assert outcome.out == ""
    [line] = outcome.complaints
    assert line.startswith("error: ")
    assert expected in line


def assert_usage_error(outcome: Outcome, expected: str) -> None:
    """Failed with the usage and one error that says `expected`, without a traceback."""
    assert outcome.code == 2
    assert outcome.out == ""
    assert "Traceback" not in outcome.err
    assert sum("error" in line.lower() for line in outcome.err.splitlines()) == 1
    assert expected in outcome.err
    assert len(outcome.complaints) <= 6
