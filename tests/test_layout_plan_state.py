"""What a state keeps and what is known about it: spec, layout, keys, records, errors."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import re
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import TOY as SPEC
from tiny import SHAPES, Shape, tiny_model
from torch.utils.flop_counter import FlopCounterMode

from hcache_rag import errors
from hcache_rag.layout import STORAGE_DTYPES, VALUE_BYTES, LayerFormat, Representation, StateLayout
from hcache_rag.spec import ModelSpec
from hcache_rag.state import FORMAT_VERSION, StateRecord, TokenIds, child_key, root_key, token_array

HIDDEN, KV, NONE = Representation.HIDDEN, Representation.KV, Representation.NONE


# --- spec ---------------------------------------------------------------------------------------


def test_spec_knows_its_widths() -> None:
    assert SPEC.kv_width == 32
    assert SPEC.query_width == 64
    assert [replace(SPEC, dtype=d).dtype_bytes for d in ("float32", "bfloat16", "float16")] == [
        4,
        2,
        2,
    ]


@pytest.mark.parametrize("shape", SHAPES)
def test_spec_counts_the_operations_of_a_forward_pass(shape: Shape) -> None:
    """Per token and layer, as torch counts them; attention per pair of tokens."""
    spec = ModelSpec(
        shape.label,
        shape.family,
        shape.layers,
        shape.hidden_size,
        shape.heads,
        shape.kv_heads,
        shape.head_dim,
        window_tokens=4096,
        dtype="float32",
        mlp_size=2 * shape.hidden_size,
    )
    tokens = 5
    model: Any = tiny_model(shape, attention="eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.model(input_ids=torch.arange(tokens)[None])

    counts = counter.get_flop_counts()

    def counted(part: str) -> int:
        """Operations of one layer's part."""
        (of_part,) = (c for name, c in counts.items() if name.endswith(f"layers.1{part}"))
        return sum(of_part.values())

    attention_flops = spec.attention_flops * tokens**2
    assert counted("") == spec.layer_flops * tokens + attention_flops
    of_linear_layers = sum(counted(f".self_attn.{name}_proj") for name in "qkvo")
    assert counted(".self_attn") == of_linear_layers + attention_flops
    of_k_and_v = sum(counted(f".self_attn.{name}_proj") for name in "kv")
    assert of_k_and_v == spec.projection_flops * tokens


def test_spec_of_an_mlp_without_a_gate() -> None:
    """Two matrices instead of three."""
    spec = replace(SPEC, mlp_size=256)
    assert spec.layer_flops - replace(spec, mlp_matrices=2).layer_flops == 2 * 64 * 256
    assert replace(spec, mlp_matrices=2).layer_flops - SPEC.layer_flops == 2 * 2 * 64 * 256


def test_spec_refuses_an_unknown_dtype() -> None:
    with pytest.raises(ValueError, match=r"'int3'.*float32"):
        replace(SPEC, dtype="int3")


def test_spec_refuses_heads_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match=r"8 query heads.* 3 KV heads"):
        replace(SPEC, num_kv_heads=3)


# --- layout -------------------------------------------------------------------------------------

FORMATS = [LayerFormat(kind, dtype) for kind, dtypes in STORAGE_DTYPES.items() for dtype in dtypes]
KV_FLOAT, HIDDEN_FLOAT = LayerFormat(KV, "float32"), LayerFormat(HIDDEN, "float32")
NOTHING = LayerFormat(NONE)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_formats_say_whether_they_have_eight_bits(fmt: LayerFormat) -> None:
    assert fmt.is_quantised == ("8" in fmt.dtype)


@pytest.mark.parametrize(
    ("representation", "dtype"),
    [
        (HIDDEN, "float64"),
        (HIDDEN, "int4"),
        (HIDDEN, ""),
        (HIDDEN, "int8-g32"),
        (KV, ""),
        (KV, "int8-g64"),
        (NONE, "float32"),
        (NONE, "int8"),
    ],
    ids=lambda value: str(value) or "no-dtype",
)
def test_what_a_representation_cannot_be_stored_as_is_refused(
    representation: Representation, dtype: str
) -> None:
    """Naming both, and what is known: groups for hidden states only, no dtype for nothing."""
    known = re.escape(repr(STORAGE_DTYPES[representation][-1]))
    with pytest.raises(ValueError, match=f"^{representation} .* as {dtype!r}; known: .*{known}$"):
        LayerFormat(representation, dtype)


