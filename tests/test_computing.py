"""Where and in what a model computes: names of devices and dtypes, on machines of any kind."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path

import pytest
import torch
from commands import Run, assert_usage_error
from fakes import save_tiny_model
from tiny import SHAPES, byte_tokenizer, tiny_model

from hcache_indexers.local import main as index_states
from hcache_rag import HCacheEngine
from hcache_rag.errors import UnsupportedModelError
from hcache_rag.llama_index import HCacheLLM
from hcache_rag.models import bfloat16_speedup, computing, device_named, dtype_named, load_model

pytestmark = pytest.mark.usefixtures("one_thread")

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "model")


def give_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def give_speedup(monkeypatch: pytest.MonkeyPatch, speedup: float) -> None:
    monkeypatch.setattr(computing, "bfloat16_speedup", lambda: speedup)


@pytest.mark.parametrize(
    ("gpus", "name", "expected"),
    [
        (0, "auto", "cpu"),
        (0, "cpu", "cpu"),
        (1, "auto", "cuda"),
        (1, "cpu", "cpu"),
        (1, "cuda", "cuda"),
        (2, "cuda:1", "cuda:1"),
    ],
)
def test_devices_that_are_here(
    monkeypatch: pytest.MonkeyPatch, gpus: int, name: str, expected: str
) -> None:
    give_gpus(monkeypatch, gpus)
    assert device_named(name) == torch.device(expected)


@pytest.mark.parametrize(
    ("gpus", "name", "there"),
    [
        (0, "cuda", "cpu"),
        (0, "cuda:0", "cpu"),
        (1, "cuda:1", "cpu, cuda:0"),
        (2, "mps", "cpu, cuda:0, cuda:1"),
        (1, "the big one", "cpu, cuda:0"),
        (1, "meta", "cpu, cuda:0"),
        (1, "", "cpu, cuda:0"),
    ],
)
def test_devices_that_are_not_here(
    monkeypatch: pytest.MonkeyPatch, gpus: int, name: str, there: str
) -> None:
    """Refused with those that are."""
    give_gpus(monkeypatch, gpus)
    with pytest.raises(ValueError, match=f"no device '{name}' here, only {there}$"):
        device_named(name)


@pytest.mark.parametrize(
    ("speedup", "dtype"),
    [(4.3, torch.bfloat16), (1.1, torch.float32), (0.5, torch.float32)],
)
def test_auto_is_bfloat16_where_it_pays(
    monkeypatch: pytest.MonkeyPatch, speedup: float, dtype: torch.dtype
) -> None:
    give_speedup(monkeypatch, speedup)
    assert dtype_named("auto", CPU) is dtype


def test_the_default_is_float32_however_fast_bfloat16_is(
    monkeypatch: pytest.MonkeyPatch, model: Path
) -> None:
    """A faster processor does not change anybody's answers."""
    give_speedup(monkeypatch, 9.0)
    assert load_model(str(model))[0].dtype is torch.float32


def test_the_speedup_is_measured() -> None:
    assert 0.01 < bfloat16_speedup() < 100
    assert math.isfinite(bfloat16_speedup())


def test_float16_is_refused_on_a_cpu_at_once(tmp_path: Path) -> None:
    """With the reason and what to do, before anything is loaded; a GPU may have it."""
    with pytest.raises(ValueError, match=r"in float16 on a CPU.* load it in bfloat16 or float32"):
        load_model(str(tmp_path / "nothing"), dtype="float16")
    assert dtype_named("float16", GPU) is torch.float16
    with pytest.raises(ValueError, match="unknown dtype 'float17'"):
        dtype_named("float17", CPU)


def test_a_model_that_is_loaded_in_float16_is_refused(tmp_path: Path) -> None:
    half = tiny_model(SHAPES[0], dtype=torch.float16)
    with pytest.raises(UnsupportedModelError, match="load it in bfloat16 or float32"):
        HCacheEngine(half, byte_tokenizer(), tmp_path / "states")


def test_an_llm_says_what_auto_came_to(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    """And a pickle of it is of that dtype, whatever is measured then."""
    give_speedup(monkeypatch, 4.0)
    with HCacheLLM(str(model), dtype="auto") as llm:
        assert llm.dtype == "bfloat16"
        assert llm.adapter.device.type == "cpu"
        give_speedup(monkeypatch, 0.5)
        with pickle.loads(pickle.dumps(llm)) as again:
            assert again.dtype == "bfloat16"


def test_auto_stays_what_it_was_for_an_index(
    run: Run, monkeypatch: pytest.MonkeyPatch, model: Path, tmp_path: Path
) -> None:
    """Its documents are not read anew because a measurement came out otherwise."""
    docs, store = tmp_path / "docs", tmp_path / "store"
    docs.mkdir()
    (docs / "a.txt").write_text("Mercury is the smallest planet and the closest one to the Sun.")
    command = ("index", docs, "--store", store, "--model", model, "--no-measure", "--json")
    for speedup, stored in ((4.0, 1), (0.5, 0)):
        give_speedup(monkeypatch, speedup)
        outcome = run(*command, "--dtype", "auto")
        assert outcome.code == 0, outcome.err
        assert json.loads(outcome.out)["stored"] == stored
        assert json.loads((store / "model.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    "command",
    [("index", "."), ("ask", "What?"), ("chat",), ("fidelity",), ("profile",)],
    ids=lambda command: str(command[0]),
)
def test_a_command_refuses_a_device_that_is_not_here(
    run: Run, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    give_gpus(monkeypatch, 0)
    outcome = run(*command, "--device", "cuda:7")
    assert_usage_error(outcome, "--device")
    flat = " ".join(outcome.err.replace("│", " ").split())
    assert "there is no device 'cuda:7' here, only cpu" in flat


def test_so_does_the_indexing_job(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    give_gpus(monkeypatch, 0)
    with pytest.raises(SystemExit) as stop:
        index_states([str(tmp_path), "--states", str(tmp_path / "s"), "--device", "cuda"])
    assert stop.value.code == 2
    assert "no device 'cuda' here, only cpu" in capsys.readouterr().err


def test_the_job_of_one_file_takes_its_dtype(model: Path, tmp_path: Path) -> None:
    """Which it passed over once."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.txt").write_text("Mercury is the smallest planet.")
    states = str(tmp_path / "states")
    arguments = ["--states", states, "--model", str(model), "--dtype", "bfloat16"]
    index_states([str(tmp_path / "docs"), *arguments, "--device", "cpu"])
    with HCacheLLM(str(model), dtype="bfloat16", store=states) as llm:
        assert llm.engine.precompute(["Mercury is the smallest planet."]).reused == 1
