"""One chunk of one layer to bytes and back. Knows neither where bytes go nor what they mean.

A value is a 48-byte header and a payload:

    magic "HCS1" | version u16 | representation u8 | dtype u8 | layer u16 | tokens u16 |
    chunk u32 | heads u32 | width u32 | payload bytes u64 | xxh3_64 u64 | zeros

little-endian. The payload is the arrays that `LayerFormat.parts` names, one after another, each
padded with zeros to four bytes. The checksum covers the state's key, the header and the payload,
so that a value that is whole but in the wrong place is found out too. LMDB 0.9 places large
values 16 bytes into a page: after the header the payload starts on a 64-byte boundary.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from hcache_rag.errors import DamagedStateError
from hcache_rag.layout import HEADER_BYTES, LayerFormat, Part, Representation
from hcache_rag.spec import ModelSpec
from hcache_rag.state import FORMAT_VERSION, StateKey

_MAGIC = b"HCS1"
_FIELDS = struct.Struct("<4sHBBHHIIIQ")
_CHECKSUM = struct.Struct("<Q")
_REPRESENTATION_CODE = {Representation.HIDDEN: 1, Representation.KV: 2}
_DTYPE_CODE = {
    "float32": 1,
    "bfloat16": 2,
    "float16": 3,
    "int8": 4,
    "int8-g64": 5,
    "int8-smooth": 6,
    "float8_e4m3": 7,
}

Words = npt.NDArray[Any]
"""An array as it is stored: elements of four and two bytes as bit patterns in uint32 and uint16,
because numpy has no bfloat16; those of one byte as int8, whatever they are; scales as float32."""


def word_dtype(part: Part) -> npt.DTypeLike:
    """The numpy dtype that a part is seen as."""
    if part.name.endswith("_scales"):
        return np.dtype(np.float32)
    return np.dtype({1: np.int8, 2: np.uint16, 4: np.uint32}[part.element_bytes])


@dataclass(frozen=True, slots=True)
class ChunkShape:
    """What one chunk holds: `tokens` tokens of one layer of `spec` in one format."""

    fmt: LayerFormat
    tokens: int
    spec: ModelSpec

    @property
    def payload_bytes(self) -> int:
        """Bytes after the header."""
        return _payload_bytes(self)

    def arrays(self, payload: memoryview | bytearray) -> tuple[Words, ...]:
        """Views of a payload, one for each of `LayerFormat.parts`."""
        return tuple(
            np.ndarray(shape, dtype, payload, begin) for shape, dtype, begin in _places(self)
        )

    def _header(self, layer: int, chunk: int) -> bytes:
        is_hidden = self.fmt.representation is Representation.HIDDEN
        return _FIELDS.pack(
            _MAGIC,
            FORMAT_VERSION,
            _REPRESENTATION_CODE[self.fmt.representation],
            _DTYPE_CODE[self.fmt.dtype],
            layer,
            self.tokens,
            chunk,
            0 if is_hidden else self.spec.num_kv_heads,
            self.spec.hidden_size if is_hidden else self.spec.head_dim,
            self.payload_bytes,
        )


@lru_cache(maxsize=4096)
def _places(shape: ChunkShape) -> tuple[tuple[tuple[int, ...], npt.DTypeLike, int], ...]:
    """Shape, dtype and first byte of every part in the payload."""
    places, begin = [], 0
    for part in shape.fmt.parts(shape.spec, shape.tokens):
        places.append((part.shape, word_dtype(part), begin))
        begin += part.num_bytes
    return tuple(places)


@lru_cache(maxsize=4096)
def _payload_bytes(shape: ChunkShape) -> int:
    return shape.fmt.num_bytes(shape.spec, shape.tokens)


def encode(
    shape: ChunkShape, key: StateKey, layer: int, chunk: int, arrays: Sequence[Words]
) -> bytearray:
    """Write one chunk from the arrays that `LayerFormat.parts` names.

    Raises:
        ValueError: an array's shape is not the chunk's.
    """
    value = bytearray(HEADER_BYTES + shape.payload_bytes)
    payload = memoryview(value)[HEADER_BYTES:]
    for target, source in zip(shape.arrays(payload), arrays, strict=True):
        if target.shape != source.shape:
            raise ValueError(f"chunk array of shape {source.shape}, expected {target.shape}")
        np.copyto(target, source, casting="no")
    header = shape._header(layer, chunk)
    value[: len(header)] = header
    _CHECKSUM.pack_into(value, len(header), _checksum(key, header, payload))
    return value


def decode(
    shape: ChunkShape, key: StateKey, layer: int, chunk: int, value: memoryview
) -> tuple[Words, ...]:
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


def check(
    fmt: LayerFormat, tokens: int, key: StateKey, layer: int, chunk: int, value: memoryview
) -> None:
    """Verify one stored value by what it says of itself, without a model.

    Raises:
        DamagedStateError: the value is not one that `encode` wrote for this place.
    """
    place = f"layer {layer}, chunk {chunk}"
    if len(value) < HEADER_BYTES:
        raise DamagedStateError(key, f"{place} has {len(value)} bytes")
    header = bytes(value[: _FIELDS.size])
    found = _FIELDS.unpack(header)
    payload = value[HEADER_BYTES:]
    expected = (
        _MAGIC,
        FORMAT_VERSION,
        _REPRESENTATION_CODE[fmt.representation],
        _DTYPE_CODE[fmt.dtype],
        layer,
        tokens,
        chunk,
    )
    if found[: len(expected)] != expected or found[-1] != len(payload):
        raise DamagedStateError(key, f"{place} has a header that does not belong there")
    tail = _CHECKSUM.pack(_checksum(key, header, payload))
    if value[len(header) : HEADER_BYTES] != tail.ljust(HEADER_BYTES - len(header), b"\0"):
        raise DamagedStateError(key, f"{place} fails its checksum")


def _checksum(key: StateKey, header: bytes, payload: memoryview) -> int:
    digest = xxhash.xxh3_64(key + header)
    digest.update(payload)
    return digest.intdigest()
