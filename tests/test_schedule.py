"""A plan's steps: every token is restored once, from the right rows, after it has been read."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import EXACT, HIDDEN, KEPT, KV, NOTHING, Case, cases, plans
from machines import SMALL as SPEC

from hcache_rag.codec import ChunkShape, encode
from hcache_rag.layout import HEADER_BYTES, LayerFormat, StateLayout
from hcache_rag.plan import Conditions, Cut, RestorePlan, SpanSize, plan_restore
from hcache_rag.profile import ModelCosts, ReadRate, SuffixCost, TokenCost
from hcache_rag.schedule import (
    RECOMPUTE_BATCH_TOKENS,
    ChunkUse,
    Piece,
    Recomputation,
    Schedule,
    schedule,
)
from hcache_rag.timeline import COMPUTING, READING, Step

KV_FLOAT, HIDDEN_FLOAT = LayerFormat(KV, "float32"), LayerFormat(HIDDEN, "float32")
STORED = StateLayout((KV_FLOAT,) * 3, 64)
MIXED = StateLayout((HIDDEN_FLOAT, HIDDEN_FLOAT, KV_FLOAT), 64)
LACKING = StateLayout((NOTHING, HIDDEN_FLOAT, KV_FLOAT), 64)


@dataclass(frozen=True)
class Laid:
    """A case, a plan for it, and the plan's steps."""

    case: Case
    plan: RestorePlan
    work: Schedule


@st.composite
def laid(draw: st.DrawFn) -> Laid:
    """Any restore on any machine: by the planner's plan, or by any other that is possible."""
    case = draw(cases(is_measured=draw(st.booleans())))
    if draw(st.booleans()):
        plan = draw(plans(case.spans))
    else:
        plan = plan_restore(
            case.spec, case.spans, case.machine, case.now, fresh_tokens=case.fresh_tokens
        )
    work = schedule(
        case.spec,
        case.spans,
        plan,
        fresh_tokens=case.fresh_tokens,
        costs=case.machine.costs_of(case.spec),
        now=case.now,
    )
    return Laid(case, plan, work)


ANY = settings(deadline=None, derandomize=True, max_examples=60)


# --- which tokens -------------------------------------------------------------------------------


@ANY
@given(laid())
def test_every_token_of_every_layer_is_restored_exactly_once(drawn: Laid) -> None:
    """By one piece's chunk, or by one recomputation, whatever the plan, layouts and spans."""
    sizes, num_layers = drawn.case.spans, drawn.case.spec.num_layers
    times = [np.zeros((num_layers, span.tokens), dtype=int) for span in sizes]
    for layer, row in enumerate(drawn.work.pieces):
        for piece in row:
            for use in piece.chunks:
                first = use.chunk * sizes[use.span].layout.chunk_tokens
                assert first + use.tokens <= sizes[use.span].tokens
                times[use.span][layer, first : first + use.tokens] += 1
    for job in drawn.work.recomputations:
        for index, tokens in job.heads:
            assert 0 < tokens <= sizes[index].tokens
            times[index][: job.layers, :tokens] += 1
    assert len(drawn.work.pieces) == num_layers
    for of_span in times:
        assert (of_span == 1).all()


@ANY
@given(laid())
def test_only_what_can_be_is_recomputed(drawn: Laid) -> None:
    """And of every span its first tokens only, once."""
    heads = [head for job in drawn.work.recomputations for head in job.heads]
    assert len({index for index, _ in heads}) == len(heads)
    assert all(drawn.case.spans[index].is_recomputable for index, _ in heads)


@ANY
@given(laid())
def test_rows_are_the_restored_tokens_of_the_prompt(drawn: Laid) -> None:
    """A row is the tokens of all earlier spans and the position in this one."""
    sizes = drawn.case.spans
    first_row = np.cumsum([0, *(span.tokens for span in sizes)])
    for piece in (piece for row in drawn.work.pieces for piece in row):
        for use in piece.chunks:
            position = use.chunk * sizes[use.span].layout.chunk_tokens
            assert use.row == first_row[use.span] + position
            assert use.tokens == min(
                sizes[use.span].layout.chunk_tokens, sizes[use.span].tokens - position
            )


