"""`HCacheRetriever`: any retriever, with the LLM told which texts its prompts will hold."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.ingestion import run_transformations
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import (
    BaseNode,
    Document,
    NodeWithScore,
    QueryBundle,
    TransformComponent,
)

from hcache_rag.errors import SourceError
from hcache_rag.indexing import PrecomputeReport
from hcache_rag.llama_index.defaults import default_embedding
from hcache_rag.llama_index.llm import HCacheLLM
from hcache_rag.llama_index.precompute import precompute
from hcache_rag.llama_index.text import llm_text, llm_texts, source_of
from hcache_rag.llama_index.vectors import MANIFEST, VectorIndex, VectorRetriever
from hcache_rag.openmp import give_back_threads

logger = logging.getLogger("hcache_rag")

STATES = "states"
CHUNK_TOKENS = 512


class HCacheRetriever(BaseRetriever):
    """Retrieves as the retriever inside does, and announces the texts to the LLM.

    The answers do not depend on it: the LLM finds stored documents in its prompts by itself. A
    document that was announced and has no state is noticed, counted and kept as one piece.

    Use `from_documents`, `from_persist_dir` or `wrap`.
    """

    def __init__(
        self,
        base: BaseRetriever,
        llm: HCacheLLM,
        report: PrecomputeReport | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._base = base
        self._llm = llm
        self.report = report
        """What `from_documents` stored."""

    @classmethod
    def wrap(cls, retriever: BaseRetriever, llm: HCacheLLM) -> HCacheRetriever:
        """Put any LlamaIndex retriever inside."""
        return cls(retriever, llm)

    @classmethod
    def from_documents(
        cls,
        documents: Sequence[Document],
        *,
        llm: HCacheLLM,
        embed_model: BaseEmbedding | None = None,
        persist_dir: str | os.PathLike[str] | None = None,
        similarity_top_k: int = 4,
        transformations: Sequence[TransformComponent] | None = None,
        show_progress: bool = False,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> HCacheRetriever:
        """Split, embed and read documents once, and keep the result.

        Args:
            llm: answers later, and reads the documents now. If it has no store yet, its states go
                to `persist_dir`.
            embed_model: the bundled all-MiniLM-L6-v2 by default.
            persist_dir: where index and states are kept. What an earlier call left there is used
                again: unchanged texts are neither embedded nor read twice.
            similarity_top_k: nodes per question.
            transformations: by default a sentence splitter of `CHUNK_TOKENS` tokens.
            show_progress: show progress bars.
            on_progress: called with (documents read, documents to read) instead of a bar.

        Raises:
            StoreFullError: no room for a state; the states before it stay.
        """
        embed_model = embed_model or default_embedding()
        folder = Path(persist_dir).expanduser() if persist_dir is not None else None
        _bind(llm, folder)
        if transformations is None:
            transformations = [_splitter(llm)]
        nodes: list[BaseNode] = list(run_transformations(documents, transformations))
        known = _known_index(folder)
        index = VectorIndex.build(nodes, embed_model, known, show_progress=show_progress)
        report = precompute(llm, nodes, show_progress=show_progress, on_progress=on_progress)
        if folder is not None:
            index.save(folder)
        _own(llm, nodes, known.nodes if known is not None else ())
        return cls(VectorRetriever(index, embed_model, similarity_top_k), llm, report)

    @classmethod
    def from_persist_dir(
        cls,
        persist_dir: str | os.PathLike[str],
        *,
        llm: HCacheLLM,
        embed_model: BaseEmbedding | None = None,
        similarity_top_k: int = 4,
    ) -> HCacheRetriever:
        """Open what `from_documents` kept.

        Raises:
            SourceError: there is no index in `persist_dir`, or it was made with another embedding.
        """
        folder = Path(persist_dir).expanduser()
        index = VectorIndex.load(folder)
        embed_model = embed_model or default_embedding()
        if index.embedding_name != embed_model.model_name:
            raise SourceError(
                f"the index in {folder} was made with the embedding {index.embedding_name!r}, "
                f"not with {embed_model.model_name!r}"
            )
        _bind(llm, folder)
        llm.engine.announce(llm_texts(index.nodes))
        return cls(VectorRetriever(index, embed_model, similarity_top_k), llm)

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

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return self._announced(self._base.retrieve(query_bundle))

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return self._announced(await self._base.aretrieve(query_bundle))

    def _announced(self, nodes: list[NodeWithScore]) -> list[NodeWithScore]:
        self._llm.engine.announce(llm_texts([scored.node for scored in nodes]))
        give_back_threads()  # the embedding's; the answer may be computed on another thread
        return nodes


def _top_k_name(retriever: BaseRetriever) -> str:
    for name in ("similarity_top_k", "_similarity_top_k"):
        if hasattr(retriever, name):
            return name
    raise AttributeError(f"{type(retriever).__name__} has no similarity_top_k")


def _known_index(folder: Path | None) -> VectorIndex | None:
    if folder is None or not (folder / MANIFEST).is_file():
        return None
    try:
        return VectorIndex.load(folder)
    except SourceError as error:
        logger.warning("%s; it is made anew", error)
        return None


def _own(llm: HCacheLLM, nodes: Sequence[BaseNode], before: Sequence[BaseNode]) -> None:
    """Let states belong to their source documents; delete those of documents that are gone."""
    store, keys = llm.engine.store, dict[str, list[bytes]]()
    if store.read_only:
        return
    for node in nodes:
        found = [record.key for record in store.find(llm_text(node))]
        keys.setdefault(source_of(node), []).extend(found)
    store.assign_all(keys, delete=True)
    gone = {source_of(node) for node in before} - keys.keys()
    if gone:
        store.delete_owner(*gone)


def _bind(llm: HCacheLLM, folder: Path | None) -> None:
    if folder is not None and not llm.has_store:
        llm.use_store(folder / STATES)


def _splitter(llm: HCacheLLM) -> SentenceSplitter:
    tokenizer = llm.engine.tokenizer
    return SentenceSplitter(
        chunk_size=CHUNK_TOKENS,
        chunk_overlap=0,
        tokenizer=lambda text: list(tokenizer.encode(text, add_special_tokens=False)),
    )
