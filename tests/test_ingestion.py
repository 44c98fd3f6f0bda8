"""The ingestion step in LlamaIndex's pipeline: cache, workers, asynchronous runs, failures."""

from __future__ import annotations

import asyncio
import logging
import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import WordEmbedding, save_tiny_model
from llama_index.core.ingestion import DocstoreStrategy, IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import BaseNode, Document
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.vector_stores import SimpleVectorStore

from hcache_rag import HCacheError, StateStore
from hcache_rag.engine import HCacheEngine
from hcache_rag.llama_index import HCacheLLM, HCachePrecompute, HCacheVectorStore, elsewhere

TEXTS = [
    "Mercury is the smallest planet and the closest one to the Sun.",
    "Venus is the hottest planet because of its thick atmosphere.",
    "Earth is the only planet known to have life and liquid oceans.",
    "Mars is a cold desert planet with the tallest volcano of all.",
]

NewLLM = Callable[..., HCacheLLM]

pytestmark = pytest.mark.usefixtures("one_thread")


def documents(texts: Sequence[str] = TEXTS) -> list[Document]:
    return [Document(text=text, id_=f"d{i}") for i, text in enumerate(texts)]


def texts_in(store: StateStore) -> set[str]:
    return {record.text for record in store.records() if not record.is_preamble}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def from_folder(model: Path, tmp_path: Path) -> Iterator[HCacheLLM]:
    """An LLM that another process can open."""
    llm = HCacheLLM(model, store=tmp_path / "states", max_new_tokens=4)
    yield llm
    llm.close()
    for other in elsewhere._opened.values():
        other.close()
    elsewhere._opened.clear()


def test_the_nodes_are_those_of_a_pipeline_without_it(new_llm: NewLLM) -> None:
    splitter = SentenceSplitter(chunk_size=30, chunk_overlap=5, tokenizer=str.split)
    plain = IngestionPipeline(transformations=[splitter]).run(documents=documents())
    with_it = IngestionPipeline(transformations=[splitter, HCachePrecompute(new_llm())])
    nodes = with_it.run(documents=documents())
    assert [n.get_content() for n in nodes] == [n.get_content() for n in plain]
    assert [n.ref_doc_id for n in nodes] == [n.ref_doc_id for n in plain]


