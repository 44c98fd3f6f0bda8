"""The house keeps its rules: light imports, one list of names, downward imports, typed packages."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hcache_rag

REPOSITORY = Path(__file__).parent.parent
HEAVY = (
    "torch",
    "transformers",
    "llama_index",
    "lmdb",
    "faiss",
    "sentence_transformers",
    "matplotlib",
)


def loaded_by(statement: str) -> list[str]:
    """The heavy packages that a statement loads in a fresh process."""
    script = f"{statement}\nimport sys\nprint(*[m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.split()


def test_importing_the_package_loads_nothing_heavy() -> None:
    """Neither torch nor transformers nor llama_index, not even lmdb."""
    assert loaded_by("import hcache_rag") == []


def test_listing_the_package_loads_nothing_heavy() -> None:
    """A person may look around for free."""
    assert loaded_by("import hcache_rag; dir(hcache_rag); hcache_rag.__version__") == []


def test_the_planner_loads_nothing_heavy() -> None:
    """It runs where nothing is installed: profiles, layouts, plans, simulations, drawings."""
    modules = (
        "errors",
        "spec",
        "layout",
        "profile",
        "presets",
        "choice",
        "plan",
        "schedule",
        "planner",
        "timeline",
        "lanes",
        "state",
        "compose",
        "codec",
        "provenance",
    )
    assert loaded_by(f"from hcache_rag import {', '.join(modules)}") == []


def test_the_store_loads_lmdb_alone() -> None:
    """Looking at states needs no model."""
    assert loaded_by("from hcache_rag import StateStore, StoreError") == ["lmdb"]


# --- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", hcache_rag.__all__)
def test_every_exported_name_resolves(name: str) -> None:
    """To something documented that lives in this library and bears that name."""
    value = getattr(hcache_rag, name)
    assert value.__name__ == name
    assert value.__module__.startswith("hcache_rag.")
    assert inspect.getdoc(value)


def test_all_is_what_is_exported() -> None:
    """`__all__`, `dir` and what type checkers see are one sorted list."""
    tree = ast.parse(Path(inspect.getfile(hcache_rag)).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    typed = [
        alias.asname or alias.name
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]
    assert sorted(typed) == hcache_rag.__all__
    assert sorted(set(hcache_rag.__all__)) == hcache_rag.__all__
    assert set(dir(hcache_rag)) == {*hcache_rag.__all__, "__version__"}


def test_an_unknown_name_is_an_attribute_error() -> None:
    """With the name, as of any module; and import says so as usual."""
    with pytest.raises(AttributeError, match="'hcache_rag' has no attribute 'HCacheEngin'"):
        _ = hcache_rag.HCacheEngin
    with pytest.raises(ImportError):
        exec("from hcache_rag import nothing_of_the_kind")


def test_every_error_is_exported() -> None:
    """Whoever catches one needs no second import."""
    from hcache_rag import errors

    named = {name for name, value in vars(errors).items() if inspect.isclass(value)}
    assert named <= set(hcache_rag.__all__)


def test_the_version_is_the_projects() -> None:
    """One version, not two."""
    text = (REPOSITORY / "pyproject.toml").read_text()
    assert re.findall(r'^version = "(.+)"$', text, re.MULTILINE) == [hcache_rag.__version__]


# --- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["kernels", "indexers", "tests", "examples", "benchmarks"])
def test_folders_that_are_not_packages(folder: str) -> None:
    """Source roots and programs: `import kernels` must not find us."""
    assert (REPOSITORY / folder).is_dir()
    assert not (REPOSITORY / folder / "__init__.py").exists()


@pytest.mark.parametrize(
    "package", ["hcache_rag", "kernels/hcache_kernels", "indexers/hcache_indexers"]
)
def test_packages_say_that_they_are_typed(package: str) -> None:
    """Else type checkers ignore their annotations."""
    assert (REPOSITORY / package / "__init__.py").is_file()
    assert (REPOSITORY / package / "py.typed").is_file()


def test_imports_point_down_only() -> None:
    """The import-linter contracts in pyproject.toml hold."""
    program = Path(sys.executable).with_name("lint-imports")
    assert program.is_file(), "import-linter is not installed beside this Python"
    done = subprocess.run(
        [program, "--no-cache"], cwd=REPOSITORY, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