def wanted_tokens(drawn: Laid, layer: int) -> int:
    """Of a piece: a quarter in the first and the last layer, which nothing hides."""
    is_edge = layer in (0, drawn.case.spec.num_layers - 1)
    return drawn.plan.piece_tokens // 4 if is_edge else drawn.plan.piece_tokens


@ANY
@given(laid())
def test_pieces_are_neighbouring_chunks_of_one_format(drawn: Laid) -> None:
    """Of the layer's format, without a gap, and no larger than asked for but by one chunk."""
    sizes = drawn.case.spans
    for layer, row in enumerate(drawn.work.pieces):
        for piece in row:
            assert {sizes[use.span].layout.layers[layer] for use in piece.chunks} == {piece.fmt}
            assert piece.start == piece.chunks[0].row
            assert piece.stop == piece.chunks[-1].row + piece.chunks[-1].tokens
            for use, following in pairwise(piece.chunks):
                assert use.row + use.tokens == following.row
            assert piece.chunks[-1].row - piece.start < max(1, wanted_tokens(drawn, layer))


@ANY
@given(laid())
def test_pieces_are_not_smaller_than_need_be(drawn: Laid) -> None:
    """A piece ends where it is large enough, or where its format or its rows do."""
    for layer, row in enumerate(drawn.work.pieces):
        for piece, following in pairwise(sorted(row, key=lambda piece: piece.start)):
            assert (
                piece.stop - piece.start >= wanted_tokens(drawn, layer)
                or piece.stop != following.start
                or piece.fmt != following.fmt
            )


@ANY
@given(laid())
def test_what_needs_most_computing_is_read_first(drawn: Laid) -> None:
    """In a layer of both, hidden states before K and V; otherwise in the order of the prompt."""
    for row in drawn.work.pieces:
        order = [(piece.fmt.representation is KV, piece.start) for piece in row]
        assert order == sorted(order)


def test_documents_in_two_formats() -> None:
    """Hidden states of all documents come first; a piece does not reach over another format."""
    sizes = [SpanSize(70, STORED), SpanSize(64, MIXED), SpanSize(10, MIXED), SpanSize(5, STORED)]
    work = schedule(SPEC, sizes, plan_restore(SPEC, sizes, None))
    hidden = Piece(HIDDEN_FLOAT, (ChunkUse(1, 0, 64, 70), ChunkUse(2, 0, 10, 134)))
    first = Piece(KV_FLOAT, (ChunkUse(0, 0, 64, 0), ChunkUse(0, 1, 6, 64)))
    last = Piece(KV_FLOAT, (ChunkUse(3, 0, 5, 144),))
    assert work.pieces[0] == work.pieces[1] == (hidden, first, last)
    assert [(piece.start, piece.stop) for piece in work.pieces[2]] == [(0, 134), (134, 149)]
    assert work.recomputations == ()


def test_rows_of_recomputed_tokens_are_left_out() -> None:
    """What lies behind keeps its rows; what lies on both sides of a hole is two pieces."""
    sizes = [SpanSize(64, STORED), SpanSize(192, STORED), SpanSize(64, STORED)]
    plan = RestorePlan((Cut(), Cut(128), Cut()), 512)
    work = schedule(SPEC, sizes, plan)
    assert [[(piece.start, piece.stop) for piece in row] for row in work.pieces] == [
        [(0, 64), (192, 320)]
    ] * 3
    assert work.recomputations == (Recomputation(((1, 128),), 3),)


def test_first_layers_that_are_recomputed_have_no_pieces() -> None:
    """Of spans that are not, they have."""
    sizes = [SpanSize(64, STORED), SpanSize(64, LACKING)]
    work = schedule(SPEC, sizes, RestorePlan((Cut(), Cut(0, 2)), 512))
    assert [[(piece.start, piece.stop) for piece in row] for row in work.pieces] == [
        [(0, 64)],
        [(0, 64)],
        [(0, 128)],
    ]
    assert work.recomputations == (Recomputation(((1, 64),), 2),)


