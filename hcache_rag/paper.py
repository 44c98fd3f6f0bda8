"""The figures of the HCache paper beside what the simulator says of the same comparison.

Gao, Chen and Shu, "Fast State Restoration in LLM Serving with HCache", EuroSys 2025. The machines
are the paper's own figures; the processors' rates are calibrated on its statements that restoring
from hidden states alone balances at about 24 GB/s for Llama-2-7B and 21 GB/s for Llama-2-13B.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from hcache_rag.choice import LayoutChoice, Prompt, choose_layout, fixed_layout
from hcache_rag.plan import Cut, RestorePlan, plan_restore
from hcache_rag.presets import A100_7B_FLOPS, A100_13B_FLOPS, GB, MODELS, TERA
from hcache_rag.profile import HardwareProfile, Rates, ReadRate
from hcache_rag.simulate import Method, methods, simulate, spans_of
from hcache_rag.spec import ModelSpec

TOLERANCE = 0.15
"""A larger difference needs an explanation."""
_ATTENTION = 0.76
_MEMORY_BYTES_PER_S = 1.3e12
_FREE = 1e18
"""The paper's formulas count no time for moving K and V inside the GPU."""
_A100_PEAK = 312 * TERA
_SENSITIVITY = {
    "A100": (312 * TERA, 32 * GB),
    "A30": (165 * TERA, 32 * GB),
    "RTX 4090": (330 * TERA, 32 * GB),
    "L20": (120 * TERA, 32 * GB),
    "H800": (990 * TERA, 64 * GB),
}
"""Peak fp16 rate and bytes a second of the sensitivity study, states in host memory."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """A model on the paper's A100s: the rates that reproduce what the paper says of it."""

    model: str
    projection_flops_per_s: float
    layer_flops_per_s: float
    gpus: int
    note: str

    @property
    def spec(self) -> ModelSpec:
        """The model."""
        return MODELS[self.model]

    def machine(
        self, bytes_per_s: float, *, of_a100: float = 1.0, memory_bytes_per_s: float = _FREE
    ) -> HardwareProfile:
        """A machine that computes `of_a100` times as fast and reads `bytes_per_s`."""
        scale = self.gpus * of_a100
        rates = Rates(
            self.projection_flops_per_s * scale,
            self.layer_flops_per_s * scale,
            _ATTENTION * self.layer_flops_per_s * scale,
            memory_bytes_per_s * scale,
        )
        rate = ReadRate(bytes_per_s)
        return HardwareProfile("the paper's machine", self.note, rate, rate, rates)


LLAMA_7B = Calibration(
    "llama-2-7b", A100_7B_FLOPS, A100_7B_FLOPS, 1, "F = 24 GB/s * 2 d_kv = 197 TFLOP/s"
)
LLAMA_13B = Calibration(
    "llama-2-13b", A100_13B_FLOPS, A100_13B_FLOPS, 1, "F = 21 GB/s * 2 d_kv = 215 TFLOP/s"
)
LLAMA_13B_1SSD = Calibration(
    "llama-2-13b",
    A100_13B_FLOPS,
    184 * TERA,
    1,
    "F = 215 TFLOP/s for projections, 184 for recomputing (fitted to 31 + 9)",
)
OPT_30B = Calibration(
    "opt-30b",
    A100_13B_FLOPS,
    A100_13B_FLOPS,
    4,
    "F = 4 GPUs of 215 TFLOP/s, the rate of 13B; the paper's own 37 GB/s for this model would "
    "mean 530 TFLOP/s in all, and then 45 + 3",
)


@dataclass(frozen=True, slots=True)
class ScheduleCheck:
    """A schedule of the paper and the one that is found from the same figures."""

    what: str
    paper: tuple[int, int]
    found: tuple[int, int]
    calibration: str


@dataclass(frozen=True, slots=True)
class RatioCheck:
    """A ratio of the paper, as a range, and the simulator's range of the same comparison.

    Args:
        why: where they differ by more than `TOLERANCE`, the reason.
    """

    what: str
    paper: tuple[float, float]
    found: tuple[float, float]
    why: str

    @property
    def differences(self) -> tuple[float, float]:
        """Relative differences of the lower and upper ends."""
        low, high = (f / p - 1 for f, p in zip(self.found, self.paper, strict=True))
        return low, high

    @property
    def is_near(self) -> bool:
        """Whether both ends are within `TOLERANCE`."""
        return all(abs(difference) <= TOLERANCE for difference in self.differences)