@pytest.mark.parametrize(
    ("fmt", "expected"),
    [
        (LayerFormat(HIDDEN, "float32"), [("rows", 4, (7, 100)), ("row_scales", 4, (7,))]),
        (LayerFormat(HIDDEN, "bfloat16"), [("rows", 2, (7, 100)), ("row_scales", 4, (7,))]),
        (
            LayerFormat(HIDDEN, "int8"),
            [("rows", 1, (7, 100)), ("row_scales", 4, (7,)), ("quant_scales", 4, (7,))],
        ),
        (
            LayerFormat(HIDDEN, "int8-g64"),
            [("rows", 1, (7, 100)), ("row_scales", 4, (7,)), ("quant_scales", 4, (7, 2))],
        ),
        (
            LayerFormat(HIDDEN, "int8-smooth"),
            [
                ("rows", 1, (7, 100)),
                ("row_scales", 4, (7,)),
                ("quant_scales", 4, (7,)),
                ("channel_scales", 4, (100,)),
            ],
        ),
        (LayerFormat(KV, "float16"), [("keys", 2, (4, 7, 8)), ("values", 2, (4, 7, 8))]),
        (
            LayerFormat(KV, "int8"),
            [
                ("keys", 1, (4, 7, 8)),
                ("values", 1, (4, 7, 8)),
                ("key_scales", 4, (4, 8)),
                ("value_scales", 4, (4, 7)),
            ],
        ),
        (LayerFormat(NONE), []),
    ],
    ids=str,
)
def test_the_parts_of_a_chunk(
    fmt: LayerFormat, expected: list[tuple[str, int, tuple[int, ...]]]
) -> None:
    """Names, bytes of an element and shapes, in the order of the disk; here of 7 tokens."""
    assert [tuple(part) for part in fmt.parts(replace(SPEC, hidden_size=100), 7)] == expected


@pytest.mark.parametrize(
    ("hidden_size", "groups"), [(1, 1), (63, 1), (64, 1), (65, 2), (72, 2), (128, 2), (129, 3)]
)
def test_the_last_group_of_channels_may_be_smaller(hidden_size: int, groups: int) -> None:
    spec = replace(SPEC, hidden_size=hidden_size)
    scales = LayerFormat(HIDDEN, "int8-g64").parts(spec, 5)[-1]
    assert (scales.name, scales.shape) == ("quant_scales", (5, groups))


@pytest.mark.parametrize(
    ("fmt", "expected"),
    [
        (LayerFormat(HIDDEN, "float32"), {1: 260, 63: 16_380, 64: 16_640}),
        (LayerFormat(HIDDEN, "bfloat16"), {1: 132, 63: 8_316, 64: 8_448}),
        (LayerFormat(HIDDEN, "float16"), {1: 132, 63: 8_316, 64: 8_448}),
        (LayerFormat(HIDDEN, "int8"), {1: 72, 63: 4_536, 64: 4_608}),
        (LayerFormat(HIDDEN, "float8_e4m3"), {1: 72, 63: 4_536, 64: 4_608}),
        (LayerFormat(HIDDEN, "int8-g64"), {1: 72, 63: 4_536, 64: 4_608}),
        (LayerFormat(HIDDEN, "int8-smooth"), {1: 72 + 256, 63: 4_536 + 256, 64: 4_608 + 256}),
        (LayerFormat(KV, "float32"), {1: 256, 63: 16_128, 64: 16_384}),
        (LayerFormat(KV, "bfloat16"), {1: 128, 63: 8_064, 64: 8_192}),
        (LayerFormat(KV, "float16"), {1: 128, 63: 8_064, 64: 8_192}),
        (LayerFormat(KV, "int8"), {1: 64 + 128 + 16, 63: 4_032 + 128 + 1_008, 64: 5_248}),
        (LayerFormat(KV, "float8_e4m3"), {1: 64 + 128 + 16, 63: 4_032 + 128 + 1_008, 64: 5_248}),
        (LayerFormat(NONE), {1: 0, 63: 0, 64: 0}),
    ],
    ids=str,
)
def test_bytes_of_a_chunk(fmt: LayerFormat, expected: dict[int, int]) -> None:
    """Row scales and quantising scales count; a stored value has a header too, nothing has none."""
    assert {tokens: fmt.num_bytes(SPEC, tokens) for tokens in expected} == expected
    assert {tokens: fmt.value_bytes(SPEC, tokens) for tokens in expected} == {
        tokens: payload and payload + 48 for tokens, payload in expected.items()
    }


