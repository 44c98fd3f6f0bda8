"""What a timeline says of its events, and what a trace and a drawing of it show."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from hcache_rag.timeline import COMPUTING, LANES, READING, Event, Step, Timeline, draw

COLOURS = {
    "read": (0x4C, 0x78, 0xA8),
    "recompute": (0xE4, 0x57, 0x56),
    "restore": (0xF5, 0x85, 0x18),
    "forward": (0x54, 0xA2, 0x4B),
}
"""What the legend says."""


def read(layer: int, start_s: float, end_s: float, waited_s: float = 0.0, size: int = 0) -> Event:
    return Event(Step(READING, "read", layer, num_bytes=size), start_s, end_s, waited_s)


def compute(
    verb: str, start_s: float, end_s: float, waited_s: float = 0.0, *, layer: int = 0
) -> Event:
    return Event(Step(COMPUTING, verb, layer), start_s, end_s, waited_s)


RESTORE = Timeline(
    (
        read(0, 0.0, 1.5, size=1000),
        read(1, 1.5, 2.5, size=500),
        compute("recompute", 0.0, 0.5, layer=2),
        compute("restore", 1.5, 1.75, 1.0),
        compute("forward", 1.75, 2.0),
        compute("restore", 2.5, 3.0, 0.5, layer=1),
        compute("forward", 3.0, 3.25, layer=1),
    )
)
"""Two layers, read in 1.5 and 1 s; computing stands still for both."""
EMPTY = Timeline(())


# --- sums ---------------------------------------------------------------------------------------


def test_a_lane_is_busy_as_long_as_its_steps_take() -> None:
    """All of them, or those of one verb; the other lane's do not count."""
    assert RESTORE.busy_s(READING) == 2.5
    assert RESTORE.busy_s(COMPUTING) == 1.75
    by_verb = {verb: RESTORE.busy_s(COMPUTING, verb) for verb in COLOURS}
    assert by_verb == {"read": 0.0, "recompute": 0.5, "restore": 0.75, "forward": 0.5}
    assert RESTORE.busy_s(READING, "read") == 2.5


def test_a_lane_waited_as_long_as_its_steps_say() -> None:
    assert RESTORE.waited_s(READING) == 0.0
    assert RESTORE.waited_s(COMPUTING) == 1.5


def test_the_makespan_ends_with_the_last_event_of_any_lane() -> None:
    """Wherever it stands in the list, and from 0, not from the first event."""
    assert RESTORE.makespan_s == 3.25
    late = Timeline((compute("forward", 2.0, 4.0), read(0, 1.0, 3.0)))
    assert late.makespan_s == 4.0


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        pytest.param(RESTORE.events, 3.25 - 2.5, id="reading-is-busier"),
        pytest.param((compute("forward", 0.0, 3.0), read(0, 0.0, 1.0)), 0.0, id="fully-hidden"),
        pytest.param((read(0, 0.0, 1.0), compute("forward", 1.0, 4.0)), 1.0, id="one-by-one"),
        pytest.param((compute("forward", 0.5, 3.0),), 0.5, id="one-lane-that-begins-late"),
    ],
)
def test_the_bubble_is_what_a_perfect_overlap_would_save(
    events: tuple[Event, ...], expected: float
) -> None:
    """Makespan minus the work of the lane that has more of it."""
    assert Timeline(events).bubble_s == expected


def test_bytes_read_are_those_of_all_steps() -> None:
    assert RESTORE.bytes_read == 1500


