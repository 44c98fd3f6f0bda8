"""Ideas of the benchmarks, against what they must be where the answer is known."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from bench_rag_qa import PREAMBLE, prompt_of
from contexts import first_sentence_of, store_behind, title_of
from ideas import best, stored_hidden, stored_inputs, stored_outside, tokens_holding
from oracle import document_state, encode, rotate
from tiny import SHAPES, Shape, byte_tokenizer, tiny_model
from transformers import PreTrainedModel

from hcache_rag import HCacheEngine, StateStore
from hcache_rag.judge import Judge
from hcache_rag.models import VALUE
from hcache_rag.trial import read_as_a_whole, trying

TOKENIZER = byte_tokenizer()
PASSAGES = (
    "Venus: It has no moon. Nor has Mercury.",
    "Mars: Two moons go around it, and both are small.",
    "Jupiter: So many that a list of them would be too long.",
)
PROMPT = prompt_of(PASSAGES, "how many moons?")
NEAR: dict[str, Any] = {"rtol": 2e-4, "atol": 2e-4}

pytestmark = pytest.mark.usefixtures("one_thread")


@cache
def model_of(shape: Shape) -> PreTrainedModel:
    return tiny_model(shape)


@pytest.fixture(params=[SHAPES[0], SHAPES[2]], ids=lambda shape: shape.label)
def engine(request: pytest.FixtureRequest, store: StateStore) -> HCacheEngine:
    """Multi-head and multi-query, nothing stored yet."""
    options: dict[str, Any] = {"preamble": PREAMBLE, "storage_dtype": "float32"}
    return HCacheEngine(model_of(request.param), TOKENIZER, store, fidelity="none", **options)


def test_repair_in_no_layer_is_none_and_in_every_layer_is_repair(engine: HCacheEngine) -> None:
    """What stays stored everywhere changes nothing; from layer 0 on, inputs are the tokens' own."""
    engine.precompute(PASSAGES)
    layers = engine.adapter.spec.num_layers
    with trying(engine, PROMPT, room_tokens=8) as trial:
        chosen = best(trial, 30)
        nothing, repaired = trial.at("none").first, trial.read(chosen).first
        assert float((nothing - repaired).abs().max()) > 1e-3
        for covered, expected in ((range(0), nothing), (range(layers), repaired)):
            with stored_outside(engine.adapter, trial, chosen, covered):
                torch.testing.assert_close(trial.read(chosen).first, expected, **NEAR)
        with stored_outside(engine.adapter, trial, chosen, range(1, layers - 1)):
            middle = trial.read(chosen).first
        for other in (nothing, repaired):
            assert float((middle - other).abs().max()) > 1e-4
        hidden = stored_hidden(engine, trial, 0)
        with stored_inputs(engine.adapter, trial, chosen, 0, hidden):
            torch.testing.assert_close(trial.read(chosen).first, repaired, **NEAR)
        torch.testing.assert_close(trial.read(chosen).first, repaired)


def test_hidden_states_are_those_that_the_stored_k_and_v_come_of(engine: HCacheEngine) -> None:
    """Reference: the model's own norm and projection of them gives the stored V."""
    engine.precompute(PASSAGES)
    adapter = engine.adapter
    with trying(engine, PROMPT, room_tokens=8) as trial, torch.no_grad():
        for layer in range(adapter.spec.num_layers):
            hidden = stored_hidden(engine, trial, layer)
            norm = adapter.norm(layer)
            assert norm is not None
            values = adapter.tap(layer, VALUE).module(norm(hidden))
            expected = trial.stale(layer)[1].transpose(0, 1).flatten(1)
            torch.testing.assert_close(values, expected, **NEAR)


@pytest.mark.parametrize("front_of", [title_of, first_sentence_of])
def test_a_text_of_its_own_is_read_in_front_of_each(engine: HCacheEngine, front_of: Any) -> None:
    """K and V as transformers gives them behind preamble and front; the preamble stays exact."""
    store_behind(engine, {text: front_of(text) for text in PASSAGES})
    model = engine.adapter.model
    with trying(engine, PROMPT, room_tokens=8) as trial:
        first, *spans = trial.composition.spans
        assert (first.record.is_preamble, first.is_exact) == (True, True)
        assert first.num_tokens == len(encode(TOKENIZER, PREAMBLE, is_document=False))
        assert [span.record.text for span in spans] == list(PASSAGES)
        assert not any(span.is_exact for span in spans)
        begin = first.num_tokens
        for text, span in zip(PASSAGES, spans, strict=True):
            front = encode(TOKENIZER, PREAMBLE, is_document=False)
            front += encode(TOKENIZER, front_of(text) + "\n\n", is_document=False)
            state = document_state(model, front, encode(TOKENIZER, text, is_document=True))
            keys = rotate(model, state.keys, span.position)
            rows = slice(begin, begin + span.num_tokens)
            for layer in range(len(keys)):
                found = [side[:, rows] for side in trial.stale(layer)]
                torch.testing.assert_close(found[0], keys[layer], **NEAR)
                torch.testing.assert_close(found[1], state.values[layer], **NEAR)
            begin += span.num_tokens


def test_titles_and_first_sentences() -> None:
    assert (title_of(PASSAGES[0]), first_sentence_of(PASSAGES[0])) == (
        "Venus",
        "Venus: It has no moon.",
    )
    assert first_sentence_of(PASSAGES[1]) == PASSAGES[1]


def test_tokens_that_hold_a_part_of_the_scores_are_the_fewest(engine: HCacheEngine) -> None:
    """By trying every number of them."""
    engine.precompute(PASSAGES)
    with trying(engine, PROMPT, room_tokens=8) as trial:
        scores = sorted(trial.scores[trial.relocated].astype(float), reverse=True)
        for mass in (0.0, 0.3, 0.6, 0.99, 1.0):
            sums = [sum(scores[:count]) for count in range(1, len(scores) + 1)]
            enough = [n for n, held in enumerate(sums, 1) if held >= mass * sum(scores)]
            assert abs(tokens_holding(trial, mass) - (enough or [len(scores)])[0]) <= 1  # rounding


def test_a_reading_can_be_judged_without_its_answer(engine: HCacheEngine) -> None:
    """All else is the same."""
    engine.precompute(PASSAGES)
    with trying(engine, PROMPT, room_tokens=8) as trial:
        ids = trial.composition.token_ids.tolist()
        with read_as_a_whole(engine.adapter, ids) as (reader, full):
            judge = Judge(engine, reader, full, gold=" two", max_new_tokens=4)
        reading = trial.at("none")
        whole = judge.judge(trial, reading)
        short = judge.judge(trial, reading, decodes=False)
    assert short.rouge_l != short.rouge_l
    assert replace(short, rouge_l=whole.rouge_l, answer=whole.answer) == whole
    assert short.answer == ""
