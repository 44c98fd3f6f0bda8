"""One chunk to bytes and back; anything but the very bytes for the very place is refused."""

from __future__ import annotations

import struct
from dataclasses import replace

import numpy as np
import pytest

from hcache_rag.codec import ChunkShape, Words, decode, encode, word_dtype
from hcache_rag.errors import DamagedStateError
from hcache_rag.layout import HEADER_BYTES, STORAGE_DTYPES, LayerFormat, Part, Representation
from hcache_rag.spec import ModelSpec
from hcache_rag.state import FORMAT_VERSION

HIDDEN, KV = Representation.HIDDEN, Representation.KV
TOKENS = [1, 63, 64]
KEY, OTHER_KEY = bytes(range(16)), bytes(range(1, 17))
LAYER, CHUNK = 3, 2
WORDS = {
    "float32": "<u4",
    "bfloat16": "<u2",
    "float16": "<u2",
    "int8": "i1",
    "int8-g64": "i1",
    "int8-smooth": "i1",
    "float8_e4m3": "i1",
}
"""How elements lie in a payload."""


def a_spec(hidden: int = 71, kv_heads: int = 3, head_dim: int = 10) -> ModelSpec:
    """By default a spec of which nothing is a multiple of four."""
    return ModelSpec(
        "toy", "llama", 5, hidden, 2 * kv_heads, kv_heads, head_dim, 100, dtype="float32"
    )


def a_shape(fmt: LayerFormat, tokens: int = 4) -> ChunkShape:
    return ChunkShape(fmt, tokens, a_spec())


def random_arrays(shape: ChunkShape) -> tuple[Words, ...]:
    """Random bit patterns, NaNs and infinities among them, in the shapes of the chunk."""
    blank = bytearray(np.random.default_rng(shape.tokens).bytes(shape.payload_bytes))
    return tuple(array.copy() for array in shape.arrays(blank))


def a_value(shape: ChunkShape) -> bytearray:
    return encode(shape, KEY, LAYER, CHUNK, random_arrays(shape))


def refuse(shape: ChunkShape, value: bytes | bytearray, place: tuple[bytes, int, int]) -> str:
    with pytest.raises(DamagedStateError) as caught:
        decode(shape, *place, memoryview(value))
    assert caught.value.key == place[0]
    assert f"layer {place[1]}, chunk {place[2]} " in caught.value.reason
    return caught.value.reason


FORMATS = [
    pytest.param(LayerFormat(kind, dtype), id=f"{kind}-{dtype}")
    for kind in (HIDDEN, KV)
    for dtype in STORAGE_DTYPES[kind]
]


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("fmt", FORMATS)
def test_round_trip_keeps_every_bit(fmt: LayerFormat, tokens: int) -> None:
    """What is decoded has the bits that were encoded, NaNs too."""
    shape = a_shape(fmt, tokens)
    arrays = random_arrays(shape)

    value = encode(shape, KEY, LAYER, CHUNK, arrays)

    for source, back in zip(
        arrays, decode(shape, KEY, LAYER, CHUNK, memoryview(value)), strict=True
    ):
        assert back.shape == source.shape
        assert back.dtype == source.dtype
        assert back.tobytes() == source.tobytes()


Expected = list[tuple[tuple[int, ...], str]]


def payload(expected: Expected, arrays: tuple[Words, ...]) -> bytes:
    """The documented payload: arrays one after another, each filled up with zeros to 4 bytes."""
    assert [(array.shape, array.dtype) for array in arrays] == [
        (shape, np.dtype(dtype)) for shape, dtype in expected
    ]
    return b"".join(
        array.astype(dtype).tobytes() + bytes(-array.nbytes % 4)
        for array, (_, dtype) in zip(arrays, expected, strict=True)
    )


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", STORAGE_DTYPES[KV])
def test_payload_of_kv_is_keys_then_values_from_byte_48(dtype: str, tokens: int) -> None:
    """K (G, t, D), then V (G, t, D); of eight bits, then scales of channels and of tokens."""
    shape = a_shape(LayerFormat(KV, dtype), tokens)
    arrays = random_arrays(shape)
    expected: Expected = [((3, tokens, 10), WORDS[dtype])] * 2
    if dtype in ("int8", "float8_e4m3"):
        expected += [((3, 10), "<f4"), ((3, tokens), "<f4")]

    value = encode(shape, KEY, LAYER, CHUNK, arrays)

    assert HEADER_BYTES == 48
    assert value[48:] == payload(expected, arrays)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", STORAGE_DTYPES[HIDDEN])
