"""One chunk to bytes and back; anything but the very bytes for the very place is refused."""

from __future__ import annotations

import struct
from dataclasses import replace

import numpy as np
import pytest

from hcache_rag.codec import HEADER_BYTES, ChunkShape, Words, decode, encode, word_dtype
from hcache_rag.errors import DamagedStateError
from hcache_rag.layout import LayerFormat, Representation
from hcache_rag.spec import ModelSpec
from hcache_rag.state import FORMAT_VERSION

HIDDEN, KV = Representation.HIDDEN, Representation.KV
DTYPES = ["float32", "bfloat16", "float16"]
TOKENS = [1, 63, 64]
KEY, OTHER_KEY = bytes(range(16)), bytes(range(1, 17))
LAYER, CHUNK = 3, 2


def a_spec(dtype: str = "float32", *, hidden: int = 30, kv_heads: int = 3) -> ModelSpec:
    return ModelSpec("toy", "llama", 5, hidden, 2 * kv_heads, kv_heads, 10, 100, dtype)


def a_shape(representation: Representation, dtype: str, tokens: int) -> ChunkShape:
    return ChunkShape.of(LayerFormat(representation, dtype), tokens, a_spec(dtype))


def random_arrays(shape: ChunkShape) -> tuple[Words, Words]:
    """Random bit patterns, NaNs and infinities among them, in the shapes of the chunk."""
    blank = bytearray(np.random.default_rng(shape.tokens).bytes(shape.payload_bytes))
    first, second = shape.arrays(blank)
    return first.copy(), second.copy()


def a_value(shape: ChunkShape) -> bytearray:
    return encode(shape, KEY, LAYER, CHUNK, *random_arrays(shape))


def refuse(shape: ChunkShape, value: bytes | bytearray, place: tuple[bytes, int, int]) -> None:
    with pytest.raises(DamagedStateError) as caught:
        decode(shape, *place, memoryview(value))
    assert caught.value.key == place[0]


KINDS = [pytest.param(kind, id=kind.value) for kind in (HIDDEN, KV)]


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("representation", KINDS)
def test_round_trip_keeps_every_bit(
    representation: Representation, dtype: str, tokens: int
) -> None:
    """What is decoded has the bits that were encoded, NaNs too."""
    shape = a_shape(representation, dtype, tokens)
    arrays = random_arrays(shape)

    value = encode(shape, KEY, LAYER, CHUNK, *arrays)

    for source, back in zip(
        arrays, decode(shape, KEY, LAYER, CHUNK, memoryview(value)), strict=True
    ):
        assert back.shape == source.shape
        assert back.dtype == source.dtype
        assert back.tobytes() == source.tobytes()


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_payload_of_kv_is_keys_then_values_from_byte_48(dtype: str, tokens: int) -> None:
    """K (G, t, D), then V (G, t, D), right after a header of 48 bytes."""
    shape = a_shape(KV, dtype, tokens)
    keys, values = random_arrays(shape)

    value = encode(shape, KEY, LAYER, CHUNK, keys, values)

    assert HEADER_BYTES == 48
    assert keys.shape == values.shape == (3, tokens, 10)
    assert keys.dtype == word_dtype(dtype)
    assert value[48:] == keys.tobytes() + values.tobytes()


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_payload_of_hidden_is_rows_then_scales_from_byte_48(dtype: str, tokens: int) -> None:
    """Rows (t, E) in the storage dtype, then float32 row scales (t,)."""
    shape = a_shape(HIDDEN, dtype, tokens)
    rows, scales = random_arrays(shape)

    value = encode(shape, KEY, LAYER, CHUNK, rows, scales)

    assert rows.shape == (tokens, 30)
    assert rows.dtype == word_dtype(dtype)
    assert scales.shape == (tokens,)
    assert scales.dtype == np.float32
    assert value[48:] == rows.tobytes() + scales.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("representation", KINDS)
def test_payload_is_what_the_layout_promises(representation: Representation, dtype: str) -> None:
    """`LayerFormat.bytes_per_token` counts exactly the payload."""
    shape = a_shape(representation, dtype, 63)
    assert shape.payload_bytes == 63 * shape.fmt.bytes_per_token(a_spec(dtype))
    assert len(a_value(shape)) == HEADER_BYTES + shape.payload_bytes


def test_header_is_the_documented_one() -> None:
    """Magic, version, codes, layer, tokens, chunk, heads, width, payload bytes: little-endian."""
    shape = a_shape(KV, "bfloat16", 7)
    value = a_value(shape)
    fields = struct.unpack_from("<4sHBBHHIIIQ", value)
    assert fields == (b"HCS1", FORMAT_VERSION, 2, 2, LAYER, 7, CHUNK, 3, 10, 2 * 3 * 7 * 10 * 2)
    assert value[40:48] == bytes(8)


