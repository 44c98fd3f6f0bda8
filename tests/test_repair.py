"""Repair: what the last row looks at is read again, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import SHAPES, Shape, tiny_model
from transformers import PreTrainedTokenizerBase

from hcache_rag import GenerationOptions, HCacheEngine
from hcache_rag.cache import RestoringCache
from hcache_rag.executor import open_restoring
from hcache_rag.models import QUERY
from hcache_rag.repair import FIDELITY_SHARES, begin_repair, last_row_scores, select_tokens

PREAMBLE = "You answer from these passages.\n"
DOCUMENTS = [
    "The first passage tells of a harbour with a red lighthouse, built long ago.",
    "The second passage is about a library that opens at nine in the morning.",
    "The third passage names the mayor, who keeps bees on the roof of the town hall.",
]
PROMPT = PREAMBLE + "\n\n".join(DOCUMENTS) + "\nWho keeps bees?"
GREEDY = GenerationOptions(max_new_tokens=16, temperature=0)


def engine(model: Any, tokenizer: Any, folder: Path, **options: Any) -> HCacheEngine:
    made = HCacheEngine(
        model, tokenizer, folder, preamble=PREAMBLE, storage_dtype="float32", **options
    )
    made.precompute(DOCUMENTS)
    return made


def run_over(
    one: HCacheEngine, prompt: str, share: float
) -> tuple[torch.Tensor, int, RestoringCache]:
    """The last position's logits over a cache repaired by `share`."""
    pieces = one._resolve(prompt, None).pieces
    composition = one._compose(pieces)
    ids = torch.tensor([composition.token_ids.tolist()])
    with (
        torch.no_grad(),
        one._buffers.borrow(ids.shape[1] + 1) as buffers,
        open_restoring(one.adapter, composition, buffers, one.store) as (cache, _),
    ):
        repaired = begin_repair(one.adapter, cache, share)
        output = one.adapter.model(input_ids=ids, past_key_values=cache)
        return output.logits[0, -1], repaired, cache


def full_prefill(model: Any, one: HCacheEngine, prompt: str) -> torch.Tensor:
    ids = torch.tensor([one._compose(one._resolve(prompt, None).pieces).token_ids.tolist()])
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids).logits[0, -1]
    return logits


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.label)
@pytest.mark.parametrize("representation", ["kv", "hidden"])
def test_everything_repaired_is_full_prefill(
    shape: Shape, representation: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Reference path: transformers' prefill. Our path: every relocated token read again."""
    model = tiny_model(shape)
    with engine(model, tokenizer, tmp_path, representation=representation) as one:
        logits, repaired, _ = run_over(one, PROMPT, 1.0)
        assert repaired == sum(len(one.document_tokens(text)) for text in DOCUMENTS[1:])
        torch.testing.assert_close(logits, full_prefill(model, one, PROMPT), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_repair_brings_logits_closer(
    attention: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """More repaired tokens, less distance to full prefill: none > half > all."""
    model = tiny_model(SHAPES[1], attention=attention)
    with engine(model, tokenizer, tmp_path) as one:
        full = full_prefill(model, one, PROMPT)
        errors = [float((run_over(one, PROMPT, s)[0] - full).norm()) for s in (0.0, 0.5, 1.0)]
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2], SHAPES[5]], ids=lambda s: s.label)
def test_scores_are_the_last_row_of_attention(
    shape: Shape, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Reference path: eager attention's own weights over the same cache. Our path: Q times K."""
    model = tiny_model(shape, attention="eager")
    with engine(model, tokenizer, tmp_path) as one:
        composition = one._compose(one._resolve(PROMPT, None).pieces)
        with one._buffers.borrow(len(composition.token_ids) + 1) as buffers:
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
    """One document right after the preamble needs no scoring pass."""
    model = tiny_model(SHAPES[1])
    with engine(model, tokenizer, tmp_path, fidelity="high") as one:
        answer = one.generate(PREAMBLE + DOCUMENTS[0] + "\nWhat?", options=GREEDY)
    assert answer.provenance.repaired_tokens == answer.provenance.relocated_tokens == 0
    assert answer.provenance.exact_tokens > 0


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
        logits, _, _ = run_over(one, prompt, 1.0)
        torch.testing.assert_close(logits, full_prefill(model, one, prompt), atol=2e-5, rtol=1e-4)
    assert answer.provenance.repaired_tokens > 0


def test_bfloat16_repaired_is_close_to_its_own_prefill(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Reference path: the bfloat16 model's prefill. Our path: everything repaired."""
    model = tiny_model(SHAPES[1], dtype=torch.bfloat16)
    with engine(model, tokenizer, tmp_path) as one:
        logits, _, _ = run_over(one, PROMPT, 1.0)
        full = full_prefill(model, one, PROMPT)
    torch.testing.assert_close(logits, full, atol=0.06, rtol=0.05)


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
