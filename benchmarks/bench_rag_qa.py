"""Are answers from restored documents as good as full prefill's, and peers'?

    python benchmarks/bench_rag_qa.py [--data FILE] [--records N] [--half odd|even] [--retrieve K]
                                      [--read WAYS] [--out FILE]
                                      [--context-at-index none|documents|both]
                                      [--order random|alike]
                                      [--figure FILE] [--quick] [--json]

HotpotQA, SQuAD, MuSiQue, NQ-open and LongBench files; SmolLM2-135M-Instruct or `--model`. Each
prompt is read in every way that follows, one after another:

  full            full prefill by transformers: the reference
  top 1, 2, 4     full prefill of the passages most like the question: what one could do instead
  none            restored, nothing read again
  epic, blend     peers at the balanced budget, see peers.py
  fast, balanced, high   last-row repair of 5, 15, 30 %
  10 %            two thirds of balanced
  exact           restored is only what follows its own words
  none +, ...     the same with passages that were read one behind another when they were indexed
                  (--context-at-index both), shuffled or each behind the most similar one (--order)

For each: F1 and EM as SQuAD counts them, whether a gold answer is in the answer, ROUGE-L against
the full answer; KL of the next token against `full`, at the first token and over its whole answer;
the same most probable first token; log-likelihood of the gold answer, per token, less that of
`full`; tokens read; seconds to the first token. Intervals are paired bootstraps, 95 %.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from common import ROOT, Target, arguments, at_most, finish, machine, quiet_transformers
from peers import cacheblend, epic_positions
from qa import exact_match, f1, substring_match

from hcache_rag import HCacheEngine, SourceError
from hcache_rag.bundled import default_model_path
from hcache_rag.judge import Judge, Judgement
from hcache_rag.models import load_model
from hcache_rag.quality import bootstrap_interval
from hcache_rag.questions import Record, read_records
from hcache_rag.repair import FIDELITY_SHARES
from hcache_rag.trial import Reading, Trial, read_as_a_whole, trying

PREAMBLE = "Answer the question from the passages in a few words.\n\n"
NEW_TOKENS = 16
BALANCED = FIDELITY_SHARES["balanced"]
QUALITY = ("f1", "em", "in_answer", "rouge_l", "kl_first", "kl", "top1", "gold")
METRICS = (*QUALITY, "tokens", "seconds")
WAYS = ("top", "epic", "blend", "fast", "10 %", "balanced", "high", "exact")
DECIDING = (
    *(Path(__file__).with_name(name) for name in ("bench_rag_qa.py", "peers.py", "qa.py")),
    *(ROOT / "hcache_rag" / name for name in ("judge.py", "questions.py", "trial.py")),
)
"""Files that decide the numbers."""

Context = Literal["none", "documents"]
CONTEXTS: tuple[Context, ...] = ("none", "documents")
REPAIRED = ("none", *FIDELITY_SHARES, "10 %")
Row = dict[str, float]


def main() -> None:
    options = parsed()
    quiet_transformers()
    records = chosen(options)
    model, tokenizer = load_model(options.model or str(default_model_path()), dtype="float32")
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-rag-qa-"))
        engines = {
            context: stack.enter_context(
                HCacheEngine(
                    model,
                    tokenizer,
                    Path(folder) / context,
                    preamble=PREAMBLE,
                    storage_dtype=options.storage_dtype,
                    fidelity="none",
                    context_at_index=context,
                )
            )
            for context in CONTEXTS
            if options.context_at_index in (context, "both")
        }
        mark = fingerprint(next(iter(engines.values())), options)
        done = already(options.out, mark)
        if not all(record.id in done for record in records):
            for engine in engines.values():
                engine.precompute(ordered(records, options.order))
        for number, record in enumerate(records):
            if record.id not in done:
                done[record.id] = judged(engines, record, options.read)
                keep(options.out, mark, record.id, done[record.id])
                if not options.quick:
                    print(f"{number + 1} of {len(records)}", end="\r", flush=True)
    results = {record.id: done[record.id] for record in records}
    rows = table(results)
    show(rows, len(results))
    if options.figure:
        draw(rows, options.figure)
    facts = {**machine(), "run": mark, "records": len(results)}
    finish(rows, targets(results), facts, options.json)


def parsed() -> argparse.Namespace:
    parser = arguments(__doc__.splitlines()[0] if __doc__ else None)
    default = ROOT.parent / "shared" / "data" / "hotpotqa_100.json"
    parser.add_argument("--data", type=Path, default=default)
    parser.add_argument("--model", help="a folder; by default the bundled SmolLM2")
    parser.add_argument("--storage-dtype", default="float32", help="what states are kept in")
    parser.add_argument("--records", type=int, help="so many; with --quick 1")
    parser.add_argument("--read", nargs="+", default=WAYS, help="some of the ways only")
    parser.add_argument(
        "--context-at-index",
        choices=(*CONTEXTS, "both"),
        default="both",
        help="what passages are read after, besides the preamble; with both, one after the other",
    )
    parser.add_argument(
        "--order",
        choices=("random", "alike"),
        default="random",
        help="of all passages when they are indexed: shuffled, or each behind the most similar one",
    )
    parser.add_argument("--half", choices=("odd", "even"), help="every other record only")
    parser.add_argument("--retrieve", type=int, help="so many passages out of all in the file")
    parser.add_argument("--out", type=Path, help="keeps each record's results, to go on later")
    parser.add_argument("--figure", type=Path, help="quality against tokens, as PNG")
    options = parser.parse_args()
    if options.quick and options.read == WAYS:
        options.read = [way for way in WAYS if way not in ("top", "high")]
    if not options.data.is_file():
        raise SystemExit(f"{options.data} is no file; see --data")
    return options


def chosen(options: argparse.Namespace) -> list[Record]:
    try:
        records = [record for record in read_records(options.data) if record.answers]
    except SourceError as error:
        raise SystemExit(str(error)) from error
    if options.half:
        records = records[options.half == "odd" :: 2]
    records = records[: options.records or (1 if options.quick else None)]
    return retrieved(records, options.retrieve) if options.retrieve else records


def retrieved(records: Sequence[Record], top_k: int) -> list[Record]:
    """The same questions, with the passages that are found for them among those of all."""
    passages = list(dict.fromkeys(p for record in records for p in record.passages))
    vectors, questions = embedded(passages), embedded([record.question for record in records])
    import faiss

    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    _, found = index.search(questions, top_k)
    return [
        Record(r.id, r.question, r.answers, tuple(passages[n] for n in numbers), r.kind)
        for r, numbers in zip(records, found, strict=True)
    ]


def ordered(records: Sequence[Record], order: str) -> list[str]:
    """All passages, in an order that is not the prompts'."""
    passages = list(dict.fromkeys(p for record in records for p in record.passages))
    random.Random(0).shuffle(passages)
    return passages if order == "random" else each_behind_its_like(passages)


