"""Every family in the table against transformers: restored exactly, relocated, repaired, answered.

The tests are made of `families.TINY`; one of them fails where a family of the table has no entry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import REFUSED, TINY, UNKNOWN, WINDOW, Tiny, model_of, read, read_apart, sides
from oracle import Reading, encode, greedy, restore
from tiny import VOCABULARY, byte_tokenizer
from torch import Tensor
from transformers import AutoConfig, DynamicCache

from hcache_kernels.fused_reference import norm_keys
from hcache_rag import GenerationOptions, HCacheEngine, StateStore
from hcache_rag.choice import fixed_layout
from hcache_rag.errors import UnsupportedModelError
from hcache_rag.executor import open_restoring
from hcache_rag.layout import StateLayout
from hcache_rag.measure import measure
from hcache_rag.models import FAMILIES, ModelAdapter, load_config
from hcache_rag.models.unknown import warned_families
from hcache_rag.repair import begin_repair, last_row_scores
from hcache_rag.trial import trying

TOKENIZER = byte_tokenizer()
PREAMBLE = "Answer from these passages.\n"
A = "The first passage tells of a harbour with a red lighthouse, built long ago."
B = "The second names the mayor, who keeps bees on the roof."
C = "A third one, of a library, is read in the same batch."
GAP, QUESTION = "\n\n", "\nWho keeps bees?"
EXACT = PREAMBLE + A + QUESTION
BOTH = PREAMBLE + A + GAP + B + QUESTION
SUPPRESSED = {"suppress_tokens": list(range(94, VOCABULARY))}
GREEDY = GenerationOptions(max_new_tokens=32, temperature=0.0, extra=SUPPRESSED)
LAYOUTS = ["hidden", "kv", "mixed", "none-first"]
DTYPES = [torch.float32, torch.bfloat16]
NEAR = {torch.float32: 2e-5, torch.bfloat16: 5e-2}
"""Relative rms distance of two ways to compute the same, by the dtype that they compute in."""

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
MOVABLE = [t for t in TINY if FAMILIES[t.family].is_movable]
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])


def ids_of(text: str) -> list[int]:
    return encode(TOKENIZER, text, is_document=False)


def layout_of(adapter: ModelAdapter, name: str) -> StateLayout:
    """Chunks so small that documents have several."""
    names = {
        "mixed": ["hidden", "kv", "hidden"],
        "none-first": ["none", "kv", "hidden"],
    }.get(name, name)
    chosen = fixed_layout(adapter.spec, names, adapter.spec.dtype)
    return StateLayout(chosen.layout.layers, 32)


def engine_of(
    tiny: Tiny, dtype: torch.dtype, layout: str, documents: Sequence[str] = (A, B, C), **more: Any
) -> HCacheEngine:
    """An engine that has read documents in one batch and repairs nothing."""
    model = model_of(tiny, dtype, more.pop("attention", "sdpa"))
    options: dict[str, Any] = {"preamble": PREAMBLE, "fidelity": "none", **more}
    representation = layout_of(ModelAdapter(model), layout)
    store = StateStore.in_memory()
    engine = HCacheEngine(
        model, TOKENIZER, store, representation=representation, profile=None, **options
    )
    engine.precompute(documents)
    return engine


def as_cached(engine: HCacheEngine, reading: Reading) -> tuple[Tensor, Tensor]:
    """K and V as transformers' own cache has them."""
    return engine.adapter.as_cached(reading.keys, reading.values)