def test_payload_of_hidden_is_rows_then_scales_from_byte_48(dtype: str, tokens: int) -> None:
    """Rows (t, E), row scales (t,); of eight bits, then scales of rows, or of groups of 64, or of
    rows and of channels (E,)."""
    shape = a_shape(LayerFormat(HIDDEN, dtype), tokens)
    arrays = random_arrays(shape)
    expected: Expected = [((tokens, 71), WORDS[dtype]), ((tokens,), "<f4")]
    if dtype in ("int8", "float8_e4m3"):
        expected.append(((tokens,), "<f4"))
    elif dtype == "int8-g64":
        expected.append(((tokens, 2), "<f4"))
    elif dtype == "int8-smooth":
        expected += [((tokens,), "<f4"), ((71,), "<f4")]

    value = encode(shape, KEY, LAYER, CHUNK, arrays)

    assert value[48:] == payload(expected, arrays)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("fmt", FORMATS)
def test_payload_is_what_the_layout_promises(fmt: LayerFormat, tokens: int) -> None:
    """`LayerFormat.num_bytes` counts exactly the payload, `value_bytes` the header too."""
    shape = a_shape(fmt, tokens)
    assert len(a_value(shape)) == 48 + fmt.num_bytes(a_spec(), tokens)
    assert len(a_value(shape)) == fmt.value_bytes(a_spec(), tokens)


@pytest.mark.parametrize(
    ("name", "element_bytes", "expected"),
    [
        ("rows", 4, np.uint32),
        ("keys", 2, np.uint16),
        ("values", 1, np.int8),
        ("row_scales", 4, np.float32),
        ("quant_scales", 4, np.float32),
        ("channel_scales", 4, np.float32),
    ],
)
def test_words_are_bit_patterns_integers_or_scales(
    name: str, element_bytes: int, expected: type
) -> None:
    """Elements of floating-point dtypes are never read as numbers; int8 and scales are."""
    assert word_dtype(Part(name, element_bytes, (1,))) == np.dtype(expected)


@pytest.mark.parametrize(
    ("fmt", "codes", "widths", "payload_bytes"),
    [
        pytest.param(LayerFormat(KV, "bfloat16"), (2, 2), (3, 10), 420 + 420, id="kv-bfloat16"),
        pytest.param(LayerFormat(KV, "int8"), (2, 4), (3, 10), 212 * 2 + 120 + 84, id="kv-int8"),
        pytest.param(LayerFormat(HIDDEN, "float32"), (1, 1), (0, 71), 1988 + 28, id="hidden"),
        pytest.param(LayerFormat(HIDDEN, "float16"), (1, 3), (0, 71), 996 + 28, id="float16"),
        pytest.param(LayerFormat(HIDDEN, "int8-g64"), (1, 5), (0, 71), 500 + 28 + 56, id="g64"),
        pytest.param(
            LayerFormat(HIDDEN, "int8-smooth"), (1, 6), (0, 71), 500 + 28 + 28 + 284, id="smooth"
        ),
    ],
)
def test_header_is_the_documented_one(
    fmt: LayerFormat, codes: tuple[int, int], widths: tuple[int, int], payload_bytes: int
) -> None:
    """Magic, version, codes, layer, tokens, chunk, heads, width, payload bytes: little-endian."""
    value = a_value(a_shape(fmt, 7))
    fields = struct.unpack_from("<4sHBBHHIIIQ", value)
    assert fields == (b"HCS1", FORMAT_VERSION, *codes, LAYER, 7, CHUNK, *widths, payload_bytes)
    assert value[40:48] == bytes(8)
    assert len(value) == 48 + payload_bytes