def schedules() -> list[ScheduleCheck]:
    """Hidden layers and layers of the other method, nothing fresh.

    With K and V at the 16K tokens of L-Eval, with recomputing at the 1,024 that the paper names.
    """

    def mix(
        calibration: Calibration, bytes_per_s: float, tokens: int
    ) -> tuple[LayoutChoice, RestorePlan]:
        prompt = Prompt(tokens, 1, 0)
        machine = calibration.machine(bytes_per_s)
        choice = _choose(calibration.spec, machine, prompt)
        spans = spans_of(prompt, choice.layout)
        return choice, plan_restore(calibration.spec, spans, machine, fresh_tokens=0)

    def with_kv(calibration: Calibration) -> tuple[int, int]:
        layers = mix(calibration, 26 * GB, 16384)[0].layout.layers
        hidden = sum(fmt.representation.value == "hidden" for fmt in layers)
        return hidden, len(layers) - hidden

    def with_recomputing(calibration: Calibration, bytes_per_s: float) -> tuple[int, int]:
        recomputed = mix(calibration, bytes_per_s, 1024)[1].cuts[0].layers
        return calibration.spec.num_layers - recomputed, recomputed

    return [
        ScheduleCheck("Llama-2-7B, 4 SSDs: hidden + kv", (31, 1), with_kv(LLAMA_7B), LLAMA_7B.note),
        ScheduleCheck(
            "Llama-2-13B, 4 SSDs: hidden + kv", (36, 4), with_kv(LLAMA_13B), LLAMA_13B.note
        ),
        ScheduleCheck(
            "OPT-30B, 4 GPUs, 4 SSDs: hidden + recomputed",
            (40, 8),
            with_recomputing(OPT_30B, 26 * GB),
            OPT_30B.note,
        ),
        ScheduleCheck(
            "Llama-2-13B, 1 SSD: hidden + recomputed",
            (31, 9),
            with_recomputing(LLAMA_13B_1SSD, 6.9 * GB),
            LLAMA_13B_1SSD.note,
        ),
    ]


def _choose(spec: ModelSpec, machine: HardwareProfile, prompt: Prompt) -> LayoutChoice:
    """The best mix of the paper's own two forms."""
    return choose_layout(spec, machine, hidden_dtype=spec.dtype, kv_dtype=spec.dtype, prompt=prompt)


def ratios() -> list[RatioCheck]:
    """The paper's comparisons, simulated on its machines."""
    restores = _sensitivity()
    sharegpt = _first_tokens([(1024, 67), (2048, 67)])
    leval = _first_tokens([(16340, 100)])
    skewed = [r for name, r in restores if name in ("A30", "L20")]
    plentiful = [r for name, r in restores if name in ("A30",)]
    return [
        RatioCheck(
            "restore, over KV offload, all GPUs",
            (1.33, 2.66),
            _range([r for _, r in restores], "kv", "plan"),
            "twice is the most that half the bytes can give unless recomputing helps as well; the "
            "paper's 2.66 needs a machine that reads more slowly than those it lists",
        ),
        RatioCheck(
            "restore, over recomputing, all GPUs",
            (5.04, 9.05),
            _range([r for _, r in restores], "recompute", "plan"),
            "GPUs with little compute (A30, L20) are taken at the A100's 0.63 of their peak; if "
            "prefill reaches a larger share there than the projection, the ratio falls",
        ),
        RatioCheck(
            "scheduler, over hidden states alone, A30 and L20",
            (1.35, 1.64),
            _range(skewed, "hidden", "plan"),
            "as above: the fewer FLOP/s the projection gets, the more hidden states alone lose",
        ),
        RatioCheck(
            "KV offload over hidden states alone where reading is plentiful (A30)",
            (0.87, 0.87),
            _range(plentiful, "kv", "hidden"),
            "as above; the paper does not say which model and GPU its figure is of",
        ),
        RatioCheck(
            "scheduler, over recomputing and KV mixed as well, all GPUs",
            (1.28, 1.42),
            _range([r for _, r in restores], "hybrid", "plan"),
            "at the L20, whose projection is slow, KV is most of either mix; at the H800 hidden "
            "states are nearly all of the plan",
        ),
        RatioCheck(
            "token-wise over layer-wise, 13B, 1 SSD, 1,024 tokens",
            (1.12, 1.12),
            _token_wise(),
            "the cost model has no term for a GEMM's awkward number of rows, which is the paper's "
            "reason; with 768 and 256 rows the paper measures 1.07",
        ),
        RatioCheck(
            "time to first token, over KV offload, ShareGPT4 (1-2K of history)",
            (1.27, 1.90),
            _range(sharegpt, "kv", "plan"),
            "",
        ),
        RatioCheck(
            "time to first token, over recomputing, ShareGPT4",
            (2.21, 3.57),
            _range(sharegpt, "recompute", "plan"),
            "OPT-30B on four GPUs is calibrated faster than the paper's 37 GB/s say, which helps "
            "recomputing most; the history lengths of the trace are a guess",
        ),
        RatioCheck(
            "time to first token, over KV offload, L-Eval (16K)",
            (1.62, 1.93),
            _range(leval, "kv", "plan"),
            "OPT-30B: with the paper's 37 GB/s the mix is 45 + 3 instead of its own 40 + 8, and "
            "the ratio 2.0",
        ),
        RatioCheck(
            "time to first token, over recomputing, L-Eval",
            (2.66, 5.73),
            _range(leval, "recompute", "plan"),
            "at 16K attention is a third of prefill: it is counted as 2 d n^2 a layer at 0.76 of "
            "the GEMM rate, where the paper's formula counts half of that",
        ),
    ]


