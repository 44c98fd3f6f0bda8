"""`hcache-rag profile`, `plan` and `simulate`: what they print, write and refuse."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from commands import Run, assert_one_error_line, assert_usage_error
from fakes import save_tiny_model

from hcache_rag import HCacheEngine
from hcache_rag.measure import find_profile, machine_name
from hcache_rag.models import load_model
from hcache_rag.presets import HARDWARE, MODELS
from hcache_rag.profile import PROFILE_NAME, HardwareProfile

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), chat=True))


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Profiles are kept in no real cache folder."""
    cache = tmp_path / "cache"
    monkeypatch.setattr("hcache_rag.llama_index.folder.cache_folder", lambda: cache)


def test_a_measured_profile_is_kept_and_used(run: Run, model: str, tmp_path: Path) -> None:
    """Beside the states, where the engine finds it, and for `plan --hardware this`."""
    store = tmp_path / "store"
    measured = run("profile", "--store", store, "--model", model, "--quick")
    assert measured.code == 0, measured.err
    assert "64" in measured.out
    assert "best mix" in measured.out
    assert re.search(
        r"computing in bfloat16: this CPU multiplies matrices [\d.]+x as", measured.out
    )
    profile = find_profile(store / "states")
    assert profile is not None
    assert profile.name == machine_name()
    assert profile.warm.bytes_per_s > 0
    assert not list((store / "states").glob(".profile-*"))

    loaded, tokenizer = load_model(model)
    with HCacheEngine(loaded, tokenizer, store / "states") as engine:
        assert engine.planner.profile == profile
        assert profile.name in engine.choice.reason
    planned = run("plan", "--model", model, "--tokens", "100", "--store", store)
    assert planned.code == 0, planned.err
    assert profile.name.split(",")[0] in planned.out
    elsewhere = run("plan", "--model", model, "--store", tmp_path / "none")
    assert elsewhere.code == 0, elsewhere.err


def test_a_profile_as_json(run: Run, model: str, tmp_path: Path) -> None:
    """One object, whose profile is the file's."""
    outcome = run("profile", "--store", tmp_path, "--model", model, "--quick", "--json")
    assert outcome.code == 0
    result = json.loads(outcome.out)
    saved = HardwareProfile.load(result["path"])
    assert saved.name == result["profile"]["name"]
    assert Path(result["path"]).name == PROFILE_NAME


def test_another_machines_profile_is_not_used(run: Run, model: str, tmp_path: Path) -> None:
    """A store that has moved is restored without a plan."""
    run("profile", "--store", tmp_path, "--model", model, "--quick")
    path = tmp_path / "states" / PROFILE_NAME
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "name": "another machine"}))
    assert find_profile(tmp_path / "states") is None
    path.write_text("{")
    assert find_profile(tmp_path / "states") is None
    loaded, tokenizer = load_model(model)
    with HCacheEngine(loaded, tokenizer, tmp_path / "states") as engine:
        assert engine.planner.profile is None


def test_indexing_measures_once(run: Run, model: str, tmp_path: Path) -> None:
    """The first time, and not where it was asked not to."""
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "a.txt").write_text("Mercury is the smallest planet and the closest one to the Sun.")
    without = run("index", docs, "--store", tmp_path / "w", "--model", model, "--no-measure")
    assert without.code == 0, without.err
    assert find_profile(tmp_path / "w" / "states") is None
    assert run("index", docs, "--store", tmp_path / "s", "--model", model).code == 0
    first = find_profile(tmp_path / "s" / "states")
    assert first is not None
    assert run("index", docs, "--store", tmp_path / "s", "--model", model).code == 0
    assert find_profile(tmp_path / "s" / "states") == first


@pytest.mark.parametrize("name", MODELS)
def test_every_named_model_is_planned_on_every_named_machine(run: Run, name: str) -> None:
    """The plan is never slower than reading one form, and says what it keeps."""
    for machine in HARDWARE:
        outcome = run("plan", "--model", name, "--hardware", machine, "--tokens", "4096", "--json")
        assert outcome.code == 0, outcome.err
        result = json.loads(outcome.out)
        times = {method["method"]: method["time_s"] for method in result["methods"]}
        assert times["plan"] <= 1.03 * min(times.values())
        assert result["questions_to_break_even"] >= 1
        assert result["layout"]