def test_a_cached_run_reads_nothing_also_after_it_was_persisted(
    new_llm: NewLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = new_llm(store=tmp_path / "states")
    pipeline = IngestionPipeline(transformations=[SentenceSplitter(), HCachePrecompute(llm)])
    first = pipeline.run(documents=documents())
    pipeline.persist(str(tmp_path / "pipeline"))
    llm.close()
    llm = new_llm(store=tmp_path / "states")
    again = IngestionPipeline(transformations=[SentenceSplitter(), HCachePrecompute(llm)])
    again.load(str(tmp_path / "pipeline"))

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the cache was not used")

    with monkeypatch.context() as patch:
        patch.setattr(HCacheEngine, "precompute", never)
        assert [n.hash for n in again.run(documents=documents())] == [n.hash for n in first]
    assert texts_in(llm.engine.store) == set(TEXTS)


def test_the_event_loop_goes_on_while_documents_are_read(
    new_llm: NewLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading ends only when a task of the loop lets it."""
    import threading

    llm, go_on = new_llm(), threading.Event()
    precompute = HCacheEngine.precompute

    def waiting(*arguments: Any, **options: Any) -> Any:
        assert go_on.wait(60)
        return precompute(*arguments, **options)

    monkeypatch.setattr(HCacheEngine, "precompute", waiting)
    pipeline = IngestionPipeline(transformations=[HCachePrecompute(llm, on_error="raise")])

    async def main() -> Sequence[BaseNode]:
        run = asyncio.create_task(pipeline.arun(documents=documents()))
        await asyncio.sleep(0)
        go_on.set()
        return await run

    assert len(asyncio.run(main())) == len(TEXTS)
    assert texts_in(llm.engine.store) == set(TEXTS)


@pytest.mark.parametrize("passes", [1, 2])
def test_it_goes_to_another_process_and_opens_its_llm_there(
    from_folder: HCacheLLM, passes: int
) -> None:
    step = HCachePrecompute(from_folder, show_progress=False)
    passed = step
    for _ in range(passes):
        passed = pickle.loads(pickle.dumps(passed))
    assert passed.to_dict() == step.to_dict()  # the pipeline's cache knows it again
    nodes = documents()
    assert passed(nodes) is nodes
    assert passed.report is not None
    assert passed.report.stored == len(TEXTS)
    step(nodes)
    assert step.report is not None
    assert (step.report.stored, step.report.reused) == (0, len(TEXTS))


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True])
def test_workers_store_the_same_states(from_folder: HCacheLLM, *, asynchronous: bool) -> None:
    """Spawned ones, and forked ones that go on where threads of torch have been."""
    torch.set_num_threads(2)
    from_folder.complete("Hello")
    step = HCachePrecompute(from_folder, on_error="raise")
    # LlamaIndex's splitter with its own tokenizer cannot be passed on without a network.
    pipeline = IngestionPipeline(transformations=[step])
    run: Any = pipeline.arun if asynchronous else pipeline.run
    nodes: Any = run(documents=documents(), num_workers=2)
    nodes = asyncio.run(nodes) if asynchronous else nodes
    assert sorted(node.get_content() for node in nodes) == sorted(TEXTS)
    assert texts_in(from_folder.engine.store) == set(TEXTS)
    step(nodes)
    assert step.report is not None
    assert (step.report.stored, step.report.reused) == (0, len(TEXTS))


@pytest.mark.parametrize("case", ["model in memory", "store in memory"])
def test_what_another_process_cannot_open_is_said_there_and_loses_nothing(
    new_llm: NewLLM, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    """Passing it on never fails: the pipeline has deleted the old document by then."""
    if case == "model in memory":
        llm, reason = new_llm(store=tmp_path / "states"), "was not loaded from a folder"
    else:
        llm, reason = HCacheLLM(model, store=StateStore.in_memory()), "a store in memory"
    warning = pickle.loads(pickle.dumps(HCachePrecompute(llm)))
    with caplog.at_level(logging.WARNING, logger="hcache_rag"):
        assert len(warning(documents())) == len(TEXTS)
    assert reason in caplog.text
    assert "num_workers=None" in caplog.text
    raising = pickle.loads(pickle.dumps(HCachePrecompute(llm, on_error="raise")))
    with pytest.raises(HCacheError, match=reason):
        raising(documents())
    llm.close()


def test_another_model_in_the_folder_is_not_taken_for_it(
    from_folder: HCacheLLM, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has been trained on since, say."""
    step = HCachePrecompute(from_folder, on_error="raise")
    named = elsewhere.Elsewhere.of(from_folder)
    monkeypatch.setattr(
        elsewhere.Elsewhere,
        "of",
        lambda _llm: elsewhere.Elsewhere(named.model, "00" * 16, named.states, named.options),
    )
    with pytest.raises(HCacheError, match="is not the model"):
        pickle.loads(pickle.dumps(step))(documents())


@pytest.mark.parametrize("error", [HCacheError("no room"), RuntimeError("out of memory")])
@pytest.mark.parametrize("strategy", list(DocstoreStrategy))
@pytest.mark.parametrize("asynchronous", [False, True])
def test_no_document_is_lost_when_it_fails(
    new_llm: NewLLM,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    strategy: DocstoreStrategy,
    *,
    asynchronous: bool,
) -> None:
    """UPSERTS deletes the old version of a document before any step runs."""
    llm = new_llm()
    vector_store = HCacheVectorStore(SimpleVectorStore(), llm)
    pipeline = IngestionPipeline(
        transformations=[SentenceSplitter(), HCachePrecompute(llm), WordEmbedding()],
        docstore=SimpleDocumentStore(),
        vector_store=vector_store,
        docstore_strategy=strategy,
    )

    def run(texts: Sequence[str]) -> None:
        given = documents(texts)
        asyncio.run(pipeline.arun(documents=given)) if asynchronous else pipeline.run(
            documents=given
        )

    run(TEXTS)
    with monkeypatch.context() as patch:

        def failing(*_: Any, **__: Any) -> None:
            raise error

        patch.setattr(HCacheEngine, "precompute", failing)
        run([*TEXTS[:3], "Mars is red."])
    inner: Any = vector_store.inner
    assert len(inner.data.embedding_dict) == (5 if "duplicates" in strategy.value else 4)
    run([*TEXTS[:3], "Mars is red and small."])
    assert "Mars is red and small." in texts_in(llm.engine.store)


def test_a_bar_shows_how_far_it_is(new_llm: NewLLM, capfd: pytest.CaptureFixture[str]) -> None:
    llm = new_llm()
    HCachePrecompute(llm)(documents(TEXTS[:2]))
    assert "Reading" not in capfd.readouterr().err
    HCachePrecompute(llm, show_progress=True)(documents())
    assert "4/4" in capfd.readouterr().err


def test_states_belong_to_the_documents_that_nodes_are_of(new_llm: NewLLM) -> None:
    llm = new_llm()
    IngestionPipeline(transformations=[SentenceSplitter(), HCachePrecompute(llm)]).run(
        documents=documents()
    )
    store = llm.engine.store
    assert store.gc() == 0
    assert store.delete_owner("d3") == 1
    assert texts_in(store) == set(TEXTS[:3])
