"""The line in front of the model: first come, first served, so many at once."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest

from hcache_rag.line import Line, Place
from hcache_rag.provenance import Generation, Provenance
from hcache_rag.streaming import GenerationStream

JOIN_S = 60
ANSWER = Generation("text", (1,), "stop", Provenance(1, 0, 0, 1))


def places(line: Line, limits: list[int], came: list[int]) -> list[Place]:
    """Places in a line, each of which says when its turn has come."""
    made = [
        Place(line, limit, lambda n=n: came.append(n))  # type: ignore[misc]
        for n, limit in enumerate(limits)
    ]
    for place in made:
        place.join()
    return made


def test_turns_come_in_the_order_of_joining() -> None:
    came: list[int] = []
    its = places(Line(), [1] * 5, came)
    for number, place in enumerate(its):
        assert came == list(range(number + 1))
        place.leave()
        place.leave()  # once is enough, and twice does no harm
    assert came == [0, 1, 2, 3, 4]


def test_so_many_are_inside_at_once() -> None:
    came: list[int] = []
    its = places(Line(), [2] * 4, came)
    assert came == [0, 1]
    its[1].leave()
    assert came == [0, 1, 2]
    its[0].leave()
    assert came == [0, 1, 2, 3]


def test_nobody_overtakes_who_waits_for_more_room() -> None:
    came: list[int] = []
    its = places(Line(), [3, 1, 3], came)
    assert came == [0]
    its[0].leave()
    assert came == [0, 1, 2]


def test_who_gives_up_is_skipped_and_who_is_inside_stays() -> None:
    came: list[int] = []
    its = places(Line(), [1] * 4, came)
    assert not its[0].give_up()
    assert its[1].give_up()
    its[2].leave()  # without having been inside
    its[0].leave()
    assert came == [0, 3]


def test_giving_up_makes_way_for_those_behind() -> None:
    came: list[int] = []
    its = places(Line(), [2, 1, 2], came)
    assert came == [0]
    assert its[1].give_up()
    assert came == [0, 2]


def test_a_long_line_of_those_who_leave_at_once_is_no_recursion() -> None:
    line, left = Line(), []
    first = Place(line, 1, lambda: None)
    first.join()
    made: list[Place] = []

    def leave(number: int) -> None:
        left.append(number)
        made[number].leave()

    for number in range(5000):
        made.append(Place(line, 1, lambda n=number: leave(n)))  # type: ignore[misc]
        made[-1].join()
    first.leave()
    assert left == list(range(5000))


@pytest.mark.parametrize("limit", [1, 3])
def test_many_threads_are_never_too_many_at_once(limit: int) -> None:
    line, lock, draw = Line(), threading.Lock(), random.Random(0)
    inside, most, done = 0, 0, 0

    def come_and_go(rounds: int) -> None:
        nonlocal inside, most, done
        for _ in range(rounds):
            with line.turn(limit):
                with lock:
                    inside += 1
                    most = max(most, inside)
                with lock:
                    inside -= 1
                    done += 1

    threads = [threading.Thread(target=come_and_go, args=(50,)) for _ in range(8)]
    draw.shuffle(threads)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(JOIN_S)
        assert not thread.is_alive()
    assert done == 400
    assert most <= limit


def test_a_fork_finds_nobody_inside() -> None:
    line = Line()
    with line.turn(1):
        child = os.fork()
        if child == 0:
            came: list[int] = []
            places(line, [1], came)
            os._exit(0 if came == [0] else 1)
        assert os.waitpid(child, 0)[1] == 0


# --- streams in a line ----------------------------------------------------------------------------


def test_streams_compute_in_the_order_in_which_they_were_begun() -> None:
    line, began, may_end = Line(), list[int](), threading.Event()

    def run_of(number: int) -> Any:
        def run(on_text: Any, *_: Any) -> Generation:
            began.append(number)
            on_text("text")
            assert may_end.wait(JOIN_S)
            return ANSWER

        return run

    streams = [GenerationStream(run_of(number), line) for number in range(6)]
    order = [3, 0, 5, 1]
    assert next(streams[3]) == "text"
    readers = []
    for number in order[1:]:
        before = len(line._waiting)
        readers.append(threading.Thread(target=streams[number].read))
        readers[-1].start()
        while len(line._waiting) == before:
            pass
    may_end.set()
    streams[3].read()
    for reader in readers:
        reader.join(JOIN_S)
        assert not reader.is_alive()
    assert began == order


def test_a_stream_that_is_closed_in_the_line_computes_nothing() -> None:
    line, began = Line(), list[int]()

    def run(*_: Any) -> Generation:
        began.append(1)
        return ANSWER

    with line.turn(1):
        stream = GenerationStream(run, line)
        stream._computation.begin()
        stream.close()
        dropped = GenerationStream(run, line)
        dropped._computation.begin()
        del dropped
    assert began == []
    assert GenerationStream(run, line).read() is ANSWER


def test_a_turn_may_end_before_its_computation() -> None:
    """So that who is told of the answer can ask again."""
    line, again = Line(), list[Generation]()

    def run(_on_text: Any, _cancelled: Any, end_turn: Callable[[], None]) -> Generation:
        end_turn()
        with line.turn(1):
            again.append(ANSWER)
        return ANSWER

    assert GenerationStream(run, line, 1).read() is ANSWER
    assert again == [ANSWER]


def test_a_thread_that_cannot_be_started_is_an_error_of_the_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    line = Line()

    def refuse(_self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start"):
            GenerationStream(lambda *_: ANSWER, line).read()
    assert GenerationStream(lambda *_: ANSWER, line).read() is ANSWER
