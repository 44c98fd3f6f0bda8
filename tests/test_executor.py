"""Plans carried out: what is recomputed equals what is stored, in any mix; errors and cancelling.

One token is one byte here. The reference for all mixes is the plan that reads everything.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import Reading, encode, prefill
from threads import own_threads
from tiny import SHAPES, Shape, byte_tokenizer, tiny_model
from torch import Tensor

from hcache_rag import GenerationOptions, HCacheEngine, StateStore
from hcache_rag.errors import DamagedStateError
from hcache_rag.executor import Execution, open_restoring, span_sizes
from hcache_rag.lanes import Cancelled
from hcache_rag.layout import STORAGE_DTYPES, LayerFormat, Representation, StateLayout
from hcache_rag.models import ModelAdapter
from hcache_rag.plan import Conditions, Cut, RestorePlan, plan_restore
from hcache_rag.profile import HardwareProfile, Rates, ReadRate
from hcache_rag.schedule import schedule
from hcache_rag.timeline import COMPUTING, READING

HIDDEN, KV, NONE = Representation.HIDDEN, Representation.KV, Representation.NONE
TOKENIZER = byte_tokenizer()
PREAMBLE = "Answer from the passages below.\n\n"
DOCUMENTS = [
    "The harbour of Saltmere has a red lighthouse that was built in 1862 and is 31 metres tall. "
    * 2,
    "The library opens at nine in the morning.",
    "The mayor keeps bees on the roof of the town hall, and sells their honey in autumn. " * 3,
]
QUESTION = "\n\nWho keeps bees?"
PROMPT = PREAMBLE + "\n\n".join(text.strip() for text in DOCUMENTS) + QUESTION
CHUNK_TOKENS = 64
GREEDY = GenerationOptions(max_new_tokens=8, temperature=0)
NEAR: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
"""What float32 sums in another order may differ by."""

by_shape = pytest.mark.parametrize("shape", SHAPES, ids=[shape.label for shape in SHAPES])


pytestmark = pytest.mark.usefixtures("one_thread")


def layout_of(shape: Shape, *formats: LayerFormat, chunk_tokens: int = CHUNK_TOKENS) -> StateLayout:
    """Formats in turn, layer by layer."""
    layers = [formats[i % len(formats)] for i in range(shape.layers)]
    return StateLayout(tuple(layers), chunk_tokens)


def engine_of(
    shape: Shape, store: StateStore | Path, layout: StateLayout, **options: Any
) -> HCacheEngine:
    keep = {"preamble": PREAMBLE, "fidelity": "none", "profile": None, **options}
    made = HCacheEngine(tiny_model(shape), TOKENIZER, store, representation=layout, **keep)
    made.precompute(DOCUMENTS)
    return made


@contextmanager
def restoring(engine: HCacheEngine, cuts: Sequence[Cut] | None, piece_tokens: int = 100) -> Any:
    """The engine's cache for the prompt, under a plan of ours."""
    composition = engine.bound.compose(engine.bound.resolve(PROMPT).pieces)
    sizes = span_sizes(composition, engine.bound.prefixes)
    plan = plan_restore(engine.adapter.spec, sizes, None)
    if cuts is not None:
        plan = RestorePlan(tuple(cuts), piece_tokens)
    work = schedule(engine.adapter.spec, sizes, plan)
    with (
        engine.answering.buffers.borrow(len(composition.token_ids)) as buffers,
        open_restoring(
            engine.adapter,
            composition,
            buffers,
            engine.store,
            work=work,
            prefixes=engine.bound.prefixes,
            reference_mode=engine.answering.reference_mode,
        ) as (cache, execution),
    ):
        yield composition, cache, execution


@torch.no_grad()
def reading(
    engine: HCacheEngine, cuts: Sequence[Cut] | None = None, piece_tokens: int = 100
) -> tuple[Reading, Execution]:
    """K, V of all positions and the last logits after the first pass."""
    with restoring(engine, cuts, piece_tokens) as (composition, cache, execution):
        execution.recompute()
        ids = torch.from_numpy(composition.token_ids.astype("int64")).unsqueeze(0)
        model: Any = engine.adapter.model
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[0, -1]
        pairs = [cache.by_position(layer) for layer in range(engine.adapter.spec.num_layers)]
    keys, values = (torch.cat(side) for side in zip(*pairs, strict=True))
    return Reading(keys, values, logits), execution


