"""Changed documents: states that go on from what is stored, against states read as a whole."""

from __future__ import annotations

import random
import string
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracle import encode, greedy
from tiny import SHAPES, VOCABULARY, Shape, byte_tokenizer, tiny_model
from transformers import PreTrainedModel

from hcache_rag import GenerationOptions, HCacheEngine, StateStore
from hcache_rag.choice import fixed_layout
from hcache_rag.codec import ChunkShape, decode
from hcache_rag.layout import LayerFormat, Representation, StateLayout
from hcache_rag.models import ModelAdapter
from hcache_rag.staging import chunk_tensors
from hcache_rag.state import StateRecord

TOKENIZER = byte_tokenizer()
PREAMBLE = "Answer from the passages below.\n\n"
QUESTION = "\n\nQuestion: what is it?\nAnswer:"
CHUNK_TOKENS = 64
PRINTABLE = {"suppress_tokens": list(range(94, VOCABULARY))}


def words(length: int, seed: int) -> str:
    source = random.Random(seed)
    return "".join(source.choices(string.ascii_lowercase + " ", k=length - 1)) + "."


DOCUMENT = words(300, seed=1)
CHANGED_AT = 210
CHANGED = DOCUMENT[:CHANGED_AT] + "#" + words(80, seed=2)
SHORTER = DOCUMENT[:CHANGED_AT]
LONGER = DOCUMENT + words(40, seed=3)
VERSIONS = {"changed": CHANGED, "shorter": SHORTER, "longer": LONGER}

KV, HIDDEN, NONE = Representation.KV, Representation.HIDDEN, Representation.NONE
LAYOUTS = {
    "kv": [(KV, "float32")],
    "hidden": [(HIDDEN, "float32")],
    "mixed": [(HIDDEN, "float32"), (KV, "float32")],
    "first-not-kept": [(NONE, ""), (HIDDEN, "float32"), (KV, "float32")],
    "bfloat16": [(HIDDEN, "bfloat16"), (KV, "bfloat16")],
    "int8": [(HIDDEN, "int8-smooth"), (KV, "int8"), (HIDDEN, "int8-g64")],
}


pytestmark = pytest.mark.usefixtures("one_thread")


@cache
def model_of(shape: Shape) -> PreTrainedModel:
    """A model that tests share and leave as it is."""
    return tiny_model(shape)


def layout_of(shape: Shape, name: str) -> StateLayout:
    """The formats of a layout, the last one for all layers that are left."""
    formats = [LayerFormat(*fmt) for fmt in LAYOUTS[name]]
    formats += formats[-1:] * shape.layers
    return StateLayout(tuple(formats[: shape.layers]), CHUNK_TOKENS)


def engine_of(shape: Shape, store: StateStore, name: str, preamble: str = PREAMBLE) -> HCacheEngine:
    return HCacheEngine(
        model_of(shape),
        TOKENIZER,
        store,
        preamble=preamble,
        representation=layout_of(shape, name),
        fidelity="none",
    )


@contextmanager
def counted_tokens(model: PreTrainedModel) -> Iterator[list[int]]:
    """How many tokens each pass of the model reads."""
    read: list[int] = []
    decoder: Any = model.get_submodule("model")

    def count(_module: object, _args: object, kwargs: dict[str, Any]) -> None:
        read.append(kwargs["input_ids"].numel())

    handle = decoder.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield read
    finally:
        handle.remove()


def arrays_of(
    engine: HCacheEngine, record: StateRecord
) -> dict[tuple[int, int], list[np.ndarray[Any, Any]]]:
    """All stored numbers of a state as they are, by layer and chunk."""
    found, step = {}, record.layout.chunk_tokens
    with engine.store.reading() as reader:
        for layer, fmt in enumerate(record.layout.layers):
            for chunk in range(record.layout.num_chunks(record.num_tokens) if fmt.dtype else 0):
                tokens = min(step, record.num_tokens - chunk * step)
                shape = ChunkShape(fmt, tokens, engine.adapter.spec)
                value = reader.value(record.key, layer, chunk)
                parts = chunk_tensors(fmt, decode(shape, record.key, layer, chunk, value), tokens)
                found[layer, chunk] = [part.double().numpy().copy() for part in parts]
    return found


def tolerance(layout: StateLayout) -> float:
    """Rounding of sums in another order; some steps of the stored form where that is coarser."""
    dtypes = {fmt.dtype for fmt in layout.layers}
    return 4.0 if "int8" in dtypes else 0.02 if "bfloat16" in dtypes else 2e-5


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[2]], ids=lambda shape: shape.label)
def test_a_changed_document_is_read_from_the_change_on(
    shape: Shape, name: str, version: str, store: StateStore
) -> None:
    """Its state is the one of a store that never saw the earlier version; few tokens are read."""
    changed = VERSIONS[version]
    engine = engine_of(shape, store, name)
    engine.precompute([DOCUMENT])
    is_int8 = name == "int8"
    common = min(CHANGED_AT if changed is not LONGER else len(DOCUMENT), len(changed) - 1)
    known = common // CHUNK_TOKENS * CHUNK_TOKENS if is_int8 else common
    with counted_tokens(model_of(shape)) as read:
        report = engine.precompute([changed])
    assert (report.stored, report.continued, report.continued_tokens) == (1, 1, known)
    assert report.stored_tokens == len(changed)
    assert read[-1] == len(changed) - known
    assert sum(read) == read[-1] + (known if name == "first-not-kept" else 0)
    [record] = store.find(changed)
    with StateStore.in_memory() as fresh:
        other = engine_of(shape, fresh, name)
        other.precompute([changed])
        [expected] = fresh.find(changed)
        assert (record.key, record.layout) == (expected.key, expected.layout)
        found, wanted = arrays_of(engine, record), arrays_of(other, expected)
    assert found.keys() == wanted.keys()
    for place, arrays in found.items():
        for one, two in zip(arrays, wanted[place], strict=True):
            assert one.shape == two.shape
            assert np.abs(one - two).max() <= tolerance(record.layout)
    assert store.verify().is_whole