@pytest.mark.parametrize(
    ("fmt", "expected"),
    [
        (LayerFormat(HIDDEN, "bfloat16"), 132 + 4),
        (LayerFormat(HIDDEN, "int8"), 68 + 4 + 4),
        (LayerFormat(HIDDEN, "int8-g64"), 68 + 4 + 8),
        (LayerFormat(HIDDEN, "int8-smooth"), 68 + 4 + 4 + 260),
        (LayerFormat(KV, "bfloat16"), 20 + 20),
        (LayerFormat(KV, "int8"), 12 + 12 + 36 + 4),
    ],
    ids=str,
)
def test_every_part_begins_on_four_bytes(fmt: LayerFormat, expected: int) -> None:
    """65 channels, or one head of 9, of one token: each array is filled up."""
    spec = replace(SPEC, hidden_size=65, num_kv_heads=1, head_dim=9)
    assert fmt.num_bytes(spec, 1) == expected


def test_bytes_per_token_of_a_layout_is_that_of_full_chunks() -> None:
    """Summed over the layers: scales of channels are spread over a chunk's tokens."""
    formats = (NOTHING, LayerFormat(HIDDEN, "float16"), LayerFormat(KV, "int8"), KV_FLOAT)
    assert StateLayout(formats, 64).bytes_per_token(SPEC) == 132 + (64 + 2 + 16) + 256
    assert StateLayout(formats, 128).bytes_per_token(SPEC) == 132 + (64 + 1 + 16) + 256
    assert StateLayout((NOTHING, KV_FLOAT, KV_FLOAT, KV_FLOAT)).bytes_per_token(SPEC) == 3 * 256
    assert StateLayout((NOTHING,)).bytes_per_token(SPEC) == 0


@pytest.mark.parametrize(
    ("chunk_tokens", "chunks_of"),
    [
        (64, {0: 0, 1: 1, 63: 1, 64: 1, 65: 2, 128: 2, 129: 3}),
        (192, {0: 0, 1: 1, 64: 1, 192: 1, 193: 2, 384: 2, 385: 3}),
    ],
)
def test_num_chunks_rounds_up(chunk_tokens: int, chunks_of: dict[int, int]) -> None:
    layout = StateLayout((KV_FLOAT,), chunk_tokens)
    assert {tokens: layout.num_chunks(tokens) for tokens in chunks_of} == chunks_of


