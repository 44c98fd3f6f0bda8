"""An index that is there already: another LLM, and its retriever wrapped. Nothing else changes.

python examples/existing_index.py [FOLDER]
"""

import sys
from pathlib import Path

from llama_index.core import Settings, SimpleDirectoryReader, VectorStoreIndex
from llama_index.core.query_engine import RetrieverQueryEngine

from hcache_rag.llama_index import HCacheLLM, HCachePrecompute, HCacheRetriever, default_embedding

folder = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_name("solar_system")
Settings.embed_model = default_embedding()  # yours

# What you have.
index = VectorStoreIndex.from_documents(SimpleDirectoryReader(folder).load_data())

# What is new: the model reads the index's nodes once, into storage/states.
llm = Settings.llm = HCacheLLM(max_new_tokens=40, store="storage/states")
HCachePrecompute(llm, show_progress=True)(list(index.docstore.docs.values()))
retriever = HCacheRetriever.wrap(index.as_retriever(similarity_top_k=3), llm=llm)

engine = RetrieverQueryEngine.from_args(retriever, llm=llm)
for question in ("Which planet is the hottest?", "Who discovered Pluto?"):
    print(f"{question}\n  {engine.query(question)}")
