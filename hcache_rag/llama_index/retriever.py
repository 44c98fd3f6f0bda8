"""`HCacheRetriever`: any retriever, with the LLM told which texts its prompts will hold."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.ingestion import run_transformations
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import (
    BaseNode,
    NodeWithScore,
    QueryBundle,
    TransformComponent,
)
from llama_index.core.vector_stores.types import MetadataFilters
from llama_index_instrumentation import get_dispatcher

from hcache_rag.errors import SourceError
from hcache_rag.forks import ForkedLock
from hcache_rag.indexing import PrecomputeReport
from hcache_rag.llama_index.arguments import expect, expect_documents
from hcache_rag.llama_index.defaults import default_embedding
from hcache_rag.llama_index.llm import HCacheLLM
from hcache_rag.llama_index.model_choice import STATES, remember_model
from hcache_rag.llama_index.nearest import IndexKind
from hcache_rag.llama_index.owning import claim, disown, settle
from hcache_rag.llama_index.persisted import MANIFEST, IndexFolder
from hcache_rag.llama_index.precompute import precompute
from hcache_rag.llama_index.text import llm_texts, source_of
from hcache_rag.llama_index.vectors import Change, VectorIndex, VectorRetriever
from hcache_rag.openmp import give_back_threads

logger = logging.getLogger("hcache_rag")
_dispatcher = get_dispatcher(__name__)

CHUNK_TOKENS = 512
_MADE = "Document(text=..., id_=...) makes one"


class HCacheRetriever(BaseRetriever):
    """Retrieves as the retriever inside does, and announces the texts to the LLM.

    The answers do not depend on it: the LLM finds stored documents in its prompts by itself. A
    document that was announced and has no state is noticed, counted and kept as one piece.

    Use `from_documents`, `from_persist_dir` or `wrap`. With an index of its own, which the first
    two have, documents can be inserted, updated, deleted and refreshed; their states follow. In a
    persisted folder each of these calls is done, or not, as a whole.

    Args:
        prefetch: when the nodes are known, begin to read their states into memory, so that they
            are there when the prompt has been built.
    """

    def __init__(
        self,
        base: BaseRetriever,
        llm: HCacheLLM,
        report: PrecomputeReport | None = None,
        *,
        prefetch: bool = True,
        transformations: Sequence[TransformComponent] | None = None,
        folder: IndexFolder | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._base = base
        self._llm = llm
        self._transformations = transformations
        self._folder = folder
        self._changing = ForkedLock()
        self.prefetch = prefetch
        self.report = report
        """What the last call that indexed documents stored."""

    @classmethod
    def wrap(
        cls, retriever: BaseRetriever, llm: HCacheLLM, *, prefetch: bool = True
    ) -> HCacheRetriever:
        """Put any LlamaIndex retriever inside.

        Raises:
            TypeError: it is none; an index has one, `index.as_retriever()`.
        """
        expect("retriever", retriever, BaseRetriever, "an index has one: index.as_retriever()")
        _expect_llm(llm)
        return cls(retriever, llm, prefetch=prefetch)

    @classmethod
    def from_documents(
        cls,
        documents: Sequence[BaseNode],
        *,
        llm: HCacheLLM,
        embed_model: BaseEmbedding | None = None,
        persist_dir: str | os.PathLike[str] | None = None,
        similarity_top_k: int = 4,
        filters: MetadataFilters | None = None,
        transformations: Sequence[TransformComponent] | None = None,
        index: IndexKind = "auto",
        prefetch: bool = True,
        show_progress: bool = False,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> HCacheRetriever:
        """Split, embed and read documents once, and keep the result.

        Args:
            llm: answers later, and reads the documents now. If it has no store yet, its states go
                to `persist_dir`.
            embed_model: the bundled all-MiniLM-L6-v2 by default.
            persist_dir: where index and states are kept. What an earlier call left there is used
                again: unchanged texts are neither embedded nor read twice. Documents that are not
                given any more are deleted, and their states are.
            similarity_top_k: nodes per question.
            filters: LlamaIndex's metadata filters, which nodes have to pass to be found.
            transformations: by default a sentence splitter of `CHUNK_TOKENS` tokens.
            index: how the nearest nodes are found: "flat" compares with all, "hnsw" is a graph
                that is quicker among very many and may miss one. "auto" takes the latter where
                comparing with all would take longer than embedding the question.
            prefetch: see the class.
            show_progress: show progress bars.
            on_progress: called with (documents read, documents to read) instead of a bar.

        Raises:
            StoreFullError: no room for a state; the states before it stay.
            TypeError: an argument of another kind.
        """
        _expect_llm(llm)
        documents = expect_documents(documents)
        embed_model = _embedding(embed_model)
        path = Path(persist_dir).expanduser() if persist_dir is not None else None
        _bind(llm, path)
        if transformations is None:
            transformations = [_splitter(llm)]
        nodes: list[BaseNode] = list(run_transformations(documents, transformations))
        folder = IndexFolder(path) if path is not None else None
        known = _known_index(folder)
        made = VectorIndex.build(nodes, embed_model, known, kind=index, show_progress=show_progress)
        report = precompute(llm, nodes, show_progress=show_progress, on_progress=on_progress)
        with folder.turn() if folder is not None else nullcontext():
            if folder is not None and known is not None:
                known = folder.caught_up(known)
            claim(llm, nodes)
            if folder is not None:
                folder.save(made)
                remember_model(llm, folder.path)
            settle(llm, nodes)
            before = {source_of(node) for node in known.nodes} if known is not None else set()
            disown(llm, sources=before - {source_of(node) for node in nodes})
        return cls(
            VectorRetriever(made, embed_model, similarity_top_k, filters),
            llm,
            report,
            prefetch=prefetch,
            transformations=transformations,
            folder=folder,
        )

    @classmethod
    def from_persist_dir(
        cls,
        persist_dir: str | os.PathLike[str],
        *,
        llm: HCacheLLM,
        embed_model: BaseEmbedding | None = None,
        similarity_top_k: int = 4,
        filters: MetadataFilters | None = None,
        transformations: Sequence[TransformComponent] | None = None,
        index: IndexKind = "auto",
        prefetch: bool = True,
    ) -> HCacheRetriever:
        """Open what `from_documents` kept.

        Args: as for `from_documents`; `transformations` are for documents that come.

        Raises:
            SourceError: there is no index in `persist_dir`, or it was made with another embedding.
        """
        _expect_llm(llm)
        folder = IndexFolder(Path(persist_dir).expanduser())
        found = folder.load(index)
        embed_model = _embedding(embed_model)
        _refuse_other_embedding(found, embed_model, folder)
        _bind(llm, folder.path)
        llm.engine.announce(llm_texts(found.nodes))
        return cls(
            VectorRetriever(found, embed_model, similarity_top_k, filters),
            llm,
            prefetch=prefetch,
            transformations=transformations,
            folder=folder,
        )

    # Documents that change.

    @_dispatcher.span
    def insert(self, document: BaseNode) -> None:
        """Split, embed and read a document that is not in the index yet.

        Raises:
            ValueError: one with its id is; see `update` and `refresh`.
            StoreFullError: no room for its states; the index stays as it was.
        """
        expect("document", document, BaseNode, _MADE)
        self._refuse_known(document)
        self._change([document], is_new=True)

    @_dispatcher.span
    def update(self, document: BaseNode) -> None:
        """Let a document take the place of the one with the same id, or come if there is none.

        What its texts have in common with the old ones, from their beginnings on, is not read
        again; equal texts are not embedded again.

        Raises:
            StoreFullError: no room for its states; the index stays as it was.
        """
        expect("document", document, BaseNode, _MADE)
        self._change([document])

    @_dispatcher.span
    def delete(self, ref_doc_id: str) -> bool:
        """Delete a document by its id, its nodes and the states that are of no other document.

        Returns:
            False where there was none.
        """
        expect("ref_doc_id", ref_doc_id, str, "a document's is its id_")
        return self._change([], [ref_doc_id])

    @_dispatcher.span
    def refresh(self, documents: Sequence[BaseNode]) -> list[bool]:
        """Insert the documents that are new, and update those that have changed.

        A document has changed where its text or its metadata has. Others in the index stay.

        Returns:
            Which of them were inserted or updated.

        Raises:
            StoreFullError: no room for their states; the index stays as it was.
        """
        documents = expect_documents(documents)
        changed = [self._hash_of(document.id_) != document.hash for document in documents]
        self._change([d for d, is_changed in zip(documents, changed, strict=True) if is_changed])
        return changed

    def _hash_of(self, ref_doc_id: str) -> str | None:
        """What a document's hash was when it was cut into its nodes."""
        for node in self._index.nodes_of([ref_doc_id]):
            return node.source_node.hash if node.source_node is not None else node.hash
        return None

    def _refuse_known(self, document: BaseNode) -> None:
        if self._index.nodes_of([document.id_]):
            raise ValueError(f"document {document.id_!r} is in the index; update or refresh it")

    def _change(
        self,
        documents: Sequence[BaseNode],
        deleted: Collection[str] = (),
        *,
        is_new: bool = False,
    ) -> bool:
        """Put documents into the place of those with the same ids, and delete others.

        States come before their nodes and go after them: whenever this is ended, every node has
        its states, and what has no node is found by gc. Documents are read before it is this
        one's turn, so that others need not wait for that.

        Args:
            is_new: the documents must not be in the index.

        Returns:
            Whether anything has changed.
        """
        retriever, llm = self._own, self._llm
        if self._transformations is None:
            self._transformations = [_splitter(llm)]
        comes = {document.id_: document for document in documents}
        sources = {*deleted, *comes}
        if not sources:
            return False
        nodes: list[BaseNode] = list(run_transformations([*comes.values()], self._transformations))
        vectors = retriever.index.embedded(nodes, retriever.embed_model, sources)
        change = Change(sources, nodes, vectors)
        retriever.index.check(change)
        if nodes:
            self.report = precompute(llm, nodes)
        with self._turn():
            before = retriever.index.nodes_of(sources)
            if not nodes and not before:
                return False
            if is_new:
                for document in documents:
                    self._refuse_known(document)
            claim(llm, [*nodes, *before])
            if lost := [t for t in llm_texts(nodes) if not llm.engine.states_of(t)]:
                llm.engine.precompute(lost)  # deleted with another document meanwhile
                claim(llm, nodes)
            if self._folder is None:
                retriever.index.apply(change)
            else:
                self._folder.change(retriever.index, change)
            settle(llm, nodes)
            disown(llm, sources=sources - {source_of(node) for node in nodes})
        llm.engine.announce(llm_texts(nodes))
        return True

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Nobody else changes the index inside the block, which is as others have left it."""
        own, folder = self._own, self._folder
        with self._changing, folder.turn() if folder is not None else nullcontext():
            if folder is not None:
                index = folder.caught_up(own.index)
                _refuse_other_embedding(index, own.embed_model, folder)
                own.index = index
            yield

    @property
    def _own(self) -> VectorRetriever:
        if not isinstance(self._base, VectorRetriever):
            name = type(self._base).__name__
            raise TypeError(
                f"this retriever wraps a {name}, whose documents are changed where they are kept; "
                "HCacheVectorStore lets states follow them"
            )
        return self._base

    @property
    def _index(self) -> VectorIndex:
        return self._own.index

    # Retrieving.

    @property
    def nodes(self) -> Sequence[BaseNode]:
        """The indexed nodes, where the retriever has an index of its own; else none."""
        return self._base.index.nodes if isinstance(self._base, VectorRetriever) else ()

    @property
    def similarity_top_k(self) -> int:
        """Nodes per question."""
        return int(getattr(self._base, _top_k_name(self._base)))

    @similarity_top_k.setter
    def similarity_top_k(self, top_k: int) -> None:
        setattr(self._base, _top_k_name(self._base), top_k)

    @property
    def filters(self) -> MetadataFilters | None:
        """Which nodes may be found, where the retriever has an index of its own."""
        return self._own.filters

    @filters.setter
    def filters(self, filters: MetadataFilters | None) -> None:
        self._own.filters = filters

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return self._announced(self._base.retrieve(query_bundle))

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return self._announced(await self._base.aretrieve(query_bundle))

    def _announced(self, nodes: list[NodeWithScore]) -> list[NodeWithScore]:
        texts = llm_texts([scored.node for scored in nodes])
        self._llm.engine.announce(texts)
        if self.prefetch:
            self._llm.engine.prefetch(texts)
        give_back_threads()  # the embedding's; the answer may be computed on another thread
        return nodes


def _expect_llm(llm: object) -> None:
    expect("llm", llm, HCacheLLM, "only it can restore what it has read")


def _embedding(embed_model: BaseEmbedding | None) -> BaseEmbedding:
    """The one that was given, or the bundled one."""
    if embed_model is None:
        return default_embedding()
    expect("embed_model", embed_model, BaseEmbedding, "None is the bundled all-MiniLM-L6-v2")
    return embed_model


def _top_k_name(retriever: BaseRetriever) -> str:
    for name in ("similarity_top_k", "_similarity_top_k"):
        if hasattr(retriever, name):
            return name
    raise AttributeError(f"{type(retriever).__name__} has no similarity_top_k")


def _known_index(folder: IndexFolder | None) -> VectorIndex | None:
    if folder is None or not (folder.path / MANIFEST).is_file():
        return None
    try:
        return folder.load()
    except SourceError as error:
        logger.warning("%s; it is made anew", error)
        return None


def _refuse_other_embedding(
    index: VectorIndex, embed_model: BaseEmbedding, folder: IndexFolder
) -> None:
    if index.embedding_name != embed_model.model_name:
        raise SourceError(
            f"the index in {folder.path} was made with the embedding "
            f"{index.embedding_name!r}, not with {embed_model.model_name!r}"
        )


def _bind(llm: HCacheLLM, folder: Path | None) -> None:
    if folder is not None and not llm.has_store:
        llm.use_store(folder / STATES)


def _splitter(llm: HCacheLLM) -> SentenceSplitter:
    return SentenceSplitter(chunk_size=CHUNK_TOKENS, chunk_overlap=0, tokenizer=llm.tokenize)
