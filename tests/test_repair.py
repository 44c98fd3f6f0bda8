"""Repair: what the last row looks at is read again, and nothing else changes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import (
    Part,
    Reading,
    block_prefill,
    document,
    encode_part,
    encode_parts,
    joined,
    prefill,
    repaired_prefill,
)
from tiny import SHAPES, Shape, byte_tokenizer, tiny_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hcache_rag import GenerationOptions, HCacheEngine
from hcache_rag.executor import open_restoring
from hcache_rag.models import QUERY
from hcache_rag.repair import FIDELITY_SHARES, begin_repair, last_row_scores, select_tokens

TOKENIZER = byte_tokenizer()
PREAMBLE = "You answer from these passages.\n"
DOCUMENTS = [
    "The first passage tells of a harbour with a red lighthouse, built long ago.",
    "The second passage is about a library that opens at nine in the morning.",
    "The third passage names the mayor, who keeps bees on the roof of the town hall.",
]
ONE_TOKEN = ["k", "q"]
LONG = (
    "A fourth one has more to say of the mayor: "
    + "she reads, she writes, she walks, " * 5
    + "and sleeps."
)
PROMPT = PREAMBLE + "\n\n".join(DOCUMENTS) + "\nWho keeps bees?"
GREEDY = GenerationOptions(max_new_tokens=16, temperature=0)
ROUNDING: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
"""What an exact restore may differ by, see test_restore.py."""

pytestmark = pytest.mark.usefixtures("one_thread")


def behind_preamble(*texts: str, between: str = "\n\n") -> list[Part]:
    """A prompt of documents right after the preamble; the first one is exact there."""
    parts = [Part(PREAMBLE)]
    for number, text in enumerate(texts):
        parts += [Part(between)] * (number > 0) + [document(text)]
    return [*parts, Part("\nWho keeps bees?")]


ONE, TWO, THREE = DOCUMENTS
PROMPTS = {
    "three": behind_preamble(*DOCUMENTS),
    "another order": behind_preamble(THREE, ONE, TWO),
    "one": behind_preamble(TWO),
    "one, behind another head": [Part("What follows is all.\n"), document(TWO), Part("\nWhat?")],
    "twice": behind_preamble(ONE, ONE),
    "twice, and another": behind_preamble(TWO, THREE, THREE, between="\n"),
    "of one token": behind_preamble(ONE, *ONE_TOKEN, between="\n"),
    "of one token only": behind_preamble(ONE_TOKEN[1], ONE_TOKEN[0], between="\n"),
    "cut": [*behind_preamble(ONE)[:-1], Part("\n\n"), document(LONG, 150), Part("...\nWho?")],
    "text between": [
        *behind_preamble(ONE)[:-1],
        Part("\nSomething that is not stored, and rather long.\n"),
        document(TWO),
        Part("\nAnd:\n"),
        document(THREE),
        Part("\nWhy?"),
    ],
    "a document at the end": [*behind_preamble(ONE)[:-1], Part("\n\n"), document(TWO)],
}


@cache
def model_of(shape: Shape, attention: str = "sdpa") -> PreTrainedModel:
    """A model that tests share and leave as it is."""
    return tiny_model(shape, attention=attention)


def engine(model: Any, tokenizer: Any, folder: Path, **options: Any) -> HCacheEngine:
    made = HCacheEngine(
        model, tokenizer, folder, preamble=PREAMBLE, storage_dtype="float32", **options
    )
    made.precompute([*DOCUMENTS, *ONE_TOKEN, LONG])
    return made


def repaired(one: HCacheEngine, prompt: str, share: float) -> tuple[list[int], Reading]:
    """Our path: the positions that are repaired, and what the cache holds then."""
    model: Any = one.adapter.model
    with torch.no_grad(), one.restoring(prompt, room_tokens=1) as (composition, cache):
        count = begin_repair(one.adapter, cache, share)
        read = cache.pass_inputs()["position_ids"][0].tolist()
        positions = sorted(set(read) - set(composition.fresh_positions.tolist()))
        assert len(positions) == count
        ids = torch.tensor([composition.token_ids.tolist()])
        logits = model(input_ids=ids, past_key_values=cache).logits[0, -1]
        pairs = [cache.by_position(layer) for layer in range(one.adapter.spec.num_layers)]
        keys, values = (torch.cat(side) for side in zip(*pairs, strict=True))
    return positions, Reading(keys, values, logits)


def relocated_positions(parts: Sequence[Part]) -> list[int]:
    """Of all documents but one right after the preamble; the prompt's last token is fresh."""
    found, position = list[int](), 0
    for number, part in enumerate(parts):
        length = len(encode_part(TOKENIZER, part))
        is_exact = number == 1 and parts[0].text == PREAMBLE
        if part.document is not None and not is_exact:
            found += range(position, position + length)
        position += length
    return [at for at in found if at < position - 1]


