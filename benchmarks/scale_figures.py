"""What a million, or a thousand million passages take: bytes, money, hours, and time to answer.

    python benchmarks/scale_figures.py [--quick] [--json]

Nothing here is measured: sizes are counted, times are what the planner and the simulator predict on
an A100 (`hcache-rag plan --hardware a100-1ssd`), hit rates come of playing requests against the
store's own rule of eviction. The prices are assumptions, all of them below; put yours there.

It prints the tables of docs/scale.md.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from common import arguments, at_least, finish, machine

from hcache_rag.choice import Prompt, choose_layout, storage_dtypes
from hcache_rag.layout import StateLayout
from hcache_rag.plan import Conditions, plan_restore
from hcache_rag.presets import HARDWARE, MODELS
from hcache_rag.profile import HardwareProfile, ReadRate
from hcache_rag.simulate import recompute_all, simulate, spans_of
from hcache_rag.spec import ModelSpec
from hcache_rag.store.eviction import priority

PASSAGE_TOKENS = 512
PROMPT = Prompt(restored_tokens=4 * PASSAGE_TOKENS, documents=4, fresh_tokens=32)
NAMES = ("llama-2-7b", "llama-3-8b", "qwen2.5-7b")
GPU = "a100-1ssd"

GPU_HOUR = 2.00
"""US dollars for an hour of an A100."""
GB_MONTH = {"host memory": 2.50, "NVMe": 0.08, "object store": 0.023}
"""US dollars for 10^9 bytes for a month."""
TIERS = {
    "host memory": ReadRate(26e9),
    "1 NVMe drive": ReadRate(6.9e9),
    "25 Gbit/s network": ReadRate(3.0e9, 2e-4),
    "object store": ReadRate(1.0e9, 5e-3),
}
"""Bytes a second, and seconds a request: what is outstanding at once shares both."""
BOUGHT = {"host memory": "host memory", "NVMe": "1 NVMe drive", "object store": "object store"}
"""What is paid for, and how it reads."""


def main() -> None:
    options = arguments(__doc__.splitlines()[0] if __doc__ else None).parse_args()
    rows = [*sizes(), *times(), *popularity(), *hit_rates(options.quick)]
    llama3 = next(row for row in rows if row["what"] == "first token" and "3-8b" in row["model"])
    targets = [at_least("llama-3-8b: recompute / host memory", llama3["gain"], 1.0)]
    finish(rows, targets, machine(), options.json)


def layout_of(spec: ModelSpec) -> StateLayout:
    """What `auto` keeps of this model on this machine, in eight-bit integers."""
    hidden, kv = storage_dtypes(spec)
    return choose_layout(
        spec, HARDWARE[GPU], hidden_dtype=hidden, kv_dtype=kv, prompt=PROMPT
    ).layout


def index_s(spec: ModelSpec) -> float:
    """GPU seconds that reading a passage takes."""
    costs = HARDWARE[GPU].costs_of(spec)
    return costs.read_s(PASSAGE_TOKENS, spec.num_layers)


def sizes() -> Iterator[dict[str, Any]]:
    """Bytes, and what keeping and making them costs."""
    print("| | kept | KB a token | 10⁶ passages | NVMe | object store | to index |", end="")
    print(" 10⁹ passages | NVMe | object store | to index |\n|" + "---|" * 11)
    for name in NAMES:
        spec = MODELS[name]
        layout, per_passage_s = layout_of(spec), index_s(spec)
        per_token = layout.bytes_per_token(spec)
        cells = []
        for count in (10**6, 10**9):
            num_bytes, hours = count * PASSAGE_TOKENS * per_token, count * per_passage_s / 3600
            cells += [
                _bytes(num_bytes),
                *(_dollars(num_bytes / 1e9 * GB_MONTH[tier]) for tier in ("NVMe", "object store")),
                f"{hours:,.0f} h, {_dollars(hours * GPU_HOUR)}",
            ]
        print(f"| {name} | {layout} | {per_token / 1e3:.0f} | " + " | ".join(cells) + " |")
        yield {
            "what": "sizes",
            "model": name,
            "bytes_per_token": per_token,
            "index_s": per_passage_s,
        }


def times() -> Iterator[dict[str, Any]]:
    """Time to the first token, and questions a second of one GPU, by where states are."""
    print("\n| | recomputed | " + " | ".join(TIERS) + " |\n|" + "---|" * (len(TIERS) + 2))
    for name in NAMES:
        spec, profile = MODELS[name], HARDWARE[GPU]
        layout = layout_of(spec)
        everything_s = _seconds(spec, profile, layout, None)
        by_tier = {tier: _seconds(spec, profile, layout, rate) for tier, rate in TIERS.items()}
        cells = [_time(seconds) for seconds in (everything_s, *by_tier.values())]
        print(f"| {name} | " + " | ".join(cells) + " |")
        gain = everything_s / by_tier["host memory"]
        yield {"what": "first token", "model": name, "gain": gain, "tiers": by_tier}


def _seconds(
    spec: ModelSpec, profile: HardwareProfile, layout: StateLayout, rate: ReadRate | None
) -> float:
    """Until the first token, by the best plan; without a rate, with nothing restored."""
    spans = spans_of(PROMPT, layout)
    if rate is None:
        plan = recompute_all(spec, PROMPT)
        rate = ReadRate(1e12)
    else:
        plan = plan_restore(
            spec, spans, profile, Conditions(rate), fresh_tokens=PROMPT.fresh_tokens
        )
    tier = HardwareProfile(profile.name, profile.source, rate, rate, profile.rates)
    fresh = PROMPT.fresh_tokens
    return simulate(spec, spans, plan, tier, fresh_tokens=fresh).makespan_s


def popularity() -> Iterator[dict[str, Any]]:
    """How often a month a passage must be asked for, so that keeping it costs less than reading."""
    print("\n| | " + " | ".join(GB_MONTH) + " |\n|" + "---|" * (len(GB_MONTH) + 1))
    for name in NAMES:
        spec = MODELS[name]
        layout, profile = layout_of(spec), HARDWARE[GPU]
        num_bytes = PASSAGE_TOKENS * layout.bytes_per_token(spec)
        uses = {}
        read_s = _seconds(spec, profile, layout, None)
        for place, tier in BOUGHT.items():
            saved_s = read_s - _seconds(spec, profile, layout, TIERS[tier])
            saved = saved_s / PROMPT.documents / 3600 * GPU_HOUR
            uses[place] = num_bytes / 1e9 * GB_MONTH[place] / saved if saved > 0 else float("inf")
        print(f"| {name} | " + " | ".join(f"{n:,.0f}" for n in uses.values()) + " |")
        yield {"what": "break-even uses a month", "model": name, "uses": uses}


def hit_rates(quick: bool) -> Iterator[dict[str, Any]]:
    """Of requests by Zipf's law, when the store holds a share of all passages."""
    passages, requests = (10_000, 50_000) if quick else (200_000, 1_000_000)
    shares = (0.01, 0.05, 0.1, 0.25)
    print("\n| exponent | " + " | ".join(f"{share:.0%}" for share in shares) + " |")
    print("|" + "---|" * (len(shares) + 1))
    for exponent in (0.7, 1.0, 1.2):
        asked = zipf(passages, exponent, requests)
        rates = [hit_rate(asked, round(share * passages)) for share in shares]
        best = [best_rate(passages, exponent, round(share * passages)) for share in shares]
        cells = (f"{a:.0%} ({b:.0%})" for a, b in zip(rates, best, strict=True))
        print(f"| {exponent} | " + " | ".join(cells) + " |")
        yield {"what": "hit rate", "exponent": exponent, "shares": shares, "rates": rates}


