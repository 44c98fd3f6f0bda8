"""Memory of one request, reused by the next: fresh memory is ten times as slow as used memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hcache_rag.device import Device, device_of
from hcache_rag.device.ring import Ring
from hcache_rag.forks import ForkedLock
from hcache_rag.models import ModelAdapter

_BLOCK_TOKENS = 256


class Buffers:
    """K and V of all layers for one request, and scratch memory for one piece of a layer.

    Args:
        capacity_tokens: slots per layer.
        device: what restores on streams of its own need; None where they have none.
    """

    def __init__(
        self, adapter: ModelAdapter, capacity_tokens: int, device: Device | None = None
    ) -> None:
        spec = adapter.spec
        self.capacity_tokens = capacity_tokens
        shape = (spec.num_layers, 1, spec.num_kv_heads, capacity_tokens)
        options: Any = {"dtype": adapter.dtype, "device": adapter.device}
        self.keys = torch.empty((*shape, spec.head_dim), **options)
        self.values = torch.empty((*shape, spec.value_dim or spec.head_dim), **options)
        self.ring = Ring(device) if device is not None else None
        self._scratch: dict[str, Tensor] = {}

    @property
    def sides(self) -> tuple[Tensor, Tensor]:
        """K and V."""
        return self.keys, self.values

    def scratch(self, name: str, *shape: int) -> Tensor:
        """Memory for a tensor of the model's dtype; its content lasts until `name` is asked again.

        Grows to the largest size that was asked for, and keeps it.
        """
        size = 1
        for length in shape:
            size *= length
        held = self._scratch.get(name)
        if held is None or held.numel() < size:
            held = torch.empty(size, dtype=self.keys.dtype, device=self.keys.device)
            self._scratch[name] = held
        return held[:size].view(shape)


class BufferPool:
    """Keeps the buffers of finished requests for the next ones. Thread-safe.

    Args:
        device: what the model's device restores on, by default what `device_of` says.
    """

    def __init__(self, adapter: ModelAdapter, device: Device | None = None) -> None:
        self._adapter = adapter
        self._device = device or device_of(adapter.device)
        self._free: list[Buffers] = []
        self._lock = ForkedLock()

    @contextmanager
    def borrow(self, tokens: int) -> Iterator[Buffers]:
        """Buffers of at least `tokens` slots, for the length of the block."""
        with self._lock:
            fitting = [b for b in self._free if b.capacity_tokens >= tokens]
            buffers = min(fitting, key=lambda b: b.capacity_tokens) if fitting else None
            if buffers is not None:
                self._free.remove(buffers)
            else:
                self._free.clear()  # what is too small now will be too small again
        if buffers is None:
            capacity_tokens = -(-tokens // _BLOCK_TOKENS) * _BLOCK_TOKENS
            buffers = Buffers(self._adapter, capacity_tokens, self._device)
        try:
            yield buffers
        finally:
            with self._lock:
                self._free.append(buffers)
