"""Devices that work in streams: queues of work that run in order, and beside each other.

The pipeline that restores on them (`hcache_rag.pipeline`) knows only the protocol:

    CudaDevice        a GPU: torch's streams and events, pinned memory
    ThreadDevice      the CPU, a thread for each stream
    SimulatedDevice   no device: work runs late, in random legal order, and races are found
"""

from __future__ import annotations

import torch

from hcache_rag.device.protocol import Device, Event, Stream

__all__ = ["DEVICES", "Device", "Event", "Stream", "device_of", "synchronise"]

DEVICES = ("cpu", "cuda")
"""Kinds of devices, as torch calls them, that states can be restored on."""


def device_of(place: torch.device) -> Device | None:
    """The device to restore on for a model at `place`.

    None on the CPU: there the forward pass restores each layer itself, straight from the store's
    map, without the copies that streams need.

    Raises:
        ValueError: a kind of device that nobody has made work.
    """
    if place.type == "cpu":
        return None
    if place.type == "cuda":
        from hcache_rag.device.cuda import CudaDevice

        return CudaDevice(place)
    raise ValueError(f"states are restored on {' and '.join(DEVICES)}, not on {place}")


def synchronise(place: torch.device) -> None:
    """Wait until everything at `place` is done. For timing; nothing in a request calls it."""
    if place.type == "cuda":
        torch.cuda.synchronize(place)
