"""Several processes answer from one folder of shards; a document is always asked of the same one.

pip install 'hcache-rag[serve]' && hcache-rag index examples/solar_system --store storage --shards 4
serve run --app-dir examples serve:app
curl -N 'localhost:8000/?question=How+long+is+a+day+on+Venus'
"""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from llama_index.core import get_response_synthesizer
from ray import serve
from starlette.responses import StreamingResponse

from hcache_rag.llama_index import default_embedding
from hcache_rag.llama_index.model_choice import ModelChoice
from hcache_rag.llama_index.persisted import load_index
from hcache_rag.llama_index.vectors import VectorRetriever

BY_SESSION = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"


@serve.deployment(num_replicas=2, request_router_config={"request_router_class": BY_SESSION})
class Answers:
    """The model; all of its processes have all shards open."""

    def __init__(self, folder: Path) -> None:
        llm = ModelChoice.of(folder).load(folder, max_new_tokens=40)
        self.synthesizer = get_response_synthesizer(llm=llm, streaming=True)

    async def answer(self, question: str, nodes: Any) -> AsyncIterator[str]:
        answer: Any = await self.synthesizer.asynthesize(question, nodes)
        async for piece in answer.async_response_gen():
            yield piece


@serve.deployment(ray_actor_options={"num_cpus": 0})
class Questions:
    """Finds the documents, and asks the process that has read the best of them before."""

    def __init__(self, folder: Path, answers: Any) -> None:
        self.retriever = VectorRetriever(load_index(folder), default_embedding(), 4)
        self.answers = answers.options(stream=True)

    async def __call__(self, request: Any) -> StreamingResponse:
        question = request.query_params["question"]
        nodes = await self.retriever.aretrieve(question)
        near = self.answers.options(session_id=nodes[0].node_id)
        return StreamingResponse(near.answer.remote(question, nodes), media_type="text/plain")


FOLDER = Path("storage").absolute()
app = Questions.bind(FOLDER, Answers.bind(FOLDER))  # type: ignore[attr-defined]