@pytest.mark.parametrize(
    ("bytes_per_token", "expected"),
    [
        pytest.param(8, 1024, id="tiny"),
        pytest.param(512, 1024, id="as-large-as-wished-at-most-tokens"),
        pytest.param(520, 960, id="just-over"),
        pytest.param(1024, 512, id="half"),
        pytest.param(2048, 256, id="quarter"),
        pytest.param(2736, 128, id="rounded-down"),
        pytest.param(8192, 64, id="as-large-as-wished-at-fewest-tokens"),
        pytest.param(65_536, 64, id="huge"),
    ],
)
def test_chunks_hold_about_half_a_mebibyte(bytes_per_token: int, expected: int) -> None:
    """A multiple of 64 tokens, from 64 to 1024."""
    spec = replace(SPEC, num_heads=1, num_kv_heads=1, head_dim=bytes_per_token // 8)
    assert StateLayout.of(spec, [KV_FLOAT]).chunk_tokens == expected


def test_chunks_are_as_large_as_the_largest_layer_allows() -> None:
    """Wherever it stands; layers that keep nothing have no say."""
    spec = replace(SPEC, hidden_size=1024)  # 4,100 bytes a token: 127 of them, rounded down
    large, small = HIDDEN_FLOAT, KV_FLOAT
    assert StateLayout.of(spec, [small]).chunk_tokens == 1024
    for formats in ([large], [large, small], [small, large], [NOTHING, small, large]):
        assert StateLayout.of(spec, formats).chunk_tokens == 64
    assert StateLayout.of(spec, [NOTHING, small]).chunk_tokens == 1024
    assert StateLayout.of(spec, [NOTHING]).chunk_tokens == 1024


@settings(deadline=None, derandomize=True, max_examples=200)
@given(
    st.integers(1, 20_000),
    st.integers(1, 64),
    st.integers(1, 256),
    st.lists(st.sampled_from([fmt for fmt in FORMATS if fmt != NOTHING]), min_size=1, max_size=3),
)
def test_any_layouts_chunks_are_as_large_as_they_may_be(
    hidden_size: int, kv_heads: int, head_dim: int, formats: list[LayerFormat]
) -> None:
    """No value is much larger than half a mebibyte, and 64 tokens more would be too many.

    "Much" are scales of channels, which do not grow with the tokens.
    """
    spec = replace(
        SPEC,
        hidden_size=hidden_size,
        num_heads=kv_heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
    )
    tokens = StateLayout.of(spec, formats).chunk_tokens

    assert tokens in range(64, 1025, 64)
    channels = 4 * max(spec.kv_width, spec.hidden_size)
    largest = max(fmt.num_bytes(spec, tokens) for fmt in formats)
    assert tokens == 64 or largest <= VALUE_BYTES + channels
    next_larger = max(fmt.num_bytes(spec, tokens + 64) for fmt in formats)
    assert tokens == 1024 or next_larger > VALUE_BYTES


def test_a_layouts_layers_are_those_it_was_made_of() -> None:
    formats = [NOTHING, HIDDEN_FLOAT, KV_FLOAT]
    layout = StateLayout.of(SPEC, formats)
    assert layout.layers == tuple(formats)
    assert layout == StateLayout(tuple(formats), layout.chunk_tokens)
    assert layout != StateLayout(tuple(formats), 64)
    assert len({layout, StateLayout.of(SPEC, formats)}) == 1


def test_runs_are_neighbouring_layers_of_one_format() -> None:
    """A format that comes again makes a run of its own; so does another dtype."""
    other = LayerFormat(HIDDEN, "int8")
    layers = (HIDDEN_FLOAT, HIDDEN_FLOAT, KV_FLOAT, HIDDEN_FLOAT, other, other, other)
    assert StateLayout(layers).runs == (
        (HIDDEN_FLOAT, 2),
        (KV_FLOAT, 1),
        (HIDDEN_FLOAT, 1),
        (other, 3),
    )


def test_layout_describes_itself_by_runs() -> None:
    bfloat16, int8 = LayerFormat(HIDDEN, "bfloat16"), LayerFormat(KV, "int8")
    layout = StateLayout((NOTHING, bfloat16, bfloat16, int8))
    assert str(layout) == "1 x none + 2 x hidden (bfloat16) + 1 x kv (int8)"


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_first_layers_may_keep_nothing(count: int) -> None:
    """All of them, too: then the state is no more than its tokens."""
    layers = (NOTHING,) * count + (KV_FLOAT,) * (3 - count)
    assert StateLayout(layers).num_none == count


@pytest.mark.parametrize(
    "layers",
    [
        pytest.param((KV_FLOAT, NOTHING), id="last"),
        pytest.param((HIDDEN_FLOAT, NOTHING, KV_FLOAT), id="between"),
        pytest.param((NOTHING, KV_FLOAT, NOTHING), id="first-and-last"),
    ],
)
def test_only_first_layers_may_keep_nothing(layers: tuple[LayerFormat, ...]) -> None:
    """A layer cannot be computed from the tokens without all layers below it."""
    with pytest.raises(ValueError, match=r"only first layers .*1 x none"):
        StateLayout(layers)
    with pytest.raises(ValueError, match="only first layers"):
        StateLayout.of(SPEC, layers)


def test_layout_refuses_no_layers() -> None:
    with pytest.raises(ValueError, match="at least one layer"):
        StateLayout(())
    with pytest.raises(ValueError, match="at least one layer"):
        StateLayout.of(SPEC, [])


@pytest.mark.parametrize("chunk_tokens", [0, -64, 65_536, 1 << 20])
def test_layout_refuses_chunks_that_are_empty_or_too_large(chunk_tokens: int) -> None:
    """A stored value's header has 16 bits for the number of its tokens."""
    with pytest.raises(ValueError, match=f"from 1 to 65535, not {chunk_tokens}"):
        StateLayout((KV_FLOAT,), chunk_tokens)


@pytest.mark.parametrize("chunk_tokens", [1, 65_535])
def test_layout_takes_the_smallest_and_the_largest_chunks(chunk_tokens: int) -> None:
    layout = StateLayout((KV_FLOAT,), chunk_tokens)
    assert layout.num_chunks(chunk_tokens) == 1
    assert StateLayout.from_json(layout.to_json()) == layout


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(StateLayout.of(SPEC, [KV_FLOAT]), id="one-layer"),
        pytest.param(StateLayout((HIDDEN_FLOAT, KV_FLOAT, HIDDEN_FLOAT)), id="mixed"),
        pytest.param(
            StateLayout((LayerFormat(KV, "float16"), LayerFormat(HIDDEN, "float32")), 17),
            id="mixed-dtypes-odd-chunks",
        ),
        pytest.param(StateLayout((NOTHING, NOTHING, KV_FLOAT), 1024), id="nothing-first"),
        pytest.param(StateLayout((NOTHING,)), id="nothing-at-all"),
        pytest.param(
            StateLayout((LayerFormat(HIDDEN, "int8-g64"), LayerFormat(KV, "int8"))), id="integers"
        ),
    ],
)
def test_layout_survives_json(layout: StateLayout) -> None:
    again = StateLayout.from_json(json.loads(json.dumps(layout.to_json())))
    assert again == layout
    assert again.runs == layout.runs


