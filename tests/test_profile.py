"""What a machine costs: fits find what was measured, profiles survive files and refuse junk."""

from __future__ import annotations

import json
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from machines import HIDDEN, KEPT, KV, NOTHING, TOY, measured_machines, specs

from hcache_rag.errors import ProfileError
from hcache_rag.layout import STORAGE_DTYPES, LayerFormat
from hcache_rag.presets import HARDWARE, MODELS
from hcache_rag.profile import (
    PROFILE_VERSION,
    HardwareProfile,
    ModelCosts,
    Rates,
    ReadRate,
    SuffixCost,
    TokenCost,
)
from hcache_rag.spec import ModelSpec

SPEC = replace(TOY, mlp_size=128)
COSTS = ModelCosts(
    project={"bfloat16": TokenCost(1e-5, 2e-6), "int8": TokenCost(1e-5, 3e-6, 1e-12)},
    scatter={"bfloat16": TokenCost(0.0, 1e-7)},
    layer=TokenCost(1e-4, 2e-5, 3e-9),
    suffix=SuffixCost(1e-3, 1e-4, 1e-6, 1e-9),
)
PROFILE = HardwareProfile(
    name="a machine",
    source="measured today",
    cold=ReadRate(1e9, 1e-4),
    warm=ReadRate(7e9),
    rates=Rates(1e12, 2e12, 3e12, 4e10),
    model=SPEC,
    costs=COSTS,
    samples={"layer": [[512.0, 0.01], [1024.0, 0.03]], "cold": []},
)
DATA_SHEET = replace(PROFILE, model=None, costs=None, samples={})


# --- costs --------------------------------------------------------------------------------------


def test_a_token_cost_is_a_polynomial() -> None:
    """Of a number, or of an array of them; no tokens take no time, not even the fixed part."""
    cost = TokenCost(1.0, 10.0, 100.0)
    assert cost(2) == 1 + 20 + 400
    assert cost(0) == 0
    assert cost(np.array([0, 1, 3])).tolist() == [0, 111, 931]
    assert TokenCost()(7) == 0


def test_a_token_cost_times_a_factor() -> None:
    """In all its parts."""
    slower = TokenCost(1.0, 10.0, 100.0).times(3.0)
    assert slower == TokenCost(3.0, 30.0, 300.0)
    assert slower(2) == 3 * TokenCost(1.0, 10.0, 100.0)(2)


def test_a_suffix_costs_by_tokens_context_and_pairs() -> None:
    cost = SuffixCost(1.0, 10.0, 100.0, 1000.0)
    assert cost(2, 3) == 1 + 20 + 300 + 6000
    assert cost(2, 0) == 1 + 20
    assert cost(0, 3) == 0.0


def test_a_read_costs_by_bytes_and_requests() -> None:
    """One request, or as many as one says; arrays as well."""
    rate = ReadRate(50.0, 3.0)
    assert rate(100) == 2 + 3
    assert rate(100, 4) == 2 + 12
    assert rate(np.array([100.0, 0.0]), np.array([1, 2])).tolist() == [5.0, 6.0]
    assert ReadRate(50.0)(100, 4) == 2.0


COEFFICIENTS = st.sampled_from([0.0, 1e-7, 3e-6, 1e-4, 2e-3])
"""What machines have: microseconds a token, milliseconds a call."""
TOKENS = [1, 64, 200, 512, 1024, 3000, 4096]


