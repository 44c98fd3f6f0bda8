"""Fixtures: tiny random models of every layout, a tiny tokenizer, the real model and its data."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import threads
import torch
from commands import Outcome, Run
from fakes import PRINTABLE, WordEmbedding
from tiny import SHAPES, byte_tokenizer, tiny_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hcache_rag import StateStore
from hcache_rag.errors import ModelNotFoundError

if TYPE_CHECKING:
    from hcache_rag.llama_index import HCacheLLM

REPOSITORY = Path(__file__).parent.parent
SHARED_DATA = REPOSITORY.parent / "shared" / "data"


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan() -> Iterator[None]:
    """An unwritten slot must show: fill `torch.empty` with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _own_threads_begin_here() -> None:
    """What another test left alive is none of this one's."""
    threads.begin()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[StateStore]:
    """An empty store."""
    with StateStore.open(tmp_path / "store") as opened:
        yield opened


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny models gain nothing from more, and lose much where other processes compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    """One token per byte, plus the control tokens <bos>, <eos> and <|im_end|>."""
    return byte_tokenizer()


@pytest.fixture(scope="session")
def smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct in float32, from the package that carries it."""
    from hcache_rag.bundled import default_model_path
    from hcache_rag.models import load_model

    try:
        return load_model(str(default_model_path()))
    except ModelNotFoundError as error:
        pytest.skip(f"the real model is not installed: {error}")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real question-answering data."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no question-answering data beside the repository ({SHARED_DATA.name}/)")
    return SHARED_DATA


@pytest.fixture(scope="session")
def solar_system() -> list[str]:
    """The passages that the project ships."""
    folder = REPOSITORY / "examples" / "solar_system"
    return [path.read_text().strip() for path in sorted(folder.glob("*.md"))]


def pytest_make_parametrize_id(config: Any, val: Any) -> str | None:
    """Readable ids for dataclasses that name themselves."""
    label = getattr(val, "label", None)
    return label if isinstance(label, str) else None


@cache
def _tiny() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return tiny_model(SHAPES[1]), byte_tokenizer()


@pytest.fixture
def new_llm() -> Iterator[Callable[..., HCacheLLM]]:
    """Makes LLMs over one tiny model, and closes them all at the end."""
    from hcache_rag.llama_index import HCacheLLM

    model, tokenizer = _tiny()
    made: list[HCacheLLM] = []

    def make(**options: Any) -> HCacheLLM:
        options = {"max_new_tokens": 12, "generate_kwargs": PRINTABLE, **options}
        made.append(HCacheLLM(model=model, tokenizer=tokenizer, **options))
        return made[-1]

    yield make
    for llm in made:
        llm.close()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in this process, with an embedding that needs no model."""
    from hcache_rag.cli import main

    embedding = WordEmbedding("all-MiniLM-L6-v2")
    monkeypatch.setattr("hcache_rag.llama_index.retriever.default_embedding", lambda: embedding)

    def call(*arguments: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["hcache-rag", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capfd.readouterr()
        return Outcome(stop.value.code, captured.out, captured.err)

    return call
