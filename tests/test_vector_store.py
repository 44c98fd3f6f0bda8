"""The vector-store proxy: states follow the documents on every way that LlamaIndex changes them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from fakes import WordEmbedding
from llama_index.core import StorageContext, VectorStoreIndex, load_index_from_storage
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.ingestion import DocstoreStrategy, IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import BaseNode, Document, NodeRelationship, TextNode
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.vector_stores import SimpleVectorStore, VectorStoreQuery
from llama_index.core.vector_stores.types import (
    BasePydanticVectorStore,
    MetadataFilter,
    MetadataFilters,
    VectorStoreQueryResult,
)

from hcache_rag import StateStore, StoreFullError
from hcache_rag.llama_index import HCacheLLM, HCachePrecompute, HCacheVectorStore
from hcache_rag.llama_index.text import llm_text

TEXTS = {
    "mercury": "Mercury is the smallest planet and the closest one to the Sun.",
    "venus": "Venus is the hottest planet because of its thick atmosphere.",
    "mars": "Mars is a cold desert planet with the tallest volcano of all.",
}
RED = "Mars is red."

NewLLM = Callable[..., HCacheLLM]

pytestmark = pytest.mark.usefixtures("one_thread")


class TextKeepingStore(BasePydanticVectorStore):
    """As a database is: it keeps the nodes themselves, and finds them by id and filter."""

    stores_text: bool = True
    _nodes: dict[str, BaseNode] = PrivateAttr(default_factory=dict)

    @property
    def client(self) -> Any:
        return self._nodes

    def add(self, nodes: Sequence[BaseNode], **_: Any) -> list[str]:
        self._nodes.update({node.node_id: node for node in nodes})
        return [node.node_id for node in nodes]

    def delete(self, ref_doc_id: str, **_: Any) -> None:
        self._nodes = {i: n for i, n in self._nodes.items() if n.ref_doc_id != ref_doc_id}

    def get_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None
    ) -> list[BaseNode]:
        found = [n for n in self._nodes.values() if node_ids is None or n.node_id in node_ids]
        for each in filters.filters if filters else ():
            assert isinstance(each, MetadataFilter)
            found = [n for n in found if n.metadata.get(each.key) == each.value]
        return found

    def delete_nodes(
        self,
        node_ids: list[str] | None = None,
        filters: MetadataFilters | None = None,
        **_: Any,
    ) -> None:
        for node in self.get_nodes(node_ids, filters):
            del self._nodes[node.node_id]

    def clear(self) -> None:
        self._nodes.clear()

    def query(self, query: VectorStoreQuery, **_: Any) -> VectorStoreQueryResult:
        found = list(self._nodes.values())[: query.similarity_top_k]
        ids = [node.node_id for node in found]
        return VectorStoreQueryResult(nodes=found, similarities=[1.0] * len(found), ids=ids)


def documents() -> list[Document]:
    return [
        Document(
            text=text,
            id_=name,
            metadata={"name": name},
            excluded_llm_metadata_keys=["name"],
            excluded_embed_metadata_keys=["name"],
        )
        for name, text in TEXTS.items()
    ]


def changed(text: str = RED) -> Document:
    return Document(text=text, id_="mars")


def stored(llm: HCacheLLM) -> set[str]:
    return {r.text for r in llm.engine.store.records() if not r.is_preamble}


INNER = pytest.mark.parametrize("inner", [SimpleVectorStore, TextKeepingStore])


def made(llm: HCacheLLM, inner: type[BasePydanticVectorStore]) -> VectorStoreIndex:
    vector_store = HCacheVectorStore(inner(), llm)  # type: ignore[call-arg]
    storage = StorageContext.from_defaults(vector_store=vector_store)
    return VectorStoreIndex.from_documents(
        documents(), storage_context=storage, embed_model=WordEmbedding()
    )


def node_of(index: VectorStoreIndex, name: str) -> str:
    its: HCacheVectorStore = index.vector_store  # type: ignore[assignment]
    inner = its.inner
    if isinstance(inner, SimpleVectorStore):
        return next(i for i, d in inner.data.text_id_to_ref_doc_id.items() if d == name)
    return next(n.node_id for n in inner.get_nodes() if n.ref_doc_id == name)


without_mars = set(TEXTS.values()) - {TEXTS["mars"]}


def named(name: str) -> MetadataFilters:
    return MetadataFilters(filters=[MetadataFilter(key="name", value=name)])


Act = Callable[[VectorStoreIndex], Any]
ROWS: dict[str, tuple[Act, set[str]]] = {
    "insert": (
        lambda index: index.insert(Document(text="Somebody new.", id_="new")),
        {*TEXTS.values(), "Somebody new."},
    ),
    "insert_nodes": (
        lambda index: index.insert_nodes([TextNode(text="A node.", id_="n")]),
        {*TEXTS.values(), "A node."},
    ),
    "update_ref_doc": (lambda index: index.update_ref_doc(changed()), {*without_mars, RED}),
    "refresh_ref_docs": (
        lambda index: index.refresh_ref_docs([*documents()[:2], changed()]),
        {*without_mars, RED},
    ),
    "refresh, nothing new": (
        lambda index: index.refresh_ref_docs(documents()),
        set(TEXTS.values()),
    ),
    "delete_ref_doc": (lambda index: index.delete_ref_doc("mars"), without_mars),
    "delete_ref_doc, docstore too": (
        lambda index: index.delete_ref_doc("mars", delete_from_docstore=True),
        without_mars,
    ),
    "delete_ref_doc, unknown": (lambda index: index.delete_ref_doc("x"), set(TEXTS.values())),
    "delete_nodes": (lambda index: index.delete_nodes([node_of(index, "mars")]), without_mars),
    "delete_nodes by filter": (
        lambda index: index.vector_store.delete_nodes(filters=named("mars")),
        without_mars,
    ),
    "clear": (lambda index: index.vector_store.clear(), set()),
    "ainsert": (
        lambda index: asyncio.run(index.ainsert(Document(text="Somebody new.", id_="new"))),
        {*TEXTS.values(), "Somebody new."},
    ),
    "aupdate_ref_doc": (
        lambda index: asyncio.run(index.aupdate_ref_doc(changed())),
        {*without_mars, RED},
    ),
    "arefresh_ref_docs": (
        lambda index: asyncio.run(index.arefresh_ref_docs([*documents()[:2], changed()])),
        {*without_mars, RED},
    ),
    "adelete_ref_doc": (lambda index: asyncio.run(index.adelete_ref_doc("mars")), without_mars),
    "adelete_nodes": (
        lambda index: asyncio.run(index.adelete_nodes([node_of(index, "mars")])),
        without_mars,
    ),
    "adelete_nodes by filter": (
        lambda index: asyncio.run(index.vector_store.adelete_nodes(filters=named("mars"))),
        without_mars,
    ),
    "aclear": (lambda index: asyncio.run(index.vector_store.aclear()), set()),
}


@INNER
@pytest.mark.parametrize("row", ROWS)
def test_states_follow_the_documents(
    new_llm: NewLLM, inner: type[BasePydanticVectorStore], row: str
) -> None:
    llm = new_llm()
    index = made(llm, inner)
    assert stored(llm) == set(TEXTS.values())
    act, expected = ROWS[row]
    act(index)
    assert stored(llm) == expected
    retriever = index.as_retriever(similarity_top_k=9)
    if "delete_ref_doc" not in row:  # LlamaIndex's index and docstore disagree then
        texts = {llm_text(scored.node) for scored in retriever.retrieve("Which planet?")}
        assert texts == expected


PIPELINE_ROWS: dict[str, tuple[DocstoreStrategy, list[Document], set[str]]] = {
    "upserts, new": (
        DocstoreStrategy.UPSERTS,
        [*documents(), Document(text="Somebody new.", id_="new")],
        {*TEXTS.values(), "Somebody new."},
    ),
    "upserts, unchanged": (DocstoreStrategy.UPSERTS, documents(), set(TEXTS.values())),
    "upserts, changed": (DocstoreStrategy.UPSERTS, [changed()], {*without_mars, RED}),
    "duplicates_only": (
        DocstoreStrategy.DUPLICATES_ONLY,
        [*documents(), Document(text="Somebody new.", id_="new")],
        {*TEXTS.values(), "Somebody new."},
    ),
    "upserts_and_delete": (
        DocstoreStrategy.UPSERTS_AND_DELETE,
        documents()[:2],
        without_mars,
    ),
}


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("with_step", [False, True])
@pytest.mark.parametrize("row", PIPELINE_ROWS)
def test_states_follow_the_documents_of_a_pipeline(
    new_llm: NewLLM, row: str, *, with_step: bool, asynchronous: bool
) -> None:
    """With the ingestion step or without: the vector store sees every change."""
    strategy, given, expected = PIPELINE_ROWS[row]
    llm = new_llm()
    vector_store = HCacheVectorStore(SimpleVectorStore(), llm)
    steps: list[Any] = [HCachePrecompute(llm)] if with_step else []
    pipeline = IngestionPipeline(
        transformations=[SentenceSplitter(), *steps, WordEmbedding()],
        docstore=SimpleDocumentStore(),
        vector_store=vector_store,
        docstore_strategy=strategy,
    )

    def run(some: list[Document]) -> None:
        asyncio.run(pipeline.arun(documents=some)) if asynchronous else pipeline.run(documents=some)

    run(documents())
    assert stored(llm) == set(TEXTS.values())
    run(given)
    assert stored(llm) == expected
    assert len(vector_store.inner.data.embedding_dict) == len(expected)  # type: ignore[attr-defined]


def test_delete_is_passed_on_once_with_the_document_s_id(
    new_llm: NewLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = made(new_llm(), SimpleVectorStore)
    seen: list[str] = []
    monkeypatch.setattr(SimpleVectorStore, "delete", lambda _self, name, **_: seen.append(name))
    index.delete_ref_doc("venus")
    index.update_ref_doc(changed())
    assert seen == ["venus", "mars"]


def test_a_text_of_two_documents_stays_until_both_are_gone(new_llm: NewLLM) -> None:
    llm = new_llm()
    index = made(llm, SimpleVectorStore)
    index.insert(Document(text=TEXTS["mars"], id_="twin"))
    index.delete_ref_doc("mars")
    assert TEXTS["mars"] in stored(llm)
    index.delete_nodes([node_of(index, "twin")])
    assert stored(llm) == without_mars


def test_one_of_a_document_s_nodes_goes_alone(new_llm: NewLLM) -> None:
    llm = new_llm()
    vector_store = HCacheVectorStore(TextKeepingStore(), llm)
    source: Any = {NodeRelationship.SOURCE: documents()[0].as_related_node_info()}
    nodes = [TextNode(text=f"Part {n} of it.", id_=f"n{n}", relationships=source) for n in range(3)]
    vector_store.add(nodes)
    vector_store.delete_nodes(["n1"])
    assert stored(llm) == {"Part 0 of it.", "Part 2 of it."}
    again = TextNode(text="Part 2, changed.", id_="n2", relationships=source)
    vector_store.add([again])
    assert stored(llm) == {"Part 0 of it.", "Part 2, changed."}
    vector_store.delete("mercury")
    assert stored(llm) == set()


def test_clearing_one_collection_leaves_another(new_llm: NewLLM) -> None:
    llm = new_llm()
    llm.engine.precompute(["Nobody's text, kept by the caller."])
    first = HCacheVectorStore(SimpleVectorStore(), llm, collection="first")
    second = HCacheVectorStore(SimpleVectorStore(), llm, collection="second")
    for store, text in ((first, "One."), (first, "Both."), (second, "Two."), (second, "Both.")):
        store.add([TextNode(text=text, embedding=[1.0])])
    first.clear()
    assert stored(llm) == {"Nobody's text, kept by the caller.", "Two.", "Both."}
    second.clear()
    assert stored(llm) == {"Nobody's text, kept by the caller."}


def test_what_is_persisted_is_opened_again_and_goes_on(new_llm: NewLLM, tmp_path: Path) -> None:
    """As any vector store; the states are on disk by then, with whose they are."""
    llm = new_llm(store=tmp_path / "states")
    made(llm, SimpleVectorStore).storage_context.persist(tmp_path / "index")
    llm.close()
    llm = new_llm(store=tmp_path / "states")
    inner = SimpleVectorStore.from_persist_dir(str(tmp_path / "index"))
    storage = StorageContext.from_defaults(
        persist_dir=str(tmp_path / "index"), vector_store=HCacheVectorStore(inner, llm)
    )
    index: Any = load_index_from_storage(storage, embed_model=WordEmbedding())
    assert len(index.as_retriever(similarity_top_k=9).retrieve("Which planet?")) == 3
    index.delete_nodes([node_of(index, "venus")])
    index.refresh_ref_docs([changed()])
    assert stored(llm) == {TEXTS["mercury"], RED}


@pytest.mark.parametrize("on_error", ["warn", "raise"])
def test_nothing_is_lost_where_states_cannot_be_stored(
    new_llm: NewLLM,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    on_error: Any,
) -> None:
    """The vector store inside has the nodes in any case."""

    def full(*_: Any, **__: Any) -> int:
        raise StoreFullError("no room")

    monkeypatch.setattr(StateStore, "put_all", full)
    vector_store = HCacheVectorStore(TextKeepingStore(), new_llm(), on_error=on_error)
    nodes = [TextNode(text="One."), TextNode(text="Two.")]
    if on_error == "raise":
        with pytest.raises(StoreFullError):
            vector_store.add(nodes)
    else:
        with caplog.at_level(logging.WARNING, logger="hcache_rag"):
            assert vector_store.add(nodes) == [node.node_id for node in nodes]
        assert "the states of 2 nodes were not stored: no room" in caplog.text
    assert len(vector_store.get_nodes()) == 2


def test_where_the_store_inside_fails_nothing_else_happens(new_llm: NewLLM) -> None:
    class Failing(TextKeepingStore):
        def add(self, nodes: Sequence[BaseNode], **_: Any) -> list[str]:
            raise ConnectionError("the database is down")

        def delete(self, ref_doc_id: str, **_: Any) -> None:
            raise ConnectionError("the database is down")

    llm = new_llm()
    made(llm, TextKeepingStore)
    failing = HCacheVectorStore(Failing(), llm)
    with pytest.raises(ConnectionError):
        failing.add([TextNode(text="One.")])
    with pytest.raises(ConnectionError):
        failing.delete("mars")
    assert stored(llm) == set(TEXTS.values())


def test_filters_that_nobody_can_follow_are_said(
    new_llm: NewLLM, caplog: pytest.LogCaptureFixture
) -> None:
    class Silent(TextKeepingStore):
        def get_nodes(self, *_: Any, **__: Any) -> list[BaseNode]:
            raise NotImplementedError

        def delete_nodes(self, *_: Any, **__: Any) -> None:
            self._nodes.clear()

    llm = new_llm()
    vector_store = HCacheVectorStore(Silent(), llm)
    vector_store.add([TextNode(text="One.")])
    with caplog.at_level(logging.WARNING, logger="hcache_rag"):
        vector_store.delete_nodes(filters=named("x"))
    assert "Silent does not say which nodes its filters have deleted" in caplog.text
    assert stored(llm) == {"One."}


def test_it_is_a_vector_store_as_the_one_inside(new_llm: NewLLM) -> None:
    names = [base.__name__ for base in HCacheVectorStore.__mro__]
    assert BasePydanticVectorStore.__name__ in names
    llm = new_llm()
    for inner in (SimpleVectorStore(), TextKeepingStore()):
        proxy = HCacheVectorStore(inner, llm)
        assert proxy.stores_text == inner.stores_text
        assert proxy.is_embedding_query == inner.is_embedding_query
        assert proxy.client is inner.client
        assert proxy.inner is inner
        assert "llm" not in str(proxy.to_dict())
    nodes = [TextNode(text="One two three, and nobody knows it.", id_="n")]
    inner.add(nodes)
    asked = VectorStoreQuery([1.0], similarity_top_k=1)
    assert proxy.query(asked).nodes == asyncio.run(proxy.aquery(asked)).nodes == nodes
    assert asyncio.run(proxy.aget_nodes(["n"])) == nodes
    prompt = "Read:\n\nOne two three, and nobody knows it.\n\nWhat?"
    answer = llm.complete(prompt)  # found by asking, so it is known to be a document
    assert answer.additional_kwargs["hcache"]["documents_missed"] == 1