def test_nothing_takes_no_time() -> None:
    assert (EMPTY.makespan_s, EMPTY.bubble_s, EMPTY.bytes_read) == (0.0, 0.0, 0)
    assert [EMPTY.busy_s(lane) + EMPTY.waited_s(lane) for lane in LANES] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("step", "label"),
    [
        (Step(READING, "read", 3, 1), "read 3.1"),
        (Step(COMPUTING, "restore", 0, 12), "restore 0.12"),
        (Step(COMPUTING, "forward", 7), "forward 7.0"),
        (Step(COMPUTING, "recompute", 5, 2), "recompute 5 layers (2)"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.verb,
)
def test_steps_have_names_for_people(step: Step, label: str) -> None:
    assert step.label == label


# --- traces -------------------------------------------------------------------------------------


def trace(timeline: Timeline, *name: str) -> list[dict[str, Any]]:
    data = json.loads(timeline.to_trace(*name))
    assert data["displayTimeUnit"] == "ms"
    rows: list[dict[str, Any]] = data["traceEvents"]
    return rows


def test_a_trace_names_its_process_and_its_lanes() -> None:
    """Metadata events, as the Trace Event Format has them; a row of its own for each lane."""
    rows = [row for row in trace(RESTORE, "a question") if row["ph"] == "M"]
    assert rows[0]["name"] == "process_name"
    assert rows[0]["args"] == {"name": "a question"}
    threads = {row["tid"]: row["args"]["name"] for row in rows[1:]}
    assert [row["name"] for row in rows[1:]] == ["thread_name"] * 2
    assert sorted(threads.values()) == sorted(LANES)
    assert len({row["pid"] for row in trace(RESTORE)}) == 1


def test_a_trace_has_every_event_in_microseconds_on_its_lane() -> None:
    """Complete events ("X"): begin and duration; what was waited and read lies in `args`."""
    rows = trace(RESTORE)
    threads = {row["tid"]: row["args"]["name"] for row in rows if row["name"] == "thread_name"}
    events = [row for row in rows if row["ph"] == "X"]
    assert len(events) == len(RESTORE.events) == len(rows) - 3
    for row, event in zip(events, RESTORE.events, strict=True):
        assert threads[row["tid"]] == event.step.lane
        assert (row["name"], row["cat"]) == (event.step.label, event.step.verb)
        assert row["ts"] == pytest.approx(event.start_s * 1e6)
        assert row["ts"] + row["dur"] == pytest.approx(event.end_s * 1e6)
        waited_us, num_bytes = event.waited_s * 1e6, event.step.num_bytes
        assert row["args"] == {"waited_us": pytest.approx(waited_us), "bytes": num_bytes}


def test_a_trace_of_nothing_is_a_trace() -> None:
    rows = trace(EMPTY)
    assert [row["ph"] for row in rows] == ["M"] * 3
    assert rows[0]["args"] == {"name": "restore"}


# --- drawings -----------------------------------------------------------------------------------


def coloured(path: Path, verb: str) -> npt.NDArray[np.bool_]:
    """Which pixels of a PNG have exactly a verb's colour."""
    from matplotlib.image import imread

    image = (np.asarray(imread(path))[..., :3] * 255).round().astype(int)
    found: npt.NDArray[np.bool_] = (image == COLOURS[verb]).all(-1)
    return found


def pixels(path: Path, verb: str) -> int:
    return int(coloured(path, verb).sum())


def rows_of(path: Path, verb: str) -> list[int]:
    """The rows of pixels that are coloured across most of the picture, as no legend is."""
    return [int(row) for row in np.flatnonzero(coloured(path, verb).mean(1) > 0.5)]


def drawn(path: Path, *timelines: Timeline) -> Path:
    draw([(f"timeline {number}", timeline) for number, timeline in enumerate(timelines)], path)
    return path


@pytest.mark.parametrize("count", [1, 3])
def test_drawing_writes_a_png(tmp_path: Path, count: int) -> None:
    """One below the other."""
    path = drawn(tmp_path / "restore.png", *[RESTORE] * count)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert list(tmp_path.iterdir()) == [path]


def test_the_suffix_says_what_is_drawn(tmp_path: Path) -> None:
    assert "<svg" in drawn(tmp_path / "restore.svg", RESTORE).read_text()


@pytest.mark.parametrize("verb", COLOURS)
def test_a_drawing_shows_how_long_each_verb_took(tmp_path: Path, verb: str) -> None:
    """Half the time, half the area of its colour; what the legend takes does not count."""
    lane = READING if verb == "read" else COMPUTING
    other = Event(Step(COMPUTING if verb == "read" else READING, "", 0), 0.0, 2.0)

    def area(*spans: tuple[float, float]) -> int:
        events = [Event(Step(lane, verb, 0), *span) for span in spans]
        return pixels(drawn(tmp_path / "area.png", Timeline((other, *events))), verb)

    legend = area()
    whole, half, in_two = area((0.0, 2.0)), area((0.5, 1.5)), area((0.0, 0.5), (1.5, 2.0))
    assert whole > 10_000
    assert (half - legend) / (whole - legend) == pytest.approx(0.5, abs=0.02)
    assert (in_two - legend) / (whole - legend) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("is_first", [True, False], ids=["above", "below"])
def test_timelines_are_drawn_on_one_scale(tmp_path: Path, is_first: bool) -> None:
    """A restore that takes half as long as another one is half as wide, wherever it stands."""
    other = Timeline((compute("forward", 0.0, 1.0),))

    def area(end_s: float) -> int:
        pair = Timeline((read(0, 0.0, end_s),)), other
        return pixels(drawn(tmp_path / "pair.png", *pair[:: 1 if is_first else -1]), "read")

    legend = area(0.0)
    assert (area(0.5) - legend) / (area(1.0) - legend) == pytest.approx(0.5, abs=0.02)


def test_reading_is_drawn_above_computing(tmp_path: Path) -> None:
    """Each verb on its lane's row only, and each row with its lane's name."""
    both = Timeline((read(0, 0.0, 1.0), compute("forward", 0.0, 1.0)))
    bands = [rows_of(drawn(tmp_path / "lanes.png", both), verb) for verb in ("read", "forward")]
    for band in bands:
        assert 10 < len(band) == band[-1] - band[0] + 1
    assert bands[0][-1] < bands[1][0]
    text = drawn(tmp_path / "lanes.svg", both).read_text()
    heights = [
        float(number)
        for lane in (READING, COMPUTING)
        for number in re.findall(rf"<!-- {lane} -->\s*<g [^>]*translate\(\S+ (\S+)\)", text)
    ]
    assert len(heights) == 2
    assert heights[0] < heights[1]


@pytest.mark.parametrize(
    ("factor", "titles"),
    [
        pytest.param(0.8, ("slow: 2.6 s", "none: 0.0 s"), id="seconds"),
        pytest.param(0.0008, ("slow: 2.6 ms", "none: 0.0 ms"), id="milliseconds"),
        pytest.param(0.4, ("slow: 1,300.0 ms", "none: 0.0 ms"), id="many-milliseconds"),
    ],
)
def test_titles_tell_how_long_it_took(
    tmp_path: Path, factor: float, titles: tuple[str, str]
) -> None:
    """In the unit of the scale. The SVG writer leaves every text in a comment."""
    events = tuple(Event(e.step, e.start_s * factor, e.end_s * factor) for e in RESTORE.events)
    draw([("slow", Timeline(events)), ("none", EMPTY)], tmp_path / "restore.svg")
    text = (tmp_path / "restore.svg").read_text()
    for comment in (*titles, *LANES, *COLOURS, titles[0].split()[-1]):
        assert f"<!-- {comment} -->" in text


@pytest.mark.parametrize(
    "timelines",
    [
        pytest.param([], id="no-timeline"),
        pytest.param([("none", EMPTY)], id="empty"),
        pytest.param([("none", EMPTY), ("nothing", EMPTY)], id="all-empty"),
    ],
)
def test_nothing_cannot_be_drawn(tmp_path: Path, timelines: list[tuple[str, Timeline]]) -> None:
    """And no file is left behind."""
    with pytest.raises(ValueError, match="nothing to draw"):
        draw(timelines, tmp_path / "restore.png")
    assert list(tmp_path.iterdir()) == []


def test_drawing_without_matplotlib_is_an_import_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And writes nothing. Everything else works without it."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="matplotlib"):
        drawn(tmp_path / "restore.png", RESTORE)
    assert list(tmp_path.iterdir()) == []