def assert_near(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> None:
    """Equal but for rounding, as a whole."""
    distance = (ours.double() - theirs.double()).pow(2).mean().sqrt()
    assert float(distance) <= NEAR[dtype] * float(theirs.double().pow(2).mean().sqrt())


def near_in_float32(ours: Tensor, theirs: Tensor) -> bool:
    return torch.allclose(ours.float(), theirs.float(), rtol=1e-5, atol=1e-5)


def test_every_family_has_a_tiny_model() -> None:
    """So that a new entry of the table is tested by all that is here."""
    missing = set(FAMILIES) - {tiny.family for tiny in TINY}
    assert not missing, f"add a configuration of {', '.join(sorted(missing))} to tests/families.py"
    for tiny in TINY:
        assert ModelAdapter(model_of(tiny)).is_known


@by_dtype
@pytest.mark.parametrize("tiny", TINY)
def test_reference_mode_is_prefill_bit_for_bit(tiny: Tiny, dtype: torch.dtype) -> None:
    """Transformers' prefill in the same steps / restored in reference mode: all bits equal.

    But for the last ones of DeepSeek-V2, which rotates complex numbers: their product is rounded
    otherwise. One document is read alone: experts compute with other shapes where others are read
    beside it.
    """
    model, cache = model_of(tiny, dtype), DynamicCache()
    logits = read(model, ids_of(PREAMBLE), ids_of(A), ids_of(QUESTION), into=cache)
    for layout in LAYOUTS[:3]:
        engine = engine_of(tiny, dtype, layout, [A], reference_mode=True)
        composition, ours = restore(engine, EXACT)
        assert composition.num_restored == composition.num_exact == len(PREAMBLE + A)
        equal = near_in_float32 if tiny.family == "deepseek_v2" else torch.equal
        for side, theirs in zip(as_cached(engine, ours), sides(cache), strict=True):
            assert equal(side, theirs), layout
        assert equal(ours.logits, logits), layout


@by_dtype
@pytest.mark.parametrize("tiny", TINY)
def test_folded_mode_is_prefill_but_for_rounding(tiny: Tiny, dtype: torch.dtype) -> None:
    """Transformers' prefill in one step on its own cache / restored as usual."""
    model, cache = model_of(tiny, dtype), DynamicCache()
    read(model, ids_of(EXACT), into=cache)
    logits = read(model, ids_of(EXACT))
    for layout in LAYOUTS:
        engine = engine_of(tiny, dtype, layout)
        with engine.restoring(EXACT) as (composition, restored), torch.no_grad():
            ids = torch.tensor([composition.token_ids.tolist()])
            call: Any = model
            ours = call(input_ids=ids, past_key_values=restored, use_cache=True).logits[0, -1]
            pairs = [restored.by_position(i) for i in range(engine.adapter.spec.num_layers)]
        assert composition.num_restored == len(PREAMBLE + A)
        keys, values = (torch.cat(side) for side in zip(*pairs, strict=True))
        for side, theirs in zip(engine.adapter.as_cached(keys, values), sides(cache), strict=True):
            assert_near(side, theirs, dtype)
        assert_near(ours, logits, dtype)


@pytest.mark.parametrize("tiny", TINY)
def test_norms_of_k_in_numbers_are_the_models_own(tiny: Tiny) -> None:
    """The model's own module / the kernels' twin in float64, of every layer that has one."""
    adapter = ModelAdapter(model_of(tiny))
    spec = adapter.spec
    rows = torch.randn(9, spec.kv_width) + 1
    for norm, (module, _) in zip(adapter.key_norms, adapter.rows_norms, strict=True):
        assert (norm is None) == (module is None)
        if norm is None or module is None:
            continue
        theirs = module(rows).double().view(9, spec.num_kv_heads, -1)
        ours = norm_keys(rows.double().view(theirs.shape), norm)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@by_dtype
@pytest.mark.parametrize("tiny", [t for t in MOVABLE if t.family != "gptj"])
def test_a_moved_document_is_what_it_is_after_the_preamble_alone(
    tiny: Tiny, dtype: torch.dtype
) -> None:
    """Transformers' own rotation called a second time / restored elsewhere: near, and the answer.

    Prompts are longer than sliding windows; fresh tokens stand between the documents and behind.
    """
    model = model_of(tiny, dtype)
    parts = [(ids_of(A), True), (ids_of(GAP), False), (ids_of(B), True), (ids_of(QUESTION), False)]
    cache, logits = read_apart(model, ids_of(PREAMBLE), parts)
    for layout in LAYOUTS[:3]:
        engine = engine_of(tiny, dtype, layout, reference_mode=layout == "mixed")
        composition, ours = restore(engine, BOTH)
        assert composition.num_restored == len(PREAMBLE + A + B)
        assert composition.num_exact == len(PREAMBLE + A)
        for side, theirs in zip(as_cached(engine, ours), sides(cache), strict=True):
            assert_near(side, theirs, dtype)
        assert_near(ours.logits, logits, dtype)


@pytest.mark.parametrize("tiny", MOVABLE)
def test_everything_repaired_is_full_prefill(tiny: Tiny) -> None:
    """Transformers' prefill in one step / every relocated token read again, and the same answer."""
    model = model_of(tiny)
    logits = read(model, ids_of(BOTH))
    for layout in ("hidden", "kv"):
        engine = engine_of(tiny, torch.float32, layout, fidelity=1.0)
        composition = engine.bound.compose(engine.bound.resolve(BOTH).pieces)
        ids = torch.tensor([composition.token_ids.tolist()])
        with (
            torch.no_grad(),
            engine.answering.buffers.borrow(ids.shape[1] + 1) as buffers,
            open_restoring(engine.adapter, composition, buffers, engine.store) as (restored, _),
        ):
            assert begin_repair(engine.adapter, restored, 1.0) == len(B)
            call: Any = model
            ours = call(input_ids=ids, past_key_values=restored).logits[0, -1]
        assert_near(ours, logits, torch.float32)
    answer = engine.generate(BOTH, options=GREEDY)
    assert answer.provenance.repaired_tokens == len(B)
    assert list(answer.token_ids) == greedy(model, ids_of(BOTH), 32, **SUPPRESSED)


@pytest.mark.parametrize("tiny", MOVABLE)
def test_scores_are_the_last_row_of_attention(tiny: Tiny) -> None:
    """Eager attention's own weights over the same cache / Q times K, and all else that counts."""
    engine = engine_of(tiny, torch.float32, "kv", attention="eager")
    composition = engine.bound.compose(engine.bound.resolve(BOTH).pieces)
    ids = torch.tensor([composition.token_ids.tolist()])
    call: Any = engine.adapter.model
    with torch.no_grad(), engine.answering.buffers.borrow(ids.shape[1] + 1) as buffers:
        with open_restoring(engine.adapter, composition, buffers, engine.store) as (restored, _):
            rows = call(input_ids=ids, past_key_values=restored, output_attentions=True).attentions
        expected = sum(row[0, :, -1].sum(0) for row in rows)[: composition.num_restored]
        with open_restoring(engine.adapter, composition, buffers, engine.store) as (restored, _):
            scores = last_row_scores(engine.adapter, restored)
    np.testing.assert_allclose(scores, expected.numpy(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("tiny", TINY)
def test_the_same_greedy_answer(tiny: Tiny) -> None:
    """Transformers' `generate` / the engine's, behind one document: the same 32 tokens."""
    theirs = greedy(model_of(tiny), ids_of(EXACT), 32, **SUPPRESSED)
    for layout in LAYOUTS:
        answer = engine_of(tiny, torch.float32, layout).generate(EXACT, options=GREEDY)
        assert answer.provenance.exact_tokens == len(PREAMBLE + A)
        assert list(answer.token_ids) == theirs, layout


@pytest.mark.parametrize("tiny", [*TINY, *UNKNOWN])
def test_a_conversation_goes_on(tiny: Tiny) -> None:
    """Transformers' answer to the whole text / the engine's, which restores what was said before.

    K is turned back out of the cache, decoded tokens included, and rotated again.
    """
    engine = engine_of(tiny, torch.float32, "kv")
    first = engine.generate(EXACT, options=replace(GREEDY, max_new_tokens=12), remember=True)
    engine.flush()
    prompt = EXACT + first.text + QUESTION
    answer = engine.generate(prompt, options=GREEDY)
    assert answer.provenance.exact_tokens >= len(EXACT)
    assert list(answer.token_ids) == greedy(engine.adapter.model, ids_of(prompt), 32, **SUPPRESSED)


@pytest.mark.parametrize("layout", ["hidden", "kv", "none-first"])
@pytest.mark.parametrize("tiny", [t for t in TINY if "sliding_window" in t.options])
def test_sliding_layers_read_what_is_in_the_window(tiny: Tiny, layout: str) -> None:
    """An engine that restores all, to remember it / one that leaves out what nothing looks at.

    Where that would be, there was something that is no number.
    """
    engine = engine_of(tiny, torch.float32, layout)
    whole = engine.generate(BOTH, options=GREEDY, remember=True)
    with engine.answering.buffers.borrow(1) as buffers:
        for side in buffers.sides:
            side.fill_(torch.nan)
    engine = engine_of(tiny, torch.float32, layout, paths_max_bytes=0)
    engine.answering.buffers._free.append(buffers)
    answer = engine.generate(BOTH, options=GREEDY)
    assert answer.token_ids == whole.token_ids
    is_any = any(ModelAdapter(engine.adapter.model).windows)
    assert (answer.provenance.bytes_read < whole.provenance.bytes_read) == is_any
    assert answer.provenance.restored_tokens == whole.provenance.restored_tokens


LATER = ("gemma3_text", "deepseek_v3", "gpt_neox", "cohere2")


@pytest.mark.parametrize("tiny", [t for t in TINY if t.label in LATER])
def test_a_changed_document_is_read_from_the_change_on(tiny: Tiny) -> None:
    """Transformers' answer / the engine's, whose state begins with another document's."""
    engine = engine_of(tiny, torch.float32, "mixed", [A])
    changed = A + " It was painted last year."
    report = engine.precompute([changed])
    assert (report.continued, report.continued_tokens) == (1, len(A))
    prompt = PREAMBLE + changed + QUESTION
    answer = engine.generate(prompt, options=GREEDY)
    assert answer.provenance.exact_tokens == len(PREAMBLE + changed)
    assert list(answer.token_ids) == greedy(engine.adapter.model, ids_of(prompt), 32, **SUPPRESSED)


@pytest.mark.parametrize("tiny", [*(t for t in TINY if t not in MOVABLE), *UNKNOWN])
def test_what_cannot_be_moved_is_read_afresh(tiny: Tiny) -> None:
    """The answer is full prefill's, and the account says why the second document was read."""
    engine = engine_of(tiny, torch.float32, "kv")
    answer = engine.generate(BOTH, options=GREEDY)
    account = answer.provenance
    assert list(answer.token_ids) == greedy(model_of(tiny), ids_of(BOTH), 32, **SUPPRESSED)
    assert account.exact_tokens == len(PREAMBLE + A)
    assert (account.relocated_tokens, account.missed_tokens) == (0, len(B))
    assert (account.documents_restored, account.documents_missed) == (1, 1)
    assert any(engine.adapter.why_not_movable in warning for warning in account.warnings)


def test_of_an_unknown_family_k_and_v_are_kept(caplog: pytest.LogCaptureFixture) -> None:
    """Said once; hidden states, of which nothing can be made, are refused."""
    warned_families.clear()
    tiny = UNKNOWN[0]
    for _ in range(2):
        engine = engine_of(tiny, torch.float32, "kv")
    assert [r.message for r in caplog.records if "nothing is known about" in r.message]
    assert caplog.text.count("nothing is known about") == 1
    chosen = HCacheEngine(engine.adapter.model, TOKENIZER, StateStore.in_memory(), profile=None)
    assert {str(fmt.representation) for fmt in chosen.choice.layout.layers} == {"kv"}
    with pytest.raises(ValueError, match="nothing is known about models of family 'falcon'"):
        engine_of(tiny, torch.float32, "hidden")


def test_an_unknown_family_can_be_measured_and_tried(tmp_path: Path) -> None:
    """Without hidden states; nothing is relocated, so that every fidelity is full prefill's."""
    engine = engine_of(UNKNOWN[0], torch.float32, "kv")
    profile = measure(engine.adapter, tmp_path, quick=True, max_tokens=64)
    assert profile.costs is not None
    assert not profile.costs.project
    assert profile.costs.scatter
    assert profile.rates.projection_flops_per_s > 0
    with trying(engine, BOTH, 1) as trial:
        assert not len(trial.relocated)
        logits = trial.at("balanced").first
    assert_near(logits, read(engine.adapter.model, ids_of(BOTH)), torch.float32)


@pytest.mark.parametrize(("tiny", "word"), REFUSED, ids=lambda value: getattr(value, "label", None))
def test_what_cannot_be_served_is_refused_by_name(tiny: Tiny, word: str) -> None:
    """At once, with the reason."""
    with pytest.raises(UnsupportedModelError, match=f"{tiny.family}.*{word}"):
        ModelAdapter(model_of(tiny))


def test_encoder_decoders_are_refused_before_they_are_loaded(tmp_path: Path) -> None:
    """By the configuration."""
    AutoConfig.for_model("t5", d_model=64, num_layers=2, num_heads=4).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"'t5'.*an encoder"):
        load_config(str(tmp_path))


def test_prompts_are_longer_than_windows() -> None:
    """So that the tests above are about sliding layers too."""
    windows = [w for t in TINY for w in ModelAdapter(model_of(t)).windows if w is not None]
    assert windows
    assert set(windows) == {WINDOW}
    assert min(map(len, (A, B))) > WINDOW > len(QUESTION)