@pytest.mark.parametrize("name", ["kv", "hidden", "mixed", "first-not-kept"])
def test_answers_from_a_continued_state_are_transformers_own(name: str, store: StateStore) -> None:
    """After three changes one after another; greedy tokens of `generate` with no cache."""
    shape = SHAPES[2]
    engine = engine_of(shape, store, name)
    versions = [DOCUMENT, DOCUMENT[:260] + "!", DOCUMENT[:230] + "?" + words(60, 5), CHANGED]
    for number, version in enumerate(versions):
        assert engine.precompute([version]).continued == (number > 0)
    prompt = PREAMBLE + CHANGED + QUESTION
    expected = greedy(
        model_of(shape), encode(TOKENIZER, prompt, is_document=False), 24, **PRINTABLE
    )
    options = GenerationOptions(max_new_tokens=24, temperature=0.0, extra=PRINTABLE)
    answer = engine.generate(prompt, options=options)
    assert list(answer.token_ids) == list(expected)
    assert answer.provenance.exact_tokens >= len(CHANGED)


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_sealed_is_restored_as_what_is_not(name: str, tmp_path: Path) -> None:
    """An encrypted namespace and a plain one, the same answers: what is decrypted must be kept."""
    shape, answers = SHAPES[2], []
    texts = [DOCUMENT, CHANGED, words(500, 11), words(700, 12)]
    prompt = PREAMBLE + "\n\n".join(texts) + QUESTION
    for number, key in enumerate((None, bytes(range(32)))):
        with StateStore.open(tmp_path / str(number), key=key) as store:
            engine = engine_of(shape, store, name)
            engine.precompute(texts[:1])
            assert engine.precompute(texts).continued == 1
            options = GenerationOptions(max_new_tokens=16, temperature=0.0, extra=PRINTABLE)
            for _ in range(3):
                found = engine.generate(prompt, options=options)
                assert found.provenance.restored_tokens > sum(map(len, texts)) - 10
                answers.append(found.token_ids)
    assert len(set(answers)) == 1


@pytest.mark.parametrize("name", ["kv", "int8"])
def test_a_document_that_has_not_changed_costs_nothing(name: str, store: StateStore) -> None:
    engine = engine_of(SHAPES[1], store, name)
    engine.precompute([DOCUMENT])
    with counted_tokens(model_of(SHAPES[1])) as read:
        report = engine.precompute([DOCUMENT, DOCUMENT])
    assert (report.stored, report.reused, report.continued, read) == (0, 1, 0, [])


def test_only_states_after_the_same_preamble_and_in_the_same_form_are_gone_on_from(
    store: StateStore,
) -> None:
    """Nor from one that shares less than half, or that was computed by another model."""
    engine_of(SHAPES[1], store, "kv").precompute([DOCUMENT])
    for other in (
        engine_of(SHAPES[1], store, "kv", preamble="Another preamble of some length.\n\n"),
        engine_of(SHAPES[1], store, "hidden"),
        engine_of(SHAPES[3], store, "kv"),
    ):
        report = other.precompute([CHANGED])
        assert (report.stored, report.continued) == (1, 0)
        store.delete(store.find(CHANGED)[0].key)
    engine = engine_of(SHAPES[1], store, "kv")
    assert engine.precompute([DOCUMENT[:100] + words(150, 7)]).continued == 0
    assert engine.precompute([DOCUMENT[:50]]).continued == 0


def test_what_is_damaged_is_not_gone_on_from(
    store: StateStore, caplog: pytest.LogCaptureFixture
) -> None:
    """The document is read as a whole, and a warning says why."""
    engine = engine_of(SHAPES[1], store, "kv")
    engine.precompute([DOCUMENT])
    [record] = store.find(DOCUMENT)
    with store._writing() as txn:
        key, data = next(iter(txn.scan("chunks", store._rows.prefix + record.key)))
        txn.put("chunks", key, data[:-1] + bytes([data[-1] ^ 1]))
    report = engine.precompute([CHANGED])
    assert (report.stored, report.continued) == (1, 0)
    assert "is read as a whole" in caplog.text


def test_layouts_that_the_library_chooses_go_on_too(store: StateStore) -> None:
    """Int8 in whole chunks, with the chunk size of `StateLayout.of`."""
    spec = ModelAdapter(model_of(SHAPES[1])).spec
    layout = fixed_layout(spec, "kv", "int8").layout
    long = words(3 * layout.chunk_tokens, seed=9)
    engine = HCacheEngine(
        model_of(SHAPES[1]), TOKENIZER, store, preamble=PREAMBLE, representation=layout
    )
    engine.precompute([long])
    report = engine.precompute([long[:-5] + "?"])
    assert (report.continued, report.continued_tokens) == (1, 2 * layout.chunk_tokens)
