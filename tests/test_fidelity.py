"""The fidelity gate: its numbers against transformers' own, what it recommends, and who follows.

Numbers are recomputed by hand, in float64, from full prefill and from documents that were read one
by one after the preamble; both are transformers' own (see oracle.py).
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracle import (
    Part,
    Reading,
    block_prefill,
    document,
    encode,
    encode_parts,
    greedy,
    joined,
    prefill,
)
from tiny import SHAPES, byte_tokenizer, tiny_model
from torch import Tensor

from hcache_rag import HCacheEngine, HCacheError, SourceError, StateStore, StoreError
from hcache_rag.bound import Fidelity
from hcache_rag.fidelity import (
    POSITIONS,
    Case,
    Estimate,
    FidelityReport,
    PositionReport,
    keep_recommendation,
    measure_fidelity,
    recommend,
)
from hcache_rag.figure import draw_fidelity
from hcache_rag.judge import Judge, LayerErrors
from hcache_rag.quality import bootstrap_interval, rouge_l
from hcache_rag.repair import recommended
from hcache_rag.state import StateKey
from hcache_rag.store import StoredModel
from hcache_rag.trial import read_as_a_whole, trying

TOKENIZER = byte_tokenizer()
PREAMBLE = "Answer from the passages below.\n\n"
DOCUMENTS = (
    "The first passage is about the planet Venus, which has no moon.",
    "A second one, somewhat longer, tells of Mars and of the two moons that it has.",
    "The third: Mercury.",
)
QUESTION = "\n\nQuestion: how many moons?\nAnswer:"
GOLD = " two"
MODEL = tiny_model(SHAPES[2])
ROOT, OTHER = StateKey(b"r" * 16), StateKey(b"o" * 16)

pytestmark = pytest.mark.usefixtures("one_thread")


def parts(*documents: str) -> list[Part]:
    """A prompt as it is made."""
    found = [Part(PREAMBLE)]
    for number, text in enumerate(documents):
        found += [Part("\n\n")] * (number > 0) + [document(text)]
    return [*found, Part(QUESTION)]


PROMPTS = [parts(*DOCUMENTS), parts(DOCUMENTS[2], DOCUMENTS[0])]
CASES = [Case(joined(prompt), GOLD) for prompt in PROMPTS]


def engine_on(store: StateStore | Path, **options: Any) -> HCacheEngine:
    """Documents stored in full, unless the options say otherwise."""
    given = {"preamble": PREAMBLE, "storage_dtype": "float32", "fidelity": "none", **options}
    engine = HCacheEngine(MODEL, TOKENIZER, store, **given)
    engine.precompute(DOCUMENTS)
    return engine


@pytest.fixture
def engine(store: StateStore) -> HCacheEngine:
    return engine_on(store)


def whole(prompt: Sequence[Part], more: str = "") -> Reading:
    """Full prefill."""
    return prefill(MODEL, encode_parts(TOKENIZER, [*prompt, Part(more)]))


def alone(prompt: Sequence[Part], more: str = "") -> Reading:
    """Documents that have seen the preamble only, and nothing read again."""
    reading, _ = block_prefill(MODEL, TOKENIZER, PREAMBLE, [*prompt[:-1], Part(QUESTION + more)])
    return reading


def kl_of(reference: Tensor, other: Tensor) -> float:
    """By its definition, in float64."""
    p, q = (logits.double().softmax(-1) for logits in (reference, other))
    return float((p * (p.log() - q.log())).sum())


def nll_of(read: Any, prompt: Sequence[Part], answer: str) -> float:
    """Negative log-likelihood per token of an answer, one token after another."""
    rows = [read(prompt, answer[:length]).logits.double() for length in range(len(answer))]
    chosen = [
        -float(row.log_softmax(-1)[token])
        for row, token in zip(rows, encode(TOKENIZER, answer, is_document=False), strict=True)
    ]
    return sum(chosen) / len(chosen)


def at(report: FidelityReport, position: str | float) -> PositionReport:
    [found] = [row for row in report.positions if row.position == position]
    return found


# --- the numbers --------------------------------------------------------------------------------


def test_nothing_repaired_is_what_documents_alone_give(engine: HCacheEngine) -> None:
    """KL, likelihood, first choice, tokens, and K and V layer by layer, all by hand."""
    report = measure_fidelity(engine, CASES, ["none"], max_new_tokens=1)
    row = at(report, "none")
    pairs = [(whole(prompt), alone(prompt)) for prompt in PROMPTS]
    kls = [kl_of(full.logits, other.logits) for full, other in pairs]
    assert min(kls) > 1e-4
    assert row.kl_first.mean == pytest.approx(np.mean(kls), rel=1e-2)
    assert row.kl == row.kl_first  # answers of one token
    same = [int(full.logits.argmax() == other.logits.argmax()) for full, other in pairs]
    assert row.top1.mean == np.mean(same)
    more = [nll_of(alone, prompt, GOLD) - nll_of(whole, prompt, GOLD) for prompt in PROMPTS]
    assert row.nll.mean == pytest.approx(np.mean(more), abs=1e-4)
    documents = [DOCUMENTS, (DOCUMENTS[2], DOCUMENTS[0])]
    fresh = [len(QUESTION) + 2 * (len(its) - 1) for its in documents]
    assert row.tokens == np.mean(fresh)
    assert report.prompt_tokens == np.mean([len(case.prompt) for case in CASES])
    assert (report.prompts, report.documents, report.left_out) == (2, 3, ())
    for layer in range(MODEL.config.num_hidden_layers):
        for name, errors in (("keys", row.layers.keys), ("values", row.layers.values)):
            by_hand = [
                brute_error(getattr(full, name)[layer], getattr(other, name)[layer], restored(its))
                for (full, other), its in zip(pairs, documents, strict=True)
            ]
            assert errors[layer] == pytest.approx(np.mean(by_hand), rel=1e-2, abs=1e-6)
    assert row.layers.keys[0] < 1e-5 < 1e-2 < row.layers.keys[-1]


def restored(documents: Sequence[str]) -> list[int]:
    """The positions of preamble and documents."""
    found, position = [*range(len(PREAMBLE))], len(PREAMBLE)
    for text in documents:
        found += range(position, position + len(text))
        position += len(text) + 2
    return found


def brute_error(full: Tensor, other: Tensor, positions: Sequence[int]) -> float:
    """Element by element, (G, n, D) each."""
    difference = reference = 0.0
    for head, position, at_ in itertools.product(
        range(full.shape[0]), positions, range(full.shape[2])
    ):
        expected = float(full[head, position, at_])
        difference += (float(other[head, position, at_]) - expected) ** 2
        reference += expected**2
    return math.sqrt(difference / reference)


def test_an_answer_is_compared_behind_each_of_its_tokens(engine: HCacheEngine) -> None:
    """KL along full prefill's own answer, and ROUGE-L of the two greedy ones."""
    count = 5
    report = measure_fidelity(engine, CASES, ["none"], max_new_tokens=count)
    kls, scores = [], []
    for prompt in PROMPTS:
        ids = encode_parts(TOKENIZER, prompt)
        answer = greedy(MODEL, ids, count, eos_token_id=None)
        rows = [prefill(MODEL, [*ids, *answer[:n]]).logits for n in range(count)]
        with trying(engine, joined(prompt), count) as trial:
            reading = trial.at("none")
            others = [reading.first, *trial.behind(answer[: count - 1])]
            own = trial.answer(reading.first, count, set())
        kls.append(np.mean([kl_of(*pair) for pair in zip(rows, others, strict=True)]))
        texts = [TOKENIZER.decode(tokens, skip_special_tokens=True) for tokens in (answer, own)]
        scores.append(rouge_l(*(str(text).split() for text in texts)))
    assert at(report, "none").kl.mean == pytest.approx(np.mean(kls), rel=1e-3)
    assert at(report, "none").rouge_l.mean == pytest.approx(np.mean(scores))


