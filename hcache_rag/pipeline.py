"""Restores pieces on a device, beside the model: pinned memory, a copying and a projecting stream.

    reading thread   fill a slot's pinned memory from the store's map
    copying stream   copy it to the slot's memory on the device
    projecting       turn that into K and V in their slots of the cache
    model's stream   go on behind it, when the forward pass comes to the layer

Everything behind the first line is only launched, and put in order by events: the device is given
a piece as soon as its bytes are there, and no thread waits for it, except the reading one for a
copy that is a whole ring behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from hcache_rag.device import Event
from hcache_rag.device.ring import Ring
from hcache_rag.schedule import Piece
from hcache_rag.spec import ModelSpec
from hcache_rag.staging import Chunk, PieceMemory, StagedPiece


class Pipeline:
    """One request's pieces on their way through a ring.

    Args:
        ring: whose slots and streams are used.
        spec: the model's numbers.
    """

    def __init__(self, ring: Ring, spec: ModelSpec) -> None:
        self._ring = ring
        self._device = ring.device
        self._spec = spec

    @contextmanager
    def running(self, pieces: Iterable[Piece]) -> Iterator[None]:
        """Enter on the model's thread before any of `pieces` is submitted.

        What the model's stream was given before comes before; what it is given after the block
        comes after everything that was submitted, so that memory may be used again, or freed.
        """
        sizes = [PieceMemory(self._spec, piece).num_bytes for piece in pieces]
        ring, device = self._ring, self._device
        ring.fit(max(sizes, default=0))
        model = device.current_stream()
        ring.copying.wait_event(device.record(model))  # projecting always comes behind a copy
        try:
            yield
        finally:
            copied, used = device.record(ring.copying), device.record(ring.projecting)
            model.wait_event(copied)
            model.wait_event(used)
            ring.settle(copied, used)

    def submit(
        self,
        piece: Piece,
        chunks: Sequence[Chunk],
        restore: Callable[[StagedPiece], None],
        writes: Sequence[Tensor],
    ) -> Event:
        """Send a piece on its way; called by the reading thread, piece after piece.

        Args:
            piece: which it is.
            chunks: its chunks on the host; they are not used after the call.
            restore: turns the piece's arrays on the device into K and V; runs when work is
                launched, inside the projecting stream.
            writes: what `restore` writes.

        Returns:
            The point behind which K and V are there, see `join`.
        """
        device, ring = self._device, self._ring
        place, slot = PieceMemory(self._spec, piece), ring.next()
        pinned, memory = slot.pinned[: place.num_bytes], slot.memory[: place.num_bytes]
        if slot.copied is not None:
            slot.copied.wait()
        device.on_host(
            lambda: place.fill(pinned, chunks), reads=[], writes=[pinned], name="hcache fill"
        )
        if slot.used is not None:
            ring.copying.wait_event(slot.used)
        device.launch(
            ring.copying,
            lambda: memory.copy_(pinned, non_blocking=True),
            reads=[pinned],
            writes=[memory],
            name="hcache copy",
        )
        slot.copied = device.record(ring.copying)
        ring.projecting.wait_event(slot.copied)
        device.launch(
            ring.projecting,
            lambda: restore(place.views(memory)),
            reads=[memory],
            writes=writes,
            name="hcache restore",
        )
        slot.used = device.record(ring.projecting)
        return slot.used

    def join(self, restored: Event) -> None:
        """Let the model's stream go on behind a piece; called by the model's thread."""
        self._device.current_stream().wait_event(restored)
