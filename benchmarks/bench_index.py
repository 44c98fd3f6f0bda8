"""How fast are documents indexed, alone and by two workers, and what do kills and many shards cost?

  python benchmarks/bench_index.py [--quick] [--json] [--documents N]

indexing   passages into a shard (captured, quantised, written and synced), against a bare prefill
           of the same batches with nothing kept; the real model, A and B take turns
two        two worker processes of one thread each, against one: passages a second of both
           together, from when the models are loaded until both have ended
kills      a worker is killed again and again until it gets through: what was read twice; a tiny
           model
million    documents with small values in 16 shards: opening the store and searching the first
           prompt in a process of its own, the next prompts, and reading all values of a document
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import torch
from bench_store import ROOT as STATE_ROOT
from bench_store import texts
from common import ROOT, arguments, at_least, at_most, finish, machine, quiet_transformers, summary

from hcache_indexers.job import Job
from hcache_rag import HCacheEngine, StateStore
from hcache_rag.layout import LayerFormat, Representation, StateLayout
from hcache_rag.offline import index_shard
from hcache_rag.sequences import PendingState, alone, batches
from hcache_rag.sources import read_folder
from hcache_rag.state import StateRecord, child_key, token_array
from hcache_rag.store import NewState
from hcache_rag.store.manifest import Manifest
from hcache_rag.texts import find_texts

SHARDS = 16
WORDS = 340
"""Of a passage: some 512 tokens."""


def main() -> None:
    parser = arguments(__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--documents", type=int, help="default 1,000,000, with --quick 20,000")
    parser.add_argument("--only", choices=["indexing", "two", "kills", "million"])
    parser.add_argument("--open", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.open:
        print(json.dumps(opened(Path(options.open))))
        return
    quiet_transformers()
    torch.set_num_threads(1)
    rows, targets = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def wanted(part: str) -> bool:
            return options.only in (None, part)

        if wanted("indexing"):
            row = indexing(folder, 8 if options.quick else 16, 2 if options.quick else 5)
            rows.append(row)
            targets.append(at_least("indexing, of a bare prefill", row["ratio"], 0.9))
            targets.append(at_least("the same by processor seconds", row["cpu_ratio"], 0.9))
        if wanted("two"):
            rows.append(two_workers(folder, 8 if options.quick else 32))
        if wanted("kills"):
            row = kills(folder, 200 if options.quick else 2_000, 5 if options.quick else 20)
            rows.append(row)
            targets.append(at_most("most read twice at a kill, in units", row["units_a_kill"], 1.0))
        if wanted("million"):
            rows.append(many(folder, options.documents or (20_000 if options.quick else 1_000_000)))
    finish(rows, targets, machine(), options.json)


def passages(count: int) -> list[str]:
    """Of some 512 tokens, each another one, out of the texts that the project ships."""
    files = read_folder(ROOT / "examples" / "solar_system").files
    words = " ".join(file.text for file in files).split()
    chance = random.Random(0)
    starts = [chance.randrange(len(words) - WORDS) for _ in range(count)]
    return [f"Passage {n}. " + " ".join(words[s : s + WORDS]) for n, s in enumerate(starts)]


def indexing(folder: Path, count: int, repeats: int) -> dict[str, Any]:
    """Passages a second, indexed and only read."""
    job, every = Job(folder, folder / "states"), passages(count)
    ours, bare = [], []
    with job.engine() as engine:
        tokens = [engine.document_tokens(text) for text in every]
        rows = [alone(PendingState(engine.root, ids, "")) for ids in tokens]
        ids = [[row.token_ids.tolist() for row in batch] for batch in batches(rows)]
        preamble = engine.adapter.prefill(engine.prompt_tokens(engine.preamble).tolist())
        for number in range(repeats + 1):
            started = _now()
            for batch in ids:
                engine.adapter.read_batch(batch, preamble)
            bare.append(_since(started))
            manifest = Manifest.create(folder / f"indexing {number}", 1)
            started = _now()
            index_shard(every, 0, manifest, engine)
            ours.append(_since(started))
            shutil.rmtree(manifest.path.parent)
    pairs = list(zip(ours[1:], bare[1:], strict=True))
    ratio = statistics.median(b / a for (a, _), (b, _) in pairs)
    cpu_ratio = statistics.median(b / a for (_, a), (_, b) in pairs)
    num_tokens = sum(map(len, tokens)) / count
    indexed, read = ([count / wall for wall, _ in times[1:]] for times in (ours, bare))
    print(
        f"indexing  {statistics.median(indexed):.2f} passages of {num_tokens:.0f} tokens a second, "
        f"bare prefill {statistics.median(read):.2f}; ratio {ratio:.3f}, "
        f"of processor seconds {cpu_ratio:.3f}"
    )
    return {
        "part": "indexing",
        "ratio": ratio,
        "cpu_ratio": cpu_ratio,
        "indexed_per_s": summary(indexed),
        "bare_per_s": summary(read),
    }


def _now() -> tuple[float, float]:
    """Seconds of the wall's clock, and of this process on a processor."""
    return time.perf_counter(), time.process_time()


def _since(then: tuple[float, float]) -> tuple[float, float]:
    wall, processor = _now()
    return wall - then[0], processor - then[1]


