"""The examples run as they are, on a folder of three passages, and stay short."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from llama_index.core import Settings

EXAMPLES = Path(__file__).parent.parent / "examples"
SHORT = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "demo")


@pytest.fixture
def passages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smollm2: object) -> Path:
    """A folder of passages in an empty working directory."""
    folder = tmp_path / "passages"
    folder.mkdir()
    for name in ("halleys-comet.md", "pluto.md", "venus.md"):
        shutil.copy(EXAMPLES / "solar_system" / name, folder)
    monkeypatch.chdir(tmp_path)
    return folder


def run(name: str, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


@pytest.mark.parametrize("name", SHORT)
def test_an_example_has_less_than_forty_lines(name: str) -> None:
    """One has two programs: what finds the documents, and what answers."""
    limit = 60 if name == "serve" else 40
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < limit


def test_quickstart(
    passages: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run("quickstart", str(passages), monkeypatch=monkeypatch)["llm"].close()
    assert "2061" in capsys.readouterr().out
    shutil.rmtree(passages)  # the second run does not need it
    again = run("quickstart", str(passages), monkeypatch=monkeypatch)
    assert "2061" in capsys.readouterr().out
    again["llm"].close()


def test_existing_index(
    passages: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Settings, "_llm", None)
    monkeypatch.setattr(Settings, "_embed_model", None)
    its = run("existing_index", str(passages), monkeypatch=monkeypatch)
    assert "Venus" in capsys.readouterr().out
    its["llm"].engine.store.flush_uses()
    assert its["llm"].engine.store.stats().hits == 6
    its["llm"].close()


def test_chat(
    passages: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    its = run("chat", str(passages), monkeypatch=monkeypatch)
    assert "Halley" in capsys.readouterr().out
    its["llm"].engine.flush()
    assert its["llm"].engine.store.stats().paths >= 2
    its["llm"].close()


def test_changing_documents(
    passages: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run("changing_documents", monkeypatch=monkeypatch)
    before, after, _, refreshed = capsys.readouterr().out.strip().splitlines()[-4:]
    assert "eight euros" in before
    assert "nine euros" in after
    assert refreshed == "[False, True]"


def test_fidelity(
    passages: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    its = run("fidelity", str(passages), monkeypatch=monkeypatch)
    assert its["report"].prompts == 3
    assert f"recommended: {its['report'].recommendation}" in capsys.readouterr().out
    its["llm"].close()


def test_web(passages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastapi.testclient import TestClient

    monkeypatch.setenv("DOCUMENTS", str(passages))
    app = run("web", monkeypatch=monkeypatch)["app"]
    with TestClient(app) as client:
        with client.stream(
            "GET", "/ask", params={"question": "When is Halley's Comet here?"}
        ) as it:
            pieces = list(it.iter_text())
        assert len(pieces) > 3
        assert "Halley" in "".join(pieces)


def test_the_notebook_runs_and_draws(monkeypatch: pytest.MonkeyPatch, smollm2: object) -> None:
    """Its cells, one after another, with fewer passages and turns."""
    plots = pytest.importorskip("matplotlib.pyplot", reason="no extra plot")
    plots.switch_backend("agg")
    drawn: list[object] = []
    monkeypatch.setattr(plots, "show", lambda: drawn.extend(plots.get_fignums()))
    monkeypatch.setenv("HCACHE_RAG_QUICK", "1")
    monkeypatch.chdir(EXAMPLES)
    its: dict[str, Any] = {}
    for cell in json.loads((EXAMPLES / "gain.ipynb").read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), its)
    assert len(drawn) == 3  # the first figure is there when the second is shown
    assert all(value > 0 for values in its["seconds"].values() for value in values)
    assert {len(values) for values in its["waited"].values()} == {2}
    its["llm"].close()
    its["without"].close()
    plots.close("all")
