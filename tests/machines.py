"""Random small models, layouts, spans and machines, and a clock that shares no code with ours."""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hypothesis import strategies as st

from hcache_rag.layout import STORAGE_DTYPES, LayerFormat, Representation, StateLayout
from hcache_rag.plan import Conditions, Cut, RestorePlan, SpanSize
from hcache_rag.profile import (
    HardwareProfile,
    ModelCosts,
    Rates,
    ReadRate,
    SuffixCost,
    TokenCost,
)
from hcache_rag.spec import ModelSpec
from hcache_rag.timeline import COMPUTING, READING

HIDDEN, KV, NONE = Representation.HIDDEN, Representation.KV, Representation.NONE
TOY = ModelSpec(
    name="toy",
    family="llama",
    num_layers=3,
    hidden_size=64,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    window_tokens=100,
    dtype="bfloat16",
)
"""K and V take 128 bytes of a token and layer, hidden states 132."""
SMALL = ModelSpec(
    name="toy",
    family="llama",
    num_layers=3,
    hidden_size=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    window_tokens=4096,
    dtype="float32",
)
NOTHING = LayerFormat(NONE)
KEPT = [
    LayerFormat(representation, dtype)
    for representation in (HIDDEN, KV)
    for dtype in STORAGE_DTYPES[representation]
]
"""Every format in which a layer can be stored."""
EXACT = 1e-9
"""Relative: the same sums in another order."""

Task = tuple[str, float, Sequence[int]]
"""A lane, seconds, and which earlier tasks must have ended."""
Seconds = Sequence[Sequence[tuple[float, float]]]
"""Of each layer's pieces: reading and restoring."""


def last_end_s(tasks: Sequence[Task]) -> float:
    """When the last task ends, event by event: an idle lane begins its next task when it can."""
    queues: dict[str, deque[int]] = {}
    for index, (lane, _, _) in enumerate(tasks):
        queues.setdefault(lane, deque()).append(index)
    running: list[tuple[float, int]] = []
    busy: set[str] = set()
    ended: set[int] = set()
    now_s = 0.0
    while True:
        for lane, queue in queues.items():
            if queue and lane not in busy and ended.issuperset(tasks[queue[0]][2]):
                index = queue.popleft()
                heapq.heappush(running, (now_s + tasks[index][1], index))
                busy.add(lane)
        if not running:
            assert len(ended) == len(tasks), "the tasks wait for each other"
            return now_s
        now_s, index = heapq.heappop(running)
        ended.add(index)
        busy.remove(tasks[index][0])


def restore_end_s(upfront_s: float, layers: Seconds, forward_s: float) -> float:
    """When a restore ends that reads, restores and passes through layer after layer."""
    tasks: list[Task] = [(READING, read_s, ()) for pieces in layers for read_s, _ in pieces]
    tasks.append((COMPUTING, upfront_s, ()))
    read = 0
    for pieces in layers:
        for _, restore_s in pieces:
            tasks.append((COMPUTING, restore_s, (read,)))
            read += 1
        tasks.append((COMPUTING, forward_s, ()))
    return last_end_s(tasks)


# --- random inputs ------------------------------------------------------------------------------


def powers(lowest: float, highest: float) -> st.SearchStrategy[float]:
    """Numbers of every order of magnitude between two."""
    return st.floats(math.log10(lowest), math.log10(highest)).map(lambda power: 10**power)


@st.composite
def specs(draw: st.DrawFn, max_layers: int = 6) -> ModelSpec:
    """A small decoder of any shape, grouped queries or not."""
    kv_heads, width = draw(st.integers(1, 4)), draw(st.sampled_from([2, 6, 16]))
    heads = kv_heads * draw(st.integers(1, 4))
    hidden = max(8, int(kv_heads * width * draw(st.floats(0.3, 4.0))))
    return ModelSpec(
        name="any",
        family="llama",
        num_layers=draw(st.integers(1, max_layers)),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=width,
        window_tokens=4096,
        dtype=draw(st.sampled_from(["float32", "bfloat16"])),
        mlp_size=draw(st.integers(0, 4)) * hidden,
    )


@st.composite
def rates(draw: st.DrawFn) -> Rates:
    """A processor; layers get a part of the projection's rate, as they do."""
    flops_per_s = draw(powers(1e8, 1e11))
    return Rates(
        projection_flops_per_s=flops_per_s,
        layer_flops_per_s=flops_per_s * draw(st.floats(0.2, 1.0)),
        attention_flops_per_s=flops_per_s * draw(st.floats(0.1, 1.0)),
        memory_bytes_per_s=flops_per_s * draw(powers(0.3, 100)),
    )


@st.composite
def read_rates(
    draw: st.DrawFn, spec: ModelSpec, flops_per_s: float, *, per_request: bool = True
) -> ReadRate:
    """A store, around the rate at which reading hidden rows takes as long as projecting them."""
    balanced = flops_per_s / spec.kv_width
    request_s = draw(st.sampled_from([0.0, 1e-6, 1e-4])) if per_request else 0.0
    return ReadRate(balanced * draw(st.one_of(powers(1e-4, 0.3), powers(0.3, 3))), request_s)