@settings(deadline=None, derandomize=True, max_examples=100)
@given(COEFFICIENTS, COEFFICIENTS, st.sampled_from([0.0, 1e-10, 1e-8]))
def test_a_fit_finds_a_token_cost(fixed_s: float, per_token_s: float, per_square_s: float) -> None:
    """Each coefficient, and none that is not there, from seven lengths."""
    truth = TokenCost(fixed_s, per_token_s, per_square_s)
    assume(truth != TokenCost())
    found = TokenCost.fit([(tokens, truth(tokens)) for tokens in TOKENS])
    for tokens in (*TOKENS, 2000, 20_000):
        assert found(tokens) == pytest.approx(truth(tokens), rel=1e-4)
    assert found.fixed_s == pytest.approx(fixed_s, rel=1e-3, abs=1e-6 * truth(1))
    assert found.per_token_s == pytest.approx(per_token_s, rel=1e-3, abs=1e-6 * truth(64) / 64)
    assert found.per_square_s == pytest.approx(
        per_square_s, rel=1e-3, abs=1e-5 * truth(4096) / 4096**2
    )


def test_a_fit_of_a_line_has_no_square() -> None:
    """Even of what is not one."""
    samples = [(tokens, 1e-9 * tokens**2) for tokens in TOKENS]
    assert TokenCost.fit(samples, degree=1).per_square_s == 0.0
    assert TokenCost.fit(samples).per_square_s == pytest.approx(1e-9)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(COEFFICIENTS, COEFFICIENTS, st.sampled_from([0.0, 1e-8, 1e-6]), st.booleans())
def test_a_fit_finds_a_suffix_cost(
    fixed_s: float, per_token_s: float, per_context_s: float, has_pairs: bool
) -> None:
    """From lengths in which tokens and context vary on their own."""
    truth = SuffixCost(fixed_s, per_token_s, per_context_s, 1e-9 if has_pairs else 0.0)
    samples = [(n, c, truth(n, c)) for n in (1, 16, 64, 256) for c in (0, 128, 1024, 4096)]
    assume(all(seconds for _, _, seconds in samples))
    found = SuffixCost.fit(samples)
    for tokens, context in ((1, 0), (32, 2048), (100, 10_000)):
        assert found(tokens, context) == pytest.approx(truth(tokens, context), rel=1e-4)


@pytest.mark.parametrize("rate", [ReadRate(3e9), ReadRate(1.25e9, 1e-3), ReadRate(1e5, 0.2)])
def test_a_fit_finds_a_read_rate(rate: ReadRate) -> None:
    """Bytes a second, and what every request takes."""
    found = ReadRate.fit([(size, rate(size)) for size in (65_536, 1 << 20, 1 << 22, 1 << 24)])
    assert found.bytes_per_s == pytest.approx(rate.bytes_per_s, rel=1e-6)
    assert found.per_request_s == pytest.approx(rate.per_request_s, rel=1e-6, abs=1e-12)


def test_reads_that_take_as_long_whatever_their_size_have_a_rate() -> None:
    """All bytes over all seconds: there is no telling what a byte costs, and none is free."""
    assert ReadRate.fit([(100, 2.0), (500, 2.0), (900, 2.0)]) == ReadRate(250.0)
    assert ReadRate.fit([(100, 0.5)]) == ReadRate(200.0)


SAMPLES = st.lists(
    st.tuples(st.integers(1, 100_000).map(float), st.floats(1e-7, 1e3)), min_size=1, max_size=8
)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(SAMPLES, st.sampled_from([1, 2]))
def test_no_fit_has_negative_costs(samples: list[tuple[float, float]], degree: int) -> None:
    """Whatever was measured, more tokens never take less time; something takes some."""
    found = TokenCost.fit(samples, degree)
    coefficients = (found.fixed_s, found.per_token_s, found.per_square_s)
    assert min(coefficients) >= 0
    assert max(coefficients) > 0
    assert np.isfinite(coefficients).all()
    rate = ReadRate.fit(samples)
    assert 0 < rate.bytes_per_s < np.inf
    assert 0 <= rate.per_request_s < np.inf


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.integers(1, 500).map(float),
            st.integers(0, 10_000).map(float),
            st.floats(1e-7, 1e3),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_no_fit_of_a_suffix_has_negative_costs(samples: list[tuple[float, float, float]]) -> None:
    found = SuffixCost.fit(samples)
    coefficients = (
        found.fixed_s,
        found.per_token_s,
        found.per_context_s,
        found.per_pair_s,
    )
    assert min(coefficients) >= 0
    assert np.isfinite(coefficients).all()