def each_behind_its_like(passages: Sequence[str]) -> list[str]:
    """The passages, each behind the one most like it of those that are left."""
    vectors = embedded(passages)
    left = np.ones(len(passages), bool)
    last, path = 0, [0]
    while len(path) < len(passages):
        left[last] = False
        last = int(np.where(left, vectors @ vectors[last], -2.0).argmax())
        path.append(last)
    return [passages[number] for number in path]


def embedded(texts: Sequence[str]) -> Any:
    """Unit vectors, (n, E)."""
    vectors = np.asarray(embedding().get_text_embedding_batch(list(texts)), np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@cache
def embedding() -> Any:
    """The bundled one, loaded once."""
    from hcache_rag.llama_index.defaults import default_embedding

    return default_embedding()


def prompt_of(passages: Sequence[str], question: str) -> str:
    return f"{PREAMBLE}{chr(10).join(p + chr(10) for p in passages)}\nQuestion: {question}\nAnswer:"


def judged(
    engines: dict[Context, HCacheEngine], record: Record, wanted: Sequence[str]
) -> dict[str, Row]:
    """One record, read in every way that is wanted."""
    (engine, *others) = engines.values()
    with trying(engine, prompt_of(record.passages, record.question), room_tokens=64) as trial:
        token_ids = trial.composition.token_ids.tolist()
        with read_as_a_whole(engine.adapter, token_ids) as (reader, reading):
            judge = Judge(
                engine,
                reader,
                reading,
                gold=f" {record.answers[0]}",
                max_new_tokens=NEW_TOKENS,
                is_line=True,
            )
        rows = {"full": scored(judge.full, record)}
        for count, passages in fewer(record).items() if "top" in wanted else ():
            ids = engine.prompt_tokens(prompt_of(passages, record.question)).tolist()
            with read_as_a_whole(engine.adapter, ids) as (reader, reading):
                rows[f"top {count}"] = scored(judge.judge(reader, reading), record)
        for name, read in ways_of(engine, trial).items():
            if name in ("none", *wanted):
                rows[name] = scored(judge.judge(trial, read()), record)
    for other in others:
        with trying(other, prompt_of(record.passages, record.question), room_tokens=64) as trial:
            for name, read in ways_of(other, trial).items():
                if name in ("none", *wanted) and name in REPAIRED:
                    rows[f"{name} +"] = scored(judge.judge(trial, read()), record)
    return rows


def scored(judgement: Judgement, record: Record) -> Row:
    """A judgement in numbers, and its answer against the gold ones."""
    answer, golds = judgement.answer, record.answers
    return {
        "f1": f1(answer, golds),
        "em": exact_match(answer, golds),
        "in_answer": substring_match(answer, golds),
        "rouge_l": judgement.rouge_l,
        "kl_first": judgement.kl_first,
        "kl": judgement.kl,
        "top1": judgement.top1,
        "gold": -judgement.nll,
        "tokens": float(judgement.tokens),
        "seconds": judgement.seconds,
    }


def ways_of(engine: HCacheEngine, trial: Trial) -> dict[str, Callable[[], Reading]]:
    """Each way's reading, with the seconds of restoring."""
    budget = round(BALANCED * len(trial.relocated))

    def peer(read: Callable[[], Reading]) -> Reading:
        restoring_s = max(0.0, trial.scoring_s - trial.repair(0.0).seconds)
        reading = read()
        return replace(reading, seconds=reading.seconds + restoring_s)

    return {
        "none": lambda: trial.at("none"),
        "epic": lambda: peer(lambda: trial.read(epic_positions(trial, budget))),
        "blend": lambda: peer(lambda: cacheblend(engine.adapter, trial, budget)),
        **{name: partial(trial.at, name) for name in ("fast", "balanced", "high")},
        "10 %": lambda: trial.at(0.10),
        "exact": lambda: trial.at("exact"),
    }


def fewer(record: Record) -> dict[int, list[str]]:
    """The passages most like the question, in their order, for some counts."""
    vectors = embedded([record.question, *record.passages])
    order = np.argsort(-(vectors[1:] @ vectors[0]), kind="stable")
    return {
        count: [record.passages[n] for n in sorted(order[:count])]
        for count in (1, 2, 4)
        if count < len(record.passages)
    }


def fingerprint(engine: HCacheEngine, options: argparse.Namespace) -> str:
    """Of all that decides the numbers but the records' choice."""
    parts = (
        engine.root.hex(),
        hashlib.sha256(options.data.read_bytes()).hexdigest(),
        options.storage_dtype,
        options.context_at_index,
        options.order,
        *options.read,
        str(options.retrieve),
        PREAMBLE,
        *(path.read_text() for path in DECIDING),
    )
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def already(out: Path | None, mark: str) -> dict[str, dict[str, Row]]:
    """What an earlier run with the same fingerprint has kept."""
    if out is None or not out.is_file():
        return {}
    kept = [json.loads(line) for line in out.read_text().splitlines()]
    return {item["id"]: item["rows"] for item in kept if item["run"] == mark}


def keep(out: Path | None, mark: str, name: str, rows: dict[str, Row]) -> None:
    if out is not None:
        with out.open("a") as file:
            file.write(json.dumps({"run": mark, "id": name, "rows": rows}) + "\n")


def table(results: dict[str, dict[str, Row]]) -> list[dict[str, Any]]:
    """A row for each way of reading: means, and intervals of KL and of F1 less that of `full`."""
    rows = []
    for name in next(iter(results.values())):
        its = [rows_[name] for rows_ in results.values() if name in rows_]
        row: dict[str, Any] = {"read": name, "n": len(its)}
        row |= {metric: float(np.mean([r[metric] for r in its])) for metric in METRICS}
        row["kl_first_95"] = bootstrap_interval([r["kl_first"] for r in its])
        full = [rows_["full"]["f1"] for rows_ in results.values() if name in rows_]
        row["f1_less_full_95"] = bootstrap_interval(np.subtract([r["f1"] for r in its], full))
        rows.append(row)
    return rows


def show(rows: Sequence[dict[str, Any]], count: int) -> None:
    print(f"{count} records")
    print(f"{'read':10}" + "".join(f"{metric:>10}" for metric in METRICS) + "   F1 - full, 95 %")
    for row in rows:
        low, high = row["f1_less_full_95"]
        numbers = "".join(f"{row[metric]:10.3f}" for metric in QUALITY)
        print(
            f"{row['read']:10}{numbers}{row['tokens']:10.0f}{row['seconds']:10.2f}"
            f"   [{low:+.3f}, {high:+.3f}]"
        )


def targets(results: dict[str, dict[str, Row]]) -> list[Target]:
    """Ratios of means over records."""

    def ratio(ours: str, theirs: str) -> float:
        one, two = (
            np.mean([rows[name]["kl_first"] for rows in results.values()])
            for name in (ours, theirs)
        )
        return float(one / two)

    there = next(iter(results.values()))
    wanted = {
        ("balanced", "blend"): 0.6,
        ("balanced", "epic"): 0.6,
        ("none +", "none"): 0.75,
        ("10 % +", "balanced"): 1.0,  # two thirds of the tokens
    }
    return [
        at_most(f"KL at the first token: {ours} / {theirs}", ratio(ours, theirs), bound)
        for (ours, theirs), bound in wanted.items()
        if ours in there and theirs in there
    ]


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """KL at the first token against the share of tokens that are read."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    full = next(row["tokens"] for row in rows if row["read"] == "full")
    for row in rows:
        low, high = row["kl_first_95"]
        place = row["tokens"] / full
        axes.errorbar(place, row["kl_first"], [[row["kl_first"] - low], [high - row["kl_first"]]])
        axes.annotate(row["read"], (place, row["kl_first"]))
    axes.set_xlabel("tokens read / full prefill")
    axes.set_ylabel("KL at the first token, nats")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
