"""The last states of a long path as one: each costs time when it is restored."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hcache_rag import codec
from hcache_rag.executor import ValueReader
from hcache_rag.models import CapturedLayer
from hcache_rag.spec import ModelSpec
from hcache_rag.staging import chunk_tensors
from hcache_rag.state import StateRecord

MAX_STEPS = 8
"""A path of so many states is not made longer, but its last ones are joined."""


def last_ones(
    path: Sequence[StateRecord], new_tokens: int, *, is_approximate: bool
) -> list[StateRecord]:
    """The last states of a path that are kept with the next one as one.

    None of them is larger than all behind it, so that they grow, and a token is written some
    `log(tokens)` times in all. What is approximate and what is not stay apart.

    Args:
        new_tokens, is_approximate: of the next one.
    """
    joined: list[StateRecord] = []
    if len(path) < MAX_STEPS:
        return joined
    for record in reversed(path):
        if record.num_tokens > new_tokens or record.is_approximate != is_approximate:
            break
        joined.insert(0, record)
        new_tokens += record.num_tokens
    return joined


def in_front(
    reader: ValueReader,
    records: Sequence[StateRecord],
    captured: Sequence[CapturedLayer],
    spec: ModelSpec,
) -> list[CapturedLayer]:
    """Captured layers with the stored K and V of some states in front of them, to the bit.

    Raises:
        StateError: one of them cannot be read.
    """
    layers = []
    for layer, caught in enumerate(captured):
        sides: tuple[list[Tensor], list[Tensor]] = ([], [])
        for record in records:
            step, fmt = record.layout.chunk_tokens, record.layout.layers[layer]
            for chunk in range(record.layout.num_chunks(record.num_tokens)):
                tokens = min(step, record.num_tokens - chunk * step)
                value = reader.value(record.key, layer, chunk)
                shape = codec.ChunkShape(fmt, tokens, spec)
                arrays = codec.decode(shape, record.key, layer, chunk, value)
                for side, stored in zip(sides, chunk_tensors(fmt, arrays, tokens), strict=True):
                    side.append(stored.transpose(0, 1).flatten(1).unsqueeze(0))
        ends = (caught.first, caught.second)
        layers.append(
            CapturedLayer(
                *(
                    torch.cat([*(part.to(end.device) for part in side), end], 1)
                    for side, end in zip(sides, ends, strict=True)
                    if end is not None
                )
            )
        )
    return layers