def assert_near(ours: Reading, theirs: Reading) -> None:
    torch.testing.assert_close(ours.keys, theirs.keys, **NEAR)
    torch.testing.assert_close(ours.values, theirs.values, **NEAR)
    torch.testing.assert_close(ours.logits, theirs.logits, **NEAR)


def spans(engine: HCacheEngine) -> list[int]:
    """Tokens of the prompt's restored spans, the preamble first."""
    composition = engine.bound.compose(engine.bound.resolve(PROMPT).pieces)
    return [span.num_tokens for span in composition.spans]


# --- what is recomputed is what is stored -----------------------------------------------------


@by_shape
@pytest.mark.parametrize("kept", [HIDDEN, KV], ids=str)
def test_recomputed_first_layers_are_the_stored_ones(
    shape: Shape, kept: Representation, store: StateStore
) -> None:
    """Everything read / the first 1, 2, ... layers of all spans recomputed: the same K and V."""
    engine = engine_of(shape, store, layout_of(shape, LayerFormat(kept, "float32")))
    expected, execution = reading(engine)
    assert execution.timeline.busy_s(COMPUTING, "recompute") == 0
    everything = execution.timeline.bytes_read
    for layers in range(1, shape.layers + 1):
        found, execution = reading(engine, [Cut(0, layers)] * len(spans(engine)))
        assert_near(found, expected)
        share = 1 - layers / shape.layers
        assert execution.timeline.bytes_read == pytest.approx(share * everything)


@by_shape
def test_recomputed_first_tokens_are_the_stored_ones(shape: Shape, store: StateStore) -> None:
    """Everything read / the tokens up to each chunk's end recomputed in all layers: the same."""
    engine = engine_of(shape, store, layout_of(shape, LayerFormat(HIDDEN, "float32")))
    expected, _ = reading(engine)
    lengths = spans(engine)
    for last in range(len(lengths)):
        for end in range(CHUNK_TOKENS, lengths[last] + CHUNK_TOKENS, CHUNK_TOKENS):
            cuts = [Cut(n) for n in lengths[:last]] + [Cut(min(end, lengths[last]))]
            cuts += [Cut()] * (len(lengths) - len(cuts))
            assert_near(reading(engine, cuts)[0], expected)


@by_shape
def test_layers_that_keep_nothing_are_recomputed(shape: Shape, tmp_path: Path) -> None:
    """All layers kept / the first two left out: the same K and V, and fewer bytes."""
    kept = LayerFormat(KV, "float32")
    whole = layout_of(shape, kept)
    less = StateLayout((LayerFormat(NONE),) * 2 + (kept,) * (shape.layers - 2), CHUNK_TOKENS)
    with engine_of(shape, tmp_path / "whole", whole) as engine:
        expected, whole_run = reading(engine)
    with engine_of(shape, tmp_path / "less", less) as engine:
        found, less_run = reading(engine)
        answer = engine.generate(PROMPT, options=GREEDY)
    assert_near(found, expected)
    assert less_run.timeline.bytes_read < whole_run.timeline.bytes_read
    assert answer.provenance.restored_tokens == sum(map(len, (t.strip() for t in DOCUMENTS))) + len(
        PREAMBLE
    )
    assert answer.provenance.seconds["recomputing"] > 0


def test_layers_that_keep_nothing_after_an_unknown_prefix_are_read_afresh(tmp_path: Path) -> None:
    """Their states cannot be completed: the tokens are read, counted and reported."""
    shape = SHAPES[0]
    kept = LayerFormat(KV, "float32")
    layout = StateLayout((LayerFormat(NONE),) + (kept,) * (shape.layers - 1), CHUNK_TOKENS)
    with engine_of(shape, tmp_path, layout) as engine:
        preamble = next(record for record in engine.store.records() if record.is_preamble)
        engine.store.delete(preamble.key)
    with HCacheEngine(
        tiny_model(shape), TOKENIZER, tmp_path, preamble="Another.\n\n", profile=None
    ) as other:
        answer = other.generate("Another.\n\n" + DOCUMENTS[0].strip() + QUESTION, options=GREEDY)
    assert answer.provenance.restored_tokens == 0
    assert answer.provenance.missed_tokens == len(DOCUMENTS[0].strip())
    assert any("not known" in warning for warning in answer.provenance.warnings)


