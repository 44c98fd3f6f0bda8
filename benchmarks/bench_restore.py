"""Is the best mix of reading and computing reached, on any ratio of the two?

    python benchmarks/bench_restore.py [--quick] [--json] [--models NAME ...] [--tokens N ...]

Restores documents' states from the real store through a real forward pass, all methods interleaved
in one run:

  recompute    the documents' states are computed again, nothing is read
  kv, hidden   every layer kept in one form, in bfloat16
  paper        HCache's scheduler: hidden states and one other method, fixed when stored
  plan         what `choose_layout` keeps and `plan_restore` does, in bfloat16
  kv8, plan8   the same with eight-bit integers

The models are random (time does not depend on values), float32, on the CPU. Reads are as they are
("warm", "cold"), or paced, so that bytes a second and operations a second stand to each other as
on a target machine: this processor is then a scale model of it. Since its speed drifts, the pace is
set anew before each round, and rounds are compared as if it had been the same in all of them.
Where reads are as they are, the planner has seen a few such requests before.

Methods that come to the same restore (say, the plan is to read K and V) are run once.

Before that, pairs: SmolLM2 in float32 and in bfloat16, and projections of int8 rows by products of
floats and of integers, with what these err. `--only precision` runs them alone.

lower bound: max(bytes / read rate, the plan's computing), the latter taken from an unpaced run of
the same plan next to the paced one. fresh: of the time, what the pass over the question takes.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, TypeAlias

import precision
from common import (
    Target,
    arguments,
    at_least,
    at_most,
    finish,
    machine,
    quiet_transformers,
    ratio_of_pairs,
    summary,
)
from scale_model import (
    AS_THEY_ARE,
    FRESH_TOKENS,
    HIDDEN,
    KV,
    MODELS,
    NONE,
    REGIMES,
    Bench,
    Documents,
    Run,
)

from hcache_rag import presets
from hcache_rag.choice import Prompt, choose_layout, fixed_layout
from hcache_rag.executor import span_sizes
from hcache_rag.layout import LayerFormat, StateLayout
from hcache_rag.plan import Conditions, Cut, RestorePlan, plan_restore
from hcache_rag.planner import Planner
from hcache_rag.profile import ReadRate
from hcache_rag.simulate import recompute_all, spans_of


def paper_layout(bench: Bench, rate: ReadRate, prompt: Prompt) -> StateLayout:
    """HCache's scheduler: its formulas, its two cases, its whole layers."""
    spec, costs = bench.spec, bench.profile.costs_of(bench.spec)
    hidden, kv = LayerFormat(HIDDEN, "bfloat16"), LayerFormat(KV, "bfloat16")
    tokens, count = prompt.document_tokens, prompt.documents
    io_hidden, io_kv = (float(rate(f.num_bytes(spec, tokens) * count)) for f in (hidden, kv))
    c_hidden = float(costs.restore(hidden)(tokens)) * count
    c_token = float(costs.layer(tokens)) * count
    layers = range(spec.num_layers + 1)
    if c_hidden > io_hidden:
        n = min(
            layers,
            key=lambda h: max(h * c_hidden, h * io_hidden + (spec.num_layers - h) * io_kv),
        )
        formats = [hidden] * n + [kv] * (spec.num_layers - n)
    else:
        n = min(
            layers,
            key=lambda h: max(h * io_hidden, h * c_hidden + (spec.num_layers - h) * c_token),
        )
        formats = [LayerFormat(NONE)] * (spec.num_layers - n) + [hidden] * n
    return StateLayout.of(spec, formats)


Restore: TypeAlias = tuple[StateLayout, tuple[Cut, ...]]


@dataclass
class Method:
    """A layout with its documents, and how they are restored."""

    name: str
    documents: Documents
    plan: RestorePlan

    @property
    def restore(self) -> Restore:
        """What is read and what is recomputed."""
        return self.documents.layout, self.plan.cuts