def test_everything_read_again_is_full_prefill(engine: HCacheEngine) -> None:
    """A share of 1, and "exact", on states that are kept in full."""
    report = measure_fidelity(engine, CASES, [1.0, "exact"], max_new_tokens=4)
    for row in report.positions:
        assert row.kl_first.high < 1e-6
        assert row.kl.high < 1e-6
        assert abs(row.nll.mean) < 1e-3
        assert (row.top1.mean, row.rouge_l.mean) == (1.0, 1.0)
        assert max(*row.layers.keys, *row.layers.values) < 1e-4


def test_exact_reads_what_is_not_kept_in_full(tmp_path: Path) -> None:
    """In eight bits, that is everything: full prefill itself. In full, what is relocated."""
    tokens = [len(case.prompt) for case in CASES]
    with engine_on(tmp_path / "int8", storage_dtype="int8") as engine:
        row = at(measure_fidelity(engine, CASES, max_new_tokens=2), "exact")
        assert (row.kl_first.mean, row.tokens) == (0.0, sum(tokens) / 2)
        assert not any(row.layers.keys)
    with engine_on(tmp_path / "float32") as engine:
        row = at(measure_fidelity(engine, CASES, max_new_tokens=2), "exact")
        firsts = [len(PREAMBLE) + len(text) for text in (DOCUMENTS[0], DOCUMENTS[2])]
        assert row.tokens == np.mean(np.subtract(tokens, firsts))


