"""What other number formats would change when restoring: bfloat16 to compute in, int8 products.

Parts of `bench_restore.py`: what each takes, in pairs that run next to each other, and errs.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import ratio_of_pairs
from torch import Tensor

from hcache_kernels import quantise_rows, quantise_rows_smoothly
from hcache_rag import GenerationOptions, HCacheEngine
from hcache_rag.bundled import default_model_path
from hcache_rag.layout import VALUE_BYTES, Representation
from hcache_rag.models import CapturedLayer, ModelAdapter, Projection, load_model

SHAPES = {
    "smollm2-135m": (576, 384),
    "1B, grouped-query": (2048, 1024),
    "1B, multi-head": (2048, 4096),
    "8B, grouped-query": (4096, 2048),
    "7B, multi-head": (4096, 8192),
}
"""Widths of a layer's input, and of its K and V together."""
TOKENS = (256, 1024, 4096)
LARGEST_PRODUCT = 1 << 35
"""Multiplications; larger ones take minutes, and show nothing new."""
DTYPES = (torch.float32, torch.bfloat16)
TEXT = (Path(__file__).parent.parent / "docs" / "design.md").read_text()


def interleaved(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, all of them once in every round; a round before that warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(-1, repeats):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - started)
    return seconds


# int8 products


def in_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (E, W) as int8, and float32 scales (W,) of what they give."""
    scales = weight.abs().amax(0).div_(127)
    return (weight / scales).round_().to(torch.int8), scales


def rounded(weight: Tensor, channel_scales: Tensor) -> Tensor:
    """Weights (E, W) as an int8 product sees them that has smooth rows' channel scales in it."""
    channels = channel_scales.unsqueeze(-1)
    integers, scales = in_int8(weight.float() * channels)
    return (integers.float() * scales / channels).to(weight.dtype)


def rounded_projections(
    adapter: ModelAdapter, captured: Sequence[CapturedLayer]
) -> list[Projection]:
    """All projections as int8 products see them, with the channel scales of captured inputs.

    With these, the product of floats errs as one of integers does, whose sums are exact.
    """
    found = []
    for layer, projection in zip(captured, adapter.projections, strict=True):
        assert layer.first is not None
        _, _, channel_scales = quantise_rows_smoothly(layer.first[0])
        found.append(Projection(rounded(projection.weight, channel_scales), projection.bias))
    return found