def test_equal_layouts_are_read_as_one_object() -> None:
    """Thousands of records share it, and what is computed for it."""
    data = StateLayout((HIDDEN_FLOAT, KV_FLOAT)).to_json()
    texts = [json.dumps(data), json.dumps(data), json.dumps({**data, "chunk_tokens": 128})]
    first, same, other = (StateLayout.from_json(json.loads(text)) for text in texts)
    assert first is same
    assert (first.chunk_tokens, other.chunk_tokens) == (64, 128)


@pytest.mark.parametrize(
    "junk",
    [
        pytest.param({}, id="empty"),
        pytest.param({"runs": [["kv", "float32", 1]]}, id="no-chunk-tokens"),
        pytest.param({"chunk_tokens": 64}, id="no-layers"),
        pytest.param({"chunk_tokens": "64", "runs": [["kv", "float32", 1]]}, id="tokens-as-text"),
        pytest.param({"chunk_tokens": 64.0, "runs": [["kv", "float32", 1]]}, id="tokens-as-float"),
        pytest.param({"chunk_tokens": True, "runs": [["kv", "float32", 1]]}, id="tokens-as-bool"),
        pytest.param({"chunk_tokens": 0, "runs": [["kv", "float32", 1]]}, id="chunks-of-nothing"),
        pytest.param({"chunk_tokens": 65536, "runs": [["kv", "float32", 1]]}, id="huge-chunks"),
        pytest.param({"chunk_tokens": 64, "runs": []}, id="zero-layers"),
        pytest.param({"chunk_tokens": 64, "runs": "kv"}, id="layers-as-text"),
        pytest.param({"chunk_tokens": 64, "runs": [["qv", "float32", 1]]}, id="unknown-kind"),
        pytest.param({"chunk_tokens": 64, "runs": [["kv", "float33", 1]]}, id="unknown-dtype"),
        pytest.param({"chunk_tokens": 64, "runs": [["kv", "int8-g64", 1]]}, id="dtype-of-others"),
        pytest.param({"chunk_tokens": 64, "runs": [["none", "int8", 1]]}, id="dtype-of-nothing"),
        pytest.param(
            {"chunk_tokens": 64, "runs": [["kv", "float32", 1], ["none", "", 1]]}, id="nothing-last"
        ),
        pytest.param({"chunk_tokens": 64, "runs": [["kv", 1]]}, id="no-dtype"),
        pytest.param({"chunk_tokens": 64, "runs": [["kv", "float32", 1, 1]]}, id="too-much"),
        pytest.param({"chunk_tokens": 64, "runs": [["kv", "int8", 0]]}, id="no-layer"),
        pytest.param({"chunk_tokens": 64, "runs": [["kv", "int8", -1]]}, id="fewer-than-no-layer"),
        pytest.param({"chunk_tokens": 64, "runs": [["kv", "int8", 1 << 40]]}, id="endless"),
        pytest.param({"chunk_tokens": 64, "runs": [["kv", "int8", 4000]] * 9}, id="many"),
        pytest.param({"chunk_tokens": 64, "runs": [["kv", "int8", "x"]]}, id="text-for-a-count"),
        pytest.param({"chunk_tokens": 64, "runs": [1]}, id="a-number-for-a-layer"),
        pytest.param({"chunk_tokens": 64, "runs": [[None, None, 1]]}, id="null-for-a-layer"),
        pytest.param({"chunk_tokens": 64, "runs": [[{}, [], 1]]}, id="objects-for-a-layer"),
    ],
)
def test_layout_refuses_junk_with_value_error(junk: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"."):
        StateLayout.from_json(junk)