def test_the_dial_reads_its_shares_again_in_order_of_their_cost(engine: HCacheEngine) -> None:
    report = measure_fidelity(engine, CASES, ["exact", 0.5, "high", "none", "fast", "balanced"])
    order = ["none", "fast", "balanced", "high", 0.5, "exact"]
    assert [row.position for row in report.positions] == order
    relocated = [len(DOCUMENTS[1]) + len(DOCUMENTS[2]), len(DOCUMENTS[0])]
    for row, share in zip(report.positions, (0, 0.05, 0.15, 0.3, 0.5), strict=False):
        repaired = np.mean([round(share * count) for count in relocated])
        assert row.tokens == at(report, "none").tokens + repaired
    assert all(row.seconds > 0 for row in report.positions)
    assert report.full_s > 0
    assert json.loads(json.dumps(report.to_dict()))["positions"][4]["position"] == 0.5


def test_seconds_are_those_of_restoring_too(engine: HCacheEngine) -> None:
    """And of scoring where something is repaired; what "exact" reads is read at once."""
    with trying(engine, CASES[0].prompt, 1) as trial:
        assert trial.at("none").seconds >= trial.scoring_s
        assert trial.at("high").seconds > trial.scoring_s
        assert trial.at("exact").tokens == trial.at(1.0).tokens
        with pytest.raises(ValueError, match="'perfect'"):
            trial.at("perfect")


def test_answers_end_where_they_should(engine: HCacheEngine) -> None:
    """With the end token, after so many tokens, or with their line."""
    ids = encode_parts(TOKENIZER, PROMPTS[0])
    answer = greedy(MODEL, ids, 6, eos_token_id=None)
    with read_as_a_whole(engine.adapter, ids) as (reader, reading):
        judge = Judge(engine, reader, reading, max_new_tokens=6)
        assert judge.full.answer == str(TOKENIZER.decode(answer, skip_special_tokens=True)).strip()
        assert (judge.full.kl, judge.full.nll, judge.full.rouge_l) == (0.0, 0.0, 1.0)
        short = Judge(engine, reader, reading, max_new_tokens=2, is_line=True)
        expected = str(TOKENIZER.decode(answer[:2], skip_special_tokens=True))
        assert short.full.answer == expected.partition("\n")[0].strip()


def test_where_no_answer_is_known_it_is_full_prefills(engine: HCacheEngine) -> None:
    """Also where that is empty: then the token that ends it counts."""
    cases = [Case(case.prompt) for case in CASES]
    report = measure_fidelity(engine, cases, ["none"], max_new_tokens=1)
    firsts = [int(whole(prompt).logits.argmax()) for prompt in PROMPTS]
    more = [
        float(whole(p).logits.double().log_softmax(-1)[first])
        - float(alone(p).logits.double().log_softmax(-1)[first])
        for p, first in zip(PROMPTS, firsts, strict=True)
    ]
    assert at(report, "none").nll.mean == pytest.approx(np.mean(more), abs=1e-4)
    assert MODEL.generation_config is not None
    before = MODEL.generation_config.eos_token_id
    MODEL.generation_config.eos_token_id = firsts  # answers end at once
    try:
        again = measure_fidelity(engine, cases, ["none"], max_new_tokens=3)
    finally:
        MODEL.generation_config.eos_token_id = before
    assert at(again, "none").nll == at(report, "none").nll
    assert at(again, "none").kl == at(report, "none").kl_first


