"""A chat over documents: each turn restores the passages, and all that was said before.

python examples/chat.py [FOLDER]
"""

import sys
from pathlib import Path

from llama_index.core import SimpleDirectoryReader
from llama_index.core.chat_engine import CondensePlusContextChatEngine

from hcache_rag.llama_index import HCacheLLM, HCacheRetriever

folder = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_name("solar_system")

llm = HCacheLLM(max_new_tokens=40, chat_memory="always")
documents = SimpleDirectoryReader(folder).load_data()
retriever = HCacheRetriever.from_documents(documents, llm=llm, similarity_top_k=2)
chat = CondensePlusContextChatEngine.from_defaults(retriever, llm=llm)

for message in ("Which comet comes back every 76 years?", "And when is it here again?"):
    print(f"\n> {message}")
    for piece in chat.stream_chat(message).response_gen:
        print(piece, end="", flush=True)
print()
