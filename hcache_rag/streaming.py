"""`GenerationStream`: an answer piece by piece, computed on a thread of its own."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextvars import copy_context
from functools import partial

from hcache_rag.openmp import give_back_threads
from hcache_rag.provenance import Generation


class GenerationStream(Iterator[str]):
    """An answer on its way: an iterator of pieces of text.

    Generation runs on a thread of its own, from the first `next` on. Its error is raised by the
    iterator. `close`, or leaving a `with` block, stops the computation after the token that is
    being computed and waits for the thread. The thread that makes the stream and the one that
    waits for a piece give their OpenMP threads back, so that generation has the processors.
    """

    def __init__(self, run: Callable[[Callable[[str], None], threading.Event], Generation]) -> None:
        self._answer = _Answer(run)
        self._thread: threading.Thread | None = None
        self._finished = False
        give_back_threads()

    @property
    def result(self) -> Generation:
        """The finished answer.

        Raises:
            RuntimeError: the stream has not ended yet.
        """
        if self._answer.result is None:
            raise RuntimeError("the stream has not been read to its end")
        return self._answer.result

    def __next__(self) -> str:
        if self._finished:
            raise StopIteration
        give_back_threads()
        if self._thread is None:
            work = partial(copy_context().run, self._answer.compute)
            self._thread = threading.Thread(target=work, name="hcache-generate", daemon=True)
            self._thread.start()
        item = self._answer.items.get()
        if isinstance(item, str):
            return item
        self.close()
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
        self._finished = True
        self._answer.cancelled.set()
        if self._thread is not None and self._thread.is_alive():
            self._thread.join()

    def __enter__(self) -> GenerationStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self._answer.cancelled.set()


class _Answer:
    """The thread's side. It knows nothing of the stream, so that a dropped stream is collected."""

    def __init__(self, run: Callable[[Callable[[str], None], threading.Event], Generation]) -> None:
        self._run = run
        self.items: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()
        self.cancelled = threading.Event()
        self.result: Generation | None = None

    def compute(self) -> None:
        end: BaseException | None = None
        try:
            self.result = self._run(self.items.put, self.cancelled)
        except BaseException as error:
            end = error
        self.items.put(end)