def relative_error(cost: TokenCost, samples: list[tuple[float, float]]) -> float:
    return float(sum((cost(tokens) / seconds - 1) ** 2 for tokens, seconds in samples))


FACTORS = st.lists(st.sampled_from([0.0, 0.5, 0.9, 1.0, 1.01, 2.0]), min_size=3, max_size=3)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.lists(st.floats(0.5, 2.0), min_size=len(TOKENS), max_size=len(TOKENS)), FACTORS)
def test_no_other_cost_is_nearer_to_noisy_samples(noise: list[float], factors: list[float]) -> None:
    """In squares of relative errors: a short document counts as much as a long one."""
    truth = TokenCost(1e-3, 1e-5, 1e-8)
    samples = [(float(n), truth(n) * factor) for n, factor in zip(TOKENS, noise, strict=True)]
    found = TokenCost.fit(samples)
    others = [
        truth,
        TokenCost(*(f * c for f, c in zip(factors, astuple(found), strict=True))),
        TokenCost(*(f * c for f, c in zip(factors, astuple(truth), strict=True))),
    ]
    for other in others:
        assert relative_error(found, samples) <= relative_error(other, samples) + 1e-9


@pytest.mark.parametrize("kind", [TokenCost, SuffixCost, ReadRate], ids=lambda k: k.__name__)
def test_nothing_can_be_fitted_to_nothing(kind: Any) -> None:
    with pytest.raises(ValueError, match=r"."):
        kind.fit([])


# --- a model's costs ----------------------------------------------------------------------------


def test_costs_of_restoring_are_those_of_the_format() -> None:
    """Hidden states are projected, K and V are not, and what is not kept is not restored."""
    assert COSTS.restore(LayerFormat(HIDDEN, "bfloat16")) == TokenCost(1e-5, 2e-6)
    assert COSTS.restore(LayerFormat(HIDDEN, "int8")) == TokenCost(1e-5, 3e-6, 1e-12)
    assert COSTS.restore(LayerFormat(KV, "bfloat16")) == TokenCost(0.0, 1e-7)
    assert COSTS.restore(NOTHING) == TokenCost()


def test_a_dtype_that_was_not_measured_costs_what_the_slowest_does() -> None:
    assert COSTS.restore(LayerFormat(HIDDEN, "float32")) == COSTS.project["int8"]
    assert COSTS.restore(LayerFormat(KV, "int8")) == COSTS.scatter["bfloat16"]


def test_costs_of_a_model_follow_from_four_rates() -> None:
    """Llama-2-7B's numbers, from the formulas of the literature: 32 heads of 128, MLP of 11008."""
    costs = Rates(1e12, 2e12, 4e12, 8e10).costs(MODELS["llama-2-7b"])
    d, ff = 4096, 11008
    layer_s = (4 * d * d + 4 * d * d + 6 * d * ff) / 2e12
    assert costs.project["float16"].fixed_s == 0.0
    assert costs.project["float16"].per_square_s == 0.0
    assert costs.layer.per_token_s == pytest.approx(layer_s)
    assert costs.layer.per_square_s == pytest.approx(2 * d / 4e12)
    assert costs.layer.fixed_s == 0.0
    assert costs.suffix.per_token_s == pytest.approx(layer_s)
    assert costs.suffix.per_pair_s == pytest.approx(4 * d / 4e12)
    assert costs.suffix.fixed_s == pytest.approx((4 * d * d + 3 * d * ff) * 2 / 8e10)
    assert costs.suffix.per_context_s == pytest.approx(2 * d * 2 / 8e10)
    moved_s = 2 * (2 * d * 2) / 8e10
    assert astuple(costs.scatter["float16"]) == (0.0, pytest.approx(moved_s), 0.0)