def main() -> None:
    parser = arguments(__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--documents", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--regimes", nargs="+", default=[*REGIMES, *AS_THEY_ARE])
    parser.add_argument("--only", choices=["precision", "restore"], help="one half of it")
    parser.add_argument("--repeats", type=int, help="default 3, with --quick 1")
    options = parser.parse_args()
    quiet_transformers()
    if options.quick:
        options.models, options.tokens, options.documents = ["mha-1024"], [1024], [1]
        options.regimes = ["a100-4ssd"]
    repeats = options.repeats or (1 if options.quick else 3)
    rows: list[dict[str, Any]] = [planning()]
    if options.only != "restore":
        rows += precision.compute_dtypes(options.quick)
        rows += precision.int8_products(options.quick)
    for name in options.models if options.only != "precision" else ():
        with tempfile.TemporaryDirectory(prefix="bench-restore-") as place:
            bench = Bench(name, Path(place), max(options.tokens))
            rows.append(step_over_gemm(bench))
            for tokens, documents, regime in product(
                options.tokens, options.documents, options.regimes
            ):
                prompt = Prompt(tokens, documents, FRESH_TOKENS)
                rows += compare(bench, prompt, regime, repeats)
    finish(rows, judge(rows), machine(), options.json)


def compare(bench: Bench, prompt: Prompt, regime: str, repeats: int) -> list[dict[str, Any]]:
    """All methods in one regime, interleaved."""
    paced = regime in REGIMES
    now = conditions(bench, regime)
    with tempfile.TemporaryDirectory(dir=bench.folder) as place:
        methods = methods_of(bench, Path(place), prompt, now)
        if not paced:
            for method in methods:
                if method.name.startswith("plan"):
                    method.plan = settled(bench, method.documents, regime == "cold")
        different = {method.restore: method for method in methods}
        runs: dict[Restore, list[Run]] = {restore: [] for restore in different}
        unpaced: dict[Restore, list[Run]] = {restore: [] for restore in different}
        for repeat in range(-1, repeats):
            round_now = conditions(bench, regime) if repeat >= 0 else now
            # With half the operations a second, and half the bytes, everything takes twice as long.
            slower = round_now.compute_factor / now.compute_factor if paced else 1.0
            rate = round_now.read_rate.bytes_per_s if paced and repeat >= 0 else None
            for restore, method in different.items():
                if method.name == "recompute" and repeat != 0:
                    continue  # once is enough: it is the slowest, and nothing waits
                if regime == "cold":
                    method.documents.forget()
                run = bench.restore(method.documents, method.plan, rate, slower)
                if repeat < 0:
                    continue
                runs[restore].append(run)
                if method.name in ("plan", "plan8") and paced:
                    unpaced[restore].append(
                        bench.restore(method.documents, method.plan, None, slower)
                    )
        for method in methods:
            method.documents.store.close()
        return report(bench, prompt, regime, now.read_rate, methods, runs, unpaced)


def settled(bench: Bench, documents: Documents, is_cold: bool) -> RestorePlan:
    """The plan of a planner that has seen a few such requests."""
    planner = Planner(bench.spec, bench.profile)
    sizes = span_sizes(documents.composition, bench.prefixes)
    for _ in range(4):
        plan, _ = planner.plan(sizes, FRESH_TOKENS)
        if is_cold:
            documents.forget()
        planner.observe(bench.restore(documents, plan, None, 1.0).timeline, plan)
    return planner.plan(sizes, FRESH_TOKENS)[0]


def conditions(bench: Bench, regime: str) -> Conditions:
    """How fast the machine computes at this moment, and reads, or is made to read."""
    slower = bench.compute_factor()
    if regime not in REGIMES:
        return Conditions(getattr(bench.profile, regime), slower)
    return Conditions(ReadRate(bench.scaled_bytes_per_s(REGIMES[regime], slower)), slower)


def methods_of(bench: Bench, folder: Path, prompt: Prompt, now: Conditions) -> list[Method]:
    spec, profile, rate = bench.spec, bench.profile, now.read_rate
    # A layout depends on the ratio of reading to computing only.
    as_if = ReadRate(rate.bytes_per_s * now.compute_factor, rate.per_request_s)

    def best(hidden_dtype: str, kv_dtype: str) -> StateLayout:
        return choose_layout(
            spec, profile, hidden_dtype=hidden_dtype, kv_dtype=kv_dtype, prompt=prompt, rate=as_if
        ).layout

    layouts = {
        "recompute": None,
        "kv": fixed_layout(spec, "kv", "bfloat16").layout,
        "hidden": fixed_layout(spec, "hidden", "bfloat16").layout,
        "paper": paper_layout(bench, as_if, prompt),
        "plan": best("bfloat16", "bfloat16"),
        "kv8": fixed_layout(spec, "kv", "int8").layout,
        "plan8": best("int8-smooth", "int8"),
    }
    made: dict[StateLayout, Documents] = {}
    methods = []
    for name, layout in layouts.items():
        kept = layout or layouts["kv"]
        assert kept is not None
        if kept not in made:
            made[kept] = Documents.make(bench.adapter, folder / str(len(made)), kept, prompt)
        sizes = span_sizes(made[kept].composition, bench.prefixes)
        if name == "recompute":
            plan = recompute_all(spec, prompt)
        elif name.startswith("plan"):
            plan = plan_restore(spec, sizes, profile, now, fresh_tokens=FRESH_TOKENS)
        else:
            plan = plan_restore(spec, sizes, None)
        methods.append(Method(name, made[kept], plan))
    return methods