def two_workers(folder: Path, count: int) -> dict[str, Any]:
    """Passages a second of one worker and of two, each of one thread."""
    source = folder / "passages.jsonl"
    with source.open("w") as file:
        for text in passages(count):
            file.write(json.dumps({"text": text}) + "\n")
    rates = {}
    for workers in (1, 2):
        job = Job(source, folder / f"{workers} workers", shards=2, unit_documents=4)
        job.manifest()
        context = multiprocessing.get_context("spawn")
        barrier = context.Barrier(workers + 1)
        processes = [
            context.Process(target=_work, args=(job, range(number, 2, workers), barrier))
            for number in range(workers)
        ]
        for process in processes:
            process.start()
        barrier.wait(timeout=300)
        started = time.perf_counter()
        for process in processes:
            process.join(timeout=900)
        rates[workers] = count / (time.perf_counter() - started)
    print(
        f"two       {rates[2]:.2f} passages a second by two workers, {rates[1]:.2f} by one; "
        f"{rates[2] / rates[1]:.2f} times"
    )
    return {"part": "two", "one_per_s": rates[1], "two_per_s": rates[2]}


def _work(job: Job, shards: Sequence[int], ready: Barrier) -> None:
    torch.set_num_threads(1)
    with job.engine() as engine:
        ready.wait(timeout=300)
        job.run(engine, list(shards))


def kills(folder: Path, count: int, times: int) -> dict[str, Any]:
    """A worker that is killed so many times, at random moments, then left to end."""
    every = [text[: 200 + 31 * n % 400] for n, text in enumerate(texts(count))]
    manifest = Manifest.create(folder / "kills", 1, unit_documents=50)
    with tiny_engine() as engine:
        started = time.perf_counter()
        index_shard(every, 0, Manifest.create(folder / "unkilled", 1, 50), engine)
        whole_s = time.perf_counter() - started
        chance, read_s = random.Random(1), 0.0
        for _ in range(times):
            child = os.fork()
            if not child:
                torch.set_num_threads(1)
                index_shard(every, 0, manifest, engine)
                os._exit(0)
            begun = time.perf_counter()
            time.sleep(chance.uniform(0.2, 2.0) * whole_s / times)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            read_s += time.perf_counter() - begun
        begun = time.perf_counter()
        report = index_shard(every, 0, manifest, engine)
        read_s += time.perf_counter() - begun
    unit_s = whole_s / (count / 50)
    lost = max(0.0, read_s - whole_s) / unit_s / times
    print(
        f"kills     {times} kills: {report.documents:,} documents in {read_s:.1f} s, "
        f"{whole_s:.1f} s without; {lost:.2f} units of {unit_s:.2f} s lost at each"
    )
    return {"part": "kills", "kills": times, "seconds": read_s, "units_a_kill": lost}


@contextmanager
def tiny_engine() -> Iterator[HCacheEngine]:
    """A random model that reads a passage in milliseconds."""
    sys.path.insert(0, str(ROOT / "tests"))
    from tiny import SHAPES, byte_tokenizer, tiny_model

    with StateStore.in_memory() as nowhere:
        yield HCacheEngine(tiny_model(SHAPES[1]), byte_tokenizer(), nowhere, preamble="Read: ")


LAYOUT = StateLayout((LayerFormat(Representation.KV, "int8"),) * 2)


def many(folder: Path, documents: int) -> dict[str, Any]:
    """A store of so many documents in 16 shards, and a process that opens it."""
    manifest = Manifest.create(folder / "many", SHARDS)
    ids, at_once = token_array(range(200)), []
    started = time.perf_counter()
    with StateStore.open(manifest.path, durability="fast") as store:
        for number, text in enumerate(texts(documents)):
            tokens = token_array([number, *ids])
            key = child_key(STATE_ROOT, tokens)
            record = StateRecord(key, STATE_ROOT, STATE_ROOT, tokens, text, LAYOUT, 1.0)
            at_once.append(NewState(record, [(0, 0, b"x" * 64), (1, 0, b"y" * 64)]))
            if len(at_once) == 20_000:
                store.put_all(at_once)
                at_once = []
        store.put_all(at_once)
    for shard in manifest.shards:
        shard.publish()
    filled_s = time.perf_counter() - started
    command = [sys.executable, __file__, "--open", str(manifest.path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(
        f"million   {documents:,} documents in {SHARDS} shards (filled in {filled_s:.0f} s): "
        f"opened and searched a first prompt in {found['open_s']:.2f} s; the next ten documents "
        f"found in {1e3 * found['match_s']:.1f} ms, their values read in "
        f"{1e3 * found['read_s']:.2f} ms"
    )
    return {"part": "million", "documents": documents, "shards": SHARDS, **found}


def opened(manifest: Path) -> dict[str, float]:
    """What a process sees that opens the store for the first time."""
    prompts = []
    every = [text for _, text in zip(range(10_000), texts(10_000), strict=False)]
    chance = random.Random(2)
    for _ in range(20):
        prompts.append("\n\n".join(["Read this.", *chance.sample(every, 10), "What?"]))
    started = time.perf_counter()
    with StateStore.open(manifest, read_only=True) as store:
        first = find_texts(prompts[0], [store])
        open_s = time.perf_counter() - started
        if len(first) != 10:
            raise RuntimeError(f"{len(first)} of 10 documents were found")
        matching, reading = [], []
        for prompt in prompts[1:]:
            started = time.perf_counter()
            records = [store.find(match.text)[0] for match in find_texts(prompt, [store])]
            matching.append(time.perf_counter() - started)
            keys = [record.key for record in records]
            started = time.perf_counter()
            with store.reading(keys) as reader:
                for key in keys:
                    for layer in range(2):
                        bytes(reader.value(key, layer, 0))
            reading.append(time.perf_counter() - started)
    return {
        "open_s": open_s,
        "match_s": statistics.median(matching),
        "read_s": statistics.median(reading),
    }


if __name__ == "__main__":
    main()
