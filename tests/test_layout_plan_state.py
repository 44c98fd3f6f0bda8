"""What a state keeps, why, and what is known about it: spec, layout, plan, state, errors."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hcache_rag import errors
from hcache_rag.layout import LayerFormat, Representation, StateLayout
from hcache_rag.plan import choose_layout
from hcache_rag.spec import ModelSpec
from hcache_rag.state import FORMAT_VERSION, StateRecord, TokenIds, child_key, root_key, token_array

HIDDEN, KV = Representation.HIDDEN, Representation.KV
SPEC = ModelSpec(
    name="toy",
    family="llama",
    num_layers=3,
    hidden_size=64,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    window_tokens=100,
    dtype="bfloat16",
)


# --- spec ---------------------------------------------------------------------------------------


def test_spec_knows_its_widths() -> None:
    assert SPEC.kv_width == 32
    assert [replace(SPEC, dtype=d).dtype_bytes for d in ("float32", "bfloat16", "float16")] == [
        4,
        2,
        2,
    ]


def test_spec_refuses_an_unknown_dtype() -> None:
    with pytest.raises(ValueError, match=r"'int3'.*float32"):
        replace(SPEC, dtype="int3")


def test_spec_refuses_heads_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match=r"8 query heads.* 3 KV heads"):
        replace(SPEC, num_kv_heads=3)


# --- layout -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("representation", "dtype", "expected"),
    [
        (HIDDEN, "float32", 64 * 4 + 4),
        (HIDDEN, "bfloat16", 64 * 2 + 4),
        (HIDDEN, "float16", 64 * 2 + 4),
        (KV, "float32", 2 * 32 * 4),
        (KV, "bfloat16", 2 * 32 * 2),
        (KV, "float16", 2 * 32 * 2),
    ],
    ids=str,
)
def test_bytes_per_token_of_a_layer(
    representation: Representation, dtype: str, expected: int
) -> None:
    """Hidden rows carry a float32 row scale; K and V carry nothing."""
    assert LayerFormat(representation, dtype).bytes_per_token(SPEC) == expected


def test_bytes_per_token_of_a_layout_is_the_sum_of_its_layers() -> None:
    layout = StateLayout.of([HIDDEN, KV, KV], "float16")
    assert layout.bytes_per_token(SPEC) == (128 + 4) + 128 + 128


@pytest.mark.parametrize(
    ("tokens", "chunks"), [(0, 0), (1, 1), (63, 1), (64, 1), (65, 2), (128, 2), (129, 3)]
)
def test_num_chunks_rounds_up(tokens: int, chunks: int) -> None:
    assert StateLayout.of([KV], "float32").num_chunks(tokens) == chunks


def test_layout_describes_itself_by_runs() -> None:
    layout = StateLayout.of([HIDDEN, HIDDEN, KV], "bfloat16")
    assert str(layout) == "2 x hidden (bfloat16) + 1 x kv (bfloat16)"


def test_layout_refuses_no_layers() -> None:
    with pytest.raises(ValueError, match="at least one layer"):
        StateLayout(())


@pytest.mark.parametrize("chunk_tokens", [0, -64])
def test_layout_refuses_empty_chunks(chunk_tokens: int) -> None:
    with pytest.raises(ValueError, match=str(chunk_tokens)):
        StateLayout((LayerFormat(KV, "float32"),), chunk_tokens)


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(StateLayout.of([KV], "float32"), id="one-layer"),
        pytest.param(StateLayout.of([HIDDEN, KV, HIDDEN], "bfloat16"), id="mixed"),
        pytest.param(
            StateLayout((LayerFormat(KV, "float16"), LayerFormat(HIDDEN, "float32")), 17),
            id="mixed-dtypes-odd-chunks",
        ),
    ],
)
def test_layout_survives_json(layout: StateLayout) -> None:
    assert StateLayout.from_json(json.loads(json.dumps(layout.to_json()))) == layout


@pytest.mark.parametrize(
    "junk",
    [
        pytest.param({}, id="empty"),
        pytest.param({"layers": [["kv", "float32"]]}, id="no-chunk-tokens"),
        pytest.param({"chunk_tokens": 64}, id="no-layers"),
        pytest.param({"chunk_tokens": "64", "layers": [["kv", "float32"]]}, id="tokens-as-text"),
        pytest.param({"chunk_tokens": 0, "layers": [["kv", "float32"]]}, id="chunks-of-nothing"),
        pytest.param({"chunk_tokens": 64, "layers": []}, id="zero-layers"),
        pytest.param({"chunk_tokens": 64, "layers": "kv"}, id="layers-as-text"),
        pytest.param({"chunk_tokens": 64, "layers": [["qv", "float32"]]}, id="unknown-kind"),
        pytest.param({"chunk_tokens": 64, "layers": [["kv", "float33"]]}, id="unknown-dtype"),
        pytest.param({"chunk_tokens": 64, "layers": [["kv"]]}, id="no-dtype"),
        pytest.param({"chunk_tokens": 64, "layers": [["kv", "float32", 1]]}, id="too-much"),
        pytest.param({"chunk_tokens": 64, "layers": [1]}, id="a-number-for-a-layer"),
        pytest.param({"chunk_tokens": 64, "layers": [[None, None]]}, id="nothing-for-a-layer"),
    ],
)
def test_layout_refuses_junk_with_value_error(junk: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"."):
        StateLayout.from_json(junk)


# --- plan ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hidden_size", "expected"),
    [
        pytest.param(63, HIDDEN, id="one-below"),
        pytest.param(64, KV, id="equal"),
        pytest.param(65, KV, id="one-above"),
        pytest.param(16, HIDDEN, id="far-below"),
        pytest.param(4096, KV, id="far-above"),
    ],
)
def test_auto_keeps_the_smaller_form(hidden_size: int, expected: Representation) -> None:
    """Hidden states where `E < 2 * G * D` (64 here), K and V otherwise; all layers alike."""
    spec = replace(SPEC, hidden_size=hidden_size)

    choice = choose_layout(spec)

    assert choice.layout == StateLayout.of([expected] * 3, "bfloat16")
    assert choice.reason.startswith(f"{expected}:")
    assert str(hidden_size) in choice.reason
    assert "64" in choice.reason


@pytest.mark.parametrize(
    ("name", "hidden_size", "kv_heads", "head_dim", "expected"),
    [
        ("Llama-2-7B", 4096, 32, 128, HIDDEN),
        ("OPT-30B", 7168, 56, 128, HIDDEN),
        ("Llama-3-8B", 4096, 8, 128, KV),
        ("Qwen2.5-7B", 3584, 4, 128, KV),
        ("SmolLM2-135M", 576, 3, 64, KV),
    ],
)
def test_auto_on_known_models(
    name: str, hidden_size: int, kv_heads: int, head_dim: int, expected: Representation
) -> None:
    """Multi-head models keep hidden states, grouped-query models K and V."""
    spec = ModelSpec(
        name, "llama", 2, hidden_size, kv_heads, kv_heads, head_dim, 4096, dtype="float16"
    )
    assert {fmt.representation for fmt in choose_layout(spec).layout.layers} == {expected}


@pytest.mark.parametrize("asked", [HIDDEN, KV], ids=str)
def test_one_representation_for_all_layers(asked: Representation) -> None:
    choice = choose_layout(SPEC, asked.value)
    assert choice.layout == StateLayout.of([asked] * 3, "bfloat16")
    assert choice.reason == f"{asked.value!r} was asked for"


def test_one_representation_per_layer() -> None:
    choice = choose_layout(SPEC, ["hidden", "kv", "hidden"])
    assert choice.layout == StateLayout.of([HIDDEN, KV, HIDDEN], "bfloat16")
    assert "caller" in choice.reason


@pytest.mark.parametrize("count", [0, 2, 4])
def test_not_one_representation_per_layer(count: int) -> None:
    with pytest.raises(ValueError, match=f"{count} representations .* 3 layers"):
        choose_layout(SPEC, ["kv"] * count)


@pytest.mark.parametrize("asked", ["", "KV", "none", "hiden"])
def test_an_unknown_representation_is_named(asked: str) -> None:
    with pytest.raises(ValueError, match=f"'{asked}'.*auto, hidden, kv"):
        choose_layout(SPEC, asked)


def test_an_unknown_representation_of_one_layer_is_named() -> None:
    with pytest.raises(ValueError, match=r"'q8'.*hidden, kv"):
        choose_layout(SPEC, ["kv", "q8", "kv"])


def test_auto_for_one_layer_is_not_called_known_when_it_is_refused() -> None:
    with pytest.raises(ValueError, match="'auto'") as caught:
        choose_layout(SPEC, ["kv", "auto", "kv"])
    assert "auto" not in str(caught.value).split("known:")[1]


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
    layout = StateLayout.of([HIDDEN, KV], "bfloat16")
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