def test_a_document_after_another_preamble_is_recomputed_after_that_one(tmp_path: Path) -> None:
    """Read as stored / recomputed: the same, since the old preamble's tokens are in the store."""
    shape = SHAPES[1]
    layout = layout_of(shape, LayerFormat(KV, "float32"))
    with engine_of(shape, tmp_path, layout):
        pass
    with HCacheEngine(
        tiny_model(shape), TOKENIZER, tmp_path, preamble="Another.\n\n", profile=None
    ) as other:
        expected, _ = reading(other)
        found, execution = reading(other, [Cut(0, 2)] * len(spans(other)))
    assert execution.timeline.busy_s(COMPUTING, "recompute") > 0
    assert_near(found, expected)


def test_an_exact_restore_with_recomputing_is_prefill(store: StateStore) -> None:
    """Transformers' own prefill / one document, some layers recomputed: the same logits."""
    shape = SHAPES[3]
    engine = engine_of(shape, store, layout_of(shape, LayerFormat(HIDDEN, "float32")))
    prompt = PREAMBLE + DOCUMENTS[0].strip() + QUESTION
    engine.planner.profile = recomputing_profile()
    engine.planner._now = Conditions(engine.planner.profile.cold)
    answer = engine.generate(prompt, options=GREEDY)
    assert "recomputed" in answer.provenance.plan
    theirs = prefill(engine.adapter.model, encode(TOKENIZER, prompt, is_document=False))
    with engine.restoring(prompt) as (composition, cache):
        ids = torch.from_numpy(composition.token_ids.astype("int64")).unsqueeze(0)
        model: Any = engine.adapter.model
        with torch.no_grad():
            logits: Tensor = model(input_ids=ids, past_key_values=cache).logits[0, -1]
    torch.testing.assert_close(logits, theirs.logits, **NEAR)


def recomputing_profile() -> HardwareProfile:
    """A machine that reads so slowly that most is recomputed, though not all."""
    return HardwareProfile("slow disk", "made up", ReadRate(2e7), ReadRate(2e7), Rates(*[1e10] * 4))


def test_cold_and_warm_are_planned_differently(store: StateStore) -> None:
    """An engine on a slow disk recomputes; when it turns out to be fast it reads."""
    shape = SHAPES[0]
    engine = engine_of(shape, store, layout_of(shape, LayerFormat(KV, "float32")))
    engine.planner.profile = recomputing_profile()
    engine.planner._now = Conditions(engine.planner.profile.cold)
    plans = [engine.generate(PROMPT, options=GREEDY).provenance.plan for _ in range(12)]
    assert "recomputed" in plans[0]
    assert plans[-1] == "everything that is stored is read"
    assert len({engine.generate(PROMPT, options=GREEDY).text for _ in range(2)}) == 1


# --- storage dtypes ---------------------------------------------------------------------------


FORMATS = [LayerFormat(kind, dtype) for kind in (HIDDEN, KV) for dtype in STORAGE_DTYPES[kind]]


