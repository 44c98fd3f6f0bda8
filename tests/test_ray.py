"""The job on Ray: the bytes of every other driver, on all processors, one of its actors lost."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from fakes import save_tiny_model
from test_indexers import shard_bytes

from hcache_indexers.job import Job
from hcache_rag.corpus import Corpus, Document, OnSkip
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
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
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