# --- keys ---------------------------------------------------------------------------------------

ROOT = root_key("model", "tokenizer")


def test_root_depends_on_both_fingerprints() -> None:
    roots = {root_key(m, t) for m in ("a", "b", "ab", "") for t in ("a", "b", "ab", "")}
    assert len(roots) == 16
    assert {len(root) for root in roots} == {16}


def test_keys_are_the_same_in_every_process() -> None:
    """Blake2b of what is documented, so that stores written yesterday are found today."""
    text = f"hcache-rag/{FORMAT_VERSION}\0model\0tokenizer"
    root = hashlib.blake2b(text.encode(), digest_size=16).digest()
    path = root + bytes([1, 0, 0, 0, 2, 1, 0, 0])
    assert root == ROOT
    assert child_key(ROOT, token_array([1, 258])) == hashlib.blake2b(path, digest_size=16).digest()


def test_key_depends_on_the_parent() -> None:
    ids = token_array([1, 2, 3])
    assert child_key(ROOT, ids) != child_key(root_key("model", "other"), ids)
    assert child_key(child_key(ROOT, ids), ids) != child_key(ROOT, ids)


def test_key_depends_on_every_token_and_their_order() -> None:
    ids = [[], [1], [1, 2], [2, 1], [1, 2, 0], [258], [1 << 16], [1, 0]]
    keys = {child_key(ROOT, token_array(i)) for i in ids}
    assert len(keys) == len(ids)
    assert {len(key) for key in keys} == {16}


def test_a_path_is_not_its_tokens_joined() -> None:
    """Two states in a row are not one state: their boundary counts."""
    first, second = token_array([1, 2]), token_array([3])
    path = child_key(child_key(ROOT, first), second)
    assert path != child_key(ROOT, np.concatenate([first, second]))


@pytest.mark.parametrize(
    "ids",
    [
        pytest.param([1, 2, 3], id="list"),
        pytest.param((1, 2, 3), id="tuple"),
        pytest.param(np.array([1, 2, 3]), id="int64"),
        pytest.param(np.array([1, 9, 2, 9, 3], dtype=np.uint32)[::2], id="strided"),
        pytest.param(np.array([1, 2, 3], dtype=">u4"), id="big-endian"),
    ],
)
def test_token_array_makes_one_array_of_all_kinds(ids: object) -> None:
    array = token_array(ids)
    assert array.dtype == np.uint32
    assert array.flags.c_contiguous
    assert child_key(ROOT, array) == child_key(ROOT, token_array([1, 2, 3]))


# --- records ------------------------------------------------------------------------------------


def a_record(
    ids: object = (5, 6, 70000), text: str = 'Zoë said:\n"hi" \U0001f600', **fields: Any
) -> StateRecord:
    token_ids: TokenIds = token_array(ids)
    layout = StateLayout((LayerFormat(HIDDEN, "bfloat16"), LayerFormat(KV, "bfloat16")))
    parent = child_key(ROOT, token_array([1]))
    key = child_key(parent, token_ids)
    return replace(StateRecord(key, parent, ROOT, token_ids, text, layout, 12.25), **fields)


def says(record: StateRecord) -> dict[str, object]:
    """All fields, in a form that compares."""
    assert record.token_ids.dtype == np.uint32
    fields = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    return fields | {"token_ids": record.token_ids.tolist()}


@pytest.mark.parametrize(
    "record",
    [
        pytest.param(a_record(), id="text-with-newlines-and-emoji"),
        pytest.param(a_record(is_preamble=True), id="preamble"),
        pytest.param(a_record((), ""), id="nothing"),
        pytest.param(a_record([10] * 65), id="ids-that-are-newline-bytes"),
        pytest.param(a_record([2**32 - 1]), id="largest-id"),
        pytest.param(a_record(text="\ud800"), id="lone-surrogate"),
        pytest.param(
            a_record(layout=StateLayout((NOTHING, LayerFormat(HIDDEN, "int8-g64")), 256)),
            id="nothing-and-integers",
        ),
    ],
)
def test_record_survives_bytes(record: StateRecord) -> None:
    assert says(StateRecord.from_bytes(record.key, record.to_bytes())) == says(record)
    assert record.num_tokens == len(record.token_ids)


