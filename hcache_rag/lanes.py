"""A lane: a queue of steps that runs in order on its own thread. Knows not what a step does."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Cancelled(Exception):  # noqa: N818 - not an error: the answer to `ReadingLane.close`
    """The lane was closed while somebody waited for one of its steps."""


class ReadingLane:
    """Runs `step(0)`, `step(1)`, ... ahead of its consumer, `depth` steps at most.

    Used as a context manager; leaving it stops the thread and joins it, whatever happened.

    Args:
        step: called on the lane's thread with each index.
        num_steps: how many steps there are.
        depth: how many finished steps may wait for the consumer: the slots of a staging ring.
    """

    def __init__(self, step: Callable[[int], None], num_steps: int, depth: int) -> None:
        if depth < 1:
            raise ValueError(f"depth must be positive, not {depth}")
        self._step = step
        self._num_steps = num_steps
        self._depth = depth
        self._done = 0
        self._released = 0
        self._closed = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="hcache-reading", daemon=True)

    def start(self) -> None:
        """Start the lane's thread."""
        self._thread.start()

    def wait(self, index: int) -> None:
        """Wait until step `index` is done.

        Raises:
            BaseException: what the step, or one before it, raised.
            Cancelled: the lane was closed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._done > index or self._error or self._closed)
            if self._done > index:
                return
            raise self._error or Cancelled()

    def release(self, index: int) -> None:
        """Say that step `index`'s result has been used, so that its slot may be written again."""
        with self._changed:
            self._released = max(self._released, index + 1)
            self._changed.notify_all()

    def close(self) -> None:
        """Stop after the running step and wait for the thread to end."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def __enter__(self) -> ReadingLane:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        for index in range(self._num_steps):
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._has_room(index))  # noqa: B023
                if self._closed:
                    return
            try:
                self._step(index)
            except BaseException as error:
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                return
            with self._changed:
                self._done = index + 1
                self._changed.notify_all()

    def _has_room(self, index: int) -> bool:
        return index < self._released + self._depth
