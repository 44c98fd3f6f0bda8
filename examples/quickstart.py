"""Read a folder once, then ask; the second run finds everything on disk.

python examples/quickstart.py [FOLDER] [QUESTION]
"""

import sys
from pathlib import Path
from typing import Any

from llama_index.core import SimpleDirectoryReader
from llama_index.core.query_engine import RetrieverQueryEngine

from hcache_rag.llama_index import HCacheLLM, HCacheRetriever

folder = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_name("solar_system")
question = sys.argv[2] if len(sys.argv) > 2 else "When will Halley's Comet come back?"

llm = HCacheLLM(max_new_tokens=40)  # or HCacheLLM("path/to/a/transformers/model")
if Path("storage/hcache-rag.json").exists():
    retriever = HCacheRetriever.from_persist_dir("storage", llm=llm)
else:
    retriever = HCacheRetriever.from_documents(
        SimpleDirectoryReader(folder).load_data(),
        llm=llm,
        persist_dir="storage",
        show_progress=True,
    )
engine = RetrieverQueryEngine.from_args(retriever, llm=llm, streaming=True)
answer: Any = engine.query(question)
answer.print_response_stream()
print()