@pytest.mark.parametrize("fmt", FORMATS)
def test_decoded_arrays_are_views(fmt: LayerFormat) -> None:
    """Reading copies nothing: the arrays lie in the value itself, and cannot be written there."""
    value = bytes(a_value(a_shape(fmt)))
    for array in decode(a_shape(fmt), KEY, LAYER, CHUNK, memoryview(value)):
        assert np.shares_memory(array, np.frombuffer(value, np.uint8))
        assert not array.flags.writeable


@pytest.mark.parametrize("fmt", FORMATS)
def test_decoded_arrays_are_aligned_where_lmdb_puts_values(fmt: LayerFormat) -> None:
    """16 bytes into a page. Without padding, an odd number of elements would shift the next."""
    value = np.frombuffer(bytes(a_value(a_shape(fmt, 1))), np.uint8)
    memory = np.zeros(len(value) + 128, np.uint8)
    begin = -memory.ctypes.data % 64 + 16
    page = memory[begin : begin + len(value)]
    page[:] = value
    for array in decode(a_shape(fmt, 1), KEY, LAYER, CHUNK, page.data):
        assert array.flags.aligned
        assert array.ctypes.data % 4 == 0


SMALL = [
    pytest.param(LayerFormat(HIDDEN, "float16"), id="hidden-float16"),
    pytest.param(LayerFormat(HIDDEN, "int8-g64"), id="hidden-int8-g64"),
    pytest.param(LayerFormat(HIDDEN, "int8-smooth"), id="hidden-int8-smooth"),
    pytest.param(LayerFormat(KV, "float16"), id="kv-float16"),
    pytest.param(LayerFormat(KV, "int8"), id="kv-int8"),
]


@pytest.mark.parametrize("fmt", SMALL)
def test_any_changed_byte_is_refused(fmt: LayerFormat) -> None:
    """Each byte of a small value, header, checksum and padding too, replaced by all others."""
    shape = ChunkShape(fmt, 1, a_spec(hidden=3, kv_heads=1, head_dim=3))
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


@pytest.mark.parametrize("fmt", FORMATS)
def test_any_shorter_value_is_refused(fmt: LayerFormat) -> None:
    """Truncated anywhere, to nothing too."""
    shape = a_shape(fmt, 1)
    value = a_value(shape)
    for length in range(len(value)):
        reason = refuse(shape, value[:length], (KEY, LAYER, CHUNK))
        assert reason.endswith(f"has {length} bytes, expected {len(value)}")


@pytest.mark.parametrize("tail", [b"\0", b"\0" * 48, bytes(range(200))], ids=len)
def test_a_longer_value_is_refused(tail: bytes) -> None:
    """Bytes behind the payload are not ignored; the error has the numbers."""
    shape = a_shape(LayerFormat(HIDDEN, "float32"), 63)
    value = a_value(shape)
    reason = refuse(shape, value + tail, (KEY, LAYER, CHUNK))
    assert reason.endswith(f"has {len(value) + len(tail)} bytes, expected {len(value)}")


@pytest.mark.parametrize("fmt", FORMATS)
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
    place: tuple[bytes, int, int], fmt: LayerFormat
) -> None:
    """A value that is in order, but not the one asked for."""
    shape = a_shape(fmt)
    refuse(shape, a_value(shape), place)


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_value_of_another_state_is_refused_by_its_checksum(fmt: LayerFormat) -> None:
    """The key is in no header: only the checksum covers it."""
    shape = a_shape(fmt)
    with pytest.raises(DamagedStateError, match=r"layer 3, chunk 2 fails its checksum"):
        decode(shape, OTHER_KEY, LAYER, CHUNK, memoryview(a_value(shape)))


TWO_HEADS = a_spec(hidden=30, kv_heads=2, head_dim=8)
KV_256 = ChunkShape(LayerFormat(KV, "bfloat16"), 4, TWO_HEADS)
HIDDEN_64 = ChunkShape(LayerFormat(HIDDEN, "int8"), 4, a_spec(hidden=64))