@settings(deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 2**32 - 1)), st.text(), st.booleans())
def test_any_record_survives_bytes(ids: list[int], text: str, is_preamble: bool) -> None:
    record = a_record(ids, text, is_preamble=is_preamble)
    assert says(StateRecord.from_bytes(record.key, record.to_bytes())) == says(record)


def test_record_of_another_key_is_refused() -> None:
    record = a_record()
    with pytest.raises(ValueError, match=r"."):
        StateRecord.from_bytes(ROOT, record.to_bytes())


def test_a_record_that_contradicts_its_key_is_refused() -> None:
    """Whole as it is, but not of the parent that the key was made from."""
    record = replace(a_record(), parent=ROOT)
    with pytest.raises(ValueError, match=r"."):
        StateRecord.from_bytes(record.key, record.to_bytes())


def with_head(record: StateRecord, **changes: object) -> bytes:
    head, _, ids = record.to_bytes().partition(b"\n")
    fields = {**json.loads(head), **changes}
    kept = {name: value for name, value in fields.items() if value is not ...}
    return json.dumps(kept).encode() + b"\n" + ids


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\n", id="empty-head"),
        pytest.param(b"\xff\xfe\n", id="not-unicode"),
        pytest.param(b"[]\n", id="head-is-a-list"),
        pytest.param(b"7\n", id="head-is-a-number"),
        pytest.param(a_record().to_bytes()[:-1], id="ids-one-byte-short"),
        pytest.param(a_record().to_bytes()[:-4], id="ids-one-token-short"),
        pytest.param(a_record().to_bytes() + b"\0\0\0\0", id="ids-one-token-long"),
        pytest.param(a_record().to_bytes().partition(b"\n")[0], id="no-ids"),
        pytest.param(a_record().to_bytes().partition(b"\n")[2], id="no-head"),
        pytest.param(with_head(a_record(), version=FORMAT_VERSION + 1), id="later-version"),
        pytest.param(with_head(a_record(), version=...), id="no-version"),
        pytest.param(with_head(a_record(), parent=ROOT.hex()), id="other-parent"),
        pytest.param(with_head(a_record(), parent="xyz"), id="parent-is-not-hex"),
        pytest.param(with_head(a_record(), parent=5), id="parent-is-a-number"),
        pytest.param(with_head(a_record(), root=...), id="no-root"),
        pytest.param(with_head(a_record(), root=""), id="empty-root"),
        pytest.param(with_head(a_record(), text=...), id="no-text"),
        pytest.param(with_head(a_record(), text=5), id="text-is-a-number"),
        pytest.param(with_head(a_record(), text=None), id="text-is-null"),
        pytest.param(with_head(a_record(), layout=[]), id="layout-is-a-list"),
        pytest.param(with_head(a_record(), layout={}), id="empty-layout"),
        pytest.param(with_head(a_record(), created_s="then"), id="time-is-a-word"),
        pytest.param(with_head(a_record(), created_s=None), id="time-is-null"),
    ],
)
def test_a_tampered_record_is_refused_with_value_error(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        StateRecord.from_bytes(a_record().key, data)


def sealed(record: StateRecord, **changes: object) -> bytes:
    """A record of other fields, written by somebody who computes the checksum."""
    data = with_head(record, **changes)[:-16]
    return data + hashlib.blake2b(record.key + data, digest_size=16).digest()


def test_sealing_is_what_a_record_does() -> None:
    assert sealed(a_record()) == a_record().to_bytes()


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"version": FORMAT_VERSION + 1}, id="later-version"),
        pytest.param({"version": ...}, id="no-version"),
        pytest.param({"parent": ROOT.hex()}, id="other-parent"),
        pytest.param({"parent": "xyz"}, id="parent-is-not-hex"),
        pytest.param({"parent": 5}, id="parent-is-a-number"),
        pytest.param({"root": ...}, id="no-root"),
        pytest.param({"root": ""}, id="empty-root"),
        pytest.param({"root": ROOT.hex()[:-2]}, id="root-of-15-bytes"),
        pytest.param({"root": ROOT.hex() + "00"}, id="root-of-17-bytes"),
        pytest.param({"text": ...}, id="no-text"),
        pytest.param({"text": 5}, id="text-is-a-number"),
        pytest.param({"text": None}, id="text-is-null"),
        pytest.param({"text": ["a", "b"]}, id="text-is-a-list"),
        pytest.param({"layout": []}, id="layout-is-a-list"),
        pytest.param({"layout": {}}, id="empty-layout"),
        pytest.param(
            {"layout": {"chunk_tokens": 64, "layers": [["kv", "int4"]]}}, id="unknown-dtype"
        ),
        pytest.param(
            {"layout": {"chunk_tokens": 64, "layers": [["kv", "float32"], ["none", ""]]}},
            id="impossible-layout",
        ),
        pytest.param({"created_s": "then"}, id="time-is-a-word"),
        pytest.param({"created_s": None}, id="time-is-null"),
    ],
)
def test_a_whole_record_that_this_version_does_not_know_is_refused(
    changes: dict[str, object],
) -> None:
    """Its checksum is right: another release, or another program, wrote it."""
    with pytest.raises(ValueError, match=r"^(?!the record fails its checksum)"):
        StateRecord.from_bytes(a_record().key, sealed(a_record(), **changes))


