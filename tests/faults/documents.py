"""Documents whose every byte follows from their keys."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import xxhash

from hcache_rag import codec
from hcache_rag.layout import LayerFormat, Representation, StateLayout
from hcache_rag.spec import ModelSpec
from hcache_rag.state import StateKey, StateRecord, child_key, root_key, token_array
from hcache_rag.store import NewState, StateStore

SPEC = ModelSpec("toy", "llama", 3, 32, 4, 2, 8, 4096, "float32")
ROOT = root_key("model", "tokenizer")
KV, HIDDEN, NONE = Representation.KV, Representation.HIDDEN, Representation.NONE
LAYOUTS = tuple(
    tuple(LayerFormat(*fmt) for fmt in layers)
    for layers in (
        ((KV, "float32"), (KV, "float32"), (KV, "int8")),
        ((HIDDEN, "int8-smooth"), (HIDDEN, "bfloat16"), (HIDDEN, "float32")),
        ((NONE, ""), (HIDDEN, "int8-g64"), (KV, "float16")),
    )
)
COMMON_HEAD = "file_path: /home/a/größe/🙂.md " * 20
"""More than what stands of a text in a key."""


def text_of(number: int) -> str:
    """Short ones, which stand in lines of their own; long ones that begin alike; others."""
    kind, words = number % 5, " ".join(f"w{number * i % 97}" for i in range(1, 40))
    if kind == 0:
        return f"note {number}"
    return f"{COMMON_HEAD}{number} {words}" if kind == 1 else f"document {number}: {words}"


def a_record(
    number: int,
    *,
    tokens: int = 40,
    layout: int | None = None,
    version: int = 0,
    chunk_tokens: int = 16,
) -> StateRecord:
    """The record of a document; each number, and each length, is another one."""
    ids = token_array([number, *range(tokens - 1)])
    kept = StateLayout(LAYOUTS[number % 3 if layout is None else layout], chunk_tokens)
    key = child_key(ROOT, ids)
    return StateRecord(key, ROOT, ROOT, ids, text_of(number), kept, float(version))


def places(record: StateRecord) -> Iterator[tuple[int, int, codec.ChunkShape]]:
    """Layer, chunk and shape of all values of a state."""
    step = record.layout.chunk_tokens
    for layer, fmt in enumerate(record.layout.layers):
        for chunk in range(record.layout.num_chunks(record.num_tokens)) if fmt.dtype else ():
            tokens = min(step, record.num_tokens - chunk * step)
            yield layer, chunk, codec.ChunkShape(fmt, tokens, SPEC)


@lru_cache(maxsize=8192)
def content(
    key: StateKey, version: float, layer: int, chunk: int, shape: codec.ChunkShape
) -> tuple[codec.Words, ...]:
    """What a chunk holds: bytes that follow from its state and its place."""
    place = key + struct.pack("<dHI", version, layer, chunk)
    source = np.random.Generator(np.random.SFC64(xxhash.xxh3_64_intdigest(place)))
    return shape.arrays(bytearray(source.bytes(shape.payload_bytes)))


def is_content(
    record: StateRecord, layer: int, chunk: int, shape: codec.ChunkShape, value: memoryview
) -> bool:
    """Whether a stored value, which is verified, is what was stored."""
    arrays = codec.decode(shape, record.key, layer, chunk, value)
    expected = content(record.key, record.created_s, layer, chunk, shape)
    return all(a.tobytes() == b.tobytes() for a, b in zip(arrays, expected, strict=True))


def a_state(record: StateRecord, owners: Sequence[str] = ()) -> NewState:
    """A record with its values."""
    key, version = record.key, record.created_s
    values = [
        (la, ch, codec.encode(shape, key, la, ch, content(key, version, la, ch, shape)))
        for la, ch, shape in places(record)
    ]
    return NewState(record, values, owners=owners)


def is_whole(store: StateStore, record: StateRecord) -> bool:
    """Whether a state is there as it was stored."""
    found = store.record(record.key)
    if found is None or found.to_bytes() != record.to_bytes():
        return False
    with store.reading() as reader:
        return all(
            is_content(record, la, ch, shape, reader.value(record.key, la, ch))
            for la, ch, shape in places(record)
        )


@dataclass(frozen=True)
class Known:
    """What may be in a store, and what must be.

    Args:
        texts: by key.
        records: every record that was ever stored, as bytes.
        expected: the keys that must be there.
        is_all: no other records may be there.
    """

    texts: dict[StateKey, str]
    records: set[bytes]
    expected: set[StateKey]
    is_all: bool = True

    @classmethod
    def of(
        cls,
        records: Iterable[StateRecord],
        without: Iterable[StateRecord] = (),
        *,
        is_all: bool = True,
    ) -> Known:
        """All of these, of which some need not be there."""
        every, absent = list(records), {record.key for record in without}
        texts = {record.key: record.text for record in every}
        return cls(texts, {record.to_bytes() for record in every}, set(texts) - absent, is_all)

    def may_be(self, record: StateRecord) -> bool:
        """Whether a record is one that was stored."""
        is_other = record.key not in self.texts and not self.is_all
        return is_other or record.to_bytes() in self.records