def assert_close(ours: Reading, theirs: Reading) -> None:
    """K and V of all positions and the last logits agree as an exact restore's do."""
    torch.testing.assert_close(ours.keys, theirs.keys, **ROUNDING)
    torch.testing.assert_close(ours.values, theirs.values, **ROUNDING)
    torch.testing.assert_close(ours.logits, theirs.logits, **ROUNDING)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.label)
@pytest.mark.parametrize("representation", ["kv", "hidden"])
def test_everything_repaired_is_full_prefill_and_nothing_is_block_attention(
    shape: Shape, representation: str, tmp_path: Path
) -> None:
    """Reference paths: transformers' prefill, and one in which documents see the preamble only."""
    model, parts = model_of(shape), PROMPTS["text between"]
    with engine(model, TOKENIZER, tmp_path, representation=representation) as one:
        positions, ours = repaired(one, joined(parts), 1.0)
        assert positions == relocated_positions(parts)
        assert_close(ours, prefill(model, encode_parts(TOKENIZER, parts)))
        positions, ours = repaired(one, joined(parts), 0.0)
        assert positions == []
        assert_close(ours, block_prefill(model, TOKENIZER, PREAMBLE, parts)[0])


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2], SHAPES[5]], ids=lambda s: s.label)
def test_what_is_repaired_is_one_causal_pass_with_the_rest_exchanged(
    shape: Shape, name: str, tmp_path: Path
) -> None:
    """Reference path: eager attention over the whole prompt, no mask, no cache, no slots.

    First with nothing repaired, for what the last row looks at; then with that repaired: none, one
    token, shares, everything.
    """
    parts, model = PROMPTS[name], model_of(shape)
    one_token = 1 / max(1, len(relocated_positions(parts)))
    with engine(model, TOKENIZER, tmp_path) as one:
        for share in (0.0, one_token, 0.15, 0.5):
            assert_repaired_by_brute_force(one, shape, parts, share)
        whole = assert_repaired_by_brute_force(one, shape, parts, 1.0)
    assert_close(whole, prefill(model, encode_parts(TOKENIZER, parts)))


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2], SHAPES[5]], ids=lambda s: s.label)
def test_eager_attention_will_do(shape: Shape, tmp_path: Path) -> None:
    """The same, where the engine's model computes attention in another way."""
    with engine(model_of(shape, "eager"), TOKENIZER, tmp_path) as one:
        for name in ("another order", "of one token", "text between"):
            assert_repaired_by_brute_force(one, shape, PROMPTS[name], 0.3)


def assert_repaired_by_brute_force(
    one: HCacheEngine, shape: Shape, parts: Sequence[Part], share: float
) -> Reading:
    eager, relocated = model_of(shape, "eager"), relocated_positions(parts)
    count = round(share * len(relocated))
    positions, ours = repaired(one, joined(parts), share)
    assert len(positions) == count
    assert set(positions) <= set(relocated)
    looked_at = looked_at_by(eager, tuple(parts))
    best = looked_at[relocated].sort(descending=True).values[:count]
    torch.testing.assert_close(looked_at[positions].sort(descending=True).values, best, **ROUNDING)
    theirs, _ = repaired_prefill(eager, TOKENIZER, PREAMBLE, parts, positions)
    assert_close(ours, theirs)
    return ours


