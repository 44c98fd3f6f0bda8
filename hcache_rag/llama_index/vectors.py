"""Nodes and their embeddings in one persisted folder: a flat FAISS index and a line per node."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.schema import BaseNode, NodeWithScore, QueryBundle
from llama_index.core.storage.docstore.utils import doc_to_json, json_to_doc

from hcache_rag.errors import SourceError

MANIFEST = "hcache-rag.json"
_FORMAT = 1


class VectorIndex:
    """Nodes in the order of their rows in a flat inner-product index of normalised embeddings.

    Args:
        index: a FAISS `IndexFlatIP` with one row per node.
        embedding_name: which model made the embeddings.
    """

    def __init__(
        self,
        nodes: Sequence[BaseNode],
        index: Any,
        embedding_name: str,
    ) -> None:
        if len(nodes) != index.ntotal:
            raise ValueError(f"{len(nodes)} nodes, but {index.ntotal} embeddings")
        self.nodes = list(nodes)
        self.embedding_name = embedding_name
        self._faiss = index

    @classmethod
    def build(
        cls,
        nodes: Sequence[BaseNode],
        embed_model: BaseEmbedding,
        known: VectorIndex | None = None,
        *,
        show_progress: bool = False,
    ) -> VectorIndex:
        """Embed nodes, except texts that `known` has embedded with the same model."""
        name = str(embed_model.model_name)
        texts = [embedding_text(node) for node in nodes]
        cached: dict[str, npt.NDArray[np.float32]] = {}
        if known is not None and known.embedding_name == name:
            cached = dict(zip(map(embedding_text, known.nodes), known.embeddings(), strict=True))
        missing = list(dict.fromkeys(text for text in texts if text not in cached))
        fresh = embed_model.get_text_embedding_batch(missing, show_progress=show_progress)
        cached.update(zip(missing, map(_normalised, fresh), strict=True))
        rows = [cached[text] for text in texts]
        index = faiss.IndexFlatIP(len(rows[0]) if rows else 1)
        if rows:
            index.add(np.stack(rows))
        return cls(nodes, index, name)

    def embeddings(self) -> npt.NDArray[np.float32]:
        """All rows, (nodes, dimensions), normalised."""
        rows: npt.NDArray[np.float32] = self._faiss.reconstruct_n(0, len(self.nodes))
        return rows

    def search(self, embedding: Sequence[float], top_k: int) -> list[NodeWithScore]:
        """The `top_k` nearest nodes, best first, scored by cosine clipped to [0, 1]."""
        count = min(top_k, len(self.nodes))
        if count < 1:
            return []
        scores, rows = self._faiss.search(_normalised(embedding)[None], count)
        return [
            NodeWithScore(node=self.nodes[row], score=float(np.clip(score, 0.0, 1.0)))
            for score, row in zip(scores[0], rows[0], strict=True)
        ]

    def save(self, folder: Path) -> None:
        """Persist into `folder`; a reader sees either the old index or this one."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        generation = folder / f"vectors-{uuid.uuid4().hex[:12]}"
        generation.mkdir(mode=0o700)
        with (generation / "nodes.jsonl").open("w", encoding="utf-8") as lines:
            for node in self.nodes:
                lines.write(json.dumps(doc_to_json(node)) + "\n")
        faiss.write_index(self._faiss, str(generation / "vectors.faiss"))
        manifest = {
            "format": _FORMAT,
            "vectors": generation.name,
            "embedding": self.embedding_name,
            "nodes": len(self.nodes),
        }
        unfinished = generation / MANIFEST
        unfinished.write_text(json.dumps(manifest, indent=1) + "\n")
        os.replace(unfinished, folder / MANIFEST)
        for old in folder.glob("vectors-*"):
            if old != generation:
                shutil.rmtree(old, ignore_errors=True)

    @classmethod
    def load(cls, folder: Path) -> VectorIndex:
        """Read what `save` wrote.

        Raises:
            SourceError: there is no index in `folder`, or one that this release cannot read.
        """
        manifest = read_manifest(folder)
        vectors = folder / str(manifest.get("vectors"))
        try:
            with (vectors / "nodes.jsonl").open(encoding="utf-8") as lines:
                nodes = [json_to_doc(json.loads(line)) for line in lines]
            index = faiss.read_index(str(vectors / "vectors.faiss"))
            return cls(nodes, index, str(manifest.get("embedding")))
        except (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
            raise SourceError(f"the index in {folder} cannot be read: {reason}") from error


class VectorRetriever(BaseRetriever):
    """Retrieves from a `VectorIndex`."""

    def __init__(
        self, index: VectorIndex, embed_model: BaseEmbedding, similarity_top_k: int
    ) -> None:
        super().__init__()
        self.index = index
        self.embed_model = embed_model
        self.similarity_top_k = similarity_top_k

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        embedding = query_bundle.embedding or self.embed_model.get_agg_embedding_from_queries(
            query_bundle.embedding_strs
        )
        return self.index.search(embedding, self.similarity_top_k)

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        embedding = query_bundle.embedding or (
            await self.embed_model.aget_agg_embedding_from_queries(query_bundle.embedding_strs)
        )
        return self.index.search(embedding, self.similarity_top_k)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a persisted folder.

    Raises:
        SourceError: there is none, or one that this release cannot read.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        raise SourceError(f"{folder} holds no index; make one with `hcache-rag index`") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SourceError(f"the index in {folder} cannot be read: {reason}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise SourceError(f"the index in {folder} is not of format {_FORMAT}")
    return manifest


def embedding_text(node: BaseNode) -> str:
    """The text of a node that is embedded."""
    from llama_index.core.schema import MetadataMode

    return node.get_content(metadata_mode=MetadataMode.EMBED)


def _normalised(embedding: Sequence[float]) -> npt.NDArray[np.float32]:
    vector = np.asarray(embedding, dtype=np.float32)
    norm = float(np.linalg.norm(vector))
    return vector / norm if norm else vector
