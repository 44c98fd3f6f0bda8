"""Documents that change: their states follow.

python examples/changing_documents.py
"""

from llama_index.core import Document
from llama_index.core.query_engine import RetrieverQueryEngine

from hcache_rag.llama_index import HCacheLLM, HCacheRetriever

llm = HCacheLLM(max_new_tokens=24)
opening = Document(id_="hours", text="The museum is open from nine to five, except on Mondays.")
tickets = Document(id_="tickets", text="A ticket costs eight euros; children enter free.")
retriever = HCacheRetriever.from_documents([opening, tickets], llm=llm, persist_dir="museum")
engine = RetrieverQueryEngine.from_args(retriever, llm=llm)


def ask(question: str) -> None:
    """Print an answer, and how many states are kept."""
    print(f"{llm.engine.store.stats().documents} documents. {question} {engine.query(question)}")


ask("What does a ticket cost?")
tickets.set_content("A ticket costs nine euros; children enter free.")
retriever.update(tickets)  # read again from the first changed word on
ask("What does a ticket cost?")
retriever.insert(Document(id_="cafe", text="The cafe on the roof serves soup and cake."))
ask("What does the cafe serve?")
retriever.delete("hours")
print(retriever.refresh([tickets, opening]))  # what has changed, or is new: [False, True]
llm.close()