@st.composite
def machines(draw: st.DrawFn, spec: ModelSpec, *, per_request: bool = True) -> HardwareProfile:
    """A machine on which it is not clear beforehand what is fastest."""
    processor = draw(rates())
    rate = draw(read_rates(spec, processor.projection_flops_per_s, per_request=per_request))
    return HardwareProfile("any", "made up", rate, rate, processor)


@st.composite
def measured_machines(draw: st.DrawFn, spec: ModelSpec) -> HardwareProfile:
    """The same, with costs as they are measured: of their own for every dtype, calls cost too."""
    machine = draw(machines(spec))
    known = machine.rates.costs(spec)
    factors = draw(st.lists(st.floats(0.2, 5.0), min_size=3, max_size=3))
    call_s = draw(st.sampled_from([0.0, 1e-6, 1e-4]))

    def near(costs: Mapping[str, TokenCost]) -> dict[str, TokenCost]:
        return {
            dtype: TokenCost(call_s, cost.per_token_s * factors[number % 3])
            for number, (dtype, cost) in enumerate(costs.items())
        }

    costs = ModelCosts(
        near(known.project),
        near(known.scatter),
        TokenCost(call_s, known.layer.per_token_s, known.layer.per_square_s),
        SuffixCost(call_s, known.suffix.per_token_s, 0.0, 0.0),
    )
    return HardwareProfile("any", "made up", machine.cold, machine.warm, machine.rates, spec, costs)


@st.composite
def layouts(draw: st.DrawFn, num_layers: int, *, may_lack: bool = True) -> StateLayout:
    """Any formats in any order, behind first layers that keep nothing."""
    nothing = draw(st.integers(0, num_layers)) if may_lack and draw(st.booleans()) else 0
    kept = draw(
        st.lists(
            st.sampled_from(KEPT), min_size=num_layers - nothing, max_size=num_layers - nothing
        )
    )
    return StateLayout((*[NOTHING] * nothing, *kept), draw(st.sampled_from([1, 7, 16, 64, 65])))


@st.composite
def spans(
    draw: st.DrawFn, num_layers: int, *, max_tokens: int = 200, max_spans: int = 5
) -> list[SpanSize]:
    """Documents of few layouts; some are cut, some cannot be computed from their tokens."""
    known = draw(st.lists(layouts(num_layers), min_size=1, max_size=2))
    result = []
    for _ in range(draw(st.integers(1, max_spans))):
        layout = draw(st.sampled_from(known))
        result.append(
            SpanSize(
                tokens=draw(st.integers(1, max_tokens)),
                layout=layout,
                is_recomputable=bool(layout.num_none) or draw(st.booleans()),
                unused_tokens=draw(st.sampled_from([0, 0, 1, 63, 100])),
            )
        )
    return result


@st.composite
def even_spans(draw: st.DrawFn, spec: ModelSpec) -> list[SpanSize]:
    """Documents of whole chunks in one format, as many as one likes: pieces are nearly equal."""
    layout = StateLayout((draw(st.sampled_from(KEPT)),) * spec.num_layers, 64)
    counts = draw(st.lists(st.integers(1, 24), min_size=1, max_size=5))
    return [SpanSize(64 * count, layout) for count in counts]


@st.composite
def plans(draw: st.DrawFn, sizes: Sequence[SpanSize]) -> RestorePlan:
    """Any plan for spans: first tokens up to the end of a chunk, or first layers, or neither."""
    cuts = []
    for span in sizes:
        none, depth = span.layout.num_none, len(span.layout.layers)
        if not span.is_recomputable:
            cuts.append(Cut())
        elif draw(st.booleans()):
            cuts.append(Cut(0, draw(st.integers(none, depth))))
        else:
            ends = range(span.chunk_tokens, span.tokens + span.chunk_tokens, span.chunk_tokens)
            cuts.append(Cut(min(draw(st.sampled_from(ends)), span.tokens), none))
    return RestorePlan(tuple(cuts), draw(st.sampled_from([1, 64, 100, 512])))


@dataclass(frozen=True)
class Case:
    """A model, what is restored, and on what."""

    spec: ModelSpec
    spans: list[SpanSize]
    machine: HardwareProfile
    now: Conditions
    fresh_tokens: int


@st.composite
def cases(draw: st.DrawFn, *, is_even: bool = False, is_measured: bool = False) -> Case:
    """A restore of anything on any machine, as it is now."""
    spec = draw(specs())
    sizes = draw(even_spans(spec) if is_even else spans(spec.num_layers))
    machine = draw(measured_machines(spec) if is_measured else machines(spec))
    now = Conditions(machine.cold, draw(st.sampled_from([0.5, 1.0, 3.0])))
    return Case(spec, sizes, machine, now, draw(st.integers(0, 40)))