@pytest.mark.parametrize("reference_mode", [False, True], ids=["folded", "reference"])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@by_shape
def test_every_storage_dtype_is_restored(
    shape: Shape, fmt: LayerFormat, reference_mode: bool, tmp_path: Path
) -> None:
    """Stored as float32 / in every other dtype: the same K and V but for the dtype's own error.

    Chunks of one token and odd lengths, documents that share a piece, and pieces of one chunk.
    """
    error = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}.get(fmt.dtype, 6e-2)
    plain = LayerFormat(fmt.representation, "float32")
    with engine_of(shape, tmp_path / "plain", layout_of(shape, plain)) as engine:
        expected, _ = reading(engine)
    for chunk_tokens in (37, 1024):
        layout = layout_of(shape, fmt, chunk_tokens=chunk_tokens)
        with engine_of(
            shape, tmp_path / str(chunk_tokens), layout, reference_mode=reference_mode
        ) as engine:
            found, _ = reading(engine)
        for ours, theirs in ((found.keys, expected.keys), (found.values, expected.values)):
            scale = theirs.pow(2).mean().sqrt()
            assert (ours - theirs).pow(2).mean().sqrt() < error * scale
            assert not ours.isnan().any()


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_a_bfloat16_model_restores_every_storage_dtype(fmt: LayerFormat, tmp_path: Path) -> None:
    """Kept in the model's own bfloat16 / in every other dtype: near, and nothing unwritten."""
    shape = SHAPES[1]
    model = tiny_model(shape, dtype=torch.bfloat16)
    found = []
    for dtype in ("bfloat16", fmt.dtype):
        layout = layout_of(shape, LayerFormat(fmt.representation, dtype))
        with HCacheEngine(
            model,
            TOKENIZER,
            tmp_path / dtype,
            preamble=PREAMBLE,
            representation=layout,
            fidelity="none",
            profile=None,
        ) as engine:
            engine.precompute(DOCUMENTS)
            found.append(reading(engine)[0])
    own, other = found
    for ours, theirs in ((other.keys, own.keys), (other.values, own.values)):
        scale = theirs.float().pow(2).mean().sqrt()
        assert (ours - theirs).float().pow(2).mean().sqrt() < 6e-2 * scale


def test_exact_fidelity_keeps_and_uses_every_bit(tmp_path: Path) -> None:
    """States in eight bits are not exact: they are read afresh, and it is said why."""
    shape = SHAPES[0]
    model = tiny_model(shape)
    prompt = PREAMBLE + DOCUMENTS[0].strip() + QUESTION
    with HCacheEngine(model, TOKENIZER, tmp_path / "a", preamble=PREAMBLE) as engine:
        engine.precompute(DOCUMENTS)
        assert "int8" in str(engine.choice.layout)
    with HCacheEngine(
        model, TOKENIZER, tmp_path / "a", preamble=PREAMBLE, fidelity="exact"
    ) as engine:
        answer = engine.generate(prompt, options=GREEDY)
        assert answer.provenance.restored_tokens == 0
        assert any("not exact" in warning for warning in answer.provenance.warnings)
    with HCacheEngine(
        model, TOKENIZER, tmp_path / "b", preamble=PREAMBLE, fidelity="exact"
    ) as engine:
        assert "float32" in str(engine.choice.layout)
        engine.precompute(DOCUMENTS)
        answer = engine.generate(prompt, options=GREEDY)
        assert answer.provenance.exact_tokens == len(PREAMBLE + DOCUMENTS[0].strip())


# --- lanes, errors, cancelling ----------------------------------------------------------------


def test_the_timeline_is_the_schedule(store: StateStore) -> None:
    """Every step of the plan ran once, in its lane's order, each restore after its read."""
    shape = SHAPES[2]
    engine = engine_of(shape, store, layout_of(shape, LayerFormat(HIDDEN, "float32")))
    _, execution = reading(engine, [Cut(0, 1)] * len(spans(engine)))
    timeline = execution.timeline
    assert [event.step for event in timeline.events] == list(execution.work.steps)
    for lane in (READING, COMPUTING):
        events = [event for event in timeline.events if event.step.lane == lane]
        for before, after in pairwise(events):
            assert before.end_s <= after.start_s
    for event in timeline.events:
        assert all(timeline.events[need].end_s <= event.start_s for need in event.step.needs)
    assert timeline.makespan_s >= max(timeline.busy_s(lane) for lane in (READING, COMPUTING))


def test_reading_goes_on_while_layers_are_recomputed(store: StateStore) -> None:
    """All of it can be read before the first restore: nothing waits for a slot."""
    shape = max(SHAPES, key=lambda s: s.layers)
    engine = engine_of(shape, store, layout_of(shape, LayerFormat(KV, "float32")))
    with restoring(engine, [Cut(0, 1)] * len(spans(engine))) as (_, _, execution):
        reads = [t for t in execution._tickets if t.step.lane == READING]
        for ticket in reads:
            ticket.wait()
        assert len(execution._read) == len(reads)