@pytest.mark.parametrize(
    ("shape", "other"),
    [
        pytest.param(KV_256, replace(KV_256, fmt=LayerFormat(KV, "float16")), id="other-dtype"),
        pytest.param(
            KV_256,
            replace(KV_256, tokens=2, spec=replace(TWO_HEADS, num_kv_heads=4)),
            id="tokens-for-heads",
        ),
        pytest.param(
            KV_256,
            replace(KV_256, tokens=8, spec=replace(TWO_HEADS, head_dim=4)),
            id="tokens-for-width",
        ),
        pytest.param(
            KV_256,
            ChunkShape(LayerFormat(HIDDEN, "bfloat16"), 4, TWO_HEADS),
            id="hidden-for-kv",
        ),
        pytest.param(
            KV_256,
            ChunkShape(LayerFormat(KV, "int8"), 4, a_spec(kv_heads=1, head_dim=20)),
            id="integers-for-floats",
        ),
        pytest.param(
            HIDDEN_64,
            replace(HIDDEN_64, fmt=LayerFormat(HIDDEN, "int8-g64")),
            id="one-group-for-rows",
        ),
    ],
)
def test_a_value_of_another_shape_with_as_many_bytes_is_refused(
    shape: ChunkShape, other: ChunkShape
) -> None:
    """The header says what the payload means; equal lengths do not make equal chunks."""
    assert other.payload_bytes == shape.payload_bytes
    refuse(shape, a_value(other), (KEY, LAYER, CHUNK))
    refuse(other, a_value(shape), (KEY, LAYER, CHUNK))


PLACES = [
    pytest.param(LayerFormat(kind, dtype), place, id=f"{kind}-{dtype}-{place}")
    for kind, dtype, count in [
        (HIDDEN, "float32", 2),
        (HIDDEN, "int8", 3),
        (HIDDEN, "int8-g64", 3),
        (HIDDEN, "int8-smooth", 4),
        (KV, "float32", 2),
        (KV, "int8", 4),
    ]
    for place in range(count)
]


@pytest.mark.parametrize(("fmt", "place"), PLACES)
def test_an_array_of_the_wrong_shape_raises_value_error(fmt: LayerFormat, place: int) -> None:
    """With the shapes that disagree; numpy would have broadcast it silently."""
    arrays = list(random_arrays(a_shape(fmt)))
    arrays[place] = arrays[place][..., :1]
    with pytest.raises(ValueError, match=r"shape \(.*\), expected \("):
        encode(a_shape(fmt), KEY, LAYER, CHUNK, arrays)


@pytest.mark.parametrize("fmt", FORMATS)
def test_too_few_or_too_many_arrays_raise_value_error(fmt: LayerFormat) -> None:
    """Scales cannot be forgotten."""
    arrays = random_arrays(a_shape(fmt))
    for wrong in (arrays[:-1], (*arrays, arrays[-1]), ()):
        with pytest.raises(ValueError, match=r"."):
            encode(a_shape(fmt), KEY, LAYER, CHUNK, wrong)


@pytest.mark.parametrize(
    ("dtype", "wrong"),
    [
        pytest.param("float32", np.float32, id="floats-for-bits"),
        pytest.param("float32", np.int32, id="signed-bits"),
        pytest.param("bfloat16", np.float16, id="halves-for-bits"),
        pytest.param("int8", np.uint8, id="unsigned-integers"),
        pytest.param("int8", np.float32, id="floats-for-integers"),
    ],
)
def test_an_array_of_the_wrong_dtype_is_not_converted(dtype: str, wrong: type) -> None:
    """Floats are not truncated to integers on the way to the disk."""
    shape = a_shape(LayerFormat(KV, dtype))
    keys, *others = random_arrays(shape)
    with pytest.raises(TypeError):
        encode(shape, KEY, LAYER, CHUNK, [np.zeros(keys.shape, wrong), *others])
