"""The indexing job on Ray Data: a pool of actors, each with the model loaded once.

A row of the dataset is the number of a shard. The actor that gets it writes the shard itself and
gives back its report, a few hundred bytes: no text and no state goes through the object store. A
shard that is begun again, because its actor or node was lost, goes on behind the last unit that is
written down; other actors never wait for it.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import ray
import ray.data

from hcache_indexers.job import Job
from hcache_rag.offline import ShardReport

SPARE_CPUS = 1.0
"""Processors that actors leave to Ray's own tasks: these would wait for ever for one of theirs."""


class ShardIndexer:
    """The actor: reads documents for one shard after another."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._open = ExitStack()
        self._engine = self._open.enter_context(job.engine())

    def __call__(self, rows: dict[str, Any]) -> dict[str, list[str]]:
        """Index the shards of some rows; a report for each."""
        reports = [self._job.run(self._engine, [int(number)]) for number in rows["shard"]]
        return {"report": [json.dumps(asdict(report)) for report in reports]}


def index_on_ray(job: Job, *, actors: int, gpus: float = 0.0) -> ShardReport:
    """Index all shards with a pool of actors; the states' folder must be one that all nodes see.

    Ray is started on this machine if the program has not connected to a cluster.

    Args:
        actors: that work at once; each holds the model.
        gpus: of each actor.
    """
    if actors < 1:
        raise ValueError(f"{actors} actors do nothing")
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False)
    job.manifest()
    rows = [{"shard": number} for number in range(job.shards)]
    done = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        ShardIndexer,
        fn_constructor_args=(job,),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=cpus_of_actor(_cpus(), actors),
        num_gpus=gpus,
    )
    report = ShardReport()
    for row in done.iter_rows():
        report = report.plus(ShardReport(**json.loads(row["report"])))
    return report


def _cpus() -> float:
    resources: Any = ray.cluster_resources  # without types
    return float(resources().get("CPU", 1.0))


def cpus_of_actor(cpus: float, actors: int) -> float:
    """What each actor takes of a cluster's processors, so that `SPARE_CPUS` are left."""
    return max(0.01, int(100 * max(0.0, cpus - SPARE_CPUS) / actors) / 100)
