"""Checks the kernels against float64: on a GPU, or in Triton's interpreter.

    python -m hcache_kernels.check               on a GPU
    python -m hcache_kernels.check --interpret   on the CPU, slowly

Every output lies in memory that is full of NaN and fenced by it: what a kernel must write is
finite afterwards and near enough, and nothing else has changed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from hcache_kernels import fused_reference as twins
from hcache_kernels import quant
from hcache_kernels.fused import (
    FP8,
    CacheSlots,
    KeyTransform,
    Projection,
    StoredKV,
    StoredRows,
    chunks_of_rows,
    why_not,
)
from hcache_kernels.tiles import tiles_of

GROUP = 64
EPS = 1e-6
FENCE = 64
"""Elements in front of a cache, and behind it, that nobody may touch."""
ROUNDING = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""What a number of a dtype may be off by, relative to its own size: half a step and a bit."""
SUMMING = 2.0**-18
"""What sums in float32 may be off by, relative to the sum of magnitudes."""


@dataclass(frozen=True)
class Case:
    """One launch.

    Args:
        label: its name.
        kind: "rows" (layer inputs), or "kv".
        stored: what they are stored in: a dtype, or one of the ways to quantise.
        dtype: of the weights.
        cache: dtype of the cache.
        chunks: tokens of each chunk.
        width, heads, head_dim: E, G, D.
        rotary: elements of a head that are rotated, by default all.
        where: "contiguous", "NHD" or "HND" pages.
    """

    label: str
    kind: str = "rows"
    stored: str = "bfloat16"
    dtype: str = "bfloat16"
    cache: str = "float32"
    chunks: tuple[int, ...] = (64, 37)
    width: int = 128
    heads: int = 2
    head_dim: int = 64
    rotary: int = 0
    is_interleaved: bool = False
    has_bias: bool = False
    has_key_norm: bool = False
    is_layer_norm: bool = False
    where: str = "contiguous"


CASES = (
    Case("plain"),
    Case("one row", chunks=(1,)),
    Case("more rows than a tile", chunks=(130, 70)),
    Case("fp16", stored="float16", dtype="float16", has_bias=True),
    Case("into bf16", cache="bfloat16", has_bias=True),
    Case("into fp16", stored="float16", dtype="float16", cache="float16"),
    Case("stored wider", stored="float32"),
    Case("stored otherwise", stored="float16"),
    Case("int8", stored="int8", has_bias=True),
    Case("int8 fp16", stored="int8", dtype="float16"),
    Case("int8-g64", stored="int8-g64", width=192),
    Case("int8-g64 odd", stored="int8-g64", width=96),
    Case("int8-smooth", stored="int8-smooth", chunks=(128, 30, 64)),
    Case("int8-smooth odd", stored="int8-smooth", width=72, head_dim=20, heads=1),
    Case("fp8", stored="fp8"),
    Case("odd width", width=60, head_dim=12, heads=3, has_bias=True),
    Case("head of 80", head_dim=80, heads=1, rotary=32),
    Case("head of 96", head_dim=96, heads=1),
    Case("head of 128", head_dim=128, heads=2),
    Case("head of 256", head_dim=256, heads=1, chunks=(40,)),
    Case("partial", rotary=16, has_bias=True),
    Case("partial odd", rotary=20),
    Case("interleaved", is_interleaved=True),
    Case("interleaved partial", is_interleaved=True, rotary=32, has_bias=True),
    Case("interleaved odd", is_interleaved=True, head_dim=20, heads=1, rotary=12),
    Case("key norm", has_key_norm=True),
    Case("key norm interleaved", has_key_norm=True, is_interleaved=True, rotary=16),
    Case("key norm odd", has_key_norm=True, head_dim=20, heads=1),
    Case("layer norm", is_layer_norm=True, has_bias=True),
    Case("layer norm int8", is_layer_norm=True, has_bias=True, stored="int8", rotary=16),
    Case("pages NHD", where="NHD"),
    Case("pages HND", where="HND", stored="int8", cache="bfloat16"),
    Case("pages HND odd", where="HND", head_dim=20, heads=3, rotary=8),
    Case("kv", kind="kv"),
    Case("kv into bf16", kind="kv", cache="bfloat16"),
    Case("kv fp32", kind="kv", stored="float32"),
    Case("kv int8", kind="kv", stored="int8", chunks=(130, 40)),
    Case("kv int8 fp16", kind="kv", stored="int8", cache="float16"),
    Case("kv fp8", kind="kv", stored="fp8"),
    Case("kv partial", kind="kv", rotary=16, stored="int8"),
    Case("kv interleaved", kind="kv", is_interleaved=True, rotary=32, stored="int8"),
    Case("kv key norm", kind="kv", has_key_norm=True, head_dim=20),
    Case("kv pages", kind="kv", where="NHD", head_dim=80, stored="int8"),
)
"""What the kernels of restoring must do."""