def test_a_grouped_query_model_is_told_why_hidden_states_are_of_no_use(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    outcome = run("plan", "--model", "llama-3-8b", "--hardware", "a100-4ssd")
    assert "hidden states are never part of the best mix for this model, because" in outcome.out
    assert "32 x kv" in outcome.out


def test_a_plan_is_drawn_and_traced(run: Run, tmp_path: Path) -> None:
    """A PNG, and a trace whose events have the two lanes."""
    png, trace = tmp_path / "plan.png", tmp_path / "plan.json"
    outcome = run(
        "plan", "--model", "llama-2-7b", "--hardware", "a100-1ssd", "--draw", png, "--trace", trace
    )
    assert outcome.code == 0, outcome.err
    assert png.read_bytes().startswith(b"\x89PNG")
    events = json.loads(trace.read_text())["traceEvents"]
    assert {event["tid"] for event in events if event["ph"] == "X"} == {1, 2}
    assert {"read", "restore", "forward"} <= {event.get("cat") for event in events}


def test_fewer_bytes_may_be_asked_for(run: Run) -> None:
    """A layout within the bytes, which then leaves first layers out."""
    outcome = run(
        "plan", "--model", "llama-2-7b", "--hardware", "laptop", "--objective", "30000", "--json"
    )
    result = json.loads(outcome.out)
    assert "none" in result["layout"]
    assert 0 < result["methods"][-1]["bytes_per_token"] <= 30000


def test_the_list_names_models_and_machines(run: Run) -> None:
    outcome = run("plan", "--list")
    assert outcome.code == 0
    assert all(name in outcome.out for name in (*MODELS, *HARDWARE))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model", "llama-9"], "neither a folder nor one of"),
        (["--model", "llama-2-7b", "--hardware", "laptop", "--tokens", "0"], "--tokens"),
        (["--model", "llama-2-7b", "--hardware", "laptop", "--objective", "x"], "--objective"),
        (["--model", "llama-2-7b", "--hardware", "laptop", "--objective", "1"], "--objective"),
        (["--model", "llama-2-7b", "--hardware", "laptop", "--kv-dtype", "int4"], "--kv-dtype"),
        (
            ["--model", "llama-2-7b", "--hardware", "laptop", "--tokens", "2", "--documents", "3"],
            "--documents",
        ),
    ],
)
def test_wrong_arguments_are_usage_errors(
    run: Run, monkeypatch: pytest.MonkeyPatch, arguments: list[str], expected: str
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert_usage_error(run("plan", *arguments), expected)


def test_unknown_hardware_and_no_measurement_are_one_line(run: Run, tmp_path: Path) -> None:
    """The known names, or what to do."""
    assert_one_error_line(run("plan", "--model", "llama-2-7b", "--hardware", "abacus"), "a100-4ssd")
    outcome = run("plan", "--model", "llama-2-7b", "--store", tmp_path / "none")
    assert_one_error_line(outcome, "hcache-rag profile")
    broken = tmp_path / "profile.json"
    broken.write_text("{}")
    outcome = run("plan", "--model", "llama-2-7b", "--hardware", broken)
    assert_one_error_line(outcome, "not a hardware profile")


@pytest.mark.parametrize("option", ["--draw", "--trace"])
@pytest.mark.parametrize("place", ["no/x.png", "."])
def test_a_picture_that_cannot_be_written_costs_only_the_picture(
    run: Run, tmp_path: Path, option: str, place: str
) -> None:
    """The plan is printed before it; a folder is not a file."""
    outcome = run("plan", "--model", "llama-2-7b", "--hardware", "laptop", option, tmp_path / place)
    assert outcome.code == 1
    assert "kept: " in outcome.out
    (line,) = [line for line in outcome.err.splitlines() if line]
    assert "cannot write" in line


def test_a_picture_without_a_suffix_is_a_png(run: Run, tmp_path: Path) -> None:
    """And is called as it is written."""
    outcome = run(
        "plan", "--model", "llama-2-7b", "--hardware", "laptop", "--draw", tmp_path / "lanes"
    )
    assert outcome.code == 0
    assert "lanes.png" in outcome.err
    assert (tmp_path / "lanes.png").is_file()


def test_a_plan_that_never_pays_off_says_so(run: Run) -> None:
    """In words, and as a JSON that every reader takes."""
    arguments = ("plan", "--model", "llama-2-7b", "--hardware", "a100-network", "--tokens", 2)
    outcome = run(*arguments, "--documents", 2, "--fresh", 0)
    assert "never" in outcome.out
    outcome = run(*arguments, "--documents", 2, "--fresh", 0, "--json")
    assert json.loads(outcome.out)["questions_to_break_even"] is None


def test_a_prompt_beyond_the_models_window_is_noted(run: Run) -> None:
    outcome = run("plan", "--model", "llama-2-7b", "--hardware", "laptop", "--tokens", 9000)
    assert outcome.code == 0
    assert "window of 4,096" in outcome.err


@pytest.mark.parametrize("limit", ["inf", "nan", "-1", "0"])
def test_an_objective_is_a_positive_finite_number(run: Run, limit: str) -> None:
    outcome = run("plan", "--model", "llama-2-7b", "--hardware", "laptop", f"--objective={limit}")
    assert outcome.code == 2


def test_the_paper_beside_the_simulator(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Schedules found are the paper's; every far ratio is explained."""
    result = json.loads(run("simulate", "--json").out)
    for schedule in result["schedules"]:
        assert schedule["found"] == schedule["paper"]
    assert len(result["ratios"]) >= 10
    assert all(ratio["is_near"] or ratio["why"] for ratio in result["ratios"])
    monkeypatch.setenv("COLUMNS", "200")
    outcome = run("simulate")
    assert outcome.code == 0
    assert "31 + 1" in outcome.out
