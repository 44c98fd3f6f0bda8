"""What the pipeline needs of a device. Knows neither tensors' meaning nor layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor


class Event(Protocol):
    """A point in a stream's work."""

    def wait(self) -> None:
        """Make the calling thread wait until the stream has come there."""


class Stream(Protocol):
    """A queue of work that runs in order, some time after it was launched."""

    def wait_event(self, event: Event) -> None:
        """Run what is launched from now on after `event`. Does not wait itself."""


class Device(Protocol):
    """Memory, streams and work.

    What work reads and writes is said beside it. Real devices do not look at that; the simulated
    one finds every pair of accesses that nothing puts in order.
    """

    def current_stream(self) -> Stream:
        """The stream of the calling thread, on which the model runs."""

    def new_stream(self, name: str) -> Stream:
        """Another stream."""

    def pinned_memory(self, num_bytes: int) -> Tensor:
        """Host memory (num_bytes,) uint8 that the device copies from by itself."""

    def memory(self, num_bytes: int) -> Tensor:
        """Device memory (num_bytes,) uint8; its first user must follow the current stream."""

    def free(self, memory: Tensor) -> None:
        """Give memory back: to the host at once, or to what the current stream is given next."""

    def launch(
        self,
        stream: Stream,
        work: Callable[[], object],
        *,
        reads: Sequence[Tensor],
        writes: Sequence[Tensor],
        name: str,
    ) -> None:
        """Queue work. Does not wait for it."""

    def on_host(
        self,
        work: Callable[[], object],
        *,
        reads: Sequence[Tensor],
        writes: Sequence[Tensor],
        name: str,
    ) -> None:
        """Do work on the calling thread, with memory that streams use as well."""

    def record(self, stream: Stream) -> Event:
        """The point behind what a stream was given so far."""