def test_a_record_whose_text_was_changed_is_refused() -> None:
    """A text that is not that of the token ids would answer from another text's tokens."""
    record = a_record(text="The sun is hot.")
    data = record.to_bytes().replace(b"is hot", b"is not")
    with pytest.raises(ValueError, match=r"."):
        StateRecord.from_bytes(record.key, data)


def test_no_flipped_bit_changes_what_a_record_says() -> None:
    """Text, layout, times and ids alike: what is not what was written is refused."""
    record = a_record()
    data = bytearray(record.to_bytes())
    wrong = 0
    for position in range(len(data)):
        for bit in range(8):
            data[position] ^= 1 << bit
            with suppress(ValueError):
                wrong += says(StateRecord.from_bytes(record.key, bytes(data))) != says(record)
            data[position] ^= 1 << bit
    assert wrong == 0, f"{wrong} of {8 * len(data)} flipped bits changed it unnoticed"


# --- errors -------------------------------------------------------------------------------------

ALL_ERRORS = [
    value
    for value in vars(errors).values()
    if inspect.isclass(value) and issubclass(value, BaseException)
]


def test_there_are_errors() -> None:
    assert len(ALL_ERRORS) >= 12


@pytest.mark.parametrize("kind", ALL_ERRORS, ids=lambda kind: kind.__name__)
def test_every_error_is_an_hcache_error(kind: type[BaseException]) -> None:
    assert issubclass(kind, errors.HCacheError)
    assert issubclass(kind, Exception)
    assert kind.__doc__


@pytest.mark.parametrize(
    ("kind", "parent"),
    [
        (errors.ModelNotFoundError, errors.ModelError),
        (errors.UnsupportedModelError, errors.ModelError),
        (errors.StoreOpenError, errors.StoreError),
        (errors.StoreFullError, errors.StoreError),
        (errors.DamagedStateError, errors.StateError),
        (errors.MissingStateError, errors.StateError),
    ],
    ids=lambda kind: kind.__name__,
)
def test_the_tree_of_errors(kind: type[Exception], parent: type[Exception]) -> None:
    assert issubclass(kind, parent)
    assert errors.__doc__ is not None
    assert kind.__name__ in errors.__doc__


def test_prompt_too_long_is_a_value_error_with_its_numbers() -> None:
    error = errors.PromptTooLongError(900, 200, 1024)
    assert isinstance(error, ValueError)
    assert (error.prompt_tokens, error.max_new_tokens, error.window_tokens) == (900, 200, 1024)
    for number in ("900", "200", "1024"):
        assert number in str(error)


@pytest.mark.parametrize("kind", [errors.DamagedStateError, errors.MissingStateError])
def test_state_errors_say_which_state_and_why(kind: type[errors.StateError]) -> None:
    error = kind(b"\x01\xab", "it is gone")
    assert (error.key, error.reason) == (b"\x01\xab", "it is gone")
    assert str(error) == "state 01ab: it is gone"
