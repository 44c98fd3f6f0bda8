"""A GPU, by torch's streams, events and pinned memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hcache_rag.device.protocol import Event, Stream


class _CudaEvent:
    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.point = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self.point.record(stream)

    def wait(self) -> None:
        """See `Event`; other threads of the interpreter go on meanwhile."""
        self.point.synchronize()


class _CudaStream:
    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.queue = stream

    def wait_event(self, event: Event) -> None:
        """See `Stream`."""
        assert isinstance(event, _CudaEvent)
        self.queue.wait_event(event.point)


class CudaDevice:
    """One CUDA device, see `hcache_rag.device.Device`."""

    def __init__(self, place: torch.device) -> None:
        self._place = place

    def current_stream(self) -> Stream:
        """See `Device`."""
        return _CudaStream(torch.cuda.current_stream(self._place))

    def new_stream(self, name: str) -> Stream:
        """See `Device`."""
        return _CudaStream(torch.cuda.Stream(self._place))  # type: ignore[no-untyped-call]

    def pinned_memory(self, num_bytes: int) -> Tensor:
        """See `Device`."""
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def memory(self, num_bytes: int) -> Tensor:
        """See `Device`."""
        return torch.empty(num_bytes, dtype=torch.uint8, device=self._place)

    def free(self, memory: Tensor) -> None:
        """See `Device`; torch's allocators take it when the last reference goes."""

    def launch(
        self,
        stream: Stream,
        work: Callable[[], object],
        *,
        reads: Sequence[Tensor],
        writes: Sequence[Tensor],
        name: str,
    ) -> None:
        """See `Device`; profilers show the name."""
        assert isinstance(stream, _CudaStream)
        with torch.cuda.stream(stream.queue), torch.profiler.record_function(name):
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
        assert isinstance(stream, _CudaStream)
        return _CudaEvent(stream.queue)