def _sensitivity() -> list[tuple[str, dict[str, float]]]:
    """Restore times by method, over GPUs, models and lengths; nothing fresh."""
    found = []
    for calibration, (name, (peak, bytes_per_s)), tokens in product(
        (LLAMA_7B, LLAMA_13B), _SENSITIVITY.items(), (1024, 4096)
    ):
        machine = calibration.machine(bytes_per_s, of_a100=peak / _A100_PEAK)
        found.append((name, _times(calibration.spec, machine, Prompt(tokens, 1, 0))))
    return found


def _first_tokens(lengths: Sequence[tuple[int, int]]) -> list[dict[str, float]]:
    """Times to the first token: a restore, then the new tokens; as in the paper not overlapped."""
    found = []
    for calibration, (context, fresh) in product((LLAMA_7B, LLAMA_13B, OPT_30B), lengths):
        spec, machine = calibration.spec, calibration.machine(26 * GB)
        loaded = calibration.machine(26 * GB, memory_bytes_per_s=_MEMORY_BYTES_PER_S)
        costs = loaded.costs_of(spec)
        times = _times(spec, machine, Prompt(context, 1, 0))
        fresh_s = spec.num_layers * costs.suffix(fresh, context)
        found.append({name: seconds + fresh_s for name, seconds in times.items()})
        found[-1]["recompute"] = spec.num_layers * float(costs.layer(context + fresh))
    return found


def _times(spec: ModelSpec, machine: HardwareProfile, prompt: Prompt) -> dict[str, float]:
    pure: list[Method] = methods(
        spec, machine, prompt, hidden_dtype=spec.dtype, kv_dtype=spec.dtype
    )
    times = {method.name: method.time_s for method in pure}
    kv = spans_of(prompt, fixed_layout(spec, "kv", spec.dtype).layout)
    hybrid = plan_restore(spec, kv, machine, fresh_tokens=0)
    times["hybrid"] = simulate(spec, kv, hybrid, machine, fresh_tokens=0).makespan_s
    return times


def _token_wise() -> tuple[float, float]:
    """The paper's 794 + 230 tokens against 31 + 9 layers."""
    spec, machine = LLAMA_13B_1SSD.spec, LLAMA_13B_1SSD.machine(6.9 * GB)
    prompt = Prompt(1024, 1, 0)
    spans = spans_of(prompt, fixed_layout(spec, "hidden", spec.dtype).layout)

    def time_s(cut: Cut) -> float:
        plan = RestorePlan((cut,), 256)
        return simulate(spec, spans, plan, machine, fresh_tokens=0).makespan_s

    step = spans[0].layout.chunk_tokens
    ratio = time_s(Cut(230 // step * step + step, 0)) / time_s(Cut(0, 9))
    return ratio, ratio


def _range(times: Sequence[dict[str, float]], slower: str, faster: str) -> tuple[float, float]:
    found = [t[slower] / t[faster] for t in times]
    return min(found), max(found)