def test_projecting_costs_its_operations() -> None:
    """`4 d d_kv` of a token, on a machine whose memory costs nothing."""
    for name in ("llama-2-7b", "llama-3-8b", "qwen2.5-7b"):
        spec = MODELS[name]
        cost = Rates(1e12, 1e12, 1e12, 1e30).costs(spec).project["float16"]
        flops = 4 * spec.hidden_size * spec.num_kv_heads * spec.head_dim
        assert cost.per_token_s == pytest.approx(flops / 1e12)


def test_reading_a_document_costs_what_reading_its_tokens_one_by_one_does() -> None:
    """Attention is counted causally: half of all pairs, in one pass or in many."""
    costs = replace(PROFILE.rates, memory_bytes_per_s=1e30).costs(SPEC)
    one_by_one = sum(costs.suffix(1, context) for context in range(1000))
    assert costs.layer(1000) == pytest.approx(one_by_one, rel=0.002)


@pytest.mark.parametrize("fmt", KEPT, ids=str)
def test_rates_know_the_cost_of_every_format(fmt: LayerFormat) -> None:
    """No format is free."""
    assert DATA_SHEET.costs_of(SPEC).restore(fmt)(64) > 0


@settings(deadline=None, derandomize=True, max_examples=40)
@given(specs())
def test_each_rate_is_that_of_its_own_work(spec: ModelSpec) -> None:
    """Twice the rate, half the time, and nothing else changes."""
    rates = Rates(1e9, 1e9, 1e9, 1e9)
    before = rates.costs(spec)
    layers = replace(rates, layer_flops_per_s=2e9).costs(spec)
    attention = replace(rates, attention_flops_per_s=2e9).costs(spec)
    projection = replace(rates, projection_flops_per_s=2e9).costs(spec)
    assert layers.layer.per_token_s == pytest.approx(before.layer.per_token_s / 2)
    assert layers.suffix.per_token_s == pytest.approx(before.suffix.per_token_s / 2)
    assert attention.layer.per_square_s == pytest.approx(before.layer.per_square_s / 2)
    assert attention.suffix.per_pair_s == pytest.approx(before.suffix.per_pair_s / 2)
    assert projection.project["int8"].per_token_s < before.project["int8"].per_token_s
    assert layers.project == attention.project == before.project
    assert layers.layer.per_square_s == before.layer.per_square_s
    assert attention.layer.per_token_s == before.layer.per_token_s
    assert (projection.layer, projection.suffix) == (before.layer, before.suffix)
    assert projection.scatter == layers.scatter == attention.scatter == before.scatter


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="the-same"),
        pytest.param({"name": "renamed"}, id="another-name"),
        pytest.param({"window_tokens": 8192}, id="another-window"),
    ],
)
def test_measured_costs_are_those_of_the_same_model(changes: dict[str, Any]) -> None:
    """Whatever it is called, and however long its context may be."""
    assert PROFILE.costs_of(replace(SPEC, **changes)) is COSTS


