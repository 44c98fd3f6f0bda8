"""Answers over HTTP, streamed, many at a time; who hangs up stops the computation.

pip install fastapi uvicorn && uvicorn --app-dir examples web:app
curl -N 'localhost:8000/ask?question=How+long+is+a+day+on+Venus'
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from llama_index.core import SimpleDirectoryReader
from llama_index.core.query_engine import RetrieverQueryEngine

from hcache_rag.llama_index import HCacheLLM, HCacheRetriever


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Index, or find the index, before the first question."""
    llm = HCacheLLM(max_new_tokens=40)
    folder = os.environ.get("DOCUMENTS", os.path.dirname(__file__) + "/solar_system")
    documents = SimpleDirectoryReader(folder).load_data()
    retriever = HCacheRetriever.from_documents(documents, llm=llm, persist_dir="storage")
    app.state.engine = RetrieverQueryEngine.from_args(retriever, llm=llm, streaming=True)
    yield
    llm.close()


app = FastAPI(lifespan=lifespan)


@app.get("/ask")
async def ask(question: str) -> StreamingResponse:
    """The answer, piece by piece."""
    answer = await app.state.engine.aquery(question)
    return StreamingResponse(answer.async_response_gen(), media_type="text/plain")