def report(
    bench: Bench,
    prompt: Prompt,
    regime: str,
    rate: ReadRate,
    methods: Sequence[Method],
    runs: dict[Restore, list[Run]],
    unpaced: dict[Restore, list[Run]],
) -> list[dict[str, Any]]:
    """Print one table; one row a method."""
    print(
        f"\n{bench.name}, {prompt.restored_tokens:,} tokens in {prompt.documents} document(s), "
        f"{regime}: {rate.bytes_per_s / 1e6:,.0f} MB/s"
    )
    print(
        f"  {'':10}{'ms':>9}{'spread':>8}{'fresh':>7}{'bound':>9}{'ratio':>7}{'predicted':>11}"
        f"{'kv/this':>9}"
        f"{'bytes/token':>13}  kept, and how restored"
    )
    rows = []
    kv = [run.seconds for method in methods if method.name == "kv" for run in runs[method.restore]]
    for method in methods:
        its = runs[method.restore]
        seconds = [run.seconds for run in its]
        work_s = [run.computing_s for run in unpaced[method.restore] or its]
        read_s = [
            float(rate(run.timeline.bytes_read, 0)) if regime in REGIMES else run.reading_s
            for run in its
        ]
        bound = [max(pair) for pair in zip(read_s, work_s, strict=True)]
        middle = statistics.median(seconds)
        layout = method.documents.layout
        lower_bound_s = statistics.median(bound)
        row: dict[str, Any] = {
            "what": "restore_s",
            "lower_bound_s": lower_bound_s,
            "model": bench.name,
            "is_multi_head": bench.spec.num_heads == bench.spec.num_kv_heads,
            "tokens": prompt.restored_tokens,
            "documents": prompt.documents,
            "regime": regime,
            "method": method.name,
            "p50": middle,
            "min": min(seconds),
            "max": max(seconds),
            "over_bound": ratio_of_pairs(seconds, bound),
            "predicted_s": method.plan.makespan_s,
            "kv_over_this": ratio_of_pairs(kv[: len(seconds)], seconds),
            "reading_s": statistics.median(read_s),
            "computing_s": statistics.median(work_s),
            "fresh_s": statistics.median(run.fresh_s for run in its),
            "waited_s": statistics.median(run.waited_s for run in its),
            "bytes_per_token": 0.0
            if method.name == "recompute"
            else layout.bytes_per_token(bench.spec),
            "layout": str(layout),
            "plan": method.plan.reason,
        }
        rows.append(row)
        predicted = f"{method.plan.makespan_s * 1e3:,.0f}" if method.plan.makespan_s else ""
        print(
            f"  {method.name:10}{middle * 1e3:9,.0f}{(max(seconds) / min(seconds) - 1):8.0%}"
            f"{row['fresh_s'] * 1e3:7,.0f}{lower_bound_s * 1e3:9,.0f}{row['over_bound']:7.2f}"
            f"{predicted:>11}{row['kv_over_this']:8.2f}x{row['bytes_per_token']:13,.0f}  "
            f"{'nothing' if method.name == 'recompute' else layout}; {method.plan.reason}",
            flush=True,
        )
    return rows


def planning() -> dict[str, Any]:
    """Seconds that it takes to plan a restore of 20 documents for a model of 80 layers."""
    spec, machine = presets.MODELS["llama-3-70b"], presets.HARDWARE["a100-4ssd"]
    prompt = Prompt(20 * 512, 20, FRESH_TOKENS)
    spans = spans_of(prompt, choose_layout(spec, machine, prompt=prompt).layout)
    samples = []
    for _ in range(50):
        started = time.perf_counter()
        plan_restore(spec, spans, machine, fresh_tokens=FRESH_TOKENS)
        samples.append(time.perf_counter() - started)
    row: dict[str, Any] = {"what": "planning_s", **summary(samples)}
    print(f"planning 20 documents for {spec.name}, 80 layers: {row['p50'] * 1e3:.2f} ms")
    return row