@dataclass(frozen=True)
class Result:
    """What came of a case.

    Args:
        label: its name.
        error: the largest one, as a part of what is allowed; more than 1 is too much.
        complaint: what is wrong, empty if nothing is.
        seconds: of the launch, the first one with compiling.
    """

    label: str
    error: float
    complaint: str
    seconds: float


def check_case(case: Case, place: torch.device) -> Result:
    """Run one case on a device (the CPU, if kernels are interpreted)."""
    source = torch.Generator().manual_seed(0)
    makes = _rows_problem if case.kind == "rows" else _kv_problem
    problem = makes(case, source)
    key = _key_transform(case, source)
    memory = [torch.full((_cache_size(case),), torch.nan, dtype=_dtype(case.cache), device=place)]
    memory.append(memory[0].clone())
    slots = _slots(case, source)
    target = _target(case, memory, slots.to(place) if slots is not None else None)
    stored, projection, moved_key = (_moved(x, place) for x in (*problem.inputs, key))
    reason = why_not(stored, projection, moved_key, target)
    if reason is not None:
        return Result(case.label, 0.0, reason, 0.0)
    from hcache_kernels import launch

    began = time.perf_counter()
    if isinstance(stored, StoredRows):
        launch.rows_launch(stored, projection, moved_key, target).run()
    else:
        launch.kv_launch(stored, moved_key, target).run()
    found = [side.cpu() for side in memory]
    seconds = time.perf_counter() - began
    return _judged(case, problem, key, slots, found, seconds)


@dataclass(frozen=True)
class _Problem:
    """Inputs; exact K before its norm and V, (T, G, D) in float64; the sizes of what was summed.

    `inner` is what sums may be off by, relative to these sizes.
    """

    inputs: tuple[Any, Any]
    exact: tuple[Tensor, Tensor]
    sizes: tuple[Tensor, Tensor]
    inner: float


def _tiles(case: Case, *, crosses_chunks: bool) -> Tensor:
    begins = [sum(case.chunks[:i]) for i in range(len(case.chunks))]
    chunks = zip(begins, case.chunks, strict=True)
    return torch.tensor(tiles_of(chunks, crosses_chunks=crosses_chunks), dtype=torch.int32)


def _rows_problem(case: Case, source: torch.Generator) -> _Problem:
    dtype = _dtype(case.dtype)
    tokens, outputs = sum(case.chunks), 2 * case.heads * case.head_dim
    hidden = torch.randn(tokens, case.width, generator=source) * 2 + case.is_layer_norm
    hidden[::16, 7] *= 30
    statistics = twins.row_statistics(hidden.double(), EPS, is_centred=case.is_layer_norm)
    scale, shift = (side.float() for side in statistics)
    weight = (torch.randn(outputs, case.width, generator=source) / case.width**0.5).to(dtype)
    bias = torch.randn(outputs, generator=source).to(dtype) if case.has_bias else None
    sums = weight.double().sum(1).float() if case.is_layer_norm else None
    stored = StoredRows(
        row_scales=scale,
        tiles=_tiles(case, crosses_chunks=case.stored != "int8-smooth"),
        shift=shift if case.is_layer_norm else None,
        **_quantised_rows(case, hidden),
    )
    chunk_of_row = chunks_of_rows(stored.tiles, tokens)
    scales = (stored.quant_scales, stored.channel_scales, chunk_of_row, stored.group_channels)
    numbers = twins.dequantise_rows(stored.rows, *scales, torch.float64)
    exact = twins.project(numbers, scale, weight, bias, stored.shift, sums, case.head_dim)
    sizes = twins.project(
        numbers.abs(),
        scale,
        weight.abs(),
        _size(bias),
        _size(stored.shift),
        _size(sums),
        case.head_dim,
    )
    # Scaled numbers are rounded to the weights' dtype in front of the product.
    is_rounded = case.stored not in ("int8", "fp8", case.dtype)
    inner = SUMMING + (ROUNDING[dtype] if is_rounded else 0.0)
    return _Problem((stored, Projection(weight, bias, sums)), exact, sizes, inner)


