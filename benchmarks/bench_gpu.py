"""What restoring takes on a GPU: the kernels' bounds, the plan against pure methods, the overlap.

    python benchmarks/bench_gpu.py [--quick] [--json] [--models NAME ...] [--trace FILE]

kernels   a layer of 4,096 tokens, by our kernel and by torch, beside the copy from pinned memory;
          and what the data sheet allows, where the GPU's is known (`hcache_kernels.roofline`)
restores  documents' states from the real store through a real forward pass over 16 fresh tokens,
          until the device is done, all methods interleaved in one run: everything recomputed, K and
          V, hidden states, and what `choose_layout` and `plan_restore` make of this machine. The
          models are random (time does not depend on values), bfloat16, of known models' shapes
overlap   of one such restore, from a profiler's trace: how long copies and kernels ran, and how
          much of the shorter of the two ran beside the other

Without a GPU it says so, and ends with an empty table.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from common import Target, arguments, at_least, at_most, finish, machine, quiet_transformers
from scale_model import FRESH_TOKENS, ROOT, Documents
from transformers import AutoConfig, AutoModelForCausalLM

from hcache_kernels.fused import fallbacks, has_triton
from hcache_rag import StateStore
from hcache_rag.buffers import BufferPool
from hcache_rag.choice import Prompt, choose_layout, fixed_layout
from hcache_rag.device import synchronise
from hcache_rag.executor import open_restoring, span_sizes
from hcache_rag.measure import measure
from hcache_rag.models import ModelAdapter
from hcache_rag.plan import Conditions, RestorePlan, plan_restore
from hcache_rag.prefixes import Prefixes
from hcache_rag.schedule import schedule
from hcache_rag.simulate import recompute_all

MODELS: dict[str, dict[str, int]] = {
    "llama-3.2-1b": {"width": 2048, "heads": 32, "kv": 8, "layers": 16, "mlp": 8192},
    "llama-2-7b": {"width": 4096, "heads": 32, "kv": 32, "layers": 32, "mlp": 11008},
    "llama-3-8b": {"width": 4096, "heads": 32, "kv": 8, "layers": 32, "mlp": 14336},
}

Interval: TypeAlias = tuple[float, float]


def main() -> None:
    parser = arguments(__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--trace", type=Path, help="write the profiler's trace here")
    options = parser.parse_args()
    quiet_transformers()
    if not torch.cuda.is_available():
        print("there is no CUDA device here: nothing was measured")
        finish([], [], machine(), options.json)
        return
    place = torch.device("cuda")
    facts = {**machine(), "gpu": torch.cuda.get_device_name(place), "cuda": torch.version.cuda}
    if options.quick:
        options.models, options.tokens = ["llama-3.2-1b"], 2048
    rows = kernels(place)
    for name in options.models:
        with tempfile.TemporaryDirectory(prefix="bench-gpu-") as folder:
            bench = Bench(name, Path(folder), place, options.tokens)
            rows += bench.compare(repeats=3 if options.quick else 7)
            rows.append(bench.overlap(options.trace))
            bench.close()
        del bench
        torch.cuda.empty_cache()
    for reason, count in fallbacks.items():
        print(f"by torch, {count} times: {reason}")
    finish(rows, judge(rows), facts, options.json)


def kernels(place: torch.device) -> list[dict[str, Any]]:
    """Each kernel beside its torch form, its copy, and its bound."""
    if not has_triton():
        print("Triton is not installed: no kernels to measure")
        return []
    from hcache_kernels.roofline import WORKS, bound_here
    from hcache_kernels.timing import timed

    print(f"\n{'one layer, 4,096 tokens':34}{'kernel':>9}{'bound':>9}{'torch':>9}{'copy':>9}  µs")
    rows = []
    for work in WORKS:
        found, allowed = timed(work, place), bound_here(work, place)
        row: dict[str, Any] = {
            "what": "kernel_s",
            "work": f"{work.model}, {work.stored}",
            "kernel_s": found.kernel_s,
            "torch_s": found.torch_s,
            "copy_s": found.copy_s,
            "bound_s": allowed.kernel_s if allowed is not None else None,
        }
        rows.append(row)
        bound = f"{1e6 * row['bound_s']:9,.0f}" if allowed is not None else f"{'':9}"
        print(
            f"{row['work']:34}{1e6 * found.kernel_s:9,.0f}{bound}{1e6 * found.torch_s:9,.0f}"
            f"{1e6 * found.copy_s:9,.0f}"
        )
    return rows


class Bench:
    """One random model on the GPU, its costs, and documents in every layout."""

    def __init__(self, name: str, folder: Path, place: torch.device, tokens: int) -> None:
        self.name, self.place = name, place
        self.prompt = Prompt(tokens, 1, FRESH_TOKENS)
        self.adapter = ModelAdapter(random_model(MODELS[name], place), name)
        spec = self.adapter.spec
        self.pool = BufferPool(self.adapter)
        self.profile = measure(self.adapter, folder, quick=True, max_tokens=tokens)
        self.empty = StateStore.open(folder / "empty")
        self.prefixes = Prefixes(self.adapter, self.empty, ROOT)
        chosen = choose_layout(
            spec, self.profile, hidden_dtype="bfloat16", kv_dtype="bfloat16", prompt=self.prompt
        )
        smaller = choose_layout(
            spec, self.profile, hidden_dtype="int8-smooth", kv_dtype="int8", prompt=self.prompt
        )
        layouts = {
            "kv": fixed_layout(spec, "kv", "bfloat16").layout,
            "hidden": fixed_layout(spec, "hidden", "bfloat16").layout,
            "plan": chosen.layout,
            "plan8": smaller.layout,
        }
        self.documents = {
            method: Documents.make(self.adapter, folder / method, layout, self.prompt)
            for method, layout in layouts.items()
        }
        self.documents["recompute"] = self.documents["kv"]

    def close(self) -> None:
        """Close the stores."""
        for method, documents in self.documents.items():
            if method != "recompute":
                documents.store.close()
        self.empty.close()

    def plan(self, method: str) -> RestorePlan:
        """How a method restores."""
        spec, documents = self.adapter.spec, self.documents[method]
        if method == "recompute":
            return recompute_all(spec, self.prompt)
        sizes = span_sizes(documents.composition, self.prefixes)
        profile = self.profile if method.startswith("plan") else None
        now = Conditions(self.profile.warm)
        return plan_restore(spec, sizes, profile, now, fresh_tokens=FRESH_TOKENS)

    @torch.no_grad()
    def restore(self, method: str) -> float:
        """Seconds until the device has done the pass."""
        documents = self.documents[method]
        composition = documents.composition
        sizes = span_sizes(composition, self.prefixes)
        work = schedule(self.adapter.spec, sizes, self.plan(method), fresh_tokens=FRESH_TOKENS)
        synchronise(self.place)
        began = time.perf_counter()
        with (
            self.pool.borrow(len(composition.token_ids)) as buffers,
            open_restoring(
                self.adapter,
                composition,
                buffers,
                documents.store,
                work=work,
                prefixes=self.prefixes,
            ) as (cache, execution),
        ):
            execution.recompute()
            self.adapter.decoder(**cache.pass_inputs(), past_key_values=cache, use_cache=True)
        synchronise(self.place)
        return time.perf_counter() - began

    def compare(self, repeats: int) -> list[dict[str, Any]]:
        """All methods, interleaved, after a round that is not counted."""
        seconds: dict[str, list[float]] = {method: [] for method in self.documents}
        for repeat in range(-1, repeats):
            for method, its in seconds.items():
                took = self.restore(method)
                if repeat >= 0:
                    its.append(took)
        print(f"\n{self.name}, {self.prompt.restored_tokens:,} tokens, warm   ms")
        rows = []
        for method, its in seconds.items():
            layout = self.documents[method].layout
            middle = statistics.median(its)
            row = {
                "what": "restore_s",
                "model": self.name,
                "method": method,
                "p50": middle,
                "min": min(its),
                "max": max(its),
                "layout": "nothing" if method == "recompute" else str(layout),
            }
            rows.append(row)
            print(
                f"  {method:10}{1e3 * middle:9,.1f} ({1e3 * min(its):,.1f} to "
                f"{1e3 * max(its):,.1f})  {row['layout']}",
                flush=True,
            )
        return rows

    def overlap(self, trace: Path | None) -> dict[str, Any]:
        """Of one restore of hidden states: how much of copying ran beside kernels."""
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            self.restore("hidden")
        if trace is not None:
            seen.export_chrome_trace(str(trace))
        copies: list[Interval] = []
        others: list[Interval] = []
        for event in seen.events() or ():
            if "CUDA" not in str(event.device_type):
                continue
            side = copies if "HtoD" in event.name else others
            side.append((event.time_range.start / 1e6, event.time_range.end / 1e6))
        copies, others = union(copies), union(others)
        both = length(crossing(copies, others))
        shorter = min(length(copies), length(others))
        row = {
            "what": "overlap",
            "model": self.name,
            "copies_s": length(copies),
            "kernels_s": length(others),
            "both_s": both,
            "share": both / shorter if shorter else 0.0,
        }
        print(
            f"  hidden: copies {1e3 * length(copies):.1f} ms, kernels {1e3 * length(others):.1f} "
            f"ms, both at once {1e3 * both:.1f} ms ({row['share']:.0%} of the shorter)"
        )
        return row


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same time in intervals that do not touch."""
    joined: list[Interval] = []
    for begin, end in sorted(intervals):
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((begin, end))
    return joined