@cache
def looked_at_by(eager: PreTrainedModel, parts: tuple[Part, ...]) -> torch.Tensor:
    """What the last row pays each position (N,) while nothing is repaired."""
    _, looked_at = repaired_prefill(eager, TOKENIZER, PREAMBLE, parts, [])
    assert looked_at is not None
    return looked_at


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[1], SHAPES[5]], ids=lambda s: s.label)
def test_bfloat16_is_as_near_to_float64_as_its_own_brute_force(
    shape: Shape, tmp_path: Path
) -> None:
    """Error of the one causal pass / of the repaired cache, in bfloat16: at most 1.5 times."""
    weights = tiny_model(shape, dtype=torch.bfloat16)
    exact = tiny_model(shape, dtype=torch.float64)
    exact.load_state_dict(weights.state_dict())
    parts = PROMPTS["text between"]
    with engine(weights, TOKENIZER, tmp_path) as one:
        for share in (0.0, 0.3, 1.0):
            positions, ours = repaired(one, joined(parts), share)
            theirs, _ = repaired_prefill(weights, TOKENIZER, PREAMBLE, parts, positions)
            true, _ = repaired_prefill(exact, TOKENIZER, PREAMBLE, parts, positions)
            for side in ("keys", "values", "logits"):
                error, allowed = (
                    float((getattr(reading, side).double() - getattr(true, side)).norm())
                    for reading in (ours, theirs)
                )
                assert error <= 1.5 * allowed


def test_the_same_tokens_are_chosen_by_every_engine(tmp_path: Path) -> None:
    """By one engine twice, and by another one on the same states."""
    with engine(model_of(SHAPES[5]), TOKENIZER, tmp_path) as one:
        chosen = [repaired(one, PROMPT, 0.15)[0] for _ in range(2)]
    with engine(model_of(SHAPES[5]), TOKENIZER, tmp_path) as one:
        chosen.append(repaired(one, PROMPT, 0.15)[0])
    assert chosen[0]
    assert chosen[0] == chosen[1] == chosen[2]


def test_where_all_tokens_are_looked_at_alike_the_first_ones_are_chosen(tmp_path: Path) -> None:
    """Queries of zeros see every key alike."""
    model = tiny_model(SHAPES[1])
    for name, parameter in model.named_parameters():
        if "q_proj" in name:
            torch.nn.init.zeros_(parameter)
    relocated = relocated_positions(PROMPTS["three"])
    with engine(model, TOKENIZER, tmp_path) as one:
        for count in (1, 2, 30, len(relocated)):
            positions, _ = repaired(one, PROMPT, count / len(relocated))
            assert positions == relocated[:count]


