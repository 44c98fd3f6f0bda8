"""What was tried to lose less when documents are restored: what holds, and what does not?

    python benchmarks/bench_tries.py [--data FILE] [--half odd|even] [--records N] [--model FOLDER]
                                     [--out FILE] [--quick] [--json]

Every idea of contexts.py and ideas.py is read beside what it would replace, on the same prompts,
and compared with full prefill: KL of the next token at the first token and over full prefill's own
answer, log-likelihood of the gold answer, the same most probable first token. Ideas, and what they
need to be told, are chosen on the even records of a file; what counts is what the odd ones say.

Passages are indexed with those of the ten records around them, so that documents which are read
behind each other are not only those of one prompt. Differences and ratios of means are of the same
records, with 95 % bootstrap intervals. With --out, a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from bench_rag_qa import NEW_TOKENS, already, each_behind_its_like, keep, prompt_of
from common import ROOT, Target, arguments, at_most, finish, machine, quiet_transformers
from contexts import indexed
from ideas import SHARES, readings, share_name

from hcache_rag import HCacheEngine, SourceError
from hcache_rag.bundled import default_model_path
from hcache_rag.judge import Judge
from hcache_rag.models import ModelAdapter, load_model
from hcache_rag.quality import bootstrap_interval
from hcache_rag.questions import Record, read_records
from hcache_rag.trial import read_as_a_whole

GROUP_RECORDS = 10
"""Whose passages are indexed together."""
SEEN = 0.115
"""A prompt whose first token changes by more, in nats, when 5 % are repaired gets 15 %.

