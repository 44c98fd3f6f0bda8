"""The drop-in parts for LlamaIndex: the LLM, the retriever, and what keeps an index's states."""

from hcache_rag.llama_index.defaults import default_embedding
from hcache_rag.llama_index.events import (
    StateEvictEvent,
    StatePrecomputeEndEvent,
    StatePrecomputeStartEvent,
    StateRestoreEvent,
)
from hcache_rag.llama_index.llm import HCacheLLM
from hcache_rag.llama_index.precompute import HCachePrecompute
from hcache_rag.llama_index.retriever import HCacheRetriever
from hcache_rag.llama_index.vector_store import HCacheVectorStore

__all__ = [
    "HCacheLLM",
    "HCachePrecompute",
    "HCacheRetriever",
    "HCacheVectorStore",
    "StateEvictEvent",
    "StatePrecomputeEndEvent",
    "StatePrecomputeStartEvent",
    "StateRestoreEvent",
    "default_embedding",
]