def test_repair_brings_logits_closer(tmp_path: Path) -> None:
    """More repaired tokens, less distance to full prefill: none > half > all."""
    model = model_of(SHAPES[1])
    full = prefill(model, encode_parts(TOKENIZER, PROMPTS["three"])).logits
    with engine(model, TOKENIZER, tmp_path) as one:
        errors = [float((repaired(one, PROMPT, s)[1].logits - full).norm()) for s in (0, 0.5, 1)]
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2], SHAPES[5]], ids=lambda s: s.label)
def test_scores_are_the_last_row_of_attention(
    shape: Shape, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Reference path: eager attention's own weights over the same cache. Our path: Q times K."""
    model = tiny_model(shape, attention="eager")
    with engine(model, tokenizer, tmp_path) as one:
        composition = one.bound.compose(one.bound.resolve(PROMPT).pieces)
        with one.answering.buffers.borrow(len(composition.token_ids) + 1) as buffers:
            with (
                torch.no_grad(),
                open_restoring(one.adapter, composition, buffers, one.store) as (cache, _),
            ):
                ids = torch.tensor([composition.token_ids.tolist()])
                attentions = model(
                    input_ids=ids, past_key_values=cache, output_attentions=True
                ).attentions
            expected = sum(row[0, :, -1].sum(0) for row in attentions)[: composition.num_restored]
            with open_restoring(one.adapter, composition, buffers, one.store) as (cache, _):
                scores = last_row_scores(one.adapter, cache)
    np.testing.assert_allclose(scores, expected.numpy(), rtol=1e-4, atol=1e-5)
    taps = [one.adapter.tap(layer, QUERY) for layer in range(shape.layers)]
    assert not any(tap.module._forward_hooks for tap in taps)


def test_repaired_tokens_are_counted(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """The default repairs 15 % of the relocated tokens, and the provenance adds up."""
    model = tiny_model(SHAPES[1])
    with engine(model, tokenizer, tmp_path) as one:
        account = one.generate(PROMPT, options=GREEDY).provenance
        relocated = sum(len(one.document_tokens(text)) for text in DOCUMENTS[1:])
        assert one.fidelity == "balanced"
    assert account.repaired_tokens == round(0.15 * relocated)
    assert account.relocated_tokens == relocated - account.repaired_tokens
    total = account.exact_tokens + account.relocated_tokens + account.repaired_tokens
    assert total + account.fresh_tokens == account.prompt_tokens


def test_exact_documents_are_not_repaired(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """One document right after the preamble needs no scoring pass; behind another one it does."""
    model: Any = tiny_model(SHAPES[1])
    passes = list[int]()
    with engine(model, tokenizer, tmp_path, fidelity="high") as one:
        handle = model.model.register_forward_pre_hook(lambda *_: passes.append(1))
        answers = []
        for shown in (DOCUMENTS[:1], DOCUMENTS[:2]):
            passes.clear()
            prompt = PREAMBLE + "\n\n".join(shown) + "\nWhat?"
            answers.append((one.generate(prompt, options=GREEDY), len(passes)))
        handle.remove()
    (alone, few), (both, more) = answers
    assert alone.provenance.repaired_tokens == alone.provenance.relocated_tokens == 0
    assert alone.provenance.exact_tokens > 0
    assert few == len(alone.token_ids)
    assert more == len(both.token_ids) + 1


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.5, 1.0])
def test_repair_is_deterministic(
    share: float, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """The same prompt twice, also with budgets of no and of one token: the same answer."""
    model = tiny_model(SHAPES[5])
    with engine(model, tokenizer, tmp_path, fidelity=share) as one:
        first, second = (one.generate(PROMPT, options=GREEDY) for _ in range(2))
    assert first.token_ids == second.token_ids
    assert first.provenance.repaired_tokens == second.provenance.repaired_tokens


def test_the_same_document_twice_and_streaming(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """A document that stands twice is repaired where it is relocated; streaming says the same."""
    model = tiny_model(SHAPES[1])
    prompt = PREAMBLE + DOCUMENTS[0] + "\n\n" + DOCUMENTS[0] + "\nWhat?"
    with engine(model, tokenizer, tmp_path, fidelity="high") as one:
        answer = one.generate(prompt, options=GREEDY)
        with one.stream(prompt, options=GREEDY) as stream:
            assert "".join(stream) == answer.text
    assert answer.provenance.repaired_tokens > 0


@given(
    scores=st.lists(st.integers(0, 4), min_size=1, max_size=30),
    budget=st.integers(-1, 40),
)
def test_select_tokens_is_brute_force(scores: list[int], budget: int) -> None:
    """The best scores win, ties by position, ascending."""
    positions = np.arange(len(scores)) * 3 + 5
    chosen = select_tokens(np.array(scores, dtype=np.float32), positions, budget)
    ranked = sorted(zip(scores, positions.tolist(), strict=True), key=lambda p: (-p[0], p[1]))
    assert chosen.tolist() == sorted(position for _, position in ranked[: max(budget, 0)])


@pytest.mark.parametrize("bad", ["best", -0.1, 1.5, True])
def test_bad_fidelity_raises_at_once(
    bad: Any, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """A wrong name names the known ones; a wrong share its range."""
    with pytest.raises(ValueError, match="fidelity"):
        HCacheEngine(tiny_model(SHAPES[0]), tokenizer, tmp_path, fidelity=bad)
    assert FIDELITY_SHARES == {"none": 0.0, "fast": 0.05, "balanced": 0.15, "high": 0.30}