The median of the even records of hotpotqa_100.json.
"""
METRICS = ("kl_first", "kl", "nll", "top1", "tokens", "seconds")
DECIDING = (
    *(
        Path(__file__).with_name(f"{name}.py")
        for name in ("bench_rag_qa", "contexts", "ideas", "peers")
    ),
    *(ROOT / "hcache_rag" / f"{name}.py" for name in ("judge", "repair", "sequences", "trial")),
)
"""Files that decide the numbers of a record."""
CONTEXTS = ("stand-in", "stand-in kept", "title", "sentence", "given", "shuffled", "alike")
ADAPTIVE = ("60 % of the scores", "70 % of the scores", "15 % where 5 % change much")
COMPARED = (
    ("15 %", "CacheBlend"),
    ("15 %", "EPIC"),
    *((f"{context}: {share}", share) for share in ("none", "15 %") for context in CONTEXTS),
    *((f"{c}: {share}", "15 %") for share in ("5 %", "10 %") for c in ("shuffled", "alike")),
    *((f"layers 2 to L-2{way}", "15 %") for way in ("", ", from stored hidden states")),
    *((f"from layer {layer}, stored hidden states", "15 %") for layer in (2, 4)),
    *((f"{count} passages dropped", "15 %") for count in (2, 4)),
    *((name, f"{name}, fixed") for name in ADAPTIVE),
)
"""Each idea, and what it stands beside."""

Row = dict[str, float]
Results = dict[str, dict[str, Row]]


def main() -> None:
    options = parsed()
    quiet_transformers()
    records = chosen(options)
    model, tokenizer = load_model(options.model or str(default_model_path()), dtype="float32")
    own = ModelAdapter(model).fingerprint
    results: Results = {}
    for begin in range(0, len(records), GROUP_RECORDS):
        group = records[begin : begin + GROUP_RECORDS]
        mark = fingerprint(own, group)
        done = already(options.out, mark)
        if any(record.id not in done for record in group):
            for record, rows in judged(model, tokenizer, group, done):
                keep(options.out, mark, record.id, rows)
                done[record.id] = rows
                if not options.quick:
                    print(f"{len(results) + len(done)} of {len(records)}", flush=True)
        results |= {record.id: done[record.id] for record in group}
    results = {name: with_budgets(its, results) for name, its in results.items()}
    compared = table(results)
    show(results, compared)
    finish(compared, targets(results), {**machine(), "records": len(results)}, options.json)


def parsed() -> argparse.Namespace:
    parser = arguments(__doc__.splitlines()[0] if __doc__ else None)
    default = ROOT.parent / "shared" / "data" / "hotpotqa_100.json"
    parser.add_argument("--data", type=Path, default=default)
    parser.add_argument("--model", help="a folder; by default the bundled SmolLM2")
    parser.add_argument("--half", choices=("odd", "even"), help="every other record only")
    parser.add_argument("--records", type=int, help="so many; with --quick one, cut short")
    parser.add_argument("--out", type=Path, help="keeps each record's results, to go on later")
    options = parser.parse_args()
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
    if options.quick:
        shortest = sorted(records[0].passages, key=len)[:3]
        return [replace(records[0], passages=tuple(shortest))]
    return records[: options.records]


def judged(
    model: Any, tokenizer: Any, group: Sequence[Record], done: Results
) -> Iterator[tuple[Record, dict[str, Row]]]:
    """The records of a group that are not done yet, read in every way."""
    passages = list(dict.fromkeys(p for record in group for p in record.passages))
    with indexed(model, tokenizer, passages, each_behind_its_like(passages)) as engines:
        for record in group:
            if record.id not in done:
                yield record, measured(engines, record)


def measured(engines: dict[str, HCacheEngine], record: Record) -> dict[str, Row]:
    engine = engines["alone"]
    ids = engine.prompt_tokens(prompt_of(record.passages, record.question)).tolist()
    with read_as_a_whole(engine.adapter, ids) as (reader, reading):
        judge = Judge(
            engine,
            reader,
            reading,
            gold=f" {record.answers[0]}",
            max_new_tokens=NEW_TOKENS,
            is_line=True,
        )
    rows = {"full": {metric: float(getattr(judge.full, metric)) for metric in METRICS}}
    for tried in readings(engines, record):
        judgement = judge.judge(tried.reader, tried.reading, decodes=False)
        rows[tried.name] = {metric: float(getattr(judgement, metric)) for metric in METRICS}
        rows[tried.name] |= tried.facts
    return rows


def fingerprint(model: str, group: Sequence[Record]) -> str:
    """Of all that decides the numbers of a group's records."""
    parts = [model, *(path.read_text() for path in DECIDING)]
    parts += [text for r in group for text in (r.id, r.question, *r.answers, *r.passages)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


# --- what comes of it -----------------------------------------------------------------------------


def with_budgets(rows: dict[str, Row], results: Results) -> dict[str, Row]:
    """A record's rows, with the budget by what was seen, and with fixed ones of the same mean."""
    some, more = rows["5 %"], rows["15 %"]
    seen = {**(more if some["seen"] > SEEN else some)}
    rows = {**rows, ADAPTIVE[-1]: seen}
    for name in ADAPTIVE:
        share = mean_share(name, results)
        at = [rows[share_name(s) if s else "none"] for s in (0.0, *SHARES)]
        rows[f"{name}, fixed"] = {
            metric: float(np.interp(share, (0.0, *SHARES), [row[metric] for row in at]))
            for metric in METRICS
        }
    return rows


def mean_share(name: str, results: Results) -> float:
    """The share of relocated tokens that an adaptive budget repairs in the mean."""
    if name != ADAPTIVE[-1]:
        return float(np.mean([rows[name]["share"] for rows in results.values()]))
    much = [rows["5 %"]["seen"] > SEEN for rows in results.values()]
    return float(np.mean(np.where(much, 0.15, 0.05)))


def column(results: Results, name: str, metric: str) -> npt.NDArray[np.float64]:
    """A way's numbers, record by record."""
    return np.array([rows[name][metric] for rows in results.values()])


def ratio(results: Results, one: str, other: str) -> tuple[float, tuple[float, float]]:
    """Of mean KL at the first token, with its 95 % bootstrap interval over records."""
    above, below = (column(results, name, "kl_first") for name in (one, other))
    drawn = np.random.default_rng(0).integers(0, len(above), (4000, len(above)))
    low, high = np.percentile(above[drawn].mean(1) / below[drawn].mean(1), (2.5, 97.5))
    return float(above.mean() / below.mean()), (float(low), float(high))


def table(results: Results) -> list[dict[str, Any]]:
    """A row for each idea: its means, and how it differs from what it stands beside.

    Of the records where it could be read: some have too few passages to drop any.
    """
    rows = []
    for name, other in COMPARED:
        its = {record: read for record, read in results.items() if name in read}
        if not its:
            continue
        value, interval = ratio(its, name, other)
        row: dict[str, Any] = {"idea": name, "beside": other, "n": len(its)}
        row |= {"kl_first_ratio": value, "kl_first_ratio_95": interval}
        for metric in METRICS:
            ours, theirs = (column(its, one, metric) for one in (name, other))
            row |= {metric: float(ours.mean()), f"{metric}_beside": float(theirs.mean())}
            row[f"{metric}_less_95"] = bootstrap_interval(ours - theirs)
        rows.append(row)
    return rows


def show(results: Results, rows: Sequence[dict[str, Any]]) -> None:
    print(f"{len(results)} records; in the mean:")
    print(f"{'read':44}" + "".join(f"{metric:>10}" for metric in METRICS))
    for name in dict.fromkeys(name for read in results.values() for name in read):
        its = {record: read for record, read in results.items() if name in read}
        means = [float(column(its, name, metric).mean()) for metric in METRICS]
        print(f"{name:44}" + "".join(f"{mean:10.3f}" for mean in means))
    print("each idea less what it stands beside, with 95 % intervals:")
    for row in rows:
        low, high = row["kl_first_ratio_95"]
        numbers = [f"KL {row['kl_first_ratio']:.2f}x ({low:.2f} to {high:.2f})"]
        for metric, title in (("kl", "answer"), ("nll", "gold"), ("top1", "top-1")):
            low, high = row[f"{metric}_less_95"]
            less = row[metric] - row[f"{metric}_beside"]
            numbers.append(f"{title} {less:+.3f} ({low:+.3f} to {high:+.3f})")
        print(f"  {row['idea'] + ' / ' + row['beside']:56} {'; '.join(numbers)}")


def targets(results: Results) -> list[Target]:
    """Ratios of mean KL at the first token."""
    wanted = {
        ("15 %", "CacheBlend"): 0.6,
        ("15 %", "EPIC"): 0.6,
        ("shuffled: none", "none"): 0.75,
        ("shuffled: 10 %", "15 %"): 1.0,  # two thirds of the tokens
    }
    return [
        at_most(f"KL at the first token: {one} / {other}", ratio(results, one, other)[0], bound)
        for (one, other), bound in wanted.items()
    ]


if __name__ == "__main__":
    main()
