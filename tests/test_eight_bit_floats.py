"""States in eight-bit floats (E4M3): the nearest of all 256, by brute force in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from hcache_kernels import (
    copy_numbers,
    dequantise_keys_into,
    dequantise_rows_into,
    dequantise_values_into,
    quantise_keys,
    quantise_rows,
    quantise_values,
)

FP8 = torch.float8_e4m3fn
GROUP = 64
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
ALL = torch.arange(256, dtype=torch.uint8).view(FP8)
NUMBERS = torch.tensor(
    [
        sign * (mantissa / 8 + (exponent > 0)) * 2.0 ** (max(exponent, 1) - 7)
        for sign in (1, -1)
        for exponent in range(16)
        for mantissa in range(8)
        if (exponent, mantissa) != (15, 7)
    ],
    dtype=torch.float64,
)
"""Every number that there is: a sign, four bits of exponent, three of mantissa, no infinity."""

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Way:
    """What shares a scale, see `test_kernels.Way`."""

    label: str
    quantise: Callable[[Tensor], tuple[Tensor, Tensor]]
    shape: tuple[int, ...]
    spread: Callable[[Tensor], Tensor]


WAYS = [
    Way("rows", lambda x: quantise_rows(x, dtype=FP8), (9, 100), lambda s: s[:, None]),
    Way(
        "groups",
        lambda x: quantise_rows(x, GROUP, FP8),
        (9, 100),
        lambda s: s.repeat_interleave(GROUP, 1)[:, :100],
    ),
    Way("keys", lambda x: quantise_keys(x, FP8), (3, 9, 12), lambda s: s[:, None, :]),
    Way("values", lambda x: quantise_values(x, FP8), (3, 9, 12), lambda s: s[:, :, None]),
]
by_way = pytest.mark.parametrize("way", WAYS, ids=[way.label for way in WAYS])
by_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=str)


def states(way: Way, dtype: torch.dtype) -> Tensor:
    """Channels and rows of all sizes, some of them tiny beside what they share a scale with."""
    torch.manual_seed(0)
    return (torch.randn(way.shape) * torch.exp(4 * torch.randn(way.shape[-1]))).to(dtype)


@by_dtype
def test_numbers_are_copied_as_what_they_are(dtype: torch.dtype) -> None:
    """Each of the 256 / torch's own conversion, and the definition; no number stays none."""
    out = torch.full((2, 256, 2), 7, dtype=dtype)
    copy_numbers(ALL.expand(2, 256), out[..., 0])
    assert (out[..., 1] == 7).all()
    assert torch.equal(out[0, :, 0].isnan(), ALL.float().isnan())
    is_number = ~ALL.float().isnan()
    assert torch.equal(out[0, is_number, 0], ALL.to(dtype)[is_number])
    assert sorted(out[1, is_number, 0].tolist()) == sorted(NUMBERS.tolist())


@by_dtype
@by_way
def test_quantising_takes_the_nearest_number(way: Way, dtype: torch.dtype) -> None:
    """The largest magnitude becomes 448; all others what is nearest of all there are."""
    inputs = states(way, dtype)
    numbers, scales = way.quantise(inputs)
    assert (numbers.dtype, scales.dtype) == (FP8, torch.float32)
    steps = inputs.double() / way.spread(scales.double())
    distance = (NUMBERS - steps.unsqueeze(-1)).abs().amin(-1)
    assert ((numbers.double() - steps).abs() <= distance + 1e-6 * steps.abs()).all()
    for scale in scales.flatten():
        shares = (way.spread(scales) == scale).expand(way.shape)
        assert numbers[shares].float().abs().max() == 448


@by_way
def test_zero_stays_zero_and_what_is_no_number_stays_visible(way: Way) -> None:
    """Nothing is divided by zero; a scale that is not finite is no use to what shares it."""
    for value in (torch.nan, torch.inf, -torch.inf):
        inputs = states(way, torch.float32)
        inputs[..., 3, :] = 0
        inputs[..., 4, 5] = value
        numbers, scales = way.quantise(inputs)
        made = numbers.double() * way.spread(scales.double())
        assert not made[..., 4, 5].isfinite().any()
        is_good = way.spread(scales).isfinite().expand(way.shape)
        assert is_good.any()
        assert (made[is_good & (inputs == 0)] == 0).all()
        assert (made - inputs.double())[is_good].abs().max() <= inputs[is_good].abs().max() / 16


@by_dtype
def test_what_is_dequantised_is_float64_rounded(dtype: torch.dtype) -> None:
    """Rows in groups, K, and V."""
    _, groups, keys, values = WAYS
    for way, write in (
        (groups, lambda n, s, out: dequantise_rows_into(n, s, GROUP, out)),
        (keys, dequantise_keys_into),
        (values, dequantise_values_into),
    ):
        inputs = torch.randn(way.shape)
        numbers, scales = way.quantise(inputs)
        out = torch.empty(way.shape, dtype=dtype)
        write(numbers, scales, out)
        exact = numbers.double() * way.spread(scales.double())
        assert torch.equal(out, exact.float().to(dtype))
