"""Pieces to one sequence: what is restored where, what is exact, what is read afresh."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hcache_rag.compose import MIN_PREAMBLE_TOKENS, Composition, compose
from hcache_rag.layout import LayerFormat, Representation, StateLayout
from hcache_rag.state import StateKey, StateRecord, TokenIds, child_key, root_key, token_array

ROOT = root_key("model", "tokenizer")
LAYOUT = StateLayout((LayerFormat(Representation.KV, "float32"),))
Pieces = Sequence[tuple[TokenIds, StateRecord | None]]


def state(ids: Sequence[int], parent: StateKey = ROOT, *, is_preamble: bool = False) -> StateRecord:
    """The state of tokens read right after `parent`."""
    array = token_array(ids)
    key = child_key(parent, array)
    return StateRecord(key, parent, ROOT, array, "", LAYOUT, 0.0, is_preamble)


PREAMBLE = state(range(10), is_preamble=True)
A = state(range(100, 105), PREAMBLE.key)
B = state(range(200, 207), PREAMBLE.key)
B_AFTER_A = state(range(200, 207), A.key)
ORPHAN = state(range(300, 304))  # stored without a preamble


def gap(*ids: int) -> tuple[TokenIds, None]:
    return token_array(ids), None


def doc(record: StateRecord, num_tokens: int | None = None) -> tuple[TokenIds, StateRecord]:
    return record.token_ids[:num_tokens], record


HEAD = gap(*range(10))
QUESTION = gap(900, 901, 902)


def spans(composition: Composition) -> list[tuple[StateRecord, int, int, bool]]:
    return [(s.record, s.position, s.num_tokens, s.is_exact) for s in composition.spans]


def placed(
    pieces: Pieces, preamble: StateRecord | None = PREAMBLE, *, exact_only: bool = False
) -> list[tuple[StateRecord, int, int, bool]]:
    return spans(compose(pieces, ROOT, preamble, exact_only=exact_only))


# --- positions ----------------------------------------------------------------------------------


def test_pieces_stand_one_after_another() -> None:
    composition = compose([HEAD, doc(A), gap(1), doc(B), QUESTION], ROOT, PREAMBLE)
    expected = [*range(10), *range(100, 105), 1, *range(200, 207), 900, 901, 902]
    assert composition.token_ids.tolist() == expected
    assert composition.token_ids.dtype == np.uint32
    assert [(s.record, s.position, s.num_tokens) for s in composition.spans] == [
        (PREAMBLE, 0, 10),
        (A, 10, 5),
        (B, 16, 7),
    ]
    assert composition.fresh_positions.tolist() == [15, 23, 24, 25]
    assert composition.restored_positions.tolist() == [*range(15), *range(16, 23)]
    assert (composition.num_restored, composition.num_exact) == (22, 15)


def test_a_cut_document_is_restored_as_far_as_it_stands_there() -> None:
    assert placed([HEAD, doc(A, 3), QUESTION])[1:] == [(A, 10, 3, True)]


def test_only_gaps_are_all_read_afresh() -> None:
    composition = compose([gap(1, 2), gap(3), gap(4, 5)], ROOT, None)
    assert composition.spans == ()
    assert composition.token_ids.tolist() == [1, 2, 3, 4, 5]
    assert composition.fresh_positions.tolist() == [0, 1, 2, 3, 4]
    assert composition.restored_positions.tolist() == []
    assert (composition.num_restored, composition.num_exact) == (0, 0)


def test_a_prompt_of_gaps_still_restores_the_preamble() -> None:
    composition = compose([HEAD, QUESTION], ROOT, PREAMBLE)
    assert spans(composition) == [(PREAMBLE, 0, 10, True)]
    assert composition.fresh_positions.tolist() == [10, 11, 12]


@pytest.mark.parametrize("pieces", [[], [gap()], [gap(), gap()]], ids=["none", "one", "two"])
@pytest.mark.parametrize("preamble", [None, PREAMBLE], ids=["no-preamble", "preamble"])
def test_nothing_gives_nothing(preamble: StateRecord | None, pieces: Pieces) -> None:
    composition = compose(pieces, ROOT, preamble)
    assert composition.spans == ()
    assert len(composition.token_ids) == len(composition.fresh_positions) == 0


# --- exact or relocated -------------------------------------------------------------------------


def test_the_document_right_after_the_preamble_is_exact() -> None:
    assert placed([HEAD, doc(A), QUESTION]) == [(PREAMBLE, 0, 10, True), (A, 10, 5, True)]


def test_the_next_document_is_relocated() -> None:
    """It was read right after the preamble, and stands after another one."""
    assert placed([HEAD, doc(A), doc(B), QUESTION])[1:] == [(A, 10, 5, True), (B, 15, 7, False)]


def test_a_document_stored_after_another_is_exact_there() -> None:
    """A path of the state tree that equals the prompt."""
    found = placed([HEAD, doc(A), doc(B_AFTER_A), QUESTION])
    assert found[1:] == [(A, 10, 5, True), (B_AFTER_A, 15, 7, True)]


def test_a_path_may_lead_through_text() -> None:
    """Stored after the preamble, a document and a separator, and standing just there."""
    later = state([60, 61], child_key(A.key, token_array([1])))
    assert placed([HEAD, doc(A), gap(1), doc(later), QUESTION])[2] == (later, 16, 2, True)
    assert placed([HEAD, doc(A), gap(2), doc(later), QUESTION])[2] == (later, 16, 2, False)
    assert placed([HEAD, doc(A), doc(later), QUESTION])[2] == (later, 15, 2, False)


def test_in_the_other_order_neither_path_holds() -> None:
    found = placed([HEAD, doc(B), doc(A), doc(B_AFTER_A), QUESTION])
    assert [is_exact for *_, is_exact in found] == [True, True, False, False]


def test_a_document_repeated_is_exact_only_once() -> None:
    found = placed([HEAD, doc(A), gap(1), doc(A), doc(A), QUESTION])
    assert found[1:] == [(A, 10, 5, True), (A, 16, 5, False), (A, 21, 5, False)]


def test_text_between_documents_breaks_the_path() -> None:
    """Also where the second was stored right after the first."""
    found = placed([HEAD, doc(A), gap(1), doc(B_AFTER_A), QUESTION])
    assert found[2] == (B_AFTER_A, 16, 7, False)


def test_a_cut_document_breaks_the_path() -> None:
    found = placed([HEAD, doc(A, 4), doc(B_AFTER_A), QUESTION])
    assert found[1:] == [(A, 10, 4, True), (B_AFTER_A, 14, 7, False)]


def test_text_in_front_of_the_first_document_makes_it_relocated() -> None:
    """The preamble itself is exact all the same."""
    found = placed([HEAD, gap(1), doc(A), QUESTION])
    assert found == [(PREAMBLE, 0, 10, True), (A, 11, 5, False)]


def test_an_unstored_document_counts_as_text() -> None:
    """A known document without a state is a piece without a record."""
    found = placed([HEAD, gap(*range(400, 420)), doc(A), QUESTION])
    assert found == [(PREAMBLE, 0, 10, True), (A, 30, 5, False)]


@pytest.mark.parametrize("empty", [gap(), (token_array([]), ORPHAN)], ids=["gap", "document"])
@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_an_empty_piece_changes_nothing(
    place: int, empty: tuple[TokenIds, StateRecord | None]
) -> None:
    """Neither positions nor the path: a document cut to no token at all stands nowhere."""
    pieces: list[tuple[TokenIds, StateRecord | None]] = [HEAD, doc(A), doc(B_AFTER_A), QUESTION]
    with_empty = [*pieces[:place], empty, *pieces[place:]]
    assert placed(with_empty) == placed(pieces)


# --- the preamble -------------------------------------------------------------------------------


@pytest.mark.parametrize("common", range(11))
def test_a_preamble_that_is_partly_equal(common: int) -> None:
    """Its common head is restored from 8 tokens on; documents after it are relocated."""
    head = gap(*[*range(common), *[999] * (10 - common)])
    expected = [(A, 10, 5, common == 10)]
    if common >= MIN_PREAMBLE_TOKENS:
        expected.insert(0, (PREAMBLE, 0, common, True))
    assert placed([head, doc(A), QUESTION]) == expected
    assert MIN_PREAMBLE_TOKENS == 8


@pytest.mark.parametrize("length", range(10))
def test_a_head_shorter_than_the_preamble(length: int) -> None:
    """Equal as far as it goes, but documents stand elsewhere than they were read."""
    found = placed([gap(*range(length)), doc(A), QUESTION])
    assert found[-1] == (A, length, 5, False)
    assert (found[0] == (PREAMBLE, 0, length, True)) == (length >= 8)


def test_the_head_may_come_in_pieces() -> None:
    """The first token, the template, the system text."""
    found = placed([gap(0), gap(), gap(1, 2, 3), gap(*range(4, 10)), doc(A), QUESTION])
    assert found == [(PREAMBLE, 0, 10, True), (A, 10, 5, True)]


def test_a_short_preamble_is_read_afresh_but_keeps_documents_exact() -> None:
    short = state([1, 2, 3], is_preamble=True)
    document = state([50, 51], short.key)
    assert placed([gap(1, 2, 3), doc(document), QUESTION], short) == [(document, 3, 2, True)]


def test_the_preamble_is_looked_for_at_the_beginning_only() -> None:
    found = placed([doc(A), HEAD, QUESTION])
    assert found == [(A, 0, 5, False)]


def test_without_a_preamble_documents_hang_on_the_root() -> None:
    """At the very beginning they are exact, behind anything else relocated."""
    assert placed([doc(ORPHAN), QUESTION], None) == [(ORPHAN, 0, 4, True)]
    assert placed([gap(1), doc(ORPHAN), QUESTION], None) == [(ORPHAN, 1, 4, False)]
    assert placed([gap(), doc(ORPHAN), QUESTION], None) == [(ORPHAN, 0, 4, True)]


def test_a_document_of_another_path_is_relocated_wherever_it_stands() -> None:
    """Read after a preamble that is not there, or without the one that is."""
    assert placed([doc(A), QUESTION], None) == [(A, 0, 5, False)]
    assert placed([HEAD, doc(ORPHAN), QUESTION])[1:] == [(ORPHAN, 10, 4, False)]


# --- exact only ---------------------------------------------------------------------------------


def test_exact_only_leaves_relocated_documents_to_be_read() -> None:
    pieces = [HEAD, doc(A), doc(B), doc(ORPHAN), QUESTION]
    composition = compose(pieces, ROOT, PREAMBLE, exact_only=True)
    assert spans(composition) == [(PREAMBLE, 0, 10, True), (A, 10, 5, True)]
    assert composition.fresh_positions.tolist() == list(range(15, 29))
    assert composition.num_exact == composition.num_restored == 15


def test_exact_only_follows_a_path() -> None:
    found = placed([HEAD, doc(A), doc(B_AFTER_A), doc(A), QUESTION], exact_only=True)
    assert found[1:] == [(A, 10, 5, True), (B_AFTER_A, 15, 7, True)]


def test_exact_only_does_not_take_up_a_broken_path() -> None:
    """What follows a document that was left out is not exact either."""
    child = state([60, 61], B.key)
    found = placed([HEAD, doc(A), doc(B), doc(child), QUESTION], exact_only=True)
    assert found[1:] == [(A, 10, 5, True)]


def test_exact_only_takes_a_partial_preamble_and_nothing_after_it() -> None:
    found = placed([gap(*range(9), 999), doc(A), QUESTION], exact_only=True)
    assert found == [(PREAMBLE, 0, 9, True)]


# --- the last token -----------------------------------------------------------------------------


def test_the_last_token_of_a_document_at_the_end_is_read_afresh() -> None:
    composition = compose([HEAD, doc(A)], ROOT, PREAMBLE)
    assert spans(composition) == [(PREAMBLE, 0, 10, True), (A, 10, 4, True)]
    assert composition.fresh_positions.tolist() == [14]


def test_a_document_of_one_token_at_the_end_is_not_restored() -> None:
    composition = compose([HEAD, doc(A, 1)], ROOT, PREAMBLE)
    assert spans(composition) == [(PREAMBLE, 0, 10, True)]
    assert composition.fresh_positions.tolist() == [10]


def test_a_prompt_that_is_the_preamble() -> None:
    composition = compose([HEAD], ROOT, PREAMBLE)
    assert spans(composition) == [(PREAMBLE, 0, 9, True)]
    assert composition.fresh_positions.tolist() == [9]


@pytest.mark.parametrize("empty", [gap(), (token_array([]), ORPHAN)], ids=["gap", "document"])
def test_an_empty_piece_at_the_end_does_not_hide_the_last_token(
    empty: tuple[TokenIds, StateRecord | None],
) -> None:
    composition = compose([HEAD, doc(A), empty], ROOT, PREAMBLE)
    assert composition.fresh_positions.tolist() == [14]


def test_a_restored_token_in_front_of_the_last_stays_restored() -> None:
    composition = compose([HEAD, doc(A), gap(1)], ROOT, PREAMBLE)
    assert composition.fresh_positions.tolist() == [15]


# --- whatever the pieces ------------------------------------------------------------------------


@cache
def alternatives() -> list[StateRecord]:
    """States under the root, under the preamble, and under each other, two levels deep."""
    ids = [[1], [1, 2], [2, 1, 1], list(range(10)), [1, 2, 1]]
    first = [state(i, parent) for i in ids for parent in (ROOT, PREAMBLE.key)]
    return first + [state(i, record.key) for i in ids for record in first]


@st.composite
def piece(draw: st.DrawFn) -> tuple[TokenIds, StateRecord | None]:
    if draw(st.booleans()):
        heads = st.integers(0, 10).map(range)
        return token_array(list(draw(st.lists(st.integers(0, 3), max_size=4) | heads))), None
    record = draw(st.sampled_from(alternatives()))
    length = draw(st.integers(0, record.num_tokens) | st.just(record.num_tokens))
    return record.token_ids[:length], record


def path_of(record: StateRecord) -> list[int]:
    """The token ids that a state was computed after."""
    parents = {r.key: r for r in (*alternatives(), PREAMBLE)}
    tokens: list[int] = []
    parent = record.parent
    while parent != ROOT:
        tokens = parents[parent].token_ids.tolist() + tokens
        parent = parents[parent].parent
    return tokens


@settings(deadline=None, derandomize=True, max_examples=500)
@given(st.lists(piece(), max_size=6), st.sampled_from([None, PREAMBLE]), st.booleans())
def test_every_composition(pieces: Pieces, preamble: StateRecord | None, exact_only: bool) -> None:
    """Every position is restored once or fresh; spans hold the prompt's ids; exact is exact."""
    composition = compose(pieces, ROOT, preamble, exact_only=exact_only)

    prompt = composition.token_ids.tolist()
    assert prompt == [int(token) for ids, _ in pieces for token in ids]
    restored = composition.restored_positions.tolist()
    fresh = composition.fresh_positions.tolist()
    assert sorted(restored + fresh) == list(range(len(prompt)))
    assert fresh == sorted(fresh)
    assert restored == sorted(restored)
    assert not prompt or fresh[-1] == len(prompt) - 1
    assert len(restored) == composition.num_restored >= composition.num_exact
    for span in composition.spans:
        end = span.position + span.num_tokens
        assert 0 < span.num_tokens <= span.record.num_tokens
        assert prompt[span.position : end] == span.record.token_ids[: span.num_tokens].tolist()
        if span.is_exact:
            assert prompt[: span.position] == path_of(span.record)
        assert span.is_exact or not exact_only


