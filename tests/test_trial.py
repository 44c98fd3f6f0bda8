"""One prompt read in several ways: everything again, nothing, what peers choose; and scores."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from oracle import (
    Part,
    block_prefill,
    document,
    greedy,
    prefill,
)
from peers import cacheblend, epic_positions
from qa import exact_match, f1, substring_match
from tiny import SHAPES, Shape, byte_tokenizer, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from hcache_rag import HCacheEngine, StateStore
from hcache_rag.quality import kl, rouge_l
from hcache_rag.trial import Trial, read_as_a_whole, trying

TOKENIZER = byte_tokenizer()
PREAMBLE = "Answer from the passages below.\n\n"
DOCUMENTS = (
    "The first passage is about the planet Venus, which has no moon.",
    "A second one, somewhat longer, tells of Mars and of the two moons that it has.",
    "The third: Mercury.",
)
QUESTION = "\n\nQuestion: how many moons?\nAnswer:"
PROMPT = PREAMBLE + "\n\n".join(DOCUMENTS) + QUESTION
NEAR: dict[str, Any] = {"rtol": 2e-4, "atol": 2e-4}


pytestmark = pytest.mark.usefixtures("one_thread")


@cache
def model_of(shape: Shape) -> PreTrainedModel:
    """A model that tests share and leave as it is."""
    return tiny_model(shape)


@pytest.fixture(params=[SHAPES[0], SHAPES[2], SHAPES[5]], ids=lambda shape: shape.label)
def engine(request: pytest.FixtureRequest, store: StateStore) -> HCacheEngine:
    """Multi-head, multi-query and grouped-query, the documents stored in full."""
    engine = HCacheEngine(
        model_of(request.param),
        TOKENIZER,
        store,
        preamble=PREAMBLE,
        storage_dtype="float32",
        fidelity="none",
    )
    engine.precompute(DOCUMENTS)
    return engine


def parts() -> list[Part]:
    """The prompt as it is made."""
    found = [Part(PREAMBLE)]
    for number, text in enumerate(DOCUMENTS):
        found += [Part("\n\n")] * (number > 0) + [document(text)]
    return [*found, Part(QUESTION)]


def whole(engine: HCacheEngine, trial: Trial) -> Tensor:
    """Transformers' own logits behind the prompt."""
    return prefill(engine.adapter.model, trial.composition.token_ids.tolist()).logits


def test_everything_again_is_full_prefill_and_nothing_is_what_documents_alone_give(
    engine: HCacheEngine,
) -> None:
    """In any order, since each reading begins with what was restored."""
    with trying(engine, PROMPT, room_tokens=8) as trial:
        every = trial.composition.restored_positions
        nothing = trial.read(np.empty(0, np.int64))
        everything = trial.read(every)
        assert nothing.tokens == len(trial.composition.fresh_positions)
        assert everything.tokens == len(trial.composition.token_ids)
        torch.testing.assert_close(everything.first, whole(engine, trial), **NEAR)
        alone, _ = block_prefill(engine.adapter.model, TOKENIZER, PREAMBLE, parts())
        torch.testing.assert_close(nothing.first, alone.logits, **NEAR)
        torch.testing.assert_close(trial.read(np.empty(0, np.int64)).first, nothing.first)
        assert float((nothing.first - everything.first).abs().max()) > 1e-3


def test_what_follows_a_prompt_is_taken_off_again(engine: HCacheEngine) -> None:
    """Teacher-forced logits and greedy answers are transformers' own, twice."""
    with trying(engine, PROMPT, room_tokens=16) as trial:
        reading = trial.read(trial.composition.restored_positions)
        ids = trial.composition.token_ids.tolist()
        expected = greedy(engine.adapter.model, ids, 6)
        for _ in range(2):
            assert trial.answer(reading.first, 6, set()) == list(expected)
            behind = trial.behind(expected)
            for count in range(1, 7):
                logits = prefill(engine.adapter.model, [*ids, *expected[:count]]).logits
                torch.testing.assert_close(behind[count - 1], logits, **NEAR)
        with read_as_a_whole(engine.adapter, ids) as (reader, full):
            torch.testing.assert_close(full.first, whole(engine, trial), **NEAR)
            assert reader.answer(full.first, 6, set()) == list(expected)
            assert reader.answer(full.first, 6, {expected[2]}) == list(expected[:2])
            torch.testing.assert_close(reader.behind(expected), behind, **NEAR)
        assert len(trial.behind([])) == 0


def test_epic_reads_the_beginnings_of_all_documents_but_the_first(engine: HCacheEngine) -> None:
    with trying(engine, PROMPT, room_tokens=8) as trial:
        _, second, third = trial.composition.spans[-3:]
        for budget, k in ((0, 0), (1, 0), (2, 1), (9, 4), (10, 5)):
            expected = [*range(second.position, second.position + k)]
            expected += range(third.position, third.position + k)
            assert epic_positions(trial, budget).tolist() == expected
        assert len(epic_positions(trial, 10_000)) == len(trial.relocated)


def test_cacheblend_with_every_token_is_full_prefill(engine: HCacheEngine) -> None:
    """With none it differs from reading nothing again, by layer 1, whose K and V are all new."""
    with trying(engine, PROMPT, room_tokens=8) as trial:
        blended = cacheblend(engine.adapter, trial, len(trial.relocated))
        torch.testing.assert_close(blended.first, whole(engine, trial), **NEAR)
        few = cacheblend(engine.adapter, trial, 5)
        assert few.tokens == 5 + len(trial.composition.fresh_positions)
        torch.testing.assert_close(cacheblend(engine.adapter, trial, 5).first, few.first)
        nothing = trial.read(np.empty(0, np.int64))
        assert not torch.equal(cacheblend(engine.adapter, trial, 0).first, nothing.first)


# --- scores -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "golds", "expected"),
    [
        ("The Moon", ["moon"], (1.0, 1.0, 1.0)),
        ("a red moon of Mars", ["the moon"], (0.4, 0.0, 1.0)),
        ("two", ["three", "two"], (1.0, 1.0, 1.0)),
        ("", ["moon"], (0.0, 0.0, 0.0)),
        ("the", ["a"], (1.0, 1.0, 1.0)),
        ("sun", ["moon"], (0.0, 0.0, 0.0)),
    ],
)
def test_answers_are_scored_as_squad_does(
    answer: str, golds: list[str], expected: tuple[float, float, float]
) -> None:
    """By hand: F1, exact match, and whether a gold answer stands in the answer."""
    assert f1(answer, golds) == pytest.approx(expected[0])
    assert (exact_match(answer, golds), substring_match(answer, golds)) == expected[1:]


@pytest.mark.parametrize(
    ("one", "two", "expected"),
    [
        ("a b c d", "a b c d", 1.0),
        ("a b c d", "a c", 2 * 2 / 6),
        ("a b", "b a", 0.5),
        ("", "", 1.0),
        ("a", "", 0.0),
        ("the cat sat on the mat", "the cat was on a mat", 2 * 4 / 12),
    ],
)
def test_rouge_l_is_that_of_longest_common_subsequences(
    one: str, two: str, expected: float
) -> None:
    assert rouge_l(one.split(), two.split()) == pytest.approx(expected)
    assert rouge_l(two.split(), one.split()) == pytest.approx(expected)


def test_kl_is_torchs_own() -> None:
    one, two = torch.randn(5, 30), torch.randn(5, 30)
    expected = torch.nn.functional.kl_div(
        two.double().log_softmax(-1),
        one.double().log_softmax(-1),
        log_target=True,
        reduction="none",
    ).sum(-1)
    torch.testing.assert_close(kl(one, two), expected)
