"""A ring of slots that pieces pass through: pinned memory on the host, and as much on the device.

It outlives requests, because pinning memory takes longer than filling it. It belongs to one
request at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle

from torch import Tensor

from hcache_rag.device.protocol import Device, Event

SLOTS = 4
"""Pieces under way at once: one that is filled, one copied, one projected, and one in between."""


@dataclass(slots=True)
class Slot:
    """Memory of one piece.

    Args:
        pinned, memory: on the host and on the device, uint8.
        copied: the last copy out of `pinned` has ended.
        used: the last work on `memory` has ended.
    """

    pinned: Tensor
    memory: Tensor
    copied: Event | None = None
    used: Event | None = None


class Ring:
    """Slots in turn, and the two streams that work on them.

    Args:
        device: whose memory it is.
        num_slots: how many pieces are under way at once.
    """

    def __init__(self, device: Device, num_slots: int = SLOTS) -> None:
        self.device = device
        self.num_slots = num_slots
        self.copying = device.new_stream("copying")
        self.projecting = device.new_stream("projecting")
        self._slots: list[Slot] = []
        self._turn: Iterator[Slot] = iter(())

    def fit(self, num_bytes: int) -> None:
        """Make every slot hold `num_bytes`; only between requests, on the model's thread."""
        if self._slots and len(self._slots[0].pinned) >= num_bytes:
            return
        for slot in self._slots:
            if slot.copied is not None:
                slot.copied.wait()
            self.device.free(slot.pinned)
            self.device.free(slot.memory)
        self._slots = [
            Slot(self.device.pinned_memory(num_bytes), self.device.memory(num_bytes))
            for _ in range(self.num_slots)
        ]
        self._turn = cycle(self._slots)

    def settle(self, copied: Event, used: Event) -> None:
        """A request has ended, perhaps in the middle of a slot, with these as its last events."""
        for slot in self._slots:
            slot.copied, slot.used = copied, used

    def next(self) -> Slot:
        """The slot whose turn it is; what it held may still be under way."""
        return next(self._turn)
