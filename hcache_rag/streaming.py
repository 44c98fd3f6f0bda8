"""`GenerationStream`: an answer piece by piece, computed on a thread of its own."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextvars import copy_context
from functools import partial

from hcache_rag.line import Line, Place
from hcache_rag.openmp import give_back_threads
from hcache_rag.provenance import Generation

Run = Callable[[Callable[[str], None], threading.Event, Callable[[], None]], Generation]
"""Computes an answer: takes what is called with each piece of text, what ends it when set, and what
ends its turn, before the answer is told to others who may want one."""


class Computation:
    """An answer that a thread computes once its turn has come.

    It knows nothing of who reads it, so that a reader that is dropped is collected.

    Args:
        run: computes the answer.
        put: called with each piece of text, and at the end with None or the error, on that thread.
        line, limit: where it waits for its turn; without a line it has it at once.
    """

    def __init__(
        self,
        run: Run,
        put: Callable[[str | BaseException | None], None],
        line: Line | None = None,
        limit: int = 1,
    ) -> None:
        self._run = run
        self._put = put
        self._cancelled = threading.Event()
        self._context = copy_context()
        self._place = Place(line if line is not None else Line(), limit, self._start)
        self._thread: threading.Thread | None = None
        self.has_begun = False
        self.result: Generation | None = None

    def begin(self) -> None:
        """Stand in the line; once."""
        self.has_begun = True
        self._place.join()

    def cancel(self) -> None:
        """End after the token that is being computed."""
        self._cancelled.set()

    def stop(self) -> bool:
        """Cancel, and wait for no turn any more; whether an end is still to be put."""
        self.cancel()
        return self.has_begun and not self._place.give_up()

    def join(self) -> None:
        """Wait for the thread, when the end was put."""
        if self._thread is not None and self._thread.ident is not None:
            self._thread.join()

    def _start(self) -> None:
        if self._cancelled.is_set():
            return self._end(None)
        work = partial(self._context.run, self._compute)
        self._thread = threading.Thread(target=work, name="hcache-generate", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:  # no more threads
            self._end(error)

    def _compute(self) -> None:
        end: BaseException | None = None
        try:
            self.result = self._run(self._put, self._cancelled, self._place.leave)
        except BaseException as error:
            end = error
        self._end(end)

    def _end(self, end: BaseException | None) -> None:
        self._place.leave()
        self._put(end)


class GenerationStream(Iterator[str]):
    """An answer on its way: an iterator of pieces of text.

    Generation runs on a thread of its own, from the first `next` on, when its turn has come. Its
    error is raised by the iterator. `close`, or leaving a `with` block, stops the computation after
    the token that is being computed and waits for the thread. The thread that makes the stream and
    the one that waits for a piece give their OpenMP threads back, so that generation has the
    processors.

    Args: see `Computation`.
    """

    def __init__(
        self,
        run: Run,
        line: Line | None = None,
        limit: int = 1,
    ) -> None:
        self._items: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()
        self._computation = Computation(run, self._items.put, line, limit)
        self._finished = False
        give_back_threads()

    @property
    def result(self) -> Generation:
        """The finished answer.

        Raises:
            RuntimeError: the stream has not ended yet.
        """
        if self._computation.result is None:
            raise RuntimeError("the stream has not been read to its end")
        return self._computation.result

    def __next__(self) -> str:
        if self._finished:
            raise StopIteration
        give_back_threads()
        if not self._computation.has_begun:
            self._computation.begin()
        item = self._items.get()
        if isinstance(item, str):
            return item
        self._finished = True
        self._computation.join()
        if item is not None:
            raise item
        raise StopIteration

    def read(self) -> Generation:
        """Read the stream to its end and return the finished answer."""
        for _ in self:
            pass
        return self.result

    def close(self) -> None:
        """Stop generating and wait until the thread has ended."""
        if self._finished:
            return
        self._finished = True
        if self._computation.stop():
            while isinstance(self._items.get(), str):
                pass
            self._computation.join()

    def __enter__(self) -> GenerationStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self._computation.cancel()  # it must take no lock: a collection may come at any time
