"""Nodes and their embeddings in memory: added, deleted, and found by similarity and metadata."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore, QueryBundle
from llama_index.core.vector_stores.types import MetadataFilters

from hcache_rag.forks import ForkedLock
from hcache_rag.llama_index.filters import passing
from hcache_rag.llama_index.nearest import IndexKind, Nearest, Vectors, normalised
from hcache_rag.llama_index.text import source_of


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """What becomes of an index at once.

    Args:
        sources: ids of documents whose nodes go.
        nodes: nodes that come, also instead of those with the same ids.
        vectors: their normalised embeddings, (N, D).
    """

    sources: Collection[str]
    nodes: Sequence[BaseNode]
    vectors: Vectors


class DimensionsError(ValueError):
    """Embeddings do not have equally many dimensions."""


class VectorIndex:
    """Nodes and normalised embeddings, in the order in which they came. Thread-safe.

    Args:
        embedding_name: which model makes the embeddings.
        kind: see `hcache_rag.llama_index.nearest.Nearest`.
    """

    def __init__(self, embedding_name: str, kind: IndexKind = "auto") -> None:
        self.embedding_name = embedding_name
        self._nearest = Nearest(kind)
        self._nodes: dict[int, BaseNode] = {}
        self._numbers: dict[str, int] = {}
        self._sources: dict[str, set[int]] = {}
        self._next = 0
        self._lock = ForkedLock()

    @classmethod
    def build(
        cls,
        nodes: Sequence[BaseNode],
        embed_model: BaseEmbedding,
        known: VectorIndex | None = None,
        *,
        kind: IndexKind = "auto",
        show_progress: bool = False,
    ) -> VectorIndex:
        """An index of some nodes; texts that `known` has embedded are not embedded again."""
        index = cls(str(embed_model.model_name), kind)
        known = known if known is not None else index
        try:
            vectors = known.embedded(nodes, embed_model, show_progress=show_progress)
        except DimensionsError:
            if known is index:
                raise
            vectors = index.embedded(nodes, embed_model, show_progress=show_progress)
        index.apply(Change((), nodes, vectors))
        return index

    @classmethod
    def of(
        cls, embedding_name: str, nodes: Iterable[tuple[int, BaseNode]], nearest: Nearest
    ) -> VectorIndex:
        """An index of numbered nodes whose vectors are there already."""
        index = cls(embedding_name, nearest.kind)
        for number, node in nodes:
            index._put(number, node)
        index._nearest = nearest
        index._next = 1 + max(index._nodes, default=-1)
        return index

    @property
    def nodes(self) -> list[BaseNode]:
        """All nodes."""
        with self._lock:
            return list(self._nodes.values())

    @property
    def numbered(self) -> list[tuple[int, BaseNode]]:
        """All nodes with the numbers of their vectors."""
        with self._lock:
            return list(self._nodes.items())

    @property
    def nearest(self) -> Nearest:
        """The vectors."""
        return self._nearest

    def __len__(self) -> int:
        return len(self._nodes)

    def nodes_of(self, sources: Iterable[str]) -> list[BaseNode]:
        """The nodes that some documents were cut into."""
        with self._lock:
            return [self._nodes[number] for number in self._numbers_of(sources)]

    def _numbers_of(self, sources: Iterable[str]) -> list[int]:
        return sorted({n for source in sources for n in self._sources.get(source, ())})

    def embeddings(self) -> Vectors:
        """The embeddings of all nodes, (N, D)."""
        with self._lock:
            return self._nearest.vectors(list(self._nodes))

    def embedded(
        self,
        nodes: Sequence[BaseNode],
        embed_model: BaseEmbedding,
        sources: Iterable[str] | None = None,
        *,
        show_progress: bool = False,
    ) -> Vectors:
        """Embeddings of nodes, (N, D); texts that the same model has embedded are not again.

        Args:
            sources: only the nodes of these documents are looked through for the texts.
        """
        texts = [embedding_text(node) for node in nodes]
        cached: dict[str, Vectors] = {}
        with self._lock:
            numbers = list(self._nodes) if sources is None else self._numbers_of(sources)
            if numbers and self.embedding_name == str(embed_model.model_name):
                known = [embedding_text(self._nodes[number]) for number in numbers]
                cached = dict(zip(known, self._nearest.vectors(numbers), strict=True))
        missing = list(dict.fromkeys(text for text in texts if text not in cached))
        fresh = embed_model.get_text_embedding_batch(missing, show_progress=show_progress)
        cached.update((t, _embedding(t, v)) for t, v in zip(missing, fresh, strict=True))
        found = [cached[text] for text in texts]
        widths = sorted({len(vector) for vector in found})
        if len(widths) > 1:
            raise DimensionsError(f"embeddings have {' and '.join(map(str, widths))} dimensions")
        return np.stack(found) if found else np.zeros((0, 0), np.float32)

    def check(self, change: Change) -> None:
        """Refuse a change that cannot be applied.

        Raises:
            DimensionsError: its embeddings have other dimensions than those that would stay.
        """
        with self._lock:
            gone = self._gone(change)
            wanted, width = self._nearest.dimensions, change.vectors.shape[1]
            if len(change.nodes) and len(gone) < len(self._nodes) and width != wanted:
                raise DimensionsError(
                    f"the new embeddings have {width} dimensions, those in the index {wanted}"
                )

    def _gone(self, change: Change) -> set[int]:
        """Which numbers go."""
        same = {self._numbers[n.node_id] for n in change.nodes if n.node_id in self._numbers}
        return same.union(self._numbers_of(change.sources))

    def apply(self, change: Change) -> None:
        """Change it, or leave it as it is.

        Raises:
            DimensionsError: see `check`.
        """
        self.check(change)
        place_of = {node.node_id: place for place, node in enumerate(change.nodes)}
        places = sorted(place_of.values())
        with self._lock:
            gone = self._gone(change)
            self._nearest.remove(gone)
            for number in gone:
                self._take(number)
            numbers = range(self._next, self._next + len(places))
            self._nearest.add(numbers, change.vectors[places])
            self._next += len(places)
            for number, place in zip(numbers, places, strict=True):
                self._put(number, change.nodes[place])

    def _put(self, number: int, node: BaseNode) -> None:
        self._nodes[number], self._numbers[node.node_id] = node, number
        self._sources.setdefault(source_of(node), set()).add(number)

    def _take(self, number: int) -> None:
        node = self._nodes.pop(number)
        del self._numbers[node.node_id]
        of_source = self._sources[source_of(node)]
        of_source.discard(number)
        if not of_source:
            del self._sources[source_of(node)]

    def search(
        self, embedding: Sequence[float], top_k: int, filters: MetadataFilters | None = None
    ) -> list[NodeWithScore]:
        """The `top_k` nearest nodes, best first, scored by cosine clipped to [0, 1].

        With filters, every node that passes is compared: as many are found as there are.

        Returns:
            Copies of the nodes, which others may change.

        Raises:
            DimensionsError: the question's embedding has other dimensions than the nodes'.
        """
        vector = normalised(embedding)
        with self._lock:
            wanted = self._nearest.dimensions
            if wanted not in (None, len(vector)):
                raise DimensionsError(
                    f"the question's embedding has {len(vector)} dimensions, "
                    f"those in the index {wanted}"
                )
            among = None
            if filters is not None and filters.filters:
                passes = passing(filters)
                among = [number for number, node in self._nodes.items() if passes(node)]
            found = self._nearest.search(vector, top_k, among)
            scored = [(self._nodes[number], score) for number, score in found]
        return [
            NodeWithScore(node=node.model_copy(deep=True), score=min(max(score, 0.0), 1.0))
            for node, score in scored
        ]


class VectorRetriever(BaseRetriever):
    """Retrieves from a `VectorIndex`.

    Args:
        filters: which nodes may be found.
    """

    def __init__(
        self,
        index: VectorIndex,
        embed_model: BaseEmbedding,
        similarity_top_k: int,
        filters: MetadataFilters | None = None,
    ) -> None:
        super().__init__()
        if similarity_top_k < 1:
            raise ValueError(f"similarity_top_k must be positive, not {similarity_top_k}")
        self.index = index
        self.embed_model = embed_model
        self.similarity_top_k = similarity_top_k
        self.filters = filters

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        embedding = query_bundle.embedding or self.embed_model.get_agg_embedding_from_queries(
            query_bundle.embedding_strs
        )
        return self.index.search(embedding, self.similarity_top_k, self.filters)

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        embedding = query_bundle.embedding or (
            await self.embed_model.aget_agg_embedding_from_queries(query_bundle.embedding_strs)
        )
        return self.index.search(embedding, self.similarity_top_k, self.filters)


def embedding_text(node: BaseNode) -> str:
    """The text of a node that is embedded."""
    return node.get_content(metadata_mode=MetadataMode.EMBED)


def _embedding(text: str, vector: Sequence[float]) -> Vectors:
    try:
        return normalised(vector)
    except ValueError as error:
        raise ValueError(f"{text[:40]!r} cannot be embedded: {error}") from error