def _quantised_rows(case: Case, hidden: Tensor) -> dict[str, Any]:
    if case.stored == "int8":
        integers, scales = quant.quantise_rows(hidden)
        return {"rows": integers, "quant_scales": scales}
    if case.stored == "int8-g64":
        integers, scales = quant.quantise_rows(hidden, GROUP)
        return {"rows": integers, "quant_scales": scales, "group_channels": GROUP}
    if case.stored == "int8-smooth":
        chunks = torch.split(hidden, list(case.chunks))
        parts = [quant.quantise_rows_smoothly(chunk) for chunk in chunks]
        return {
            "rows": torch.cat([part[0] for part in parts]),
            "quant_scales": torch.cat([part[1] for part in parts]),
            "channel_scales": torch.stack([part[2] for part in parts]),
        }
    if case.stored == "fp8":
        scales = hidden.abs().amax(1) / 448
        return {"rows": (hidden / scales[:, None]).to(FP8), "quant_scales": scales}
    return {"rows": hidden.to(_dtype(case.stored))}


def _kv_problem(case: Case, source: torch.Generator) -> _Problem:
    shape = (case.heads, sum(case.chunks), case.head_dim)
    keys, values = (torch.randn(shape, generator=source) * 3 for _ in range(2))
    tiles = _tiles(case, crosses_chunks=False)
    if case.stored == "int8":
        parts = [quant.quantise_keys(x) for x in torch.split(keys, list(case.chunks), 1)]
        key_scales = torch.stack([scales for _, scales in parts])
        stored_values, value_scales = quant.quantise_values(values)
        stored_keys = torch.cat([integers for integers, _ in parts], 1)
        stored = StoredKV(stored_keys, stored_values, tiles, key_scales, value_scales)
        of_rows = key_scales.double()[chunks_of_rows(tiles, shape[1])].transpose(0, 1)
        exact = (
            stored_keys.double() * of_rows,
            stored_values.double() * value_scales.double().unsqueeze(-1),
        )
    else:
        dtype = FP8 if case.stored == "fp8" else _dtype(case.stored)
        stored = StoredKV(keys.to(dtype), values.to(dtype), tiles)
        exact = (stored.keys.double(), stored.values.double())
    sides = (exact[0].transpose(0, 1), exact[1].transpose(0, 1))
    return _Problem((stored, None), sides, (sides[0].abs(), sides[1].abs()), SUMMING)


def _key_transform(case: Case, source: torch.Generator) -> KeyTransform:
    rotary = case.rotary or case.head_dim
    positions = torch.randint(0, 4000, (sum(case.chunks),), generator=source)
    frequencies = 10000.0 ** (-torch.arange(0, rotary, 2) / rotary)
    angles = torch.outer(positions.double(), frequencies.double())
    repeated = angles.repeat_interleave(2, 1) if case.is_interleaved else angles.repeat(1, 2)
    gain = 0.5 + torch.rand(case.head_dim, generator=source) if case.has_key_norm else None
    cos, sin = (side.to(_dtype(case.dtype)) for side in (repeated.cos(), repeated.sin()))
    return KeyTransform(cos, sin, case.is_interleaved, gain, EPS)


PAGE = 16