@pytest.mark.parametrize(
    ("piece_tokens", "expected"),
    [
        (1, [64] * 5),
        (64, [64] * 5),
        (65, [128, 128, 64]),
        (129, [192, 128]),
        (320, [320]),
        (999, [320]),
    ],
)
def test_chunks_are_taken_until_a_piece_is_large_enough(
    piece_tokens: int, expected: list[int]
) -> None:
    """Over the ends of documents."""
    sizes = [SpanSize(64, STORED), SpanSize(256, STORED)]
    work = schedule(SPEC, sizes, RestorePlan((Cut(), Cut()), piece_tokens))
    assert [piece.stop - piece.start for piece in work.pieces[1]] == expected


def test_the_first_and_the_last_layer_are_in_smaller_pieces() -> None:
    """Computing waits for the first piece's reading, and the end for the last one's restoring."""
    sizes = [SpanSize(1024, StateLayout((KV_FLOAT,) * 3, 64))]
    work = schedule(SPEC, sizes, RestorePlan((Cut(),), 512))
    assert [len(row) for row in work.pieces] == [8, 2, 8]
    assert RestorePlan((Cut(),), 512).edge_piece_tokens == 128


# --- in which order -----------------------------------------------------------------------------


@ANY
@given(laid())
def test_needs_point_back_to_the_reading_of_the_same_piece(drawn: Laid) -> None:
    """Every piece is read once and restored once, after it was read; nothing else is waited for."""
    steps = drawn.work.steps
    read: list[int] = []
    for index, step in enumerate(steps):
        assert all(need < index for need in step.needs)
        if step.verb != "restore":
            assert step.needs == ()
            continue
        (need,) = step.needs
        assert (steps[need].lane, steps[need].verb) == (READING, "read")
        assert (steps[need].layer, steps[need].piece) == (step.layer, step.piece)
        read.append(need)
    assert read == [index for index, step in enumerate(steps) if step.verb == "read"]


@ANY
@given(laid())
def test_steps_are_in_the_order_of_the_forward_pass(drawn: Laid) -> None:
    """Reading; then what is recomputed, then of each layer its pieces and its forward pass."""
    pieces = [len(row) for row in drawn.work.pieces]
    expected = [
        *[(READING, "read", layer, i) for layer, count in enumerate(pieces) for i in range(count)],
        *[
            (COMPUTING, "recompute", job.layers, i)
            for i, job in enumerate(drawn.work.recomputations)
        ],
    ]
    for layer, count in enumerate(pieces):
        expected += [(COMPUTING, "restore", layer, i) for i in range(count)]
        expected.append((COMPUTING, "forward", layer, 0))
    assert [(s.lane, s.verb, s.layer, s.piece) for s in drawn.work.steps] == expected


# --- what is read -------------------------------------------------------------------------------


@ANY
@given(laid())
def test_bytes_are_those_of_whole_stored_values(drawn: Laid) -> None:
    """Headers and payloads as the codec writes them, of a cut document's last chunk too."""
    spec, sizes = drawn.case.spec, drawn.case.spans
    for step in drawn.work.steps:
        if step.verb != "read":
            assert step.num_bytes == 0
            continue
        expected = 0
        for use in drawn.work.pieces[step.layer][step.piece].chunks:
            span = sizes[use.span]
            stored = span.tokens + span.unused_tokens
            first = use.chunk * span.layout.chunk_tokens
            tokens = min(first + span.layout.chunk_tokens, stored) - first
            fmt = span.layout.layers[step.layer]
            expected += HEADER_BYTES + ChunkShape(fmt, tokens, spec).payload_bytes
        assert step.num_bytes == expected


@pytest.mark.parametrize("fmt", KEPT, ids=str)
def test_bytes_are_those_that_encoding_writes(fmt: LayerFormat) -> None:
    """80 of 90 tokens: a chunk of 64, and one of 26 of which 16 are used."""
    sizes = [SpanSize(80, StateLayout((fmt,) * 3, 64), unused_tokens=10)]
    work = schedule(SPEC, sizes, plan_restore(SPEC, sizes, None))
    written = 0
    for chunk, tokens in enumerate((64, 26)):
        shape = ChunkShape(fmt, tokens, SPEC)
        arrays = shape.arrays(bytearray(shape.payload_bytes))
        written += len(encode(shape, bytes(16), 0, chunk, arrays))
    assert [step.num_bytes for step in work.steps if step.verb == "read"] == [written] * 3
    assert [use.tokens for use in work.pieces[0][0].chunks] == [64, 16]


