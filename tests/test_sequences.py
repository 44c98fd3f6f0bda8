"""Documents that are read one behind another: what stands in front of each, and what is stored."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from oracle import document_state, encode, prefill, rotate
from tiny import SHAPES, Shape, byte_tokenizer, tiny_model
from transformers import PreTrainedModel

from hcache_rag import HCacheEngine, StateStore
from hcache_rag.sequences import (
    BATCH_TOKENS,
    LEAD_TOKENS,
    PendingState,
    TokenRow,
    alone,
    batches,
    chained,
)
from hcache_rag.state import StateKey, TokenIds, child_key, root_key, token_array
from hcache_rag.trial import trying

TOKENIZER = byte_tokenizer()
PREAMBLE = "Answer from the passages below.\n\n"
DOCUMENTS = (
    "The first passage is about the planet Venus, which has no moon.",
    "A second one, somewhat longer, tells of Mars and of the two moons that it has.",
    "The third: Mercury.",
    "Jupiter has so many that a list of them would be longer than this.",
)
QUESTION = "\n\nQuestion: how many moons?\nAnswer:"
NEAR: dict[str, Any] = {"rtol": 2e-4, "atol": 2e-4}
ROOT = root_key("model", "tokenizer")
SEPARATOR = token_array([7, 7])


pytestmark = pytest.mark.usefixtures("one_thread")


@cache
def model_of(shape: Shape) -> PreTrainedModel:
    return tiny_model(shape)


def prompt_of(*documents: str) -> str:
    return PREAMBLE + "\n\n".join(documents) + QUESTION


def engine_on(store: StateStore, shape: Shape = SHAPES[2], **options: Any) -> HCacheEngine:
    its: dict[str, Any] = {
        "preamble": PREAMBLE,
        "storage_dtype": "float32",
        "fidelity": "none",
        "context_at_index": "documents",
    }
    return HCacheEngine(model_of(shape), TOKENIZER, store, **its | options)


# --- rows -----------------------------------------------------------------------------------------


def pending(*lengths: int, parent: StateKey = ROOT) -> list[PendingState]:
    """Documents of some lengths; no two tokens of them are the same."""
    ids = iter(range(100, 1_000_000))
    return [
        PendingState(parent, token_array([next(ids) for _ in range(length)]), f"text {number}")
        for number, length in enumerate(lengths)
    ]


def path_of(*parts: TokenIds) -> StateKey:
    path = ROOT
    for part in parts:
        path = child_key(path, part)
    return path


def starts(row: TokenRow) -> list[int]:
    return [begin for begin, _ in row.states]


def test_a_single_document_has_nothing_in_front() -> None:
    """Its state is the one that it has alone."""
    (state,) = pending(5)
    (row,) = chained([state], SEPARATOR, 100)
    assert (row.token_ids.tolist(), starts(row)) == (state.token_ids.tolist(), [0])
    assert row.states[0][1].key == alone(state).states[0][1].key == state.key


def test_the_last_of_the_first_row_stands_in_front_of_it() -> None:
    """Each document's parent is the path of all that is read before it, separators included."""
    one, two, three = pending(5, 4, 3)
    (row,) = chained([one, two, three], SEPARATOR, 400)
    expected = [*three.token_ids, 7, 7, *one.token_ids, 7, 7, *two.token_ids, 7, 7]
    assert row.token_ids.tolist() == [*expected, *three.token_ids]
    assert starts(row) == [5, 12, 18]
    parents = [state.parent for _, state in row.states]
    front = (three.token_ids, SEPARATOR)
    assert parents == [
        path_of(*front),
        path_of(*front, one.token_ids, SEPARATOR),
        path_of(*front, one.token_ids, SEPARATOR, two.token_ids, SEPARATOR),
    ]
    assert [state.text for _, state in row.states] == ["text 0", "text 1", "text 2"]


@pytest.mark.parametrize("max_tokens", [LEAD_TOKENS + 1, LEAD_TOKENS + 40, 400, 2048])
@pytest.mark.parametrize("seed", range(8))
def test_every_document_stands_once_in_rows_that_are_not_too_long(
    seed: int, max_tokens: int
) -> None:
    """And each finds its own tokens there; in front of a row is the end of the one before."""
    random = np.random.default_rng(seed)
    every = pending(*random.integers(1, 300, 30).tolist())
    rows = list(chained(every, SEPARATOR, max_tokens))
    found = [(row, begin, state) for row in rows for begin, state in row.states]
    assert [state.text for *_, state in found] == [state.text for state in every]
    for row, begin, state in found:
        end = begin + len(state.token_ids)
        assert row.token_ids[begin:end].tolist() == state.token_ids.tolist()
    for row in rows:
        longest = max(len(state.token_ids) for _, state in row.states)
        assert len(row.token_ids) <= max(max_tokens, longest)
    for before, row in pairwise(rows):
        lead = row.token_ids[: max(0, starts(row)[0] - len(SEPARATOR))].tolist()
        last = before.states[-1][1].token_ids.tolist()
        assert len(lead) <= LEAD_TOKENS
        assert last[len(last) - len(lead) :] == lead