@pytest.mark.parametrize("samples", [[0.1, 0.5, 0.2], [1.0, 0.0, 3.0, 0.5, 0.25]])
def test_intervals_are_those_of_all_resamples(samples: list[float]) -> None:
    """Every way to draw as many samples with replacement, each as likely as the others."""
    means = [np.mean(drawn) for drawn in itertools.product(samples, repeat=len(samples))]
    low, high = np.percentile(means, (2.5, 97.5), method="inverted_cdf")
    found = bootstrap_interval(samples)
    assert found == pytest.approx((low, high), abs=0.05 * float(np.std(samples)))
    assert found == bootstrap_interval(samples)
    assert found[0] < np.mean(samples) < found[1]


# --- what it recommends -------------------------------------------------------------------------


def row_of(position: str | float, high: float) -> PositionReport:
    some = Estimate(0.0, 0.0, 0.0)
    kl = Estimate(high / 2, high / 4, high)
    return PositionReport(position, kl, some, some, some, some, 1.0, 1.0, LayerErrors((), ()))


@pytest.mark.parametrize(
    ("highs", "expected"),
    [
        ({"none": 0.1, "fast": 0.05}, "none"),  # as much as is allowed
        ({"none": 0.11, "fast": 0.1, "high": 0.01}, "fast"),
        ({"none": 0.5, "fast": 0.4, "balanced": 0.09, "high": 0.01}, "balanced"),
        ({"none": 0.5, "fast": 0.05, "balanced": 0.2, "high": 0.2}, "fast"),
        ({"none": 0.5, "high": 0.2, 0.5: 0.05, "exact": 0.0}, 0.5),
        ({"none": 0.5, "high": 0.2, "exact": 0.0}, "exact"),
        ({"none": 0.5, "high": 0.2}, "exact"),
        ({"exact": 0.3}, "exact"),
    ],
)
def test_the_cheapest_position_that_is_surely_near_enough(
    highs: dict[str | float, float], expected: str | float
) -> None:
    """By the upper end of its interval; the mean of the position before may be within."""
    found, reason = recommend([row_of(*item) for item in highs.items()], 0.1)
    assert found == expected
    assert "0.1 nats" in reason
    if expected != "exact":
        assert f"to {highs[expected]:.2g})" in reason


def test_a_report_recommends_by_its_tolerance(engine: HCacheEngine) -> None:
    strict = measure_fidelity(engine, CASES, tolerance_nats=1e-9, max_new_tokens=1)
    loose = measure_fidelity(engine, CASES, tolerance_nats=1e9, max_new_tokens=1)
    assert [row.position for row in strict.positions] == list(POSITIONS)
    assert (strict.recommendation, loose.recommendation) == ("exact", "none")
    assert loose.positions[0].kl_first == strict.positions[0].kl_first


# --- what cannot be measured --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"positions": []}, "no position"),
        ({"positions": ["none", "perfect"]}, "'perfect'"),
        ({"positions": [1.5]}, "1.5"),
        ({"tolerance_nats": 0.0}, "positive number, not 0.0"),
        ({"tolerance_nats": math.nan}, "positive number, not nan"),
        ({"max_new_tokens": 0}, "positive, not 0"),
    ],
)
def test_bad_arguments_raise_at_once(
    engine: HCacheEngine, wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        measure_fidelity(engine, CASES, **wrong)


def test_an_exact_engine_restores_too_little(tmp_path: Path) -> None:
    with (
        engine_on(tmp_path, fidelity="exact") as engine,
        pytest.raises(ValueError, match="exact"),
    ):
        measure_fidelity(engine, CASES)


def test_prompts_that_cannot_be_compared_are_left_out(engine: HCacheEngine) -> None:
    """One beyond the window, with its answer, and one in which nothing is known."""
    window = engine.adapter.spec.window_tokens
    room = window - len(CASES[0].prompt) - 32
    fits, not_quite = Case("x" * room + CASES[0].prompt), Case("x" * (room + 1) + CASES[0].prompt)
    told: list[tuple[int, int]] = []
    report = measure_fidelity(
        engine,
        [not_quite, CASES[0], Case("Nothing is known here."), fits],
        ["none"],
        on_progress=lambda done, total: told.append((done, total)),
    )
    assert told == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]
    assert report.prompts == 2
    assert report.left_out == (
        f"a prompt of {window - 31:,} tokens and its answer of up to 32 do not fit into the "
        f"model's window of {window:,}",
        "a prompt holds no document with a usable state",
    )
    long = Case(CASES[0].prompt, "x" * window)
    assert measure_fidelity(engine, [*CASES, long], ["none"]).prompts == 2


