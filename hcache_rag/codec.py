"""One chunk of one layer to bytes and back. Knows neither where bytes go nor what they mean.

A value is a 48-byte header and a payload:

    magic "HCS1" | version u16 | representation u8 | dtype u8 | layer u16 | tokens u16 |
    chunk u32 | heads u32 | width u32 | payload bytes u64 | xxh3_64 u64 | zeros

little-endian. The payload of `kv` is K then V, each (G, t, D); of `hidden`, the rows (t, E) and
then their float32 row scales (t,). The checksum covers the state's key, the header and the
payload, so that a value that is whole but in the wrong place is found out too. LMDB 0.9 places
large values 16 bytes into a page: after the header the payload starts on a 64-byte boundary.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from hcache_rag.errors import DamagedStateError
from hcache_rag.layout import ROW_SCALE_BYTES, LayerFormat, Representation
from hcache_rag.spec import DTYPE_BYTES, ModelSpec
from hcache_rag.state import FORMAT_VERSION, StateKey

HEADER_BYTES = 48
_MAGIC = b"HCS1"
_FIELDS = struct.Struct("<4sHBBHHIIIQ")
_CHECKSUM = struct.Struct("<Q")
_REPRESENTATION_CODE = {Representation.HIDDEN: 1, Representation.KV: 2}
_DTYPE_CODE = {"float32": 1, "bfloat16": 2, "float16": 3}

Words = npt.NDArray[Any]
"""Bit patterns of the elements: uint32 or uint16, because numpy has no bfloat16."""


def word_dtype(dtype: str) -> npt.DTypeLike:
    """The unsigned integer that holds one element of `dtype`."""
    return np.dtype(np.uint32 if DTYPE_BYTES[dtype] == 4 else np.uint16)


@dataclass(frozen=True, slots=True)
class ChunkShape:
    """What one chunk holds: `tokens` tokens of one layer in one format."""

    fmt: LayerFormat
    tokens: int
    heads: int
    width: int

    @classmethod
    def of(cls, fmt: LayerFormat, tokens: int, spec: ModelSpec) -> ChunkShape:
        """The shape of a chunk of `tokens` tokens of a layer kept as `fmt`."""
        if fmt.representation is Representation.HIDDEN:
            return cls(fmt, tokens, 0, spec.hidden_size)
        return cls(fmt, tokens, spec.num_kv_heads, spec.head_dim)

    @property
    def payload_bytes(self) -> int:
        """Bytes after the header."""
        element_bytes = DTYPE_BYTES[self.fmt.dtype]
        if self.fmt.representation is Representation.HIDDEN:
            return self.tokens * (self.width * element_bytes + ROW_SCALE_BYTES)
        return 2 * self.heads * self.tokens * self.width * element_bytes

    def arrays(self, payload: memoryview | bytearray) -> tuple[Words, Words]:
        """Views of a payload: (K, V), each (G, t, D), or (rows (t, E), row scales (t,))."""
        word = word_dtype(self.fmt.dtype)
        if self.fmt.representation is Representation.HIDDEN:
            count = self.tokens * self.width
            rows = np.frombuffer(payload, word, count).reshape(self.tokens, self.width)
            scales = np.frombuffer(payload, np.float32, self.tokens, rows.nbytes)
            return rows, scales
        count = self.heads * self.tokens * self.width
        shape = (self.heads, self.tokens, self.width)
        keys = np.frombuffer(payload, word, count).reshape(shape)
        values = np.frombuffer(payload, word, count, keys.nbytes).reshape(shape)
        return keys, values

    def _header(self, layer: int, chunk: int) -> bytes:
        return _FIELDS.pack(
            _MAGIC,
            FORMAT_VERSION,
            _REPRESENTATION_CODE[self.fmt.representation],
            _DTYPE_CODE[self.fmt.dtype],
            layer,
            self.tokens,
            chunk,
            self.heads,
            self.width,
            self.payload_bytes,
        )


def encode(
    shape: ChunkShape, key: StateKey, layer: int, chunk: int, first: Words, second: Words
) -> bytearray:
    """Write one chunk: `first` and `second` are what `ChunkShape.arrays` names.

    Raises:
        ValueError: an array's shape is not the chunk's.
    """
    value = bytearray(HEADER_BYTES + shape.payload_bytes)
    payload = memoryview(value)[HEADER_BYTES:]
    for target, source in zip(shape.arrays(payload), (first, second), strict=True):
        if target.shape != source.shape:
            raise ValueError(f"chunk array of shape {source.shape}, expected {target.shape}")
        np.copyto(target, source, casting="no")
    header = shape._header(layer, chunk)
    value[: len(header)] = header
    _CHECKSUM.pack_into(value, len(header), _checksum(key, header, payload))
    return value


def decode(
    shape: ChunkShape, key: StateKey, layer: int, chunk: int, value: memoryview
) -> tuple[Words, Words]:
    """Verify one stored value and return views of its arrays (see `ChunkShape.arrays`).

    The views are valid only as long as `value` is.

    Raises:
        DamagedStateError: the value is not the one that `encode` wrote for this place.
    """
    place = f"layer {layer}, chunk {chunk}"
    if len(value) != HEADER_BYTES + shape.payload_bytes:
        expected = HEADER_BYTES + shape.payload_bytes
        raise DamagedStateError(key, f"{place} has {len(value)} bytes, expected {expected}")
    header = shape._header(layer, chunk)
    if value[: len(header)] != header:
        raise DamagedStateError(key, f"{place} has a header that does not belong there")
    payload = value[HEADER_BYTES:]
    tail = _CHECKSUM.pack(_checksum(key, header, payload))
    if value[len(header) : HEADER_BYTES] != tail.ljust(HEADER_BYTES - len(header), b"\0"):
        raise DamagedStateError(key, f"{place} fails its checksum")
    return shape.arrays(payload)


def _checksum(key: StateKey, header: bytes, payload: memoryview) -> int:
    digest = xxhash.xxh3_64(key + header)
    digest.update(payload)
    return digest.intdigest()
