"""On Ray: the indexing job, one of its actors lost; answers from replicas, one of them killed."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote
from urllib.request import urlopen

import pytest
from commands import Run
from fakes import PRINTABLE, WordEmbedding, chat_tokenizer, save_tiny_model
from llama_index.core.query_engine import RetrieverQueryEngine
from test_indexers import shard_bytes
from tiny import SHAPES, attentive_model
from transformers import GenerationConfig

from hcache_indexers.job import Job
from hcache_rag.corpus import Corpus, Document, OnSkip
from hcache_rag.llama_index import HCacheRetriever
from hcache_rag.llama_index.model_choice import ModelChoice
from hcache_rag.store.manifest import Manifest

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = [f"Document {number} has a line of its own." for number in range(23)]
SHARDS, UNIT = 2, 3


@dataclass(frozen=True, slots=True)
class Fatal(Corpus):
    """Kills the process that reads its last document, once."""

    def documents(self, on_skip: OnSkip = lambda _name, _reason: None) -> Iterator[Document]:
        for number, document in enumerate(Corpus.documents(self, on_skip)):
            if number == len(TEXTS) - 1:
                _kill_once(self.path.parent / "killed")
            yield document


@dataclass(frozen=True, slots=True)
class FatalJob(Job):
    """A job whose first actor to come to the end is lost."""

    def corpus(self) -> Corpus:
        return Fatal(self.source, self.text_column)


def _kill_once(mark: Path) -> None:
    try:
        os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def two_processors() -> Iterator[None]:
    """Ray with two processors, as many as there are actors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=100 << 20,
        )
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("job")
    for number, text in enumerate(TEXTS):
        (folder / "docs").mkdir(exist_ok=True)
        (folder / "docs" / f"{number:02}.txt").write_text(text)
    model = str(save_tiny_model(folder / "model"))
    return Job(folder / "docs", folder / "ray", model, shards=SHARDS, unit_documents=UNIT)


@pytest.mark.usefixtures("two_processors")
def test_a_lost_actor_costs_its_unit_and_the_bytes_are_the_same(job: Job) -> None:
    """Two actors on two processors. One is killed when all but its last unit are written down."""
    from hcache_indexers.ray_data import index_on_ray

    fatal = FatalJob(**{name: getattr(job, name) for name in Job.__dataclass_fields__})
    report = index_on_ray(fatal, actors=2)
    assert (job.source.parent / "killed").is_file()
    assert report.documents == len(TEXTS)
    units = [len(shard.units()) for shard in Manifest.open(job.states).shards]
    assert report.units == sum(units)
    # What the lost actor had written down was not done again.
    lost = report.units - report.new_units
    assert lost >= min(units) - 1 > 0
    lines = [(shard.folder / "units.jsonl").read_text() for shard in job.manifest().shards]
    assert [text.count('"id"') for text in lines] == units

    alone = Job(job.source, job.source.parent / "alone", job.model, "float32", "text", SHARDS, UNIT)
    with alone.engine() as engine:
        alone.run(engine, range(SHARDS))
    assert shard_bytes(alone.states) == shard_bytes(job.states)


@pytest.mark.parametrize(("cpus", "actors"), [(2, 2), (1, 1), (1, 4), (64, 8), (16, 3)])
def test_actors_leave_a_processor_to_ray_itself(cpus: int, actors: int) -> None:
    """Where they are so many that nothing would be left, they take next to nothing."""
    from hcache_indexers.ray_data import cpus_of_actor

    taken = actors * cpus_of_actor(cpus, actors)
    assert 0 < taken <= max(cpus - 1, 0.01 * actors)


def test_no_actors_are_an_error(job: Job) -> None:
    from hcache_indexers.ray_data import index_on_ray

    with pytest.raises(ValueError, match="0 actors"):
        index_on_ray(job, actors=0)


# --- answers ------------------------------------------------------------------------------------

EXAMPLE = Path(__file__).parent.parent / "examples" / "serve.py"
PATIENCE_S = 60.0


class Noted:
    """A synthesizer that writes down which process is asked what."""

    def __init__(self, inner: Any, notes: Path) -> None:
        self._inner = inner
        self._notes = notes

    async def asynthesize(self, question: str, nodes: Any) -> Any:
        with self._notes.open("a") as file:
            file.write(f"{os.getpid()} {question}\n")
        return await self._inner.asynthesize(question, nodes)


@pytest.fixture
def storage(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An index of all texts, in shards, made by the command of the example."""
    model = tmp_path / "model"
    attentive_model(SHAPES[1]).save_pretrained(model)
    chat_tokenizer().save_pretrained(model)
    config: Any = GenerationConfig
    config(**PRINTABLE).save_pretrained(model)
    (tmp_path / "docs").mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / "docs" / f"{number:02}.txt").write_text(text)
    monkeypatch.chdir(tmp_path)
    arguments = ("--store", "storage", "--model", model, "--shards", str(SHARDS), "--no-measure")
    done = run("index", "docs", *arguments)
    assert done.code == 0
    return tmp_path / "storage"


@pytest.fixture
def example(storage: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The example, with an embedding that needs no model, and notes."""
    spec = importlib.util.spec_from_file_location("example_of_serving", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    ray.cloudpickle.register_pickle_by_value(module)
    made, notes = module.get_response_synthesizer, storage / "notes.txt"
    monkeypatch.setattr(
        module, "get_response_synthesizer", lambda **options: Noted(made(**options), notes)
    )
    monkeypatch.setattr(module, "default_embedding", lambda: WordEmbedding("all-MiniLM-L6-v2"))
    return module


@pytest.fixture
def url(example: Any, two_processors: None) -> Iterator[str]:
    """Where the example answers."""
    serve = pytest.importorskip("ray.serve", reason="no extra serve")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(example.app)
    yield f"http://127.0.0.1:{port}/?question="
    serve.shutdown()


def test_replicas_answer_as_one_process_and_each_has_its_documents(url: str, storage: Path) -> None:
    """Reference path: a query engine in this process. One of two replicas is killed in between."""

    def ask(question: str) -> str:
        text: str = urlopen(url + quote(question), timeout=PATIENCE_S).read().decode()
        return text

    questions = [f"Which document is number {number}?" for number in range(len(TEXTS))]
    with ModelChoice.of(storage).load(storage, max_new_tokens=40) as llm:
        embedding = WordEmbedding("all-MiniLM-L6-v2")
        retriever = HCacheRetriever.from_persist_dir(storage, llm=llm, embed_model=embedding)
        engine = RetrieverQueryEngine.from_args(retriever, llm=llm)
        expected = [str(engine.query(question)) for question in questions]
        best = [retriever.retrieve(question)[0].node_id for question in questions]
    assert len(set(expected)) > len(TEXTS) // 2

    assert [ask(question) for question in questions] == expected
    assert [ask(question) for question in questions] == expected
    asked_of: dict[str, set[int]] = {}
    for line in (storage / "notes.txt").read_text().splitlines():
        pid, _, question = line.partition(" ")
        asked_of.setdefault(best[questions.index(question)], set()).add(int(pid))
    assert {len(pids) for pids in asked_of.values()} == {1}
    replicas = set().union(*asked_of.values())
    assert len(replicas) == 2

    lost = replicas.pop()
    os.kill(lost, signal.SIGKILL)
    for question, document, text in zip(questions, best, expected, strict=True):
        if asked_of[document] == {lost}:  # which the other one is asked for the first time now
            assert ask(question) == text