@pytest.mark.parametrize("cut", [Cut(), Cut(0, 1)], ids=["reading", "recomputing"])
def test_an_error_of_the_reading_lane_reaches_the_pass(
    cut: Cut, store: StateStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The very error; no thread, no buffer and no hook is left behind."""
    shape = SHAPES[0]
    engine = engine_of(shape, store, layout_of(shape, LayerFormat(KV, "float32")))
    error = DamagedStateError(b"key", "made up")

    def fail(*_: object) -> Any:
        raise error

    monkeypatch.setattr(Execution, "_read_chunk", fail)
    with pytest.raises(DamagedStateError) as caught:
        reading(engine, [cut] * len(spans(engine)))
    assert caught.value is error
    assert own_threads() == []
    assert not engine.adapter.model._forward_pre_hooks
    assert not engine.adapter.decoder._forward_hooks
    assert len(engine.answering.buffers._free) == 1


def test_a_request_cancelled_before_its_first_token_stops_at_the_next_step(
    store: StateStore,
) -> None:
    """An empty answer that says so; no thread and no buffer is left behind."""
    shape = SHAPES[0]
    engine = engine_of(shape, store, layout_of(shape, LayerFormat(KV, "float32")))
    cancelled = threading.Event()
    count = 0

    def cancel(_module: object, _inputs: object) -> None:
        nonlocal count
        count += 1
        cancelled.set()

    handle = engine.adapter.layers[0].register_forward_pre_hook(cancel)
    try:
        answer = engine.generate(PROMPT, options=GREEDY, cancelled=cancelled)
    finally:
        handle.remove()
    assert count == 1
    assert (answer.text, answer.token_ids, answer.finish_reason) == ("", (), "cancelled")
    assert own_threads() == []
    assert len(engine.answering.buffers._free) == 1
    assert engine.generate(PROMPT, options=GREEDY).finish_reason != "cancelled"


def test_cancelling_reaches_a_pass_of_ones_own(store: StateStore) -> None:
    """`Cancelled` comes out of the forward pass."""
    shape = SHAPES[0]
    engine = engine_of(shape, store, layout_of(shape, LayerFormat(KV, "float32")))
    composition = engine.bound.compose(engine.bound.resolve(PROMPT).pieces)
    with (
        engine.answering.buffers.borrow(len(composition.token_ids)) as buffers,
        open_restoring(
            engine.adapter, composition, buffers, engine.store, is_cancelled=lambda: True
        ) as (cache, _),
        torch.no_grad(),
        pytest.raises(Cancelled),
    ):
        engine.adapter.decoder(**cache.pass_inputs(), past_key_values=cache, use_cache=True)


def test_buffers_are_used_again(store: StateStore) -> None:
    """The second request of a size allocates neither K and V nor scratch memory."""
    shape = SHAPES[0]
    engine = engine_of(shape, store, layout_of(shape, LayerFormat(HIDDEN, "int8")))
    engine.generate(PROMPT, options=GREEDY)
    (buffers,) = engine.answering.buffers._free
    places = {name: held.data_ptr() for name, held in buffers._scratch.items()}
    assert places
    engine.generate(PROMPT, options=GREEDY)
    (again,) = engine.answering.buffers._free
    assert again is buffers
    assert {name: held.data_ptr() for name, held in again._scratch.items()} == places


def test_a_piece_of_one_chunk_in_the_models_dtype_is_not_copied_first(store: StateStore) -> None:
    """Hidden rows go into the projection straight from the store's map."""
    shape = SHAPES[0]
    layout = layout_of(shape, LayerFormat(HIDDEN, "float32"), chunk_tokens=1024)
    engine = engine_of(shape, store, layout)
    reading(engine, [Cut()] * len(spans(engine)), piece_tokens=1)
    (buffers,) = engine.answering.buffers._free
    assert set(buffers._scratch) == {"projected"}


def test_adapter_stops_where_nobody_asks_further() -> None:
    """Capturing two layers runs two layers, and leaves no hook."""
    adapter = ModelAdapter(tiny_model(SHAPES[2]))
    ran: list[int] = []
    handles = [
        layer.register_forward_hook(lambda *_, i=i: ran.append(i))
        for i, layer in enumerate(adapter.layers)
    ]
    captured = adapter.capture([[1, 2, 3]], [KV, KV], adapter.prefill([]))
    for handle in handles:
        handle.remove()
    assert ran == [0, 1]
    assert len(captured) == 2
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in adapter.model.modules())
