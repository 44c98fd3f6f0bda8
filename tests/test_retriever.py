"""The retriever, its persisted folder and the ingestion step, with a tiny model."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import Run, assert_one_error_line
from fakes import PRINTABLE, FixedRetriever, WordEmbedding, save_tiny_model, word_vector
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import Document, TextNode
from llama_index.llms.huggingface import HuggingFaceLLM
from tiny import SHAPES, byte_tokenizer, tiny_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hcache_rag import HCacheError, SourceError, StateStore, StoreError, StoreFullError
from hcache_rag.llama_index import HCacheLLM, HCachePrecompute, HCacheRetriever
from hcache_rag.llama_index.model_choice import ModelChoice
from hcache_rag.llama_index.persisted import load_index
from hcache_rag.llama_index.vectors import VectorIndex

TEXTS = [
    "Mercury is the smallest planet and the closest one to the Sun.",
    "Venus is the hottest planet because of its thick atmosphere.",
    "Earth is the only planet known to have life and liquid oceans.",
    "Mars is a cold desert planet with the tallest volcano of all.",
    "Jupiter is a giant planet with a storm older than the telescope.",
]
QUESTION = "Which planet is a cold desert?"


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model(SHAPES[1])


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return byte_tokenizer()


@pytest.fixture
def new_llm(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Iterator[Callable[..., HCacheLLM]]:
    """Makes LLMs without a store, and closes them all at the end."""
    made: list[HCacheLLM] = []

    def make(**options: Any) -> HCacheLLM:
        options = {"max_new_tokens": 12, "generate_kwargs": PRINTABLE, **options}
        made.append(HCacheLLM(model=model, tokenizer=tokenizer, **options))
        return made[-1]

    yield make
    for llm in made:
        llm.close()


@pytest.fixture
def reference(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> HuggingFaceLLM:
    """Full prefill of the same prompts by LlamaIndex's own LLM."""
    return HuggingFaceLLM(
        model=model,
        tokenizer=tokenizer,
        context_window=4096,
        max_new_tokens=12,
        generate_kwargs={"do_sample": False, **PRINTABLE},
    )


def documents(texts: Sequence[str] = TEXTS) -> list[Document]:
    return [Document(text=text, id_=f"document-{i}") for i, text in enumerate(texts)]


def texts_of(found: Sequence[Any]) -> list[str]:
    return [scored.node.get_content() for scored in found]


def stored_texts(store: StateStore) -> set[str]:
    return {record.text for record in store.records() if not record.is_preamble}


def account(llm: HCacheLLM, prompt: str) -> dict[str, Any]:
    result: dict[str, Any] = llm.complete(prompt).additional_kwargs["hcache"]
    return result


def test_scores_are_cosines_in_order(new_llm: Callable[..., HCacheLLM]) -> None:
    retriever = HCacheRetriever.from_documents(
        documents(), llm=new_llm(), embed_model=WordEmbedding(), similarity_top_k=5
    )
    found = retriever.retrieve(QUESTION)
    query = np.asarray(word_vector(QUESTION))
    rows = np.asarray([word_vector(text) for text in TEXTS])
    cosines = rows @ query / np.linalg.norm(rows, axis=1) / np.linalg.norm(query)
    order = np.argsort(-cosines)
    assert texts_of(found) == [TEXTS[i] for i in order]
    scores = [scored.score for scored in found]
    np.testing.assert_allclose(scores, np.clip(cosines[order], 0, 1), rtol=0, atol=1e-6)  # type: ignore[arg-type]


def test_opposite_vectors_score_zero_not_less() -> None:
    class Axis(WordEmbedding):
        def _get_text_embedding(self, text: str) -> list[float]:
            return [float(text), 0.0]

        def _get_query_embedding(self, query: str) -> list[float]:
            return [float(query), 0.0]

    embedding = Axis()
    nodes = [TextNode(text="-3"), TextNode(text="5"), TextNode(text="0")]
    index = VectorIndex.build(nodes, embedding)
    found = index.search(embedding.get_query_embedding("2"), 3)
    assert [(s.node.get_content(), s.score) for s in found] == [("5", 1.0), ("0", 0.0), ("-3", 0.0)]