# --- what it costs ------------------------------------------------------------------------------

COSTS = ModelCosts(
    project={"float32": TokenCost(0.25, 2.0)},
    scatter={"float32": TokenCost(0.5, 1.0)},
    layer=TokenCost(1.0, 10.0, 100.0),
    suffix=SuffixCost(1.0, 2.0, 3.0, 4.0),
)


def priced(plan: RestorePlan, sizes: list[SpanSize], **options: Any) -> list[Step]:
    """The steps of a plan on a machine that reads a byte a second, and one request in 100 s."""
    now = Conditions(ReadRate(1.0, 100.0), compute_factor=3.0)
    return list(schedule(SPEC, sizes, plan, costs=COSTS, now=now, **options).steps)


def test_steps_cost_what_the_machine_says() -> None:
    """Two chunks are two requests; computing takes three times as long as it was measured."""
    sizes = [SpanSize(5, MIXED), SpanSize(70, LACKING)]
    steps = priced(RestorePlan((Cut(), Cut(0, 1)), 512), sizes, fresh_tokens=7)
    hidden_5 = 48 + 5 * (16 + 1) * 4
    hidden_70, kv_75 = 2 * 48 + 70 * (16 + 1) * 4, 3 * 48 + 75 * 2 * 8 * 4
    forward_s = 3 * (1 + 7 * 2 + 75 * (3 + 7 * 4))
    assert [(step.verb, step.cost_s) for step in steps] == [
        ("read", hidden_5 + 100.0),
        ("read", hidden_5 + hidden_70 + 300.0),
        ("read", kv_75 + 300.0),
        ("recompute", 3 * (1 + 10 * 70 + 100 * 70**2)),
        ("restore", 3 * (0.25 + 2 * 5)),
        ("forward", forward_s),
        ("restore", 3 * (0.25 + 2 * 75)),
        ("forward", forward_s),
        ("restore", 3 * (0.5 + 1 * 75)),
        ("forward", forward_s),
    ]
    assert [step.num_bytes for step in steps[:3]] == [hidden_5, hidden_5 + hidden_70, kv_75]


def test_a_batch_costs_what_its_documents_do_through_all_its_layers() -> None:
    sizes = [SpanSize(5, STORED), SpanSize(7, STORED)]
    steps = priced(RestorePlan((Cut(0, 2),) * 2, 512), sizes)
    (recompute,) = (step for step in steps if step.verb == "recompute")
    of_5, of_7 = (1 + 10 * tokens + 100 * tokens**2 for tokens in (5, 7))
    assert recompute.cost_s == 3 * 2 * (of_5 + of_7)


def test_by_default_one_token_is_fresh() -> None:
    """The last one of a prompt always is."""
    sizes = [SpanSize(5, STORED)]
    plan = RestorePlan((Cut(),), 512)
    assert priced(plan, sizes) == priced(plan, sizes, fresh_tokens=1)
    assert priced(plan, sizes, fresh_tokens=2)[-1].cost_s == 3 * (1 + 2 * 2 + 5 * (3 + 2 * 4))


@ANY
@given(laid())
def test_without_a_machine_steps_have_bytes_but_no_costs(drawn: Laid) -> None:
    """They are the same steps otherwise."""
    case = drawn.case
    costs = case.machine.costs_of(case.spec)
    half_known: list[dict[str, Any]] = [{}, {"costs": costs}, {"now": case.now}]
    for options in half_known:
        bare = schedule(case.spec, case.spans, drawn.plan, **options)
        assert bare.pieces == drawn.work.pieces
        assert bare.recomputations == drawn.work.recomputations
        assert list(bare.steps) == [replace(step, cost_s=0.0) for step in drawn.work.steps]