def _pages(case: Case) -> int:
    return -(-sum(case.chunks) // PAGE) + 2


def _cache_size(case: Case) -> int:
    tokens = PAGE * _pages(case)
    return 2 * FENCE + tokens * case.heads * case.head_dim


def _slots(case: Case, source: torch.Generator) -> Tensor | None:
    """Pages in a random order, and some rows that are not wanted."""
    if case.where == "contiguous":
        return None
    order = torch.randperm(_pages(case) * PAGE, generator=source)[: sum(case.chunks)]
    order[::5] = -1
    return order


def _target(case: Case, memory: Sequence[Tensor], slots: Tensor | None) -> CacheSlots:
    """The cache in fenced memory; in one stretch, its rows begin behind three others."""
    inner = [side[FENCE:-FENCE] for side in memory]
    if case.where == "contiguous":
        keys, values = (side.view(case.heads, -1, case.head_dim)[:, 3:] for side in inner)
        return CacheSlots.contiguous(keys, values)
    assert slots is not None
    is_hnd = case.where == "HND"
    shape = (case.heads, PAGE) if is_hnd else (PAGE, case.heads)
    keys, values = (side.view(-1, *shape, case.head_dim) for side in inner)
    return CacheSlots.paged(keys, values, slots, heads_first=is_hnd)


def _judged(
    case: Case,
    problem: _Problem,
    key: KeyTransform,
    slots: Tensor | None,
    found: Sequence[Tensor],
    seconds: float,
) -> Result:
    """Compare the whole of the cache's memory with what it should be."""
    keys = twins.norm_heads(problem.exact[0], key.gain, key.eps)
    turned = twins.rope(keys, key.cos, key.sin, is_interleaved=key.is_interleaved)
    shrink = torch.ones(())
    if key.gain is not None:  # a norm divides errors as it divides numbers
        rms = problem.exact[0].pow(2).mean(-1, keepdim=True).sqrt()
        shrink = 2 * key.gain.abs().max() / rms
    rounding = ROUNDING[_dtype(case.cache)]
    expected = (turned, problem.exact[1])
    slack = [
        factor * size.amax(-1, keepdim=True) * problem.inner + side.abs() * rounding
        for factor, size, side in zip(
            (2 * shrink, torch.ones(())), problem.sizes, expected, strict=True
        )
    ]
    wanted, allowed = (
        [torch.full_like(side, torch.nan, dtype=torch.float64) for side in found] for _ in "12"
    )
    _target(case, wanted, slots).write(*expected)
    _target(case, allowed, slots).write(slack[0], slack[1])
    worst = 0.0
    for side, have, want, may in zip("KV", found, wanted, allowed, strict=True):
        written = ~want.isnan()
        if not have[~written].isnan().all():
            return Result(case.label, worst, f"{side}: something else was written", seconds)
        if not have[written].isfinite().all():
            return Result(case.label, worst, f"{side}: something was not written", seconds)
        error = (have.double() - want).abs()[written] / may[written]
        worst = max(worst, float(error.max()))
    complaint = f"{worst:.2f} of the allowed error" if worst > 1 else ""
    return Result(case.label, worst, complaint, seconds)


def _moved(value: Any, place: torch.device) -> Any:
    """A dataclass of tensors, on a device."""
    if value is None:
        return None
    tensors = {f.name: getattr(value, f.name) for f in fields(value)}
    return replace(
        value, **{n: t.to(place) if isinstance(t, Tensor) else t for n, t in tensors.items()}
    )


def _size(tensor: Tensor | None) -> Tensor | None:
    return tensor.abs() if tensor is not None else None


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def check_rows(place: torch.device) -> Iterator[Result]:
    """Quantising, its inverse, and the norms' statistics, against their twins."""
    from hcache_kernels import launch, reference

    source = torch.Generator().manual_seed(1)
    for tokens, width, group in ((5, 128, None), (3, 100, 64), (1, 64, 64), (7, 72, None)):
        rows = torch.randn(tokens, width, generator=source)
        rows[0, :3] = torch.tensor([0.5, -1.5, 2.5]) / 127
        rows[-1] = 0
        for dtype in (torch.float32, torch.bfloat16):
            began = time.perf_counter()
            stored = rows.to(dtype).to(place)
            integers, scales = (t.cpu() for t in launch.quantise_rows(stored, group))
            theirs, their_scales = quant.quantise_rows(rows.to(dtype), group)
            label = f"quantise {tokens}x{width} {group or 'row'} {dtype}"
            step = (integers.int() - theirs.int()).abs().max()
            error = float((scales - their_scales).abs().max() / their_scales.max() / 2**-22)
            apart = "other integers" if step > (place.type == "cuda") or error > 1 else ""
            yield Result(label, error, apart, time.perf_counter() - began)

            out = torch.full((tokens, width), torch.nan, dtype=dtype, device=place)
            launch.dequantise_rows_into(integers.to(place), scales.to(place), group, out)
            wide = scales if group else scales.unsqueeze(-1)
            exact = reference.dequantise_rows(integers, wide, group or width)
            slack = exact.abs() * ROUNDING[dtype] + 1e-9
            error = float(((out.cpu().double() - exact).abs() / slack).max())
            yield _result(f"de{label}", error)
    for tokens, width in ((3, 128), (2, 100)):
        rows = torch.randn(tokens, width, generator=source) + 1
        for is_centred in (False, True):
            found = launch.row_statistics(rows.to(place), EPS, is_centred=is_centred)
            exact_sides = twins.row_statistics(rows.double(), EPS, is_centred=is_centred)
            error = max(
                float((ours.cpu() - theirs).abs().max() / theirs.abs().max() / 2**-20)
                for ours, theirs in zip(found, exact_sides, strict=True)
                if ours is not None
            )
            yield _result(f"statistics {tokens}x{width} {is_centred}", error)


def _result(label: str, error: float) -> Result:
    complaint = "" if error <= 1 else f"{error:.2f} of the allowed error"
    return Result(label, error, complaint, 0.0)


def check_all(place: torch.device) -> Iterator[Result]:
    """Every case, then the smaller kernels."""
    for case in CASES:
        yield check_case(case, place)
    yield from check_rows(place)


def main() -> int:
    """Check everything; one line of JSON for each result. 1 if anything is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--interpret", action="store_true", help="in Triton's interpreter")
    options = parser.parse_args()
    if options.interpret:
        from hcache_kernels.interpreter import interpret

        interpret()
    failed = 0
    for result in check_all(torch.device("cpu" if options.interpret else "cuda")):
        sys.stdout.write(json.dumps(asdict(result)) + "\n")
        failed += bool(result.complaint)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
