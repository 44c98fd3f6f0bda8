"""The offline indexing job: states for many documents, without a retriever.

For programs that retrieve with an index of their own: `hcache-index SOURCE --states DIR` fills a
state store that `HCacheLLM(store=DIR)` reads. SOURCE is a folder of documents, or a file of JSON
lines or Parquet. With --shards, the store is made of shards, which may be filled by many workers:
by this process, one shard after another; by those of SLURM, Kubernetes or torchrun (--shard auto);
or on Ray (--ray). Killed and started again, each goes on where it was. Without it, all texts are in
memory at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from hcache_indexers.workers import Worker, worker_of
from hcache_rag.cli.console import quiet_transformers
from hcache_rag.corpus import Corpus
from hcache_rag.errors import HCacheError
from hcache_rag.indexing import PrecomputeReport
from hcache_rag.models import device_named
from hcache_rag.offline import OnProgress, Progress, ShardReport
from hcache_rag.sequences import BATCH_TOKENS
from hcache_rag.sources import read_folder
from hcache_rag.store.manifest import MANIFEST_FILE, UNIT_DOCUMENTS, Manifest
from hcache_rag.worth import Worth


def index_states(
    source: Path,
    states: Path,
    *,
    model: str | None = None,
    dtype: str = "float32",
    device: str = "auto",
    text_column: str = "text",
    show_progress: bool = False,
) -> PrecomputeReport:
    """Store the states of every document of `source` in a store of one file.

    Args:
        source: a folder, whose files are documents, or a file of JSON lines or Parquet.
        text_column: of the latter.

    Raises:
        SourceError, ModelError, StoreError: see there.
    """
    from hcache_rag.llama_index import HCacheLLM

    texts, skipped = _read(source, text_column)
    llm = HCacheLLM(model, dtype=dtype, device=device, store=states)
    try:
        with tqdm(total=len(texts), unit="doc", disable=not show_progress) as bar:

            def advance(done: int, total: int) -> None:
                bar.total, bar.n = total, done
                bar.refresh()

            report = llm.engine.precompute(texts, on_progress=advance)
            return replace(report, skipped=(*skipped, *report.skipped))
    finally:
        llm.close()


def _read(source: Path, text_column: str) -> tuple[list[str], list[tuple[str, str]]]:
    """All texts, and what was passed over, with the reason."""
    if not source.expanduser().is_file():
        contents = read_folder(source)
        return [file.text for file in contents.files], list(contents.skipped)
    skipped: list[tuple[str, str]] = []
    corpus = Corpus(source.expanduser(), text_column)
    found = [document.text for document in corpus.documents(lambda *it: skipped.append(it))]
    return found, skipped


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of the job."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        device_named(options.device)
    except ValueError as error:
        parser.error(f"argument --device: {error}")
    is_sharded = options.shards or options.shard or options.ray or _is_sharded(options.states)
    for name in () if is_sharded else _SHARDED:
        if getattr(options, name):
            parser.error(f"--{name.replace('_', '-')} goes with --shards")
    try:
        with quiet_transformers():
            (_index_shards if is_sharded else _index_one_file)(options)
    except (HCacheError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; what was stored stays, the next run goes on from there\n")
        sys.exit(130)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hcache-index", description=__doc__)
    add = parser.add_argument
    add("source", type=Path, metavar="SOURCE", help="folder of documents, or a .jsonl or .parquet")
    add("--states", type=Path, required=True, metavar="DIR", help="folder of the state store")
    add("--model", metavar="DIR", help="folder of a transformers model (default: the bundled one)")
    add(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16"],
        help="what the model is loaded as (default: %(default)s)",
    )
    add(
        "--device",
        default="auto",
        metavar="NAME",
        help="cpu, cuda, cuda:1, or auto, a GPU if torch sees one (default: %(default)s)",
    )
    add(
        "--text-column",
        default="text",
        metavar="NAME",
        help="column of JSON lines and Parquet that holds the text (default: %(default)s)",
    )
    add = parser.add_argument_group("shards").add_argument
    add("--shards", type=_positive, metavar="N", help="make a store of so many shards")
    add("--shard", metavar="I/N", help="work as worker I of N (from 0); 'auto' asks the launcher")
    add("--ray", type=_positive, metavar="ACTORS", help="work with so many Ray actors")
    add(
        "--unit-documents",
        type=_positive,
        metavar="N",
        help=f"documents of a unit of work (default: {UNIT_DOCUMENTS})",
    )
    add(
        "--batch-tokens",
        type=_positive,
        metavar="N",
        help=f"tokens that the model reads at once (default: {BATCH_TOKENS})",
    )
    add("--publish", action="store_true", help="make the shards final when they are done")
    add("--price-per-hour", type=float, metavar="X", help="what this machine costs, for the report")
    return parser


_SHARDED = ("unit_documents", "batch_tokens", "publish", "price_per_hour")
"""Options that mean nothing for a store of one file."""


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


_positive.__name__ = "positive number"  # argparse says it


def _is_sharded(states: Path) -> bool:
    return (states.expanduser() / MANIFEST_FILE).is_file()


def _index_one_file(options: argparse.Namespace) -> None:
    report = index_states(
        options.source,
        options.states,
        model=options.model,
        dtype=options.dtype,
        device=options.device,
        text_column=options.text_column,
        show_progress=True,
    )
    for name, reason in report.skipped:
        sys.stderr.write(f"skipped {name}: {reason}\n")
    sys.stdout.write(
        f"{report.stored} stored, {report.reused} were there already, "
        f"{len(report.skipped)} skipped\n"
    )


def _index_shards(options: argparse.Namespace) -> None:
    from hcache_indexers.job import DEFAULT_SHARDS, Job

    given = {"unit_documents": options.unit_documents, "batch_tokens": options.batch_tokens}
    if _is_sharded(options.states):
        there = Manifest.open(options.states.expanduser())
        given["shards"] = options.shards or len(there.shards)
        given["unit_documents"] = options.unit_documents or there.unit_documents
    worker = worker_of(options.shard, os.environ) if options.shard else Worker(0, 1)
    given.setdefault("shards", options.shards or DEFAULT_SHARDS)
    job = Job(
        options.source,
        options.states,
        model=options.model and os.path.abspath(options.model),
        dtype=options.dtype,
        device=options.device,
        text_column=options.text_column,
        **{name: value for name, value in given.items() if value is not None},
    )
    mine, total = worker.shards(job.shards), job.corpus().count()

    def skip(name: str, reason: str) -> None:
        sys.stderr.write(f"skipped {name}: {reason}\n")

    if options.ray:
        from hcache_indexers.ray_data import index_on_ray

        report = index_on_ray(job, actors=options.ray)
    with job.engine() as engine:
        if not options.ray:
            its = total * len(mine) // job.shards
            with _bar(its) as on_progress:
                report = job.run(engine, mine, on_progress=on_progress, on_skip=skip, total=its)
        worth = job.worth(engine, report, options.price_per_hour)
    if options.publish:
        for number in mine:
            job.manifest().shard(number).publish()
    sys.stdout.write("\n".join(report_lines(report, worth)) + "\n")


@contextmanager
def _bar(total: int) -> Iterator[OnProgress]:
    with tqdm(total=total, unit="doc") as bar:

        def advance(progress: Progress) -> None:
            bar.n = progress.documents
            left = "" if progress.left_s is None else f", {progress.left_s:,.0f} s left"
            bar.set_postfix_str(f"{progress.tokens_per_s:,.0f} tokens/s{left}")

        yield advance


def report_lines(report: ShardReport, worth: Worth | None) -> Iterator[str]:
    """A report for people."""
    yield (
        f"{report.documents:,} documents, {report.tokens:,} tokens, {report.num_bytes:,} bytes; "
        f"of these now: {report.new_documents:,}, {report.new_tokens:,}, {report.new_bytes:,}"
    )
    yield (
        f"{report.units:,} units, {report.new_units:,} of them now, in {report.seconds:,.1f} s "
        f"({report.work_s:,.1f} s of work in all)"
    )
    for reason, count in sorted(report.skipped.items()):
        yield f"without a state: {count:,}, {reason}"
    if worth is None:
        return
    cost = worth.cost(report.work_s)
    if cost is not None:
        yield f"cost: {cost:,.2f}, at {worth.price_per_hour:,.2f} an hour"
    uses = worth.break_even_uses
    yield (
        f"a document: {worth.index_s:.3f} s to index; to the first token {worth.fresh_s:.3f} s "
        f"read afresh, {worth.restored_s:.3f} s restored"
    )
    yield (
        "it never pays: restoring takes as long as reading"
        if uses is None
        else f"it pays from {uses:,.1f} uses of a document on"
    )


if __name__ == "__main__":
    main()