def test_fewer_than_two_prompts_are_none(engine: HCacheEngine) -> None:
    with pytest.raises(SourceError, match=r"^1 prompt\(s\) .* two are needed: a prompt holds no"):
        measure_fidelity(engine, [CASES[0], Case("Nothing is known here.")])
    with pytest.raises(SourceError, match=r"^0 prompt\(s\) can be compared, but two are needed$"):
        measure_fidelity(engine, [])


def test_one_document_in_each_prompt_says_nothing(engine: HCacheEngine) -> None:
    cases = [Case(joined(parts(text))) for text in DOCUMENTS]
    with pytest.raises(SourceError, match="no document is relocated"):
        measure_fidelity(engine, cases)


def test_a_damaged_state_is_one_sentence(engine: HCacheEngine, store: StateStore) -> None:
    [record] = store.find(DOCUMENTS[1])
    with store._writing() as txn:
        for key, value in list(txn.scan("chunks", store._rows.prefix + record.key)):
            txn.put("chunks", key, bytes(value)[:-1] + b"!")
    with pytest.raises(StoreError, match=r"`hcache-rag verify --repair`"):
        measure_fidelity(engine, CASES)


def test_when_the_time_is_up_four_prompts_have_been_read(engine: HCacheEngine) -> None:
    report = measure_fidelity(engine, CASES * 3, ["none"], budget_s=0.0)
    assert report.prompts == 4
    assert report.left_out == ("the time was up",) * 2


# --- who follows --------------------------------------------------------------------------------


def test_a_recommendation_is_followed_by_the_next_engine(tmp_path: Path) -> None:
    """If it names nothing itself; another model does not follow; a name given anew keeps it."""
    with engine_on(tmp_path, fidelity="auto") as engine:
        assert (engine.fidelity, engine.repair_share) == ("balanced", 0.15)
        report = measure_fidelity(engine, CASES, tolerance_nats=1e9, max_new_tokens=1)
        keep_recommendation(report, engine.store, engine)
        root = engine.root
    for fidelity, share in (("none", 0.0), ("high", 0.3), (0.5, 0.5), (0.0, 0.0)):
        with StateStore.open(tmp_path) as store:
            if fidelity != "none":
                store.set_fidelity(root, fidelity)
            layout = store.models()[root].layout  # with another one, it was measured for nothing
            store.name_model(root, f"again {fidelity}", layout, "reason")
            assert store.stats().fidelities == {f"again {fidelity}": fidelity}
        with engine_on(tmp_path, fidelity="auto") as engine:
            assert (engine.fidelity, engine.repair_share) == (fidelity, share)
            answer = engine.generate(CASES[0].prompt)
            relocated = len(DOCUMENTS[1]) + len(DOCUMENTS[2])
            assert answer.provenance.repaired_tokens == round(share * relocated)
            assert answer.provenance.fidelity == fidelity
            assert engine.plan(CASES[0].prompt).to_dict()["fidelity"] == fidelity
        with engine_on(tmp_path, fidelity="fast") as engine:
            assert engine.fidelity == "fast"
    other = HCacheEngine(tiny_model(SHAPES[0]), TOKENIZER, tmp_path)
    assert other.fidelity == "balanced"
    other.close()
    with StateStore.open(tmp_path) as store:
        store.set_fidelity(root, None)
    with engine_on(tmp_path, fidelity="auto") as engine:
        assert engine.fidelity == "balanced"


@pytest.mark.parametrize("found", ["exact", "perfect", None])
def test_what_a_store_cannot_ask_for_is_not_followed(store: StateStore, found: str | None) -> None:
    """ "exact" needs other states than are there."""
    root = engine_on(store).root
    store.set_fidelity(root, found)
    assert engine_on(store, fidelity="auto").fidelity == "balanced" == recommended(found)


def test_exact_is_not_written(engine: HCacheEngine, store: StateStore) -> None:
    """What the store asked for before stays."""
    store.set_fidelity(engine.root, "high")
    report = measure_fidelity(engine, CASES, tolerance_nats=1e-9, max_new_tokens=1)
    with pytest.raises(HCacheError, match="--storage-dtype float32"):
        keep_recommendation(report, store, engine)
    assert store.models()[engine.root].fidelity == "high"