@pytest.mark.slow
def test_the_bundled_embedding_finds_what_brute_force_finds(
    new_llm: Callable[..., HCacheLLM], solar_system: list[str]
) -> None:
    from hcache_rag.llama_index import default_embedding

    embedding = default_embedding()
    llm = new_llm()
    retriever = HCacheRetriever.from_documents(
        documents(solar_system),
        llm=llm,
        embed_model=embedding,
        transformations=[SentenceSplitter(chunk_size=2048, chunk_overlap=0, tokenizer=list)],
    )
    assert [node.get_content() for node in retriever.nodes] == solar_system
    rows = np.asarray([embedding.get_text_embedding(text) for text in solar_system])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    for question in ("Who discovered Pluto?", "How high is Olympus Mons?", "What are comets?"):
        query = np.asarray(embedding.get_query_embedding(question))
        cosines = rows @ query / np.linalg.norm(query)
        for top_k in (1, 4, 10):
            retriever.similarity_top_k = top_k
            found = retriever.retrieve(question)
            expected = np.argsort(-cosines)[:top_k]
            assert texts_of(found) == [solar_system[i] for i in expected]
            np.testing.assert_allclose(
                [s.score for s in found],  # type: ignore[arg-type]
                np.clip(cosines[expected], 0, 1),
                rtol=0,
                atol=1e-5,
            )


@pytest.mark.parametrize("top_k", [1, 3, 5, 6, 1000])
def test_more_nodes_than_there_are_cannot_be_found(
    new_llm: Callable[..., HCacheLLM], top_k: int
) -> None:
    retriever = HCacheRetriever.from_documents(
        documents(), llm=new_llm(), embed_model=WordEmbedding(), similarity_top_k=top_k
    )
    assert retriever.similarity_top_k == top_k
    assert len(retriever.retrieve(QUESTION)) == min(top_k, len(TEXTS))


def test_no_documents_are_an_index_too(new_llm: Callable[..., HCacheLLM], tmp_path: Path) -> None:
    options: dict[str, Any] = {"embed_model": WordEmbedding(), "persist_dir": tmp_path}
    first = HCacheRetriever.from_documents([], llm=new_llm(), **options)
    assert first.retrieve(QUESTION) == []
    assert first.report is not None
    assert first.report.stored == 0
    reopened = HCacheRetriever.from_persist_dir(
        tmp_path, llm=new_llm(), embed_model=WordEmbedding()
    )
    assert reopened.retrieve(QUESTION) == []
    grown = HCacheRetriever.from_documents(documents(), llm=new_llm(), **options)
    assert len(grown.retrieve(QUESTION)) == 4
    emptied = HCacheRetriever.from_documents([], llm=new_llm(), **options)
    assert emptied.retrieve(QUESTION) == []


def test_a_document_without_text_is_found_by_nobody_and_harms_nobody(
    new_llm: Callable[..., HCacheLLM],
) -> None:
    llm = new_llm()
    retriever = HCacheRetriever.from_documents(
        documents(["", " \n ", *TEXTS]), llm=llm, embed_model=WordEmbedding(), similarity_top_k=9
    )
    assert retriever.report is not None
    assert retriever.report.stored == len(TEXTS)
    assert set(TEXTS) <= set(texts_of(retriever.retrieve(QUESTION)))


def test_long_documents_are_split_where_the_model_counts_its_tokens(
    new_llm: Callable[..., HCacheLLM],
) -> None:
    """One byte is one token here; the splitter must count as the model does, not as tiktoken."""
    text = " ".join(TEXTS * 4)
    retriever = HCacheRetriever.from_documents(
        documents([text]), llm=new_llm(), embed_model=WordEmbedding()
    )
    lengths = [len(node.get_content()) for node in retriever.nodes]
    assert len(lengths) > 1
    assert max(lengths) <= 512
    assert sum(lengths) >= len(text) - len(lengths)


def test_every_node_has_a_state_and_the_report_says_so(
    new_llm: Callable[..., HCacheLLM], tmp_path: Path
) -> None:
    llm = new_llm()
    progress: list[tuple[int, int]] = []
    retriever = HCacheRetriever.from_documents(
        documents(),
        llm=llm,
        embed_model=WordEmbedding(),
        persist_dir=tmp_path,
        on_progress=lambda done, total: progress.append((done, total)),
    )
    assert stored_texts(llm.engine.store) == set(TEXTS)
    assert llm.engine.store.path == tmp_path / "states"
    assert retriever.report is not None
    assert (retriever.report.stored, retriever.report.reused) == (5, 0)
    assert retriever.report.stored_tokens == sum(map(len, TEXTS))
    assert progress[0] == (0, 5)
    assert progress[-1] == (5, 5)