class Products:
    """A piece of `tokens` int8-smooth rows of one layer, and the ways to project it."""

    def __init__(self, width: int, out_width: int, tokens: int) -> None:
        self.rows = torch.randint(-127, 128, (tokens, width), dtype=torch.int8)
        self.channels, self.scale = torch.rand(width) + 0.5, torch.rand(tokens, 1)
        self.weight = torch.randn(width, out_width) * 0.02
        self.weights = {dtype: self.weight.to(dtype) for dtype in DTYPES}
        self.integers, self.column_scales = in_int8(self.weight * self.channels.unsqueeze(-1))
        self.staged = {dtype: torch.empty(tokens, width, dtype=dtype) for dtype in DTYPES}
        self.out = {dtype: torch.empty(tokens, out_width, dtype=dtype) for dtype in DTYPES}
        self.sums = torch.empty(tokens, out_width, dtype=torch.int32)
        self.chunk = max(64, min(1024, VALUE_BYTES // width // 64 * 64))

    def floats(self, dtype: torch.dtype) -> None:
        """What is done now: to floats, the product, the rows' scales."""
        staged, out = self.staged[dtype], self.out[dtype]
        staged.copy_(self.rows)
        staged.mul_(self.channels)
        torch.mm(staged, self.weights[dtype], out=out)
        out.mul_(self.scale)

    def ints(self, dtype: torch.dtype) -> None:
        """By `torch._int_mm`, if the weights were rounded long before."""
        self._int_product(dtype, slice(None), self.integers, self.column_scales)

    def ints_by_chunk(self, dtype: torch.dtype) -> None:
        """By `torch._int_mm`, with the channel scales of each chunk, as states have them."""
        for first in range(0, len(self.rows), self.chunk):
            weights = in_int8(self.weight * self.channels.unsqueeze(-1))
            self._int_product(dtype, slice(first, first + self.chunk), *weights)

    def _int_product(
        self, dtype: torch.dtype, at: slice, integers: Tensor, column_scales: Tensor
    ) -> None:
        torch._int_mm(self.rows[at], integers, out=self.sums[at])
        floats = torch.mul(self.sums[at], column_scales, out=self.out[torch.float32][at])
        torch.mul(floats, self.scale[at], out=self.out[dtype][at])


def int8_products(is_quick: bool) -> list[dict[str, Any]]:
    """A/B: the projection of int8-smooth rows by floats, and by integers. Only if torch has it."""
    shapes = dict(list(SHAPES.items())[:2]) if is_quick else SHAPES
    tokens_of = TOKENS[:1] if is_quick else TOKENS
    rows = []
    print(
        f"\nprojecting int8-smooth rows by floats / by torch._int_mm, {torch.get_num_threads()} "
        "thread(s); by chunk: weights rounded anew for each chunk's channel scales\n"
        f"  {'':20}{'tokens':>7}{'float32 ms':>12}{'int8':>8}{'by chunk':>10}"
        f"{'bfloat16 ms':>13}{'int8':>8}{'by chunk':>10}"
    )
    for name, (width, out_width) in shapes.items():
        for tokens in tokens_of:
            if width * out_width * tokens > LARGEST_PRODUCT:
                continue
            piece = Products(width, out_width, tokens)
            repeats = 3 if is_quick else max(3, min(15, int(1e10 / (width * out_width * tokens))))
            calls: dict[str, Callable[[], object]] = {}
            for dtype in DTYPES:
                for way in (piece.floats, piece.ints, piece.ints_by_chunk):
                    calls[f"{dtype} {way.__name__}"] = partial(way, dtype)
            seconds = interleaved(calls, repeats)
            line = f"  {name:20}{tokens:7,}"
            for dtype in DTYPES:
                floats = seconds[f"{dtype} floats"]
                ratios = {
                    way: ratio_of_pairs(floats, seconds[f"{dtype} {way}"])
                    for way in ("ints", "ints_by_chunk")
                }
                rows.append(
                    {
                        "what": "int8_product",
                        "shape": [width, out_width],
                        "tokens": tokens,
                        "chunk_tokens": piece.chunk,
                        "dtype": str(dtype).removeprefix("torch."),
                        "threads": torch.get_num_threads(),
                        "floats_s": statistics.median(floats),
                        "floats_over_ints": ratios["ints"],
                        "floats_over_ints_by_chunk": ratios["ints_by_chunk"],
                    }
                )
                head = 12 if dtype is torch.float32 else 13
                line += f"{statistics.median(floats) * 1e3:{head}.2f}{ratios['ints']:7.2f}x"
                line += f"{ratios['ints_by_chunk']:9.2f}x"
            print(line, flush=True)
    return rows


@torch.no_grad()
def int8_errors(adapter: ModelAdapter, is_quick: bool) -> list[dict[str, Any]]:
    """Relative errors (Frobenius) of SmolLM2's K and V against float64, over layers."""
    tokenizer: Any = load_tokenizer()
    ids = tokenizer(TEXT).input_ids
    seen, other = (ids[first : first + (64 if is_quick else 900)] for first in (0, 3000))
    kept = [Representation.HIDDEN] * adapter.spec.num_layers
    nothing = adapter.prefill(tokenizer("\n\n").input_ids)
    before, captured = (adapter.capture([part], kept, nothing) for part in (seen, other))
    errors: dict[str, list[float]] = {}
    for layer, (first, caught) in enumerate(zip(before, captured, strict=True)):
        assert first.first is not None
        assert caught.first is not None
        hidden, weight = caught.first[0], adapter.projections[layer].weight
        rms = adapter.row_scale(layer, hidden).unsqueeze(-1)
        right = (hidden.double() @ weight.double()) * rms.double()
        plain, plain_scales = quantise_rows(hidden)
        smooth, scales, channels = quantise_rows_smoothly(hidden)
        _, _, channels_before = quantise_rows_smoothly(first.first[0])
        restored = (smooth * channels) * scales.unsqueeze(-1)
        half = hidden.bfloat16()
        ways = {
            "float32": hidden @ weight * rms,
            "int8-smooth (default)": restored @ weight * rms,
            "int8-smooth, int8 weights": restored @ rounded(weight, channels) * rms,
            "as before, channel scales of another text": restored
            @ rounded(weight, channels_before)
            * rms,
            "int8": plain * plain_scales.unsqueeze(-1) @ weight * rms,
            "computing in bfloat16": (half @ weight.bfloat16()).float() * rms,
        }
        for name, found in ways.items():
            error = (found.double() - right).norm() / right.norm()
            errors.setdefault(name, []).append(float(error))
    print("\nrelative error of K and V from hidden states, against float64; median and worst layer")
    for name, found_errors in errors.items():
        print(f"  {name:44}{statistics.median(found_errors):9.1e}{max(found_errors):9.1e}")
    return [
        {"what": "error", "way": name, "p50": statistics.median(its), "max": max(its)}
        for name, its in errors.items()
    ]


def load_tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(default_model_path())


# bfloat16 to compute in


def compute_dtypes(is_quick: bool) -> list[dict[str, Any]]:
    """A/B: SmolLM2 in float32 and in bfloat16; and the errors of `int8_errors`, on the former."""
    path, num_tokens = str(default_model_path()), 200 if is_quick else 1024
    passage = TEXT[: num_tokens * 4]
    preamble, question = "Answer from this text.\n\n", "\n\nQuestion: what is a plan?\nAnswer:"
    calls: dict[str, Callable[[], object]] = {}
    rows: list[dict[str, Any]] = []
    with ExitStack() as opened:
        for dtype in ("float32", "bfloat16"):
            model, tokenizer = load_model(path, dtype=dtype)
            for kind in ("kv",) if is_quick else ("kv", "hidden"):
                engine = opened.enter_context(
                    HCacheEngine(
                        model,
                        tokenizer,
                        opened.enter_context(tempfile.TemporaryDirectory(prefix="bench-dtypes-")),
                        preamble=preamble,
                        representation=kind,
                        profile=None,
                        fidelity="none",
                        keep_recurring=False,
                    )
                )
                engine.precompute([passage])
                name = {"kv": "first token, K and V", "hidden": "first token, hidden states"}[kind]
                calls[f"{dtype} {name}"] = _answer(engine, preamble + passage + question, 1)
            calls[f"{dtype} first token, all read"] = _answer(engine, passage[30:] + question, 1)
            calls[f"{dtype} eight decoded tokens"] = _answer(engine, "Once", 9)
            if dtype == "float32":
                rows += int8_errors(engine.adapter, is_quick)
        seconds = interleaved(calls, 1 if is_quick else 7)
    print(f"\nSmolLM2-135M, {len(passage):,} characters; ms in float32, in bfloat16, their ratio")
    for name in (n.partition(" ")[2] for n in calls if n.startswith("float32")):
        full, half = (seconds[f"{dtype} {name}"] for dtype in ("float32", "bfloat16"))
        row: dict[str, Any] = {
            "what": "compute_dtype",
            "step": name,
            "float32_s": statistics.median(full),
            "bfloat16_s": statistics.median(half),
            "float32_over_bfloat16": ratio_of_pairs(full, half),
            "threads": torch.get_num_threads(),
        }
        rows.append(row)
        print(
            f"  {name:34}{row['float32_s'] * 1e3:8.0f}{row['bfloat16_s'] * 1e3:8.0f}"
            f"{row['float32_over_bfloat16']:7.2f}x"
        )
    return rows


def _answer(engine: HCacheEngine, prompt: str, tokens: int) -> Callable[[], object]:
    options = GenerationOptions(max_new_tokens=tokens, temperature=0)
    return lambda: engine.generate(prompt, options=options)
