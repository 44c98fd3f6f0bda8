"""The README is true: its code runs as written, its commands exist, its tree is the tree."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    return [body for name, body in fenced if name == language]


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(blocks("python"))))
def test_code_runs_as_written(index: int, tmp_path: Path, smollm2: object) -> None:
    """In an empty folder beside a few of the passages."""
    passages = tmp_path / "examples" / "solar_system"
    passages.mkdir(parents=True)
    for name in ("halleys-comet.md", "pluto.md", "venus.md", "ceres.md"):
        shutil.copy(ROOT / "examples" / "solar_system" / name, passages)
    done = subprocess.run(
        [sys.executable, "-c", blocks("python")[index]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "2061" in done.stdout


def all_commands(app: Any) -> list[Any]:
    return list(app.registered_commands)


def test_shell_commands_exist() -> None:
    """Every `hcache-rag` command of the README has a help text."""
    from hcache_rag.cli.app import app

    commands = set(re.findall(r"^hcache-rag ([\w-]+)", README, re.MULTILINE))
    assert commands == {command.name or command.callback.__name__ for command in all_commands(app)}
    for command in commands:
        assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0


def test_make_targets_exist() -> None:
    """Every `make` command of README and CONTRIBUTING is a target."""
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = README + (ROOT / "CONTRIBUTING.md").read_text()
    assert set(re.findall(r"^make (\w+)", text, re.MULTILINE)) <= targets


def test_tree_names_every_module() -> None:
    """The file tree has a line for every module, and none for a module that is gone."""
    tree = blocks("")[-1]
    folders = ("hcache_rag", "kernels", "indexers", "examples", "benchmarks")
    modules = {
        path.name if path.name != "__init__.py" else f"{path.parent.name}/"
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        if path.parent.name != "tests"
    }
    named = set(re.findall(r"^\s*([\w.]+(?:\.py|/))", tree, re.MULTILINE))
    assert modules - named == set()
    assert {name for name in named if name.endswith(".py")} - modules == set()