def test_what_was_kept_is_opened_again(
    new_llm: Callable[..., HCacheLLM], tmp_path: Path, reference: HuggingFaceLLM
) -> None:
    llm = new_llm()
    first = HCacheRetriever.from_documents(
        documents(), llm=llm, embed_model=WordEmbedding(), persist_dir=tmp_path
    )
    expected = first.retrieve(QUESTION)
    llm.close()

    llm, embedding = new_llm(), WordEmbedding()
    second = HCacheRetriever.from_persist_dir(tmp_path, llm=llm, embed_model=embedding)
    found = second.retrieve(QUESTION)
    assert [s.node_id for s in found] == [s.node_id for s in expected]
    assert [s.score for s in found] == [s.score for s in expected]
    assert [s.node.to_dict() for s in found] == [s.node.to_dict() for s in expected]
    assert embedding.embedded == []
    best = texts_of(found)[0]
    prompt = f"{llm.preamble}{best}\n\nWhat?"
    assert account(llm, prompt)["exact_tokens"] == len(llm.preamble) + len(best)
    assert llm.complete(prompt).text == reference.complete(prompt).text


def test_the_command_line_answers_from_what_a_program_has_kept(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder says which model it was made with, where that can be said."""
    monkeypatch.setattr("hcache_rag.llama_index.retriever.default_embedding", WordEmbedding)
    model = save_tiny_model(tmp_path / "model", chat=True)
    store = tmp_path / "storage"
    mars = Document(text=TEXTS[3], metadata={"file_name": "mars.txt"})
    with HCacheLLM(model, storage_dtype="float32") as llm:
        HCacheRetriever.from_documents([mars], llm=llm, persist_dir=store)
    choice = ModelChoice.of(store)
    assert choice == ModelChoice(str(model), "float32", "auto", "float32", "none")
    asked = ("ask", QUESTION, "--store", store, "--max-new-tokens", "2", "--json")
    answer = json.loads(run(*asked).out)
    assert answer["sources"] == ["mars.txt"]
    assert answer["provenance"]["documents_restored"] == 1
    with HCacheLLM(model=tiny_model(SHAPES[1]), tokenizer=byte_tokenizer()) as llm:
        HCacheRetriever.from_documents([mars], llm=llm, persist_dir=store)
    assert_one_error_line(run(*asked), "does not say which model its index was made with")


def test_nodes_keep_their_metadata_and_relations(
    new_llm: Callable[..., HCacheLLM], tmp_path: Path
) -> None:
    document = Document(text=TEXTS[0], id_="d", metadata={"page": 3, "file": "é.txt"})
    options: dict[str, Any] = {"embed_model": WordEmbedding()}
    first = HCacheRetriever.from_documents(
        [document], llm=new_llm(), persist_dir=tmp_path, **options
    )
    second = HCacheRetriever.from_persist_dir(tmp_path, llm=new_llm(), **options)
    assert [n.to_dict() for n in second.nodes] == [n.to_dict() for n in first.nodes]
    node = second.nodes[0]
    assert node.metadata == document.metadata
    assert node.ref_doc_id == "d"


def test_the_state_is_of_the_text_that_the_prompt_will_hold(
    new_llm: Callable[..., HCacheLLM],
) -> None:
    """Metadata that the model is shown is a part of it; metadata that is excluded is not."""
    document = Document(
        text=TEXTS[0],
        metadata={"page": 3, "secret": "x"},
        excluded_llm_metadata_keys=["secret"],
    )
    llm = new_llm()
    retriever = HCacheRetriever.from_documents([document], llm=llm, embed_model=WordEmbedding())
    assert stored_texts(llm.engine.store) == {f"page: 3\n\n{TEXTS[0]}"}
    answer = RetrieverQueryEngine.from_args(retriever, llm=llm).query(QUESTION)
    assert "page: 3" in answer.source_nodes[0].node.get_content("llm")  # type: ignore[arg-type]


def test_the_second_indexing_reads_and_embeds_nothing(
    new_llm: Callable[..., HCacheLLM], tmp_path: Path
) -> None:
    embedding = WordEmbedding()
    first = new_llm()
    HCacheRetriever.from_documents(
        documents(), llm=first, embed_model=embedding, persist_dir=tmp_path
    )
    assert sorted(embedding.embedded) == sorted(TEXTS)
    first.close()
    embedding = WordEmbedding()
    second = HCacheRetriever.from_documents(
        documents(), llm=new_llm(), embed_model=embedding, persist_dir=tmp_path
    )
    assert embedding.embedded == []
    assert second.report is not None
    assert (second.report.stored, second.report.reused) == (0, 5)
    assert len(second.retrieve(QUESTION)) == 4


def test_changed_documents_are_read_and_embedded_alone(
    new_llm: Callable[..., HCacheLLM], tmp_path: Path
) -> None:
    HCacheRetriever.from_documents(
        documents(), llm=new_llm(), embed_model=WordEmbedding(), persist_dir=tmp_path
    )
    changed = "Mars is a red planet, and this sentence about it is new."
    texts = [*TEXTS[:3], changed, TEXTS[4], TEXTS[0]]  # one changed, one twice
    embedding = WordEmbedding()
    retriever = HCacheRetriever.from_documents(
        documents(texts), llm=new_llm(), embed_model=embedding, persist_dir=tmp_path
    )
    assert embedding.embedded == [changed]
    assert retriever.report is not None
    assert (retriever.report.stored, retriever.report.reused) == (1, 4)
    retriever.similarity_top_k = 9
    assert sorted(texts_of(retriever.retrieve(QUESTION))) == sorted(texts)
    reopened = HCacheRetriever.from_persist_dir(
        tmp_path, llm=new_llm(), embed_model=WordEmbedding(), similarity_top_k=9
    )
    assert sorted(texts_of(reopened.retrieve(QUESTION))) == sorted(texts)


def test_one_generation_of_vectors_is_kept(
    new_llm: Callable[..., HCacheLLM], tmp_path: Path
) -> None:
    for count in (3, 5, 4):
        HCacheRetriever.from_documents(
            documents(TEXTS[:count]),
            llm=new_llm(),
            embed_model=WordEmbedding(),
            persist_dir=tmp_path,
        )
    assert len(list(tmp_path.glob("vectors-*"))) == 1
    assert len(load_index(tmp_path).nodes) == 4


def test_without_its_states_the_answers_are_those_of_full_prefill(
    new_llm: Callable[..., HCacheLLM], tmp_path: Path, reference: HuggingFaceLLM
) -> None:
    llm = new_llm()
    HCacheRetriever.from_documents(
        documents(), llm=llm, embed_model=WordEmbedding(), persist_dir=tmp_path
    )
    llm.close()
    shutil.rmtree(tmp_path / "states")

    llm = new_llm(store_missed=False)
    retriever = HCacheRetriever.from_persist_dir(tmp_path, llm=llm, embed_model=WordEmbedding())
    everything = llm.preamble + "\n\n".join(TEXTS) + "\n\nWhat?"
    assert account(llm, everything)["documents_missed"] == 5  # known before any is retrieved
    engine = RetrieverQueryEngine.from_args(retriever, llm=llm)
    expected = RetrieverQueryEngine.from_args(retriever, llm=reference)
    assert str(engine.query(QUESTION)) == str(expected.query(QUESTION))
    found = texts_of(retriever.retrieve(QUESTION))
    prompt = llm.preamble + "\n\n".join(found) + "\n\nWhat?"
    spent = account(llm, prompt)
    assert (spent["documents_restored"], spent["documents_missed"]) == (0, 4)
    assert spent["missed_tokens"] == sum(map(len, found))
    assert spent["restored_tokens"] == 0
    [warning] = spent["warnings"]
    assert "4 document(s) read afresh" in warning
    assert llm.complete(prompt).text == reference.complete(prompt).text


def test_documents_that_were_never_stored_are_counted_as_missed(
    new_llm: Callable[..., HCacheLLM], tmp_path: Path
) -> None:
    """Half of the states: the others are restored, these are read, and both are told apart."""
    llm = new_llm(store=tmp_path / "states")
    llm.engine.precompute(TEXTS[:2])
    retriever = HCacheRetriever.wrap(FixedRetriever(TEXTS[:4]), llm)
    found = retriever.retrieve(QUESTION)
    spent = account(llm, llm.preamble + "\n\n".join(texts_of(found)) + "\n\nWhat?")
    assert (spent["documents_restored"], spent["documents_missed"]) == (2, 2)
    assert spent["missed_tokens"] == len(TEXTS[2]) + len(TEXTS[3])


def test_an_index_of_another_embedding_is_refused_by_name(
    new_llm: Callable[..., HCacheLLM], tmp_path: Path
) -> None:
    HCacheRetriever.from_documents(
        documents(), llm=new_llm(), embed_model=WordEmbedding("one"), persist_dir=tmp_path
    )
    with pytest.raises(SourceError, match="made with the embedding 'one', not with 'two'"):
        HCacheRetriever.from_persist_dir(tmp_path, llm=new_llm(), embed_model=WordEmbedding("two"))


def test_indexing_again_with_another_embedding_embeds_everything(
    new_llm: Callable[..., HCacheLLM], tmp_path: Path
) -> None:
    HCacheRetriever.from_documents(
        documents(), llm=new_llm(), embed_model=WordEmbedding("one"), persist_dir=tmp_path
    )
    embedding = WordEmbedding("two")
    retriever = HCacheRetriever.from_documents(
        documents(), llm=new_llm(), embed_model=embedding, persist_dir=tmp_path
    )
    assert len(embedding.embedded) == len(TEXTS)
    assert retriever.report is not None
    assert retriever.report.reused == len(TEXTS)  # the states do not depend on it


@pytest.fixture
def persisted(new_llm: Callable[..., HCacheLLM], tmp_path: Path) -> Path:
    HCacheRetriever.from_documents(
        documents(), llm=new_llm(), embed_model=WordEmbedding(), persist_dir=tmp_path / "index"
    )
    return tmp_path / "index"


def damage(folder: Path, what: str) -> None:
    """Spoil one thing about a persisted folder."""
    manifest = folder / "hcache-rag.json"
    vectors = next(folder.glob("vectors-*"))
    content = json.loads(manifest.read_text())
    if what == "manifest cut":
        manifest.write_text(manifest.read_text()[:20])
    elif what == "manifest empty":
        manifest.write_text("")
    elif what == "manifest binary":
        manifest.write_bytes(bytes(range(128, 256)))
    elif what == "manifest a list":
        manifest.write_text("[]")
    elif what == "manifest of another format":
        manifest.write_text(json.dumps({**content, "format": 99}))
    elif what == "manifest without vectors":
        manifest.write_text(json.dumps({**content, "vectors": None}))
    elif what == "vectors gone":
        shutil.rmtree(vectors)
    elif what == "faiss cut":
        data = (vectors / "vectors.faiss").read_bytes()
        (vectors / "vectors.faiss").write_bytes(data[:50])
    elif what == "faiss empty":
        (vectors / "vectors.faiss").write_bytes(b"")
    elif what == "nodes cut":
        text = (vectors / "nodes.jsonl").read_text()
        (vectors / "nodes.jsonl").write_text(text[: len(text) // 2])
    elif what == "a node less":
        lines = (vectors / "nodes.jsonl").read_text().splitlines(keepends=True)
        (vectors / "nodes.jsonl").write_text("".join(lines[1:]))
    elif what == "a node is no object":
        lines = (vectors / "nodes.jsonl").read_text().splitlines(keepends=True)
        (vectors / "nodes.jsonl").write_text("".join(["7\n", *lines[1:]]))
    else:
        raise ValueError(what)


DAMAGES = [
    "manifest cut",
    "manifest empty",
    "manifest binary",
    "manifest a list",
    "manifest of another format",
    "manifest without vectors",
    "vectors gone",
    "faiss cut",
    "faiss empty",
    "nodes cut",
    "a node less",
    "a node is no object",
]


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_index_is_an_error_in_one_line_that_names_the_folder(
    new_llm: Callable[..., HCacheLLM], persisted: Path, what: str
) -> None:
    damage(persisted, what)
    with pytest.raises(SourceError) as raised:
        HCacheRetriever.from_persist_dir(persisted, llm=new_llm(), embed_model=WordEmbedding())
    assert str(persisted) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_folder_without_an_index_is_an_error_and_stays_as_it_was(
    new_llm: Callable[..., HCacheLLM], tmp_path: Path
) -> None:
    with pytest.raises(SourceError, match="holds no index"):
        HCacheRetriever.from_persist_dir(tmp_path, llm=new_llm(), embed_model=WordEmbedding())
    assert list(tmp_path.iterdir()) == []


def test_documents_may_be_indexed_whole(new_llm: Callable[..., HCacheLLM], tmp_path: Path) -> None:
    """Without a splitter, each document is one passage."""
    retriever = HCacheRetriever.from_documents(
        documents(),
        llm=new_llm(),
        embed_model=WordEmbedding(),
        persist_dir=tmp_path,
        transformations=[],
    )
    found = retriever.retrieve(QUESTION)
    reopened = HCacheRetriever.from_persist_dir(
        tmp_path, llm=new_llm(), embed_model=WordEmbedding()
    )
    assert texts_of(reopened.retrieve(QUESTION)) == texts_of(found)
    assert {s.node_id for s in found} <= {f"document-{i}" for i in range(len(TEXTS))}


def test_a_store_that_is_named_keeps_the_states(
    new_llm: Callable[..., HCacheLLM], tmp_path: Path
) -> None:
    llm = new_llm(store=tmp_path / "elsewhere")
    HCacheRetriever.from_documents(
        documents(), llm=llm, embed_model=WordEmbedding(), persist_dir=tmp_path / "index"
    )
    assert stored_texts(llm.engine.store) == set(TEXTS)
    assert llm.engine.store.path == tmp_path / "elsewhere"
    assert not (tmp_path / "index" / "states").exists()


def test_an_llm_that_has_answered_before_still_keeps_its_states_in_the_folder(
    new_llm: Callable[..., HCacheLLM], tmp_path: Path
) -> None:
    """Nobody has named a store when the first question comes without a retriever."""
    llm = new_llm()
    llm.complete("Hello")
    assert not llm.has_store
    HCacheRetriever.from_documents(
        documents(), llm=llm, embed_model=WordEmbedding(), persist_dir=tmp_path
    )
    assert (tmp_path / "states" / "data.mdb").is_file()


def test_asynchronous_retrieval_finds_the_same(new_llm: Callable[..., HCacheLLM]) -> None:
    llm = new_llm()
    retriever = HCacheRetriever.from_documents(documents(), llm=llm, embed_model=WordEmbedding())
    expected = retriever.retrieve(QUESTION)

    async def both() -> tuple[list[Any], str]:
        found = await retriever.aretrieve(QUESTION)
        engine = RetrieverQueryEngine.from_args(retriever, llm=llm)
        return list(found), str(await engine.aquery(QUESTION))

    found, answer = asyncio.run(both())
    assert [(s.node_id, s.score) for s in found] == [(s.node_id, s.score) for s in expected]
    assert answer == str(RetrieverQueryEngine.from_args(retriever, llm=llm).query(QUESTION))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_wrapping_changes_nothing_but_announces_the_texts(
    new_llm: Callable[..., HCacheLLM], *, asynchronous: bool
) -> None:
    llm, inner = new_llm(), FixedRetriever(TEXTS[:3])
    prompt = "Read:\n\n" + "\n\n".join(TEXTS[:3]) + "\n\nWhat?"
    assert account(llm, prompt)["documents_missed"] == 0  # nobody has said that these are any
    retriever = HCacheRetriever.wrap(inner, llm)
    found = (
        asyncio.run(retriever.aretrieve(QUESTION)) if asynchronous else retriever.retrieve(QUESTION)
    )
    assert [s.node for s in found] == inner.nodes
    assert list(retriever.nodes) == []
    spent = account(llm, prompt)
    assert spent["documents_missed"] == 3
    assert spent["missed_tokens"] == sum(map(len, TEXTS[:3]))


def test_a_wrapped_retriever_s_top_k_is_the_inner_one_s(
    new_llm: Callable[..., HCacheLLM],
) -> None:
    llm = new_llm()
    inner = HCacheRetriever.from_documents(documents(), llm=llm, embed_model=WordEmbedding())
    outer = HCacheRetriever.wrap(inner, llm)
    outer.similarity_top_k = 2
    assert inner.similarity_top_k == outer.similarity_top_k == 2
    assert len(outer.retrieve(QUESTION)) == 2


def test_precompute_is_a_step_that_passes_nodes_on(
    new_llm: Callable[..., HCacheLLM], tmp_path: Path
) -> None:
    llm = new_llm(store=tmp_path / "states")
    step = HCachePrecompute(llm)
    nodes = [TextNode(text=text, id_=str(i)) for i, text in enumerate(TEXTS)]
    before = [node.to_dict() for node in nodes]
    passed = step(nodes)
    assert list(passed) == nodes
    assert [node.to_dict() for node in passed] == before
    assert stored_texts(llm.engine.store) == set(TEXTS)
    assert step.report is not None
    assert (step.report.stored, step.report.reused) == (5, 0)
    step(nodes)
    assert step.report is not None
    assert (step.report.stored, step.report.reused) == (0, 5)


def test_precompute_works_in_a_pipeline_behind_a_splitter(
    new_llm: Callable[..., HCacheLLM], tmp_path: Path
) -> None:
    splitter = SentenceSplitter(chunk_size=64, chunk_overlap=0, tokenizer=list)
    text = " ".join(TEXTS)
    plain = IngestionPipeline(transformations=[splitter]).run(documents=documents([text]))
    llm = new_llm(store=tmp_path / "states")
    step = HCachePrecompute(llm)
    pipeline = IngestionPipeline(transformations=[splitter, step])
    nodes = pipeline.run(documents=documents([text]))
    assert [n.get_content() for n in nodes] == [n.get_content() for n in plain]
    assert stored_texts(llm.engine.store) == {n.get_content().strip() for n in nodes}
    stored = llm.engine.store.stats()
    assert [n.hash for n in pipeline.run(documents=documents([text]))] == [n.hash for n in nodes]
    assert llm.engine.store.stats().documents == stored.documents


def test_a_pipeline_s_cache_does_not_leave_a_new_store_empty(
    new_llm: Callable[..., HCacheLLM], tmp_path: Path
) -> None:
    first = new_llm(store=tmp_path / "first")
    pipeline = IngestionPipeline(transformations=[HCachePrecompute(first)])
    pipeline.run(documents=documents())
    second = new_llm(store=tmp_path / "second")
    again = IngestionPipeline(transformations=[HCachePrecompute(second)], cache=pipeline.cache)
    again.run(documents=documents())
    assert stored_texts(second.engine.store) == set(TEXTS)


@pytest.mark.parametrize("kind", ["closed", "read-only", "full"])
def test_precompute_can_warn_or_raise(
    new_llm: Callable[..., HCacheLLM],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    StateStore.open(tmp_path / "states").close()
    store = StateStore.open(tmp_path / "states", read_only=kind == "read-only")
    llm = new_llm(store=store)
    raising, warning = HCachePrecompute(llm, on_error="raise"), HCachePrecompute(llm)
    if kind == "closed":
        store.close()
    if kind == "full":

        def full(*_: Any, **__: Any) -> int:
            raise StoreFullError("no room")

        monkeypatch.setattr(StateStore, "put_all", full)
    nodes = [TextNode(text=text) for text in TEXTS]
    with pytest.raises(StoreError):
        raising(nodes)
    with caplog.at_level(logging.WARNING, logger="hcache_rag"):
        assert list(warning(nodes)) == nodes
    [record] = [r for r in caplog.records if r.name == "hcache_rag"]
    assert "the states of 5 nodes were not stored: " in record.getMessage()
    assert warning.report is None
    store.close()


def test_indexing_on_a_store_that_cannot_be_written_raises(
    new_llm: Callable[..., HCacheLLM], tmp_path: Path
) -> None:
    StateStore.open(tmp_path / "states").close()
    with StateStore.open(tmp_path / "states", read_only=True) as store:
        llm = new_llm(store=store)
        with pytest.raises(HCacheError, match="reading only"):
            HCacheRetriever.from_documents(
                documents(),
                llm=llm,
                embed_model=WordEmbedding(),
                persist_dir=tmp_path / "index",
            )
    assert not (tmp_path / "index" / "hcache-rag.json").exists()