def step_over_gemm(bench: Bench) -> dict[str, Any]:
    """The restoring step of 1,024 hidden rows against its bare GEMM."""
    steps, bare = bench.steps(repeats=3)
    ratio = ratio_of_pairs(steps, bare)
    print(f"\n{bench.name}: restoring step of 1,024 hidden rows / its bare GEMM {ratio:.3f}")
    return {
        "what": "step_over_gemm",
        "model": bench.name,
        "is_multi_head": bench.spec.num_heads == bench.spec.num_kv_heads,
        "ratio": ratio,
    }


def judge(rows: Sequence[dict[str, Any]]) -> list[Target]:
    """The project's targets, each at its worst place in this run."""
    restores = [row for row in rows if row["what"] == "restore_s"]
    plans = [row for row in restores if row["method"] in ("plan", "plan8")]
    targets = [at_most("planning, 80 layers, 20 documents, ms", 1e3 * rows[0]["p50"], 2.0)]
    if not plans:
        return targets
    targets += [
        at_most("plan / lower bound, worst", max(row["over_bound"] for row in plans), 1.10),
        at_most(
            "plan: |measured / predicted - 1|, worst",
            max(abs(row["p50"] / row["predicted_s"] - 1) for row in plans),
            0.10,
        ),
    ]

    def same(row: dict[str, Any], method: str) -> dict[str, Any] | None:
        keys = ("model", "tokens", "documents", "regime")
        found = [r for r in restores if r["method"] == method and all(r[k] == row[k] for k in keys)]
        return found[0] if found else None

    over_pure = []
    for row in (r for r in plans if r["method"] == "plan"):
        pure = [same(row, method) for method in ("recompute", "kv", "hidden")]
        over_pure.append(row["p50"] / min(other["p50"] for other in pure if other is not None))
    targets.append(at_most("plan / best pure method, worst", max(over_pure), 1.03))

    def worst(regime: str, method: str, what: str, *, multi_head: bool = True) -> float | None:
        found = [
            row[what]
            for row in restores
            if row["regime"] == regime
            and row["method"] == method
            and row["is_multi_head"] == multi_head
        ]
        return min(found) if found else None

    for name, regime, method, bound in (
        ("A100 + 4 SSDs: kv / plan", "a100-4ssd", "plan", 1.85),
        ("A100 + 4 SSDs: kv / plan8", "a100-4ssd", "plan8", 2.6),
        ("A100 + 1 SSD: kv / plan", "a100-1ssd", "plan", 2.5),
        ("H100 PCIe 5: kv / plan", "h100-pcie5", "plan", 2.0),
    ):
        value = worst(regime, method, "kv_over_this")
        if value is not None:
            targets.append(at_least(f"multi-head, {name}, worst", value, bound))
    over_recompute = [
        row["p50"] / plan["p50"]
        for row in restores
        if row["method"] == "recompute"
        and row["is_multi_head"]
        and (row["tokens"], row["documents"], row["regime"]) == (4096, 1, "a100-4ssd")
        and (plan := same(row, "plan")) is not None
    ]
    if over_recompute:
        targets.append(
            at_least("A100 + 4 SSDs, 4K tokens: recompute / plan", min(over_recompute), 8.0)
        )
    for name, method, where, bound in (
        ("multi-head, A100 + 4 SSDs: kv / plan", "plan", "a100-4ssd", 1.85),
        ("multi-head, A100 + 4 SSDs: kv / plan8", "plan8", "a100-4ssd", 3.5),
        ("multi-head, A100 + 1 SSD: kv / plan8", "plan8", "a100-1ssd", 3.5),
        ("grouped-query: kv / kv8", "kv8", None, 1.9),
    ):
        shares = [
            kept["bytes_per_token"] / row["bytes_per_token"]
            for row in restores
            if row["method"] == method
            and row["is_multi_head"] == (where is not None)
            and where in (row["regime"], None)
            and (kept := same(row, "kv")) is not None
        ]
        if shares:
            targets.append(at_least(f"bytes on disk, {name}", min(shares), bound))
    steps = [row["ratio"] for row in rows if row["what"] == "step_over_gemm"]
    multi = [r["ratio"] for r in rows if r["what"] == "step_over_gemm" and r["is_multi_head"]]
    if multi:
        targets.append(at_most("restoring step / bare GEMM, multi-head, worst", max(multi), 1.15))
    elif steps:
        targets.append(at_most("restoring step / bare GEMM, worst", max(steps), 1.15))
    return targets


if __name__ == "__main__":
    main()
