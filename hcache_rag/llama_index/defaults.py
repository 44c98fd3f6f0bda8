"""What is used where a program names nothing: the bundled embedding model."""

from __future__ import annotations

from llama_index.core.base.embeddings.base import BaseEmbedding

from hcache_rag.bundled import EMBEDDING_NAME, default_embedding_path


def default_embedding() -> BaseEmbedding:
    """The bundled all-MiniLM-L6-v2, on the CPU, 384 dimensions.

    Raises:
        ModelNotFoundError: the package that carries it is not installed.
    """
    from llama_index.embeddings.huggingface import HuggingFaceEmbedding

    path = str(default_embedding_path())
    embedding: BaseEmbedding = HuggingFaceEmbedding(model_name=path, device="cpu")
    embedding.model_name = EMBEDDING_NAME  # the folder differs from machine to machine
    return embedding
