"""`Step` and `Timeline`: what is to run on which lane, and when it ran. Measured or predicted.

Knows no clocks and no lanes; tables, traces and drawings of both kinds are made here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

READING, COMPUTING = "reading", "computing"
LANES = (READING, COMPUTING)


@dataclass(frozen=True, slots=True)
class Step:
    """A piece of work on one lane.

    Args:
        lane: `READING` or `COMPUTING`.
        verb: "read", "recompute", "restore" or "forward".
        layer: which layer; the number of layers for "recompute".
        piece: which of the layer's pieces, or of the recomputed batches.
        needs: indices of the steps, all earlier in the list, that must have ended.
        cost_s: predicted seconds.
        num_bytes: bytes that the step reads.
    """

    lane: str
    verb: str
    layer: int
    piece: int = 0
    needs: tuple[int, ...] = ()
    cost_s: float = 0.0
    num_bytes: int = 0

    @property
    def label(self) -> str:
        """A name for people."""
        if self.verb == "recompute":
            return f"recompute {self.layer} layers ({self.piece})"
        return f"{self.verb} {self.layer}.{self.piece}"


@dataclass(frozen=True, slots=True)
class Event:
    """A step that ran: from `start_s` to `end_s`, after its lane stood still for `waited_s`."""

    step: Step
    start_s: float
    end_s: float
    waited_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Timeline:
    """The events of a restore; seconds from its beginning."""

    events: tuple[Event, ...]

    @property
    def makespan_s(self) -> float:
        """From the beginning to the end of the last event."""
        return max((event.end_s for event in self.events), default=0.0)

    def busy_s(self, lane: str, verb: str | None = None) -> float:
        """Seconds that a lane worked, on all verbs or on one."""
        return sum(
            event.end_s - event.start_s
            for event in self.events
            if event.step.lane == lane and verb in (None, event.step.verb)
        )

    def waited_s(self, lane: str) -> float:
        """Seconds that a lane stood still for what its steps needed."""
        return sum(event.waited_s for event in self.events if event.step.lane == lane)

    @property
    def bytes_read(self) -> int:
        """Bytes of all reading steps."""
        return sum(event.step.num_bytes for event in self.events)

    @property
    def bubble_s(self) -> float:
        """Makespan minus the busier lane's work: what a perfect overlap would save."""
        return self.makespan_s - max(self.busy_s(lane) for lane in LANES)

    def to_trace(self, name: str = "restore") -> str:
        """A JSON text that Perfetto and chrome://tracing open; one row a lane."""
        rows: list[dict[str, Any]] = [
            {"ph": "M", "pid": 1, "name": "process_name", "args": {"name": name}}
        ]
        for thread, lane in enumerate(LANES, start=1):
            rows.append(
                {
                    "ph": "M",
                    "pid": 1,
                    "tid": thread,
                    "name": "thread_name",
                    "args": {"name": lane},
                }
            )
        rows += [
            {
                "ph": "X",
                "pid": 1,
                "tid": LANES.index(event.step.lane) + 1,
                "cat": event.step.verb,
                "name": event.step.label,
                "ts": event.start_s * 1e6,
                "dur": (event.end_s - event.start_s) * 1e6,
                "args": {"waited_us": event.waited_s * 1e6, "bytes": event.step.num_bytes},
            }
            for event in self.events
        ]
        return json.dumps({"traceEvents": rows, "displayTimeUnit": "ms"})


_COLOURS = {
    "read": "#4c78a8",
    "recompute": "#e45756",
    "restore": "#f58518",
    "forward": "#54a24b",
}


def draw(timelines: Sequence[tuple[str, Timeline]], path: Path) -> None:
    """Draw timelines under each other, on one scale, into a PNG (or what the suffix says).

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is nothing to draw.
    """
    if not any(timeline.events for _, timeline in timelines):
        raise ValueError("there is nothing to draw: no step has run")
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(11, 0.9 + 1.1 * len(timelines)), layout="constrained")
    axes: Any = figure.subplots(len(timelines), 1, sharex=True, squeeze=False)
    longest = max(timeline.makespan_s for _, timeline in timelines)
    unit, factor = ("s", 1.0) if longest > 2 else ("ms", 1e3)
    for axis, (title, timeline) in zip(axes[:, 0], timelines, strict=True):
        for row, lane in enumerate(reversed(LANES)):
            for verb, colour in _COLOURS.items():
                spans = [
                    (e.start_s * factor, (e.end_s - e.start_s) * factor)
                    for e in timeline.events
                    if e.step.lane == lane and e.step.verb == verb
                ]
                axis.broken_barh(
                    spans, (row - 0.4, 0.8), facecolors=colour, edgecolor="white", linewidth=0.3
                )
        axis.set_yticks([0, 1], list(reversed(LANES)))
        axis.set_title(
            f"{title}: {timeline.makespan_s * factor:,.1f} {unit}", loc="left", fontsize=9
        )
        axis.set_xlim(0, longest * factor)
    axes[-1, 0].set_xlabel(unit)
    figure.legend(
        handles=[Patch(color=colour, label=verb) for verb, colour in _COLOURS.items()],
        loc="outside lower right",
        ncols=len(_COLOURS),
        frameon=False,
        fontsize=8,
    )
    figure.savefig(path, dpi=120)
