"""What is a graph of vectors worth, and what is reading states ahead?

    python benchmarks/bench_retrieval.py [--quick] [--json]

The nearest ten of many vectors of 384 dimensions, in unequal clusters of 80 effective dimensions as
sentence embeddings have them: comparing with all, and a graph (HNSW), also after every tenth was
deleted. Time of a search, of building, and the share of the true ten that is found.

Then SmolLM2-135M-Instruct over the Solar System passages, top-4, states that no memory holds yet:
seconds from the question to the first token with reading ahead and without, interleaved, the store
opened anew each time and its file dropped from the page cache.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from common import ROOT, arguments, at_least, finish, machine, quiet_transformers, ratio_of_pairs
from llama_index.core.query_engine import RetrieverQueryEngine

from hcache_rag.bundled import default_model_path
from hcache_rag.llama_index import HCacheLLM, HCacheRetriever
from hcache_rag.llama_index.folder import answer, documents_of
from hcache_rag.llama_index.nearest import Nearest, Vectors
from hcache_rag.llama_index.persisted import load_index
from hcache_rag.measure import drop_page_cache
from hcache_rag.models import load_model
from hcache_rag.sources import FolderContents, read_folder

D, EFFECTIVE, CLUSTERS = 384, 80, 2000
QUERIES, TOP_K = 100, 10


def vectors(count: int) -> Vectors:
    random = np.random.default_rng(0)
    basis = random.normal(size=(EFFECTIVE, D)) / np.sqrt(EFFECTIVE)
    centres = random.normal(size=(CLUSTERS, EFFECTIVE))
    its = random.choice(CLUSTERS, count, p=random.dirichlet(np.full(CLUSTERS, 0.5)))
    found = (centres[its] + 0.9 * random.normal(size=(count, EFFECTIVE))) @ basis
    found += 0.015 * random.normal(size=(count, D))
    normal: Vectors = (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)
    return normal


def searching(count: int) -> list[dict[str, Any]]:
    held = vectors(count + QUERIES)
    queries, held = held[count:], held[:count]
    rows, exact = list[dict[str, Any]](), Nearest("flat")
    for kind in ("flat", "hnsw"):
        index = exact if kind == "flat" else Nearest("hnsw")
        began = time.perf_counter()
        index.add(range(count), held)
        build_s = time.perf_counter() - began
        rows.append(measured(kind, index, exact, queries, count, build_s))
        if kind == "hnsw":
            gone = range(0, count, 10)
            exact.remove(gone)
            index.remove(gone)
            rows.append(measured("hnsw, a tenth deleted", index, exact, queries, count, build_s))
    return rows


def measured(
    kind: str, index: Nearest, exact: Nearest, queries: Vectors, count: int, build_s: float
) -> dict[str, Any]:
    seconds, recalls = [], []
    for query in queries:
        began = time.perf_counter()
        found = index.search(query, TOP_K)
        seconds.append(time.perf_counter() - began)
        best = {number for number, _ in exact.search(query, TOP_K)}
        recalls.append(len(best & {number for number, _ in found}) / TOP_K)
    row: dict[str, Any] = {
        "what": "search",
        "kind": kind,
        "vectors": count,
        "search_s": statistics.median(seconds),
        "build_s": build_s,
        "recall_at_10": statistics.fmean(recalls),
    }
    print(
        f"  {count:7,} {kind:22} {row['search_s'] * 1e3:8.2f} ms  built in {build_s:6.1f} s"
        f"  recall@10 {row['recall_at_10']:.3f}"
    )
    return row


def reading_ahead(folder: Path, repeats: int, quick: bool) -> tuple[dict[str, Any], float]:
    model, tokenizer = load_model(str(default_model_path()))
    files = read_folder(ROOT / "examples" / "solar_system").files
    files = files[:8] if quick else files
    options: dict[str, Any] = {
        "model": model,
        "tokenizer": tokenizer,
        "fidelity": "none",
        "max_new_tokens": 1,
        "storage_dtype": "float32",
    }
    llm = HCacheLLM(**options)
    made = HCacheRetriever.from_documents(
        documents_of(FolderContents(files, ())), llm=llm, persist_dir=folder
    )
    embed_model = made._own.embed_model
    llm.close()
    questions = [node.get_content().split(".")[0] for node in load_index(folder).nodes]
    samples: dict[bool, list[float]] = {False: [], True: []}
    waited: dict[bool, list[float]] = {False: [], True: []}
    read: dict[bool, list[float]] = {False: [], True: []}
    for run in range(-1, repeats):  # the first round warms up
        for prefetch in samples:
            llm = HCacheLLM(store=folder / "states", **options)
            retriever = HCacheRetriever.from_persist_dir(
                folder, llm=llm, embed_model=embed_model, prefetch=prefetch
            )
            drop_page_cache(folder / "states" / "data.mdb")
            engine = RetrieverQueryEngine.from_args(retriever, llm=llm, streaming=True)
            found = answer(engine, questions[run % len(questions)])
            llm.close()
            if run >= 0:
                samples[prefetch].append(found.provenance["seconds"]["first_token"])
                waited[prefetch].append(found.provenance["seconds"]["waiting"])
                read[prefetch].append(found.provenance["seconds"]["reading"])
    for prefetch, seconds in samples.items():
        print(
            f"  {'read ahead' if prefetch else 'read when restored':20}"
            f" {statistics.median(seconds) * 1e3:8.1f} ms to the first token; the lane reads for"
            f" {statistics.median(read[prefetch]) * 1e3:6.1f}, the model waits"
            f" {statistics.median(waited[prefetch]) * 1e3:6.1f}"
        )
    ratio = ratio_of_pairs(samples[False], samples[True])
    row: dict[str, Any] = {
        "what": "prefetch, cold",
        "without_s": statistics.median(samples[False]),
        "with_s": statistics.median(samples[True]),
        "waiting_without_s": statistics.median(waited[False]),
        "waiting_with_s": statistics.median(waited[True]),
        "reading_without_s": statistics.median(read[False]),
        "reading_with_s": statistics.median(read[True]),
        "reading_without_over_with": ratio_of_pairs(read[False], read[True]),
        "without_over_with": ratio,
    }
    faster = float(row["reading_without_over_with"])
    print(f"  without / with: first token {ratio:.2f}x, reading {faster:.2f}x")
    return row, faster


def main() -> None:
    parser = arguments(__doc__.splitlines()[0] if __doc__ else None)
    options = parser.parse_args()
    quiet_transformers()
    faiss.omp_set_num_threads(1)
    rows: list[dict[str, Any]] = []
    print("The nearest ten, one thread:")
    for count in (5_000,) if options.quick else (10_000, 50_000, 100_000):
        rows += searching(count)
    recall = min(row["recall_at_10"] for row in rows)
    print("From the retrieved nodes to the first token, from a cold page cache:")
    with tempfile.TemporaryDirectory(prefix="bench-index-") as folder:
        row, faster = reading_ahead(Path(folder), 3 if options.quick else 15, options.quick)
    rows.append(row)
    targets = [
        at_least("recall@10 of a graph", recall, 0.98),
        at_least("cold, the lane's reading: without / with reading ahead", faster, 1.0),
    ]
    finish(rows, targets, machine(), options.json)


if __name__ == "__main__":
    main()