@pytest.mark.parametrize(
    "changes",
    [
        {"family": "qwen2"},
        {"num_layers": 4},
        {"hidden_size": 65},
        {"num_heads": 4},
        {"num_kv_heads": 8},
        {"head_dim": 16},
        {"dtype": "float16"},
        {"mlp_size": 0},
        {"mlp_matrices": 2},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_costs_of_another_model_follow_from_the_rates(changes: dict[str, Any]) -> None:
    """A model that differs in any number was not measured."""
    other = replace(SPEC, **changes)
    assert PROFILE.costs_of(other) == PROFILE.rates.costs(other)


@pytest.mark.parametrize(
    "profile",
    [
        pytest.param(replace(PROFILE, model=None), id="no-model"),
        pytest.param(replace(PROFILE, costs=None), id="no-costs"),
    ],
)
def test_costs_of_an_unmeasured_machine_follow_from_its_rates(profile: HardwareProfile) -> None:
    assert profile.costs_of(SPEC) == PROFILE.rates.costs(SPEC)


# --- profiles in files --------------------------------------------------------------------------


@pytest.mark.parametrize("profile", [PROFILE, DATA_SHEET], ids=["measured", "data-sheet"])
def test_a_profile_survives_json(profile: HardwareProfile) -> None:
    """With its samples, to the last bit."""
    text = profile.to_json()
    assert json.loads(text)["version"] == PROFILE_VERSION == 1
    assert HardwareProfile.from_json(text) == profile


@settings(deadline=None, derandomize=True, max_examples=30)
@given(specs().flatmap(measured_machines), st.text())
def test_any_profile_survives_json(profile: HardwareProfile, name: str) -> None:
    named = replace(profile, name=name)
    assert HardwareProfile.from_json(named.to_json()) == named


@pytest.mark.parametrize("name", HARDWARE)
def test_a_preset_survives_a_file(tmp_path: Path, name: str) -> None:
    HARDWARE[name].save(tmp_path / "profile.json")
    assert HardwareProfile.load(tmp_path / "profile.json") == HARDWARE[name]


def with_data(**changes: object) -> str:
    """A profile as JSON with other fields; `...` takes one out."""
    data = {**json.loads(PROFILE.to_json()), **changes}
    return json.dumps({name: value for name, value in data.items() if value is not ...})


JUNK = [
    pytest.param("", id="empty"),
    pytest.param("{", id="half-an-object"),
    pytest.param(PROFILE.to_json()[:-20], id="cut-off"),
    pytest.param("null", id="null"),
    pytest.param("[]", id="list"),
    pytest.param("7", id="number"),
    pytest.param("{}", id="empty-object"),
    pytest.param('{"version": 1}', id="nothing-but-a-version"),
    pytest.param(with_data(version=...), id="no-version"),
    pytest.param(with_data(version=PROFILE_VERSION + 1), id="later-version"),
    pytest.param(with_data(version="1"), id="version-as-text"),
    *[
        pytest.param(with_data(**{field: ...}), id=f"no-{field}")
        for field in ("name", "source", "cold", "warm", "rates", "model", "costs")
    ],
    pytest.param(with_data(colour="red"), id="unknown-field"),
    pytest.param(with_data(cold=None), id="rate-is-null"),
    pytest.param(with_data(warm=5), id="rate-is-a-number"),
    pytest.param(with_data(cold={}), id="empty-rate"),
    pytest.param(with_data(cold={"bytes_per_s": 1, "per_second": 1}), id="unknown-part-of-a-rate"),
    pytest.param(with_data(rates=[1, 2, 3, 4]), id="rates-are-a-list"),
    pytest.param(with_data(rates={"layer_flops_per_s": 1}), id="rates-are-incomplete"),
    pytest.param(with_data(model="llama"), id="model-is-a-name"),
    pytest.param(with_data(model={"name": "llama"}), id="model-is-incomplete"),
    pytest.param(
        with_data(model={**json.loads(PROFILE.to_json())["model"], "dtype": "int3"}),
        id="model-of-an-unknown-dtype",
    ),
    pytest.param(with_data(costs=[]), id="costs-are-a-list"),
    pytest.param(with_data(costs={"project": {}}), id="costs-are-incomplete"),
    pytest.param(
        with_data(costs={**json.loads(PROFILE.to_json())["costs"], "project": [1]}),
        id="projecting-is-a-list",
    ),
    pytest.param(
        with_data(costs={**json.loads(PROFILE.to_json())["costs"], "layer": {"per_byte_s": 1}}),
        id="unknown-part-of-a-cost",
    ),
]


@pytest.mark.parametrize("text", JUNK)
def test_what_is_not_a_profile_of_this_version_is_refused(tmp_path: Path, text: str) -> None:
    """As a text, and as a file, whose error says which."""
    with pytest.raises(ProfileError, match="not a hardware profile"):
        HardwareProfile.from_json(text)
    path = tmp_path / "profile.json"
    path.write_text(text)
    with pytest.raises(ProfileError, match=r"profile\.json: not a hardware profile"):
        HardwareProfile.load(path)


@pytest.mark.parametrize(
    "rate",
    [
        pytest.param({"bytes_per_s": "fast"}, id="word"),
        pytest.param({"bytes_per_s": None}, id="null"),
        pytest.param({"bytes_per_s": 0.0}, id="zero"),
        pytest.param({"bytes_per_s": -1e9}, id="negative"),
        pytest.param({"bytes_per_s": float("nan")}, id="nan"),
        pytest.param({"bytes_per_s": 1e9, "per_request_s": -1.0}, id="negative-requests"),
    ],
)
def test_rates_that_no_machine_has_are_refused(rate: dict[str, object]) -> None:
    """Or the first question that is planned with them ends in a division by zero."""
    with pytest.raises(ProfileError):
        HardwareProfile.from_json(with_data(cold=rate))


@pytest.mark.parametrize("name", ["missing.json", "missing/profile.json", "."])
def test_a_profile_that_is_not_there_is_named(tmp_path: Path, name: str) -> None:
    """A folder is none either."""
    with pytest.raises(ProfileError, match="cannot read"):
        HardwareProfile.load(tmp_path / name)


def test_a_file_that_is_not_text_is_no_profile(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(ProfileError, match=r"cannot read .*profile\.json"):
        HardwareProfile.load(path)


def test_saving_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    """A path, or its name; a text file that ends as text files do."""
    path = tmp_path / "profile.json"
    DATA_SHEET.save(path)
    PROFILE.save(str(path))
    assert HardwareProfile.load(str(path)) == PROFILE
    assert path.read_text() == PROFILE.to_json() + "\n"
    assert list(tmp_path.iterdir()) == [path]


@contextmanager
def no_file_larger_than(num_bytes: int) -> Iterator[None]:
    """The operating system refuses to write more, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_fails_half_way_leaves_the_old_file(tmp_path: Path) -> None:
    """Whole, and no other; the error says which file and why."""
    path = tmp_path / "profile.json"
    DATA_SHEET.save(path)
    with no_file_larger_than(100), pytest.raises(ProfileError, match=r"profile\.json: File too"):
        PROFILE.save(path)
    assert HardwareProfile.load(path) == DATA_SHEET
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_replaced_stays(tmp_path: Path) -> None:
    """Nothing unfinished is left beside it."""
    folder = tmp_path / "profile.json"
    folder.mkdir()
    with pytest.raises(ProfileError, match=r"cannot write .*profile\.json"):
        PROFILE.save(folder)
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="No such file"):
        PROFILE.save(tmp_path / "missing" / "profile.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("file/profile.json", id="below-a-file"),
        pytest.param("long" * 100, id="name-too-long"),
    ],
)
def test_a_path_that_cannot_be_is_a_profile_error(tmp_path: Path, name: str) -> None:
    """Not the operating system's."""
    (tmp_path / "file").touch()
    with pytest.raises(ProfileError):
        PROFILE.save(tmp_path / name)


def test_a_reader_sees_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    """Never a part: two writers' profiles are replaced as a whole, while they are read."""
    path = tmp_path / "profile.json"
    DATA_SHEET.save(path)
    done = threading.Event()

    def write() -> None:
        for _ in range(50):
            PROFILE.save(path)
            DATA_SHEET.save(path)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not done.is_set():
        assert HardwareProfile.load(path) in (PROFILE, DATA_SHEET)
    writer.join()


def test_every_storage_dtype_has_costs() -> None:
    """Of machines known by their rates."""
    costs = DATA_SHEET.costs_of(SPEC)
    assert set(costs.project) == set(STORAGE_DTYPES[HIDDEN])
    assert set(costs.scatter) == set(STORAGE_DTYPES[KV])