def crossing(some: Sequence[Interval], others: Sequence[Interval]) -> list[Interval]:
    """When both are under way."""
    pairs = ((max(a, c), min(b, d)) for a, b in some for c, d in others)
    return [(begin, end) for begin, end in pairs if begin < end]


def length(intervals: Iterable[Interval]) -> float:
    """Seconds of intervals that do not touch."""
    return sum(end - begin for begin, end in intervals)


def random_model(shape: dict[str, int], place: torch.device) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=1000,
        hidden_size=shape["width"],
        intermediate_size=shape["mlp"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv"],
        max_position_embeddings=32768,
    )
    auto: Any = AutoModelForCausalLM
    with place:
        return auto.from_config(config, dtype=torch.bfloat16).eval()


def judge(rows: Sequence[dict[str, Any]]) -> list[Target]:
    """The targets, each at its worst place in this run."""
    targets = []
    bounded = [r for r in rows if r["what"] == "kernel_s" and r["bound_s"]]
    if bounded:
        worst = max(row["kernel_s"] / row["bound_s"] for row in bounded)
        targets.append(at_most("kernel / its bound, worst", worst, 2.0))
    over_copy = [row["kernel_s"] / row["copy_s"] for row in rows if row["what"] == "kernel_s"]
    if over_copy:
        targets.append(at_most("kernel / its copy, worst", max(over_copy), 1.0))
    restores = [row for row in rows if row["what"] == "restore_s"]
    for model in {row["model"] for row in restores}:
        its = {row["method"]: row["p50"] for row in restores if row["model"] == model}
        pure = min(its[method] for method in ("recompute", "kv", "hidden"))
        targets.append(at_most(f"{model}: plan / best pure method", its["plan"] / pure, 1.03))
    shares = [row["share"] for row in rows if row["what"] == "overlap"]
    if shares:
        targets.append(at_least("copies and kernels at once, worst", min(shares), 0.8))
    return targets


if __name__ == "__main__":
    main()