def test_rows_are_read_with_others_of_their_length() -> None:
    """No batch is too long, unless it is one row; no row is lost."""
    rows = [alone(state) for state in pending(5, 3000, 700, 600, 1, 900, 40)]
    found = list(batches(rows))
    assert sorted(id(row) for batch in found for row in batch) == sorted(map(id, rows))
    for batch in found:
        assert len(batch) == 1 or len(batch) * len(batch[-1].token_ids) <= BATCH_TOKENS


# --- states ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("representation", ["hidden", "kv"])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2], SHAPES[5]], ids=lambda s: s.label)
def test_states_are_those_behind_the_documents_before(
    store: StateStore, shape: Shape, representation: str
) -> None:
    """K and V as transformers gives them behind all that was read before, moved to their place."""
    engine = engine_on(store, shape, representation=representation)
    report = engine.precompute(DOCUMENTS)
    assert (report.stored, store.stats().documents) == (len(DOCUMENTS), len(DOCUMENTS))
    model = model_of(shape)
    ids = {text: encode(TOKENIZER, text, is_document=True) for text in DOCUMENTS}
    between = encode(TOKENIZER, "\n\n", is_document=False)
    before = [*encode(TOKENIZER, PREAMBLE, is_document=False), *ids[DOCUMENTS[-1]], *between]
    context = {}
    for text in DOCUMENTS:
        context[text] = list(before)
        before += [*ids[text], *between]
    shown = (DOCUMENTS[2], DOCUMENTS[0])
    with trying(engine, prompt_of(*shown), room_tokens=8) as trial:
        _, *spans = trial.composition.spans
        assert [span.is_exact for span in spans] == [False, False]
        slot = trial.composition.spans[0].num_tokens
        for text, span in zip(shown, spans, strict=True):
            state = document_state(model, context[text], ids[text])
            keys = rotate(model, state.keys, span.position)
            for layer in range(len(keys)):
                rows = slice(slot, slot + span.num_tokens)
                found = [side[:, rows] for side in trial.stale(layer)]
                torch.testing.assert_close(found[0], keys[layer], **NEAR)
                torch.testing.assert_close(found[1], state.values[layer], **NEAR)
            slot += span.num_tokens
        everything = trial.read(trial.composition.restored_positions)
        logits = prefill(model, trial.composition.token_ids.tolist()).logits
        torch.testing.assert_close(everything.first, logits, **NEAR)


def test_what_was_read_behind_others_stays_whatever_becomes_of_them(store: StateStore) -> None:
    """Neither another order, nor a document more or less, has any read again."""
    engine = engine_on(store)
    engine.precompute(DOCUMENTS[:3])
    for texts in (DOCUMENTS[:3], DOCUMENTS[2::-1], DOCUMENTS[1:3]):
        report = engine.precompute(texts)
        assert (report.stored, report.reused) == (0, len(texts))
    (first,) = store.find(DOCUMENTS[0])
    assert store.delete(first.key)
    report = engine.precompute(DOCUMENTS)
    assert (report.stored, report.reused) == (2, 2)
    assert len(store.find(DOCUMENTS[1])) == 1


def test_both_states_of_a_text_are_used_each_where_it_is_better(store: StateStore) -> None:
    """The one that has seen nothing right behind the preamble, the other everywhere else."""
    chained_one = engine_on(store)
    chained_one.precompute(DOCUMENTS)
    plain = engine_on(store, context_at_index="none")
    assert plain.precompute(DOCUMENTS).stored == len(DOCUMENTS)
    assert chained_one.precompute(DOCUMENTS).reused == len(DOCUMENTS)
    for engine in (plain, chained_one):
        with trying(engine, prompt_of(*DOCUMENTS[:3]), room_tokens=8) as trial:
            _, *spans = trial.composition.spans
            assert [span.is_exact for span in spans] == [True, False, False]
            behind = [span.record.parent == spans[0].record.parent for span in spans]
            assert behind == [True, False, False]


def test_documents_in_the_order_in_which_they_were_read_are_exact(store: StateStore) -> None:
    """Such as two pieces of one file that are found together, behind what was read before them."""
    engine = engine_on(store, fidelity="exact", context_at_index="none")
    engine.precompute([DOCUMENTS[3]])
    engine_on(store).precompute(DOCUMENTS)
    prompt = prompt_of(DOCUMENTS[3], *DOCUMENTS[:3])
    with trying(engine, prompt, room_tokens=8) as trial:
        assert [span.is_exact for span in trial.composition.spans] == [True] * 5
        nothing = trial.read(np.empty(0, np.int64))
        logits = prefill(engine.adapter.model, trial.composition.token_ids.tolist()).logits
        torch.testing.assert_close(nothing.first, logits, **NEAR)


def test_what_contradicts_it_is_said_at_once(store: StateStore) -> None:
    with pytest.raises(ValueError, match="not exact"):
        engine_on(store, fidelity="exact")
    with pytest.raises(ValueError, match="'none' or 'documents', not 'title'"):
        engine_on(store, context_at_index="title")
    layers = ["none"] + ["hidden"] * (model_of(SHAPES[2]).config.num_hidden_layers - 1)
    with pytest.raises(ValueError, match="keep nothing"):
        engine_on(store, representation=layers)