@pytest.mark.parametrize(
    "others",
    [
        {"context_at_index": "documents"},
        {"preamble": "Another head.\n\n"},
        {"representation": "kv", "storage_dtype": "int8"},
    ],
)
def test_what_was_measured_with_other_states_is_not_followed(
    tmp_path: Path, others: dict[str, Any]
) -> None:
    """Nor is it forgotten: with the old options it holds again."""
    with engine_on(tmp_path, fidelity="auto") as engine:
        report = measure_fidelity(engine, CASES, tolerance_nats=1e9, max_new_tokens=1)
        keep_recommendation(report, engine.store, engine)
    with engine_on(tmp_path, fidelity="auto") as again:
        assert again.fidelity == "none"
    engine_on(tmp_path, **others).close()  # indexes anew
    with engine_on(tmp_path, fidelity="auto", **others) as other:
        assert other.fidelity == "balanced"
    engine_on(tmp_path, storage_dtype="float32").close()
    assert StateStore.open(tmp_path).models()[other.root].fidelity == "none"


@pytest.mark.parametrize("wrong", [1.5, -0.1, math.nan, True, ["high"]])
def test_a_store_refuses_what_is_no_fidelity(store: StateStore, wrong: Any) -> None:
    with pytest.raises(ValueError, match="fidelity is a name or a share from 0 to 1"):
        store.set_fidelity(ROOT, wrong)
    assert store.models() == {}


def test_a_store_for_reading_refuses_it(tmp_path: Path) -> None:
    StateStore.open(tmp_path).close()
    with StateStore.open(tmp_path, read_only=True) as store, pytest.raises(StoreError):
        store.set_fidelity(ROOT, "fast")


def test_models_are_kept_as_before(store: StateStore) -> None:
    """Without a fidelity byte for byte, and read by what is known of later fields."""
    before = b'{"name": "SmolLM2", "layout": "30 x kv", "reason": "smaller"}'
    model = StoredModel("SmolLM2", "30 x kv", "smaller")
    assert (model.to_bytes(), StoredModel.from_bytes(before)) == (before, model)
    later = b'{"name": "SmolLM2", "fidelity": 0.5, "more": [1]}'
    assert StoredModel.from_bytes(later) == StoredModel("SmolLM2", fidelity=0.5)
    for damaged in (b"", b"3", b"[]", b"{}", b'{"name": 3}', b'{"name": "a", "fidelity": [1]}'):
        assert StoredModel.from_bytes(damaged).name == "an unknown model"
    store.name_model(ROOT, "SmolLM2", "30 x kv", "smaller")
    store.set_fidelity(ROOT, "fast")
    store.set_fidelity(OTHER, 0.25)
    store.name_model(ROOT, "SmolLM2", "15 x kv", "smaller still")
    assert store.models() == {
        ROOT: StoredModel("SmolLM2", "15 x kv", "smaller still", "fast"),
        OTHER: StoredModel("an unknown model", fidelity=0.25),
    }


# --- the figure ---------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_the_figure_is_drawn_whole(engine: HCacheEngine, tmp_path: Path, suffix: str) -> None:
    positions: list[Fidelity] = ["none", "high", 0.5, "exact"]
    report = measure_fidelity(engine, CASES, positions, max_new_tokens=1)
    target = tmp_path / f"quality.{suffix}"
    draw_fidelity(report, target)
    assert [path.name for path in tmp_path.glob("*qualit*")] == [target.name]
    if suffix == "svg":
        assert all(f"<!-- {row.position} -->" in target.read_text() for row in report.positions)
    assert target.read_bytes()[:4] in (b"\x89PNG", b"%PDF", b"<?xm")


def test_a_figure_of_no_known_form_leaves_nothing(engine: HCacheEngine, tmp_path: Path) -> None:
    report = measure_fidelity(engine, CASES, ["none"], max_new_tokens=1)
    with pytest.raises(ValueError, match="bogus"):
        draw_fidelity(report, tmp_path / "quality.bogus")
    with pytest.raises(OSError, match="nowhere"):
        draw_fidelity(report, tmp_path / "nowhere" / "quality.png")
    assert not list(tmp_path.glob("*qualit*"))