# --- what nothing looks at ----------------------------------------------------------------------


@given(
    gaps=st.lists(st.integers(0, 9), min_size=3, max_size=3),
    window=st.integers(1, 12),
)
def test_unseen_rows_are_brute_force(gaps: list[int], window: int) -> None:
    """A row is seen by every fresh token at most `window - 1` behind it."""
    pieces: list[tuple[TokenIds, StateRecord | None]] = [HEAD]
    for length, document in zip(gaps, (A, B, A), strict=True):
        pieces += [gap(*range(500, 500 + length)), doc(document)]
    composition = compose(pieces, ROOT, PREAMBLE)
    expected = [
        row
        for row, position in enumerate(composition.restored_positions)
        if not any(position <= fresh < position + window for fresh in composition.fresh_positions)
    ]
    found = [row for begin, end in composition.unseen_rows(window) for row in range(begin, end)]
    assert found == expected


def test_only_a_beginning_without_a_gap() -> None:
    """The exact spans from the first token on, and nothing behind what is read between them."""
    after_gap = state(range(400, 406), child_key(A.key, token_array([1])))
    pieces = [HEAD, doc(A), gap(1), doc(after_gap), QUESTION]
    whole = compose(pieces, ROOT, PREAMBLE)
    assert [span.record for span in whole.spans] == [PREAMBLE, A, after_gap]
    assert whole.num_exact == whole.num_restored
    beginning = compose(pieces, ROOT, PREAMBLE, beginning_only=True)
    assert [span.record for span in beginning.spans] == [PREAMBLE, A]
    relocated = compose([HEAD, doc(B), doc(A), QUESTION], ROOT, PREAMBLE, beginning_only=True)
    assert [span.record for span in relocated.spans] == [PREAMBLE, B]
