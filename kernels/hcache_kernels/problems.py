"""The inputs of a case, and what the kernels must make of them, in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hcache_kernels import fused_reference as twins
from hcache_kernels import quant
from hcache_kernels.cases import Case, slots_of
from hcache_kernels.operands import KeyNorm, Projection, Rotation, StoredKV, StoredRows
from hcache_kernels.tiles import tiles_of

GROUP = 64
EPS = 1e-6
EIGHT_BITS = {"int8": torch.int8, "fp8": quant.FP8}
ROUNDING = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""What a number of a dtype may be off by, relative to its own size: half a step and a bit."""
SUMMING = 2.0**-18
"""What sums in float32 may be off by, relative to the sum of magnitudes."""


@dataclass(frozen=True)
class Sums:
    """K in front of its norm, and V, (T, G, D) in float64.

    Args:
        exact: what they are.
        sizes: the sums of what was summed, without signs.
        inner: what sums may be off by, relative to their sizes.
    """

    exact: tuple[Tensor, Tensor]
    sizes: tuple[Tensor, Tensor]
    inner: float


@dataclass(frozen=True)
class Problem:
    """A case's inputs on the CPU, and what must come of them.

    Args:
        stored, projection, rotation, slots: what the kernels are given.
        exact: K after its norm and RoPE, and V, (T, G, D) in float64.
        slack: what each of these numbers may be off by in the cache.
    """

    stored: StoredRows | StoredKV
    projection: Projection | None
    rotation: Rotation
    slots: Tensor | None
    exact: tuple[Tensor, Tensor]
    slack: tuple[Tensor, Tensor]


def _tiles(case: Case, *, crosses_chunks: bool) -> Tensor:
    begins = [sum(case.chunks[:i]) for i in range(len(case.chunks))]
    chunks = zip(begins, case.chunks, strict=True)
    return torch.tensor(tiles_of(chunks, crosses_chunks=crosses_chunks), dtype=torch.int32)


def _rows(case: Case, source: torch.Generator) -> tuple[StoredRows, Projection, Sums]:
    """Layer inputs with a channel that is large in some rows, and what is projected of them."""
    dtype = dtype_of(case.dtype)
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
    chunk_of_row = twins.chunks_of_rows(stored.tiles, tokens)
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
    return (
        stored,
        Projection(weight, bias, sums, _key_norm(case, source)),
        Sums(exact, sizes, inner),
    )


def _quantised_rows(case: Case, hidden: Tensor) -> dict[str, Any]:
    if case.stored in ("int8", "fp8"):
        numbers, scales = quant.quantise_rows(hidden, dtype=EIGHT_BITS[case.stored])
        return {"rows": numbers, "quant_scales": scales}
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
    return {"rows": hidden.to(dtype_of(case.stored))}


def _kv(case: Case, source: torch.Generator) -> tuple[StoredKV, Sums]:
    """K and V; nothing is summed."""
    shape = (case.heads, sum(case.chunks), case.head_dim)
    keys, values = (torch.randn(shape, generator=source) * 3 for _ in range(2))
    tiles = _tiles(case, crosses_chunks=False)
    if case.stored in EIGHT_BITS:
        dtype = EIGHT_BITS[case.stored]
        parts = [quant.quantise_keys(x, dtype) for x in torch.split(keys, list(case.chunks), 1)]
        key_scales = torch.stack([scales for _, scales in parts])
        stored_values, value_scales = quant.quantise_values(values, dtype)
        stored_keys = torch.cat([numbers for numbers, _ in parts], 1)
        stored = StoredKV(stored_keys, stored_values, tiles, key_scales, value_scales)
        of_rows = key_scales.double()[twins.chunks_of_rows(tiles, shape[1])].transpose(0, 1)
        exact = (
            stored_keys.double() * of_rows,
            stored_values.double() * value_scales.double().unsqueeze(-1),
        )
    else:
        dtype = dtype_of(case.stored)
        stored = StoredKV(keys.to(dtype), values.to(dtype), tiles)
        exact = (stored.keys.double(), stored.values.double())
    sides = (exact[0].transpose(0, 1), exact[1].transpose(0, 1))
    return stored, Sums(sides, (sides[0].abs(), sides[1].abs()), SUMMING)


def _key_norm(case: Case, source: torch.Generator) -> KeyNorm | None:
    if not case.norm:
        return None
    gain, bias = torch.rand(2, case.heads, case.head_dim, generator=source).to(dtype_of(case.dtype))
    is_centred = case.norm == "layer"
    return KeyNorm(0.5 + gain, bias if is_centred else None, EPS, is_centred, case.norm == "rows")


def _rotation(case: Case, source: torch.Generator) -> Rotation:
    rotary = case.head_dim if case.rotary is None else case.rotary
    positions = torch.randint(0, 4000, (sum(case.chunks),), generator=source)
    frequencies = 10000.0 ** (-torch.arange(0, rotary, 2) / max(rotary, 1))
    angles = torch.outer(positions.double(), frequencies.double())
    repeated = angles.repeat_interleave(2, 1) if case.is_interleaved else angles.repeat(1, 2)
    cos, sin = (side.to(dtype_of(case.dtype)) for side in (repeated.cos(), repeated.sin()))
    return Rotation(cos, sin, case.is_interleaved)


def problem_of(case: Case) -> Problem:
    """A case's inputs, and what the kernels must make of them."""
    source = torch.Generator().manual_seed(0)
    projection, norm = None, None
    stored: StoredRows | StoredKV
    if case.kind == "rows":
        stored, projection, sums = _rows(case, source)
        norm = projection.key_norm
    else:
        stored, sums = _kv(case, source)
    rotation, slots = _rotation(case, source), slots_of(case, source)
    keys, values = sums.exact
    turned = twins.rope(
        twins.norm_keys(keys, norm),
        rotation.cos,
        rotation.sin,
        is_interleaved=rotation.is_interleaved,
    )
    rounding = ROUNDING[dtype_of(case.cache)]
    of_keys, of_values = (sums.inner * size.amax(-1, keepdim=True) for size in sums.sizes)
    slack = (
        2 * _through(norm, keys, of_keys) + turned.abs() * rounding,
        of_values + values.abs() * rounding,
    )
    return Problem(stored, projection, rotation, slots, (turned, values), slack)


def _through(norm: KeyNorm | None, keys: Tensor, errors: Tensor) -> Tensor:
    """What errors (T, G, 1) of K become in a norm: it divides them as it divides numbers."""
    if norm is None:
        return errors
    shared = (-2, -1) if norm.is_over_heads else (-1,)
    mean = keys.mean(shared, keepdim=True) if norm.is_centred else 0.0
    spread = (keys - mean).pow(2).mean(shared, keepdim=True).sqrt()
    return 2 * norm.gain.abs().max() * errors.amax(shared, keepdim=True) / spread


def _size(tensor: Tensor | None) -> Tensor | None:
    return tensor.abs() if tensor is not None else None


def dtype_of(name: str) -> torch.dtype:
    """A dtype by its name."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
