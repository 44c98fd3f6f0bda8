"""The CPU as a device with streams: a thread for each of them, for real concurrency without a GPU.

Work on the current stream runs at once, on the thread that launches it.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hcache_rag.device.protocol import Event, Stream

WAIT_S = 60.0
"""Whoever waits longer for another stream waits in vain."""


class _Point:
    """An event; it carries what went wrong in front of it."""

    def __init__(self) -> None:
        self._reached = threading.Event()
        self._error: BaseException | None = None

    def reach(self, error: BaseException | None) -> None:
        self._error = error
        self._reached.set()

    def wait(self) -> None:
        """See `Event`.

        Raises:
            BaseException: what work in front of it raised.
            TimeoutError: it is not reached.
        """
        if not self._reached.wait(WAIT_S):
            raise TimeoutError(f"a stream has stood still for {WAIT_S} s")
        if self._error is not None:
            raise self._error


class _ThreadStream:
    def __init__(self, name: str) -> None:
        self._work: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=f"hcache-{name}", daemon=True)
        self._thread.start()

    def put(self, work: Callable[[], object]) -> None:
        self._work.put(work)

    def wait_event(self, event: Event) -> None:
        """See `Stream`."""
        self.put(event.wait)

    def record(self) -> Event:
        point = _Point()
        self._work.put(lambda: point.reach(self._error))
        return point

    def close(self) -> None:
        self._work.put(None)
        self._thread.join(WAIT_S)

    @torch.no_grad()
    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            try:
                work()
            except BaseException as error:
                self._error = self._error or error


class _Current:
    """The caller's own stream: it has done what it was given."""

    def wait_event(self, event: Event) -> None:
        """See `Stream`."""
        event.wait()


class ThreadDevice:
    """The CPU, see `hcache_rag.device.Device`. A context manager: leaving it ends the threads."""

    def __init__(self) -> None:
        self._streams: list[_ThreadStream] = []

    def __enter__(self) -> ThreadDevice:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in self._streams:
            stream.close()

    def current_stream(self) -> Stream:
        """See `Device`."""
        return _Current()

    def new_stream(self, name: str) -> Stream:
        """See `Device`."""
        stream = _ThreadStream(name)
        self._streams.append(stream)
        return stream

    def pinned_memory(self, num_bytes: int) -> Tensor:
        """See `Device`; it is memory like any other."""
        return torch.empty(num_bytes, dtype=torch.uint8)

    def memory(self, num_bytes: int) -> Tensor:
        """See `Device`."""
        return torch.empty(num_bytes, dtype=torch.uint8)

    def free(self, memory: Tensor) -> None:
        """See `Device`."""

    def launch(
        self,
        stream: Stream,
        work: Callable[[], object],
        *,
        reads: Sequence[Tensor],
        writes: Sequence[Tensor],
        name: str,
    ) -> None:
        """See `Device`."""
        if isinstance(stream, _ThreadStream):
            stream.put(work)
        else:
            work()

    def on_host(
        self,
        work: Callable[[], object],
        *,
        reads: Sequence[Tensor],
        writes: Sequence[Tensor],
        name: str,
    ) -> None:
        """See `Device`."""
        work()

    def record(self, stream: Stream) -> Event:
        """See `Device`."""
        if isinstance(stream, _ThreadStream):
            return stream.record()
        point = _Point()
        point.reach(None)
        return point
