"""How near are answers from restored documents to full prefill, on your texts? Which is enough?

python examples/fidelity.py [FOLDER]
"""

import sys
from pathlib import Path

from llama_index.core import SimpleDirectoryReader
from llama_index.core.schema import MetadataMode

from hcache_rag.fidelity import Case, measure_fidelity
from hcache_rag.llama_index import HCacheLLM, HCacheRetriever

folder = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_name("solar_system")

llm = HCacheLLM(fidelity="none")
documents = SimpleDirectoryReader(folder).load_data()
retriever = HCacheRetriever.from_documents(documents, llm=llm, similarity_top_k=2)

questions = ("When is Halley's Comet here again?", "Who discovered Pluto?", "How hot is Venus?")
cases = []
for question in questions:
    nodes = retriever.retrieve(question)
    passages = [node.get_content(MetadataMode.LLM) for node in nodes]
    cases.append(Case(llm.qa_prompt(passages, question)))

report = measure_fidelity(llm.engine, cases, tolerance_nats=0.1, max_new_tokens=8)
print(f"full prefill reads {report.prompt_tokens:,.0f} tokens in {report.full_s:.2f} s")
for row in report.positions:
    print(
        f"{row.position!s:9} reads {row.tokens:6,.0f} tokens in {row.seconds:.2f} s; "
        f"KL at the first token {row.kl_first.mean:.3f}, the same one in {row.top1.mean:.0%}"
    )
print(f"recommended: {report.recommendation}, {report.reason}")