def _chances(passages: int, exponent: float) -> np.ndarray[Any, np.dtype[np.float64]]:
    chances = np.arange(1, passages + 1, dtype=np.float64) ** -exponent
    result: np.ndarray[Any, np.dtype[np.float64]] = chances / chances.sum()
    return result


def zipf(passages: int, exponent: float, requests: int) -> Sequence[int]:
    """Which passages are asked for, one after another; the same ones each time."""
    ends = np.cumsum(_chances(passages, exponent))
    drawn = np.random.default_rng(0).random(requests) * ends[-1]
    return [int(n) for n in np.searchsorted(ends, drawn)]


def best_rate(passages: int, exponent: float, room: int) -> float:
    """What a store would have that knew the future: the most popular ones are there."""
    return float(_chances(passages, exponent)[:room].sum())


def hit_rate(asked: Sequence[int], room: int) -> float:
    """Of the second half of some requests, by the store's own rule, states of one size."""
    clock, hits = 0.0, 0
    uses: dict[int, int] = {}
    current: dict[int, float] = {}
    heap: list[tuple[float, int]] = []
    for number, passage in enumerate(asked):
        if passage in current:
            uses[passage] += 1
            hits += number >= len(asked) // 2
        else:
            while len(current) >= room:
                lowest, victim = heapq.heappop(heap)
                if current.get(victim) == lowest:
                    clock = lowest
                    del current[victim], uses[victim]
            uses[passage] = 0
        current[passage] = priority(clock, uses[passage], 1.0, 1)
        heapq.heappush(heap, (current[passage], passage))
    return hits / (len(asked) - len(asked) // 2)


def _bytes(number: float) -> str:
    for unit, size in (("PB", 1e15), ("TB", 1e12)):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number / 1e9:,.0f} GB"


def _dollars(number: float) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"${number / size:,.1f}{unit}"
    return f"${number:,.0f}"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:,.0f} ms, {1 / seconds:,.1f}/s"


if __name__ == "__main__":
    main()
