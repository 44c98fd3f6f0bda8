"""`HCacheVectorStore`: any vector store, with the states of its nodes kept in step."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Sequence
from typing import Any, Literal

from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.schema import BaseNode
from llama_index.core.vector_stores.simple import SimpleVectorStore
from llama_index.core.vector_stores.types import (
    BasePydanticVectorStore,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryResult,
)

from hcache_rag.llama_index.arguments import expect, refuse_unknown
from hcache_rag.llama_index.llm import HCacheLLM
from hcache_rag.llama_index.owning import disown, own
from hcache_rag.llama_index.precompute import precompute
from hcache_rag.llama_index.text import llm_texts

logger = logging.getLogger("hcache_rag")


class HCacheVectorStore(BasePydanticVectorStore):
    """Does what the vector store inside does, and lets the states follow.

    Only the vector store sees every way in which LlamaIndex changes an index. Nodes that are added
    are read once, unless an ingestion step has done so before; states of nodes that are deleted are
    deleted, unless another document has the same text. The store inside goes first: if it fails,
    nothing else happens.

    Args:
        inner: the vector store.
        llm: the LLM that will answer.
        collection: tells this vector store's nodes from others' in the same state store, which
            matters to `clear`.
        on_error: what happens where states cannot be stored or deleted. "warn" (the default) logs
            it: the answer will be right without a state, only slower; "raise" lets it out.
        show_progress: show a progress bar while nodes are read.

    Examples:
        ```python
        vector_store = HCacheVectorStore(SimpleVectorStore(), llm)
        storage = StorageContext.from_defaults(vector_store=vector_store)
        index = VectorStoreIndex.from_documents(documents, storage_context=storage)
        ```
    """

    stores_text: bool = Field(default=False, description="As of the vector store inside.")
    is_embedding_query: bool = Field(default=True, description="As of the vector store inside.")
    collection: str = Field(default="default", description="Whose nodes these are.")
    on_error: Literal["warn", "raise"] = Field(default="warn", description="What an error does.")
    show_progress: bool = Field(default=False, description="Show a progress bar.")

    _inner: BasePydanticVectorStore = PrivateAttr()
    _llm: HCacheLLM = PrivateAttr()

    def __init__(self, inner: BasePydanticVectorStore, llm: HCacheLLM, **kwargs: Any) -> None:
        expect("inner", inner, BasePydanticVectorStore, "HCacheVectorStore(vector_store, llm)")
        expect("llm", llm, HCacheLLM)
        refuse_unknown(kwargs, type(self).model_fields)
        super().__init__(
            stores_text=inner.stores_text, is_embedding_query=inner.is_embedding_query, **kwargs
        )
        self._inner = inner
        self._llm = llm

    @classmethod
    def class_name(cls) -> str:
        """The stable name in serialised forms."""
        return "HCacheVectorStore"

    @property
    def inner(self) -> BasePydanticVectorStore:
        """The vector store inside."""
        return self._inner

    @property
    def client(self) -> Any:
        """Of the vector store inside."""
        return self._inner.client

    # What comes.

    def add(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[str]:
        """Add nodes, and let the model read those that have no state."""
        ids = self._inner.add(nodes, **kwargs)
        self._read(nodes)
        return ids

    async def async_add(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[str]:
        """The same; the model reads on another thread."""
        ids = await self._inner.async_add(nodes, **kwargs)
        await asyncio.to_thread(self._read, nodes)
        return ids

    # What goes.

    def delete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        """Delete a document's nodes, and their states."""
        self._inner.delete(ref_doc_id, **delete_kwargs)
        self._let_go(sources=[ref_doc_id])

    async def adelete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        """The same."""
        await self._inner.adelete(ref_doc_id, **delete_kwargs)
        await asyncio.to_thread(self._let_go, sources=[ref_doc_id])

    def delete_nodes(
        self,
        node_ids: list[str] | None = None,
        filters: MetadataFilters | None = None,
        **delete_kwargs: Any,
    ) -> None:
        """Delete nodes, and their states."""
        before = self._listed(node_ids, filters)
        self._inner.delete_nodes(node_ids, filters, **delete_kwargs)
        self._let_go(nodes=self._gone(node_ids, filters, before))

    async def adelete_nodes(
        self,
        node_ids: list[str] | None = None,
        filters: MetadataFilters | None = None,
        **delete_kwargs: Any,
    ) -> None:
        """The same."""
        before = await asyncio.to_thread(self._listed, node_ids, filters)
        await self._inner.adelete_nodes(node_ids, filters, **delete_kwargs)
        gone = self._gone(node_ids, filters, before)
        await asyncio.to_thread(self._let_go, nodes=gone)

    def clear(self) -> None:
        """Delete all nodes, and the states of those that were added through this collection."""
        self._inner.clear()
        self._let_go(everything=True)

    async def aclear(self) -> None:
        """The same."""
        await self._inner.aclear()
        await asyncio.to_thread(self._let_go, everything=True)

    # What stays as it is.

    def get_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None
    ) -> list[BaseNode]:
        """Of the vector store inside."""
        return self._inner.get_nodes(node_ids, filters)

    async def aget_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None
    ) -> list[BaseNode]:
        """Of the vector store inside."""
        return await self._inner.aget_nodes(node_ids, filters)

    def query(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        """Of the vector store inside."""
        return self._announced(self._inner.query(query, **kwargs))

    async def aquery(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        """Of the vector store inside."""
        return self._announced(await self._inner.aquery(query, **kwargs))

    def persist(self, persist_path: str, fs: Any = None) -> None:
        """Persist the vector store inside; states are on disk already."""
        self._inner.persist(persist_path, fs=fs)

    def _announced(self, result: VectorStoreQueryResult) -> VectorStoreQueryResult:
        if result.nodes:
            self._llm.engine.announce(llm_texts(result.nodes))
        return result

    def _read(self, nodes: Sequence[BaseNode]) -> None:
        try:
            if nodes:
                self._llm.engine.announce(llm_texts(nodes))
                precompute(self._llm, nodes, show_progress=self.show_progress)
                own(self._llm, nodes, self.collection)
        except Exception as error:
            self._failed(f"the states of {len(nodes)} nodes were not stored", error)

    def _let_go(
        self,
        *,
        sources: Collection[str] = (),
        nodes: Collection[str] = (),
        everything: bool = False,
    ) -> None:
        try:
            collection = self.collection if everything else None
            disown(self._llm, sources=sources, nodes=nodes, collection=collection)
        except Exception as error:
            self._failed("states of what was deleted stay until `gc`", error)

    def _failed(self, what: str, error: Exception) -> None:
        if self.on_error == "raise":
            raise error
        logger.warning("%s: %s", what, error)

    def _listed(
        self, node_ids: list[str] | None, filters: MetadataFilters | None
    ) -> set[str] | None:
        """Which nodes a deletion by filters is about, or all that there are; None is not known."""
        if filters is None:
            return None
        if isinstance(self._inner, SimpleVectorStore):
            return set(self._inner.data.embedding_dict)
        try:
            return {node.node_id for node in self._inner.get_nodes(node_ids, filters)}
        except NotImplementedError:
            return None

    def _gone(
        self,
        node_ids: list[str] | None,
        filters: MetadataFilters | None,
        before: set[str] | None,
    ) -> Collection[str]:
        if filters is None:
            return node_ids or ()
        if before is None:
            logger.warning(
                "%s does not say which nodes its filters have deleted; their states stay until "
                "their documents are deleted",
                type(self._inner).__name__,
            )
            return ()
        if isinstance(self._inner, SimpleVectorStore):
            return before - self._inner.data.embedding_dict.keys()
        return before
