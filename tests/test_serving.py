"""Processes answer from one store at once, as one of them does alone, while another one indexes."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from multiprocessing.pool import Pool
from multiprocessing.synchronize import Barrier, Event
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import PRINTABLE, WordEmbedding
from llama_index.core import Document
from llama_index.core.query_engine import RetrieverQueryEngine
from tiny import SHAPES, attentive_model, byte_tokenizer

from hcache_rag import GenerationOptions, HCacheEngine, StateStore
from hcache_rag.llama_index import HCacheLLM, HCacheRetriever
from hcache_rag.store.manifest import Manifest

pytestmark = pytest.mark.usefixtures("one_thread")

PROCESSES = 4
PATIENCE_S = 120.0
IMPORTED_ONCE = (
    "torch",
    "transformers.generation.utils",
    "transformers.models.llama.modeling_llama",
    "llama_index.core",
)
"""By the process that all others are forked from, which does nothing else."""

PREAMBLE = "Read: "
PASSAGES = [f"Passage {n} tells of the number {n}, and of nothing else at all." for n in range(8)]
LATER = [f"Later passage {n} has arrived while others were being asked." for n in range(400)]
PROMPTS = [
    f"{PREAMBLE}{PASSAGES[n]}\n\n{PASSAGES[n + 3]}\n\n{PASSAGES[n + 1]}\n\nWhich number?"
    for n in range(4)
]
FIRST_LATER = f"{PREAMBLE}{LATER[0]}\n\nWhat has arrived?"
"""Its document is exact: whether it is stored yet or not, the answer is full prefill's."""
OPTIONS = GenerationOptions(max_new_tokens=8, temperature=0, extra=PRINTABLE)


@dataclass(frozen=True, slots=True)
class Together:
    """What the processes wait for."""

    begin: Barrier
    has_indexed: Event
    have_answered: tuple[Event, ...]


_together: Together


def enter(together: Together) -> None:
    """A process begins."""
    global _together
    _together = together
    torch.set_num_threads(1)


@cache
def model() -> tuple[Any, Any]:
    return attentive_model(SHAPES[1]), byte_tokenizer()


def engine_on(store: StateStore) -> HCacheEngine:
    return HCacheEngine(
        *model(), store, preamble=PREAMBLE, storage_dtype="float32", keep_recurring=False
    )


def answers_of(engine: HCacheEngine) -> list[str]:
    return [engine.generate(p, options=OPTIONS).text for p in (*PROMPTS, FIRST_LATER)]


def answer(path: Path, number: int, read_only: bool) -> tuple[int, list[list[str]], int]:
    """Until another process has indexed something.

    Returns:
        The process, all answers as often as they were given, and the tokens restored for the first.
    """
    with StateStore.open(path, read_only=read_only) as store:
        engine = engine_on(store)
        _together.begin.wait(PATIENCE_S)
        answers = [answers_of(engine)]
        while not _together.has_indexed.is_set():
            answers.append(answers_of(engine))
        answers.append(answers_of(engine))
        restored = engine.generate(PROMPTS[0], options=OPTIONS).provenance.restored_tokens
        _together.have_answered[number].set()
        return os.getpid(), answers, restored


def index(path: Path) -> tuple[int, int]:
    """Until all others have answered.

    Returns:
        The process, and how many of the later passages it has stored.
    """
    with StateStore.open(path) as store:
        engine = engine_on(store)
        _together.begin.wait(PATIENCE_S)
        stored = 0
        for text in LATER:
            stored += engine.precompute([text]).stored
            _together.has_indexed.set()
            if all(event.is_set() for event in _together.have_answered):
                break
        return os.getpid(), stored


@pytest.fixture(scope="module")
def context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED_ONCE))
    return context


@pytest.fixture(scope="module")
def together(context: Any) -> Together:
    events = tuple(context.Event() for _ in range(PROCESSES - 1))
    return Together(context.Barrier(PROCESSES), context.Event(), events)


@pytest.fixture(scope="module")
def processes(context: Any, together: Together) -> Iterator[Pool]:
    """Each takes one of as many tasks, since all of these wait for one another."""
    with context.Pool(PROCESSES, initializer=enter, initargs=(together,)) as pool:
        yield pool


@pytest.mark.parametrize("kind", ["one file", "shards", "published shards"])
def test_processes_answer_as_one_while_another_indexes(
    kind: str, processes: Pool, together: Together, tmp_path: Path
) -> None:
    """Reference path: one process alone; for what comes meanwhile, full prefill."""
    path = tmp_path / "store"
    if kind != "one file":
        Manifest.create(path, 3)
    with StateStore.open(path) as store:
        engine = engine_on(store)
        engine.precompute(PASSAGES)
        expected = answers_of(engine)
        assert len(set(expected)) == len(expected)
        restored = engine.generate(PROMPTS[0], options=OPTIONS).provenance.restored_tokens
    is_published = kind == "published shards"
    if is_published:
        for shard in Manifest.open(path).shards:
            shard.publish()
        Manifest.open(path).with_shard("local")
    for event in (together.has_indexed, *together.have_answered):
        event.clear()

    answering = [
        processes.apply_async(answer, (path, number, is_published))
        for number in range(PROCESSES - 1)
    ]
    its_pid, stored = processes.apply_async(index, (path,)).get(PATIENCE_S)
    results = [result.get(PATIENCE_S) for result in answering]

    assert len({its_pid, *(pid for pid, _, _ in results)}) == PROCESSES
    for _, answers, its_restored in results:
        assert answers == [expected] * len(answers)
        assert its_restored == restored > 0
    assert 0 < stored < len(LATER)
    with StateStore.open(path) as store:
        assert store.verify().is_whole
        assert store.stats().documents == len(PASSAGES) + stored
        assert [len(store.find(text)) for text in LATER[:stored]] == [1] * stored


def index_and_ask(folder: Path) -> tuple[int, str]:
    llm = HCacheLLM(
        model=model()[0], tokenizer=model()[1], max_new_tokens=8, generate_kwargs=PRINTABLE
    )
    with llm:
        _together.begin.wait(PATIENCE_S)
        documents = [Document(text=text, id_=text[:9]) for text in PASSAGES]
        retriever = HCacheRetriever.from_documents(
            documents, llm=llm, persist_dir=folder, embed_model=WordEmbedding()
        )
        engine = RetrieverQueryEngine.from_args(retriever, llm=llm)
        return os.getpid(), str(engine.query("Which passage tells of the number 5?"))


def test_processes_that_begin_at_once_share_one_index(processes: Pool, tmp_path: Path) -> None:
    """As the workers of a web server do, which all find nothing there."""
    results = processes.map(index_and_ask, [tmp_path] * PROCESSES, chunksize=1)
    assert len({pid for pid, _ in results}) == PROCESSES
    assert len({text for _, text in results}) == 1
    llm = HCacheLLM(model=model()[0], tokenizer=model()[1])
    with llm:
        retriever = HCacheRetriever.from_persist_dir(tmp_path, llm=llm, embed_model=WordEmbedding())
        assert {node.get_content() for node in retriever.nodes} == set(PASSAGES)
        assert llm.engine.store.stats().documents == len(PASSAGES)
        assert llm.engine.store.verify().is_whole