def test_decoded_arrays_are_views() -> None:
    """Reading copies nothing: the arrays lie in the value itself."""
    value = a_value(a_shape(KV, "float32", 4))
    keys, values = decode(a_shape(KV, "float32", 4), KEY, LAYER, CHUNK, memoryview(value))
    assert np.shares_memory(keys, np.frombuffer(value, np.uint8))
    assert np.shares_memory(values, np.frombuffer(value, np.uint8))


@pytest.mark.parametrize("representation", KINDS)
def test_any_changed_byte_is_refused(representation: Representation) -> None:
    """Each byte of a small value, header, checksum and padding too, replaced by all others."""
    spec = a_spec("float16", hidden=2, kv_heads=1)
    shape = ChunkShape.of(LayerFormat(representation, "float16"), 2, replace(spec, head_dim=2))
    value = a_value(shape)
    accepted = set()
    for position in range(len(value)):
        for flip in range(1, 256):
            value[position] ^= flip
            try:
                decode(shape, KEY, LAYER, CHUNK, memoryview(value))
                accepted.add(position)
            except DamagedStateError:
                pass
            value[position] ^= flip
    assert not accepted, f"changes of bytes {sorted(accepted)} went unnoticed"
    decode(shape, KEY, LAYER, CHUNK, memoryview(value))


@pytest.mark.parametrize("representation", KINDS)
def test_any_shorter_value_is_refused(representation: Representation) -> None:
    """Truncated anywhere, to nothing too."""
    shape = a_shape(representation, "bfloat16", 1)
    value = a_value(shape)
    for length in range(len(value)):
        refuse(shape, value[:length], (KEY, LAYER, CHUNK))


@pytest.mark.parametrize("tail", [b"\0", b"\0" * 48, bytes(range(200))], ids=len)
def test_a_longer_value_is_refused(tail: bytes) -> None:
    """Bytes behind the payload are not ignored."""
    shape = a_shape(HIDDEN, "float32", 63)
    refuse(shape, a_value(shape) + tail, (KEY, LAYER, CHUNK))


@pytest.mark.parametrize("representation", KINDS)
@pytest.mark.parametrize(
    "place",
    [
        pytest.param((OTHER_KEY, LAYER, CHUNK), id="other-key"),
        pytest.param((KEY, LAYER + 1, CHUNK), id="other-layer"),
        pytest.param((KEY, LAYER, CHUNK + 1), id="other-chunk"),
        pytest.param((KEY, CHUNK, LAYER), id="layer-and-chunk-swapped"),
    ],
)
def test_a_whole_value_in_the_wrong_place_is_refused(
    place: tuple[bytes, int, int], representation: Representation
) -> None:
    """A value that is in order, but not the one asked for."""
    shape = a_shape(representation, "float32", 4)
    refuse(shape, a_value(shape), place)


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(ChunkShape(LayerFormat(KV, "float16"), 4, 2, 8), id="other-dtype"),
        pytest.param(ChunkShape(LayerFormat(KV, "bfloat16"), 2, 4, 8), id="tokens-for-heads"),
        pytest.param(ChunkShape(LayerFormat(KV, "bfloat16"), 8, 2, 4), id="tokens-for-width"),
        pytest.param(ChunkShape(LayerFormat(HIDDEN, "bfloat16"), 4, 0, 30), id="hidden-for-kv"),
    ],
)
def test_a_value_of_another_shape_with_as_many_bytes_is_refused(other: ChunkShape) -> None:
    """The header says what the payload means; equal lengths do not make equal chunks."""
    shape = ChunkShape(LayerFormat(KV, "bfloat16"), 4, 2, 8)
    assert other.payload_bytes == shape.payload_bytes
    refuse(shape, a_value(other), (KEY, LAYER, CHUNK))


@pytest.mark.parametrize("representation", KINDS)
@pytest.mark.parametrize("which", [0, 1], ids=["first", "second"])
def test_an_array_of_the_wrong_shape_raises_value_error(
    which: int, representation: Representation
) -> None:
    """With the shapes that disagree; numpy would have broadcast it silently."""
    shape = a_shape(representation, "float32", 4)
    arrays = list(random_arrays(shape))
    arrays[which] = arrays[which][..., :1]
    with pytest.raises(ValueError, match=r"shape \(.*\), expected \("):
        encode(shape, KEY, LAYER, CHUNK, arrays[0], arrays[1])


def test_an_array_of_the_wrong_dtype_is_not_converted() -> None:
    """Floats are not truncated to integers on the way to the disk."""
    shape = a_shape(KV, "float32", 4)
    keys, values = random_arrays(shape)
    with pytest.raises(TypeError):
        encode(shape, KEY, LAYER, CHUNK, keys.view(np.float32), values)
