"""The drop-in parts for LlamaIndex: the LLM, the retriever and the ingestion transform."""

from hcache_rag.llama_index.defaults import default_embedding
from hcache_rag.llama_index.events import StateRestoreEvent
from hcache_rag.llama_index.llm import HCacheLLM
from hcache_rag.llama_index.precompute import HCachePrecompute
from hcache_rag.llama_index.retriever import HCacheRetriever

__all__ = [
    "HCacheLLM",
    "HCachePrecompute",
    "HCacheRetriever",
    "StateRestoreEvent",
    "default_embedding",
]