@ANY
@given(laid())
def test_costs_do_not_depend_on_how_work_is_cut_into_steps(drawn: Laid) -> None:
    """All steps together take what the bytes, tokens and calls take."""
    case, work = drawn.case, drawn.work
    costs, slower = case.machine.costs_of(case.spec), case.now.compute_factor
    seconds: defaultdict[str, float] = defaultdict(float)
    for step in work.steps:
        seconds[step.verb] += step.cost_s
    uses = [use for row in work.pieces for piece in row for use in piece.chunks]
    num_bytes = sum(step.num_bytes for step in work.steps)
    read_s = (
        num_bytes / case.now.read_rate.bytes_per_s + len(uses) * case.now.read_rate.per_request_s
    )
    restore_s = sum(
        costs.restore(piece.fmt).fixed_s
        + sum(use.tokens for use in piece.chunks) * costs.restore(piece.fmt).per_token_s
        for row in work.pieces
        for piece in row
    )
    recompute_s = sum(
        job.layers * costs.layer(tokens) for job in work.recomputations for _, tokens in job.heads
    )
    context = sum(span.tokens for span in case.spans)
    forward_s = case.spec.num_layers * costs.suffix(case.fresh_tokens, context)
    assert seconds["read"] == pytest.approx(read_s, rel=EXACT)
    assert seconds["restore"] == pytest.approx(slower * restore_s, rel=EXACT)
    assert seconds["recompute"] == pytest.approx(slower * recompute_s, rel=EXACT)
    assert seconds["forward"] == pytest.approx(slower * forward_s, rel=EXACT)


# --- batches ------------------------------------------------------------------------------------


@st.composite
def recomputed(draw: st.DrawFn) -> tuple[list[SpanSize], RestorePlan]:
    """Documents of very different lengths, all recomputed, through some or all layers."""
    lengths = draw(st.lists(st.integers(1, 3000), min_size=1, max_size=12))
    sizes = [SpanSize(tokens, STORED) for tokens in lengths]
    cuts = tuple(draw(st.sampled_from([Cut(0, 1), Cut(0, 3), Cut(n, 0)])) for n in lengths)
    return sizes, RestorePlan(cuts, 512)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(recomputed())
def test_batches_hold_documents_of_similar_length(
    drawn: tuple[list[SpanSize], RestorePlan],
) -> None:
    """Up to 2,048 tokens with padding, or one document; those through more layers come first."""
    sizes, plan = drawn
    jobs = schedule(SPEC, sizes, plan).recomputations
    assert RECOMPUTE_BATCH_TOKENS == 2048
    for job in jobs:
        lengths = [tokens for _, tokens in job.heads]
        assert lengths == sorted(lengths)
        assert len(lengths) == 1 or len(lengths) * lengths[-1] <= 2048
        assert all(tokens == sizes[index].tokens for index, tokens in job.heads)
        assert all(
            job.layers == (3 if plan.cuts[index].tokens else plan.cuts[index].layers)
            for index, _ in job.heads
        )
    assert [job.layers for job in jobs] == sorted((job.layers for job in jobs), reverse=True)
    for job, following in pairwise(jobs):
        if job.layers == following.layers:
            longer = following.heads[0][1]
            assert longer >= job.heads[-1][1]
            assert (len(job.heads) + 1) * longer > 2048, "it would have had room"


def test_whole_documents_and_first_tokens_are_computed_together() -> None:
    """Through all layers it makes no difference what a document's cut was called."""
    sizes = [SpanSize(300, STORED), SpanSize(128, STORED), SpanSize(64, STORED)]
    work = schedule(SPEC, sizes, RestorePlan((Cut(128), Cut(0, 3), Cut(0, 1)), 512))
    assert work.recomputations == (
        Recomputation(((0, 128), (1, 128)), 3),
        Recomputation(((2, 64),), 1),
    )


def test_nothing_to_restore_is_a_forward_pass() -> None:
    work = schedule(SPEC, [], plan_restore(SPEC, [], None))
    assert (work.pieces, work.recomputations) == (((), (), ()), ())
    assert [(step.verb, step.layer) for step in work.steps] == [("forward", i) for i in range(3)]


def test_a_plan_for_other_spans_is_refused() -> None:
    """One cut for each span."""
    with pytest.raises(ValueError, match=r"."):
        schedule(SPEC, [SpanSize(64, STORED)], RestorePlan((), 512))
