"""The kernels against float64, against their naive twins, and against transformers' own code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from hcache_kernels import (
    dequantise_keys_into,
    dequantise_rows_into,
    dequantise_values_into,
    fold_projection,
    project_kv,
    quantise_keys,
    quantise_rows,
    quantise_rows_smoothly,
    quantise_values,
    reference,
    rope_into,
    row_scale,
)

EPS = 1e-6
CANARY = 12345.0
DTYPES = [torch.float32, torch.bfloat16]
TOKENS = [1, 63, 64, 65]
MASSIVE_COLUMN = 7
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9}
"""The largest relative error of rounding once."""


@dataclass(frozen=True)
class Heads:
    """The widths of one attention layer."""

    label: str
    hidden_size: int
    kv_heads: int
    head_dim: int


HEADS = [
    Heads("1x2", 6, 1, 2),
    Heads("1x20", 72, 1, 20),
    Heads("3x12", 60, 3, 12),
    Heads("5x64", 320, 5, 64),
]


@dataclass(frozen=True)
class Layer:
    """Inputs of one layer in one dtype."""

    hidden: Tensor
    gain: Tensor
    key_weight: Tensor
    value_weight: Tensor
    key_bias: Tensor | None
    value_bias: Tensor | None
    cos: Tensor
    sin: Tensor
    heads: Heads

    @property
    def bias(self) -> Tensor | None:
        """The stacked biases."""
        if self.key_bias is None or self.value_bias is None:
            return None
        return torch.cat((self.key_bias, self.value_bias))

    def rows(self, rows: slice) -> Layer:
        """Some of the tokens."""
        return replace(self, hidden=self.hidden[rows], cos=self.cos[rows], sin=self.sin[rows])

    @property
    def float64(self) -> Layer:
        """The same (already rounded) numbers in float64."""
        tensors: dict[str, Any] = {
            field: value.double() for field, value in vars(self).items() if torch.is_tensor(value)
        }
        return replace(self, **tensors)


def angles(positions: Tensor, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin (T, D) of RoPE, as models hand them to their layers."""
    frequency = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.outer(positions.double(), frequency).repeat(1, 2)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def a_layer(heads: Heads, tokens: int, dtype: torch.dtype, *, bias: bool = True) -> Layer:
    """A layer whose inputs look like real ones: outlier columns, and massive activations."""
    size, width = heads.hidden_size, heads.kv_heads * heads.head_dim
    columns = torch.exp(0.7 * torch.randn(size))
    hidden = torch.randn(tokens, size) * columns
    gain = 0.5 + torch.rand(size)
    if size > MASSIVE_COLUMN:
        hidden[:, MASSIVE_COLUMN] *= 10
        hidden[::16, MASSIVE_COLUMN] = 1000 + 2000 * torch.rand(len(hidden[::16]))
        gain[MASSIVE_COLUMN] = 0.03
    positions = torch.randint(0, 4000, (tokens,))
    cos, sin = angles(positions, heads.head_dim, dtype)
    return Layer(
        hidden.to(dtype),
        gain.to(dtype),
        (torch.randn(width, size) / size**0.5).to(dtype),
        (torch.randn(width, size) / size**0.5).to(dtype),
        torch.randn(width).to(dtype) if bias else None,
        torch.randn(width).to(dtype) if bias else None,
        cos,
        sin,
        heads,
    )


def exact_rope(keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of `keys` (G, T, D) in float64, written out element by element of the pairs."""
    half = keys.shape[-1] // 2
    first, second = keys.double()[..., :half], keys.double()[..., half:]
    c, s = cos.double(), sin.double()
    rotated = torch.empty(keys.shape, dtype=torch.float64)
    rotated[..., :half] = first * c[:, :half] - second * s[:, :half]
    rotated[..., half:] = second * c[:, half:] + first * s[:, half:]
    return rotated


def exact_kv(layer: Layer) -> tuple[Tensor, Tensor]:
    """K after RoPE and V in float64, each (G, T, D)."""
    wide = layer.float64
    rows = wide.hidden / (wide.hidden.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * wide.gain
    shape = (len(rows), layer.heads.kv_heads, layer.heads.head_dim)
    keys, values = rows @ wide.key_weight.T, rows @ wide.value_weight.T
    if wide.key_bias is not None and wide.value_bias is not None:
        keys, values = keys + wide.key_bias, values + wide.value_bias
    keys = keys.view(shape).transpose(0, 1)
    return exact_rope(keys, layer.cos, layer.sin), values.view(shape).transpose(0, 1)


def naive_kv(layer: Layer) -> tuple[Tensor, Tensor]:
    """The reference path in the layer's own dtype."""
    return reference.project_kv(
        layer.hidden,
        layer.gain,
        EPS,
        layer.key_weight,
        layer.value_weight,
        layer.key_bias,
        layer.value_bias,
        layer.cos,
        layer.sin,
    )


def folded_kv(layer: Layer, keys_out: Tensor, values_out: Tensor) -> None:
    """The folded path, into given outputs and a scratch buffer full of NaN."""
    weight = fold_projection(layer.gain, layer.key_weight, layer.value_weight)
    scratch = torch.full((len(layer.hidden), weight.shape[1]), torch.nan, dtype=weight.dtype)
    project_kv(
        layer.hidden,
        row_scale(layer.hidden, EPS),
        weight,
        layer.bias,
        layer.cos,
        layer.sin,
        keys_out,
        values_out,
        scratch,
    )


def padded(shape: tuple[int, ...], dtype: torch.dtype, where: str) -> tuple[Tensor, Tensor]:
    """A NaN-poisoned output (G, T, D) in one of several memory layouts, and its whole buffer.

    Everything in the buffer outside the output is a canary.
    """
    heads, tokens, width = shape
    if where == "middle-of-cache":
        buffer = torch.full((heads, tokens + 8, width), CANARY, dtype=dtype)
        out = buffer[:, 3 : 3 + tokens]
    elif where == "token-major":
        buffer = torch.full((tokens + 2, heads + 1, width), CANARY, dtype=dtype)
        out = buffer[1:-1, :-1].transpose(0, 1)
    elif where == "every-other-element":
        buffer = torch.full((heads, tokens + 1, 2 * width + 1), CANARY, dtype=dtype)
        out = buffer[:, :-1, 1::2]
    else:
        assert where == "every-other-token"
        buffer = torch.full((heads, 2 * tokens + 1, width), CANARY, dtype=dtype)
        out = buffer[:, 1::2]
    out.fill_(torch.nan)
    assert out.shape == shape
    return out, buffer


LAYOUTS = ["middle-of-cache", "token-major", "every-other-element", "every-other-token"]


def assert_canaries(out: Tensor, buffer: Tensor) -> None:
    """`out` is written in full, and nothing else of its buffer is."""
    assert out.isfinite().all()
    out.fill_(CANARY)
    assert (buffer == CANARY).all()


def name(value: object) -> str:
    """Readable parametrize ids."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return str(getattr(value, "label", value))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The sums' order does not depend on how many cores there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("where", LAYOUTS)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("heads", HEADS, ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_rope_into_is_float64_rope_rounded(
    dtype: torch.dtype, heads: Heads, tokens: int, where: str
) -> None:
    """Every element within a few roundings of float64, in any output layout, and only there."""
    keys = torch.randn(heads.kv_heads, tokens, heads.head_dim).to(dtype)
    cos, sin = angles(torch.randint(0, 4000, (tokens,)), heads.head_dim, dtype)
    out, buffer = padded(tuple(keys.shape), dtype, where)
    before = keys.clone()

    rope_into(keys, cos, sin, out)

    larger = torch.stack(keys.double().abs().chunk(2, -1)).amax(0).repeat(1, 1, 2)
    bound = 4 * ROUNDING[dtype] * larger
    assert ((out.double() - exact_rope(keys, cos, sin)).abs() <= bound).all()
    assert torch.equal(keys, before)
    assert_canaries(out, buffer)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_rope_into_reads_keys_of_any_strides(dtype: torch.dtype) -> None:
    """Keys that are a view into the projection give the same bits as a compact copy."""
    view = torch.randn(65, 2, 3, 20).to(dtype).permute(1, 2, 0, 3)[0]
    cos, sin = angles(torch.arange(65), 20, dtype)
    from_view, from_copy = torch.empty(2, 3, 65, 20, dtype=dtype)

    rope_into(view, cos, sin, from_view)
    rope_into(view.contiguous(), cos, sin, from_copy)

    assert torch.equal(from_view, from_copy)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_rope_into_is_no_worse_than_the_reference(dtype: torch.dtype) -> None:
    """Its error against float64 is at most the naive twin's (one rounding fewer)."""
    keys = torch.randn(5, 512, 64).to(dtype)
    cos, sin = angles(torch.arange(512), 64, dtype)
    out = torch.empty_like(keys)

    rope_into(keys, cos, sin, out)

    truth = exact_rope(keys, cos, sin)
    own = rms(out.double() - truth)
    assert 0 < own <= rms(reference.rope(keys, cos, sin).double() - truth)


def test_rope_at_position_zero_changes_nothing() -> None:
    """cos = 1 and sin = 0 give the keys back, bit for bit."""
    keys = torch.randn(3, 4, 12)
    cos, sin = angles(torch.zeros(4), 12, torch.float32)
    out = torch.empty_like(keys)

    rope_into(keys, cos, sin, out)

    assert torch.equal(out, keys)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_reference_rope_is_transformers_bit_for_bit(dtype: torch.dtype, family: str) -> None:
    """The naive twin against `apply_rotary_pos_emb`, with the angles of a real model."""
    module: Any = import_module(f"transformers.models.{family}.modeling_{family}")
    config = LlamaConfig(hidden_size=60, num_attention_heads=3, head_dim=20)
    positions = torch.tensor([[0, 1, 2, 63, 64, 65, 1000, 2047]])
    keys = torch.randn(1, 3, 8, 20).to(dtype)
    cos, sin = LlamaRotaryEmbedding(config)(keys, positions)

    _, expected = module.apply_rotary_pos_emb(keys, keys, cos, sin)

    assert cos.dtype == dtype
    assert torch.equal(reference.rope(keys[0], cos[0], sin[0]), expected[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_reference_norm_is_transformers_bit_for_bit(dtype: torch.dtype) -> None:
    """The naive twin against `LlamaRMSNorm`."""
    layer = a_layer(HEADS[-1], 65, dtype)
    norm = LlamaRMSNorm(len(layer.gain), eps=EPS).to(dtype)
    norm.weight.data.copy_(layer.gain)

    with torch.no_grad():
        expected = norm(layer.hidden)

    assert torch.equal(reference.rms_norm(layer.hidden, layer.gain, EPS), expected)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=name)
def test_row_scale_is_one_over_rms(dtype: torch.dtype, tokens: int) -> None:
    """Float32, one per row, within a few float32 roundings of float64, massive rows too."""
    hidden = a_layer(HEADS[-1], tokens, dtype).hidden

    scale = row_scale(hidden, EPS)

    truth = 1 / (hidden.double().pow(2).mean(-1) + EPS).sqrt()
    assert scale.dtype == torch.float32
    assert scale.shape == (tokens,)
    assert ((scale / truth - 1).abs() <= 8 * ROUNDING[torch.float32]).all()


def test_row_scale_of_a_row_of_zeros_is_finite() -> None:
    """`eps` bounds it."""
    assert row_scale(torch.zeros(2, 8), 1e-4).tolist() == pytest.approx([100.0, 100.0])


def test_row_scale_does_not_overflow_in_float16() -> None:
    """60,000 squared does not fit into float16; the squares are taken in float32."""
    hidden = torch.full((1, 4), 60000.0, dtype=torch.float16)
    assert row_scale(hidden, EPS).item() == pytest.approx(1 / hidden[0, 0].item())


def test_row_scale_keeps_leading_dimensions() -> None:
    """(B, T, E) gives (B, T), row by row."""
    hidden = torch.randn(2, 3, 16)
    assert torch.equal(row_scale(hidden, EPS)[1], row_scale(hidden[1], EPS))


@pytest.mark.parametrize("heads", HEADS, ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_fold_projection_rounds_once(dtype: torch.dtype, heads: Heads) -> None:
    """Exactly the float64 product of weight and gain, rounded; K's columns before V's."""
    layer = a_layer(heads, 1, dtype)

    folded = fold_projection(layer.gain, layer.key_weight, layer.value_weight)

    wide = layer.float64
    truth = torch.cat((wide.key_weight * wide.gain, wide.value_weight * wide.gain)).to(dtype).T
    assert folded.shape == (heads.hidden_size, 2 * heads.kv_heads * heads.head_dim)
    assert folded.dtype == dtype
    assert torch.equal(folded, truth)


@pytest.mark.parametrize("where", LAYOUTS)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("heads", HEADS, ids=name)
def test_project_kv_writes_its_outputs_and_nothing_else(
    heads: Heads, tokens: int, where: str
) -> None:
    """K and V near float64 at every element, in any output layout; canaries unharmed."""
    layer = a_layer(heads, tokens, torch.float32)
    shape = (heads.kv_heads, tokens, heads.head_dim)
    keys, keys_buffer = padded(shape, torch.float32, where)
    values, values_buffer = padded(shape, torch.float32, where)

    folded_kv(layer, keys, values)

    for out, truth in zip((keys, values), exact_kv(layer), strict=True):
        torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-5)
    assert_canaries(keys, keys_buffer)
    assert_canaries(values, values_buffer)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_project_kv_without_bias_is_with_a_bias_of_zero(dtype: torch.dtype) -> None:
    """None means zero."""
    layer = a_layer(HEADS[2], 65, dtype, bias=False)
    zero = torch.zeros(36, dtype=dtype)
    with_zeros = replace(layer, key_bias=zero, value_bias=zero)
    outputs = torch.full((4, 3, 65, 12), torch.nan, dtype=dtype)

    folded_kv(layer, outputs[0], outputs[1])
    folded_kv(with_zeros, outputs[2], outputs[3])

    assert torch.equal(outputs[:2], outputs[2:])


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("heads", HEADS[1:], ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_folding_costs_no_accuracy(
    dtype: torch.dtype, heads: Heads, bias: bool, tokens: int
) -> None:
    """At most 1.5x the error of transformers' order of operations, judged against float64.

    A thousand rows go through both in calls of `tokens` rows, so that a call of one row is
    judged on as many elements as a call of 65.
    """
    layer = a_layer(heads, 1040 // tokens * tokens, dtype, bias=bias)
    folded, naive = torch.full(
        (2, 2, heads.kv_heads, len(layer.hidden), heads.head_dim), torch.nan, dtype=dtype
    )
    for begin in range(0, len(layer.hidden), tokens):
        rows = slice(begin, begin + tokens)
        part = layer.rows(rows)
        folded_kv(part, folded[0][:, rows], folded[1][:, rows])
        naive[0][:, rows], naive[1][:, rows] = naive_kv(part)

    for label, ours, theirs, truth in zip("KV", folded, naive, exact_kv(layer), strict=True):
        own_error, naive_error = ours.double() - truth, theirs.double() - truth
        assert rms(own_error) <= 1.5 * rms(naive_error), f"rms error of {label}"
        assert largest(own_error) <= 1.5 * largest(naive_error), f"largest errors of {label}"


def rms(error: Tensor) -> float:
    """Root mean square."""
    return error.pow(2).mean().sqrt().item()


def largest(error: Tensor) -> float:
    """A token's largest error, on average over the tokens of (G, T, D).

    The largest of all is one number out of a long tail, and differs by half from run to run.
    """
    return error.abs().amax((0, 2)).mean().item()


# --- eight-bit integers -------------------------------------------------------------------------

GROUP = 64
Quantised = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Way:
    """A way to quantise: the function, its inputs' shapes, and what shares a scale.

    Args:
        quantise: the function under test.
        shape: of the input for T tokens.
        spread: scales to the input's shape, in float64.
    """

    label: str
    quantise: Callable[[Tensor], Quantised]
    shape: Callable[[int], tuple[int, ...]]
    spread: Callable[[Tensor, int], Tensor]


def _row_ways(width: int) -> list[Way]:
    def spread_groups(scales: Tensor, _: int) -> Tensor:
        return torch.stack([scales[:, channel // GROUP] for channel in range(width)], dim=-1)

    return [
        Way(
            f"rows-of-{width}",
            quantise_rows,
            lambda tokens: (tokens, width),
            lambda scales, _: scales[:, None].expand(-1, width),
        ),
        Way(
            f"rows-of-{width}-in-groups",
            lambda rows: quantise_rows(rows, GROUP),
            lambda tokens: (tokens, width),
            spread_groups,
        ),
    ]


WAYS = [
    *[way for width in (60, 64, 72, 100, 129) for way in _row_ways(width)],
    Way(
        "keys",
        quantise_keys,
        lambda tokens: (3, tokens, 12),
        lambda scales, tokens: scales[:, None, :].expand(-1, tokens, -1),
    ),
    Way(
        "values",
        quantise_values,
        lambda tokens: (3, tokens, 12),
        lambda scales, _: scales[:, :, None].expand(-1, -1, 12),
    ),
]
FLOATS = [*DTYPES, torch.float16]
NEAREST = 0.5 + 1e-5
"""Half a step, and what float32 needs to find out which integer is nearest."""


def states(way: Way, tokens: int, dtype: torch.dtype) -> Tensor:
    """Something to quantise: outlier channels and outlier tokens, of both signs."""
    shape = way.shape(tokens)
    channels, rows = torch.exp(torch.randn(shape[-1])), torch.exp(torch.randn(tokens, 1))
    return (torch.randn(shape) * channels * rows).to(dtype)


@pytest.mark.parametrize("tokens", [1, 63])
@pytest.mark.parametrize("way", WAYS, ids=name)
@pytest.mark.parametrize("dtype", FLOATS, ids=name)
def test_quantising_is_off_by_half_a_step_at_most(
    dtype: torch.dtype, way: Way, tokens: int
) -> None:
    """Against float64, everywhere; the input stays as it is."""
    inputs = states(way, tokens, dtype)
    before = inputs.clone()

    integers, scales = way.quantise(inputs)

    assert (integers.dtype, scales.dtype) == (torch.int8, torch.float32)
    assert integers.shape == inputs.shape
    steps = way.spread(scales.double(), tokens)
    assert steps.shape == inputs.shape
    assert ((integers.double() * steps - inputs.double()).abs() <= NEAREST * steps).all()
    assert torch.equal(inputs, before)


@pytest.mark.parametrize("tokens", [1, 63])
@pytest.mark.parametrize("way", WAYS, ids=name)
def test_scales_are_those_of_what_shares_them(way: Way, tokens: int) -> None:
    """The largest magnitude over 127, so that the integers use all of their range, both ways."""
    inputs = states(way, tokens, torch.float32)
    integers, scales = way.quantise(inputs)
    steps = way.spread(scales, tokens)
    for scale in scales.flatten():
        shares = steps == scale
        largest = inputs[shares].double().abs().max()
        assert scale.item() == pytest.approx(largest.item() / 127, rel=2**-23)
        assert integers[shares].abs().max() == 127
    assert integers.min() >= -127


def test_what_shares_a_scale() -> None:
    """Rows have one each, or one for each 64 channels; K one a channel, V one a token and head."""
    hidden, heads = torch.randn(7, 100), torch.randn(3, 7, 12)
    assert quantise_rows(hidden)[1].shape == (7,)
    assert quantise_rows(hidden, GROUP)[1].shape == (7, 2)
    assert quantise_rows(hidden, 128)[1].shape == (7, 1)
    assert quantise_keys(heads)[1].shape == (3, 12)
    assert quantise_values(heads)[1].shape == (3, 7)


@pytest.mark.parametrize(("tokens", "width"), [(1, 60), (63, 72), (63, 100), (5, 128)])
def test_quantising_twins_agree(tokens: int, width: int) -> None:
    """`reference.quantise` finds the same integers, but where two are as near in float32."""
    inputs = states(_row_ways(width)[0], tokens, torch.float32)
    integers, scales = quantise_rows(inputs)
    steps = inputs.double() / scales.double()[:, None]
    is_clear = ((steps.abs() % 1) - 0.5).abs() > 1e-4
    assert is_clear.double().mean() > 0.9
    twin = reference.quantise(inputs, scales[:, None])
    assert torch.equal(integers[is_clear], twin[is_clear])
    in_groups, group_scales = quantise_rows(inputs, GROUP)
    truth = in_groups.double() * _row_ways(width)[1].spread(group_scales.double(), tokens)
    assert torch.equal(reference.dequantise_rows(in_groups, group_scales, GROUP), truth)


@pytest.mark.parametrize("way", WAYS, ids=name)
@pytest.mark.parametrize("dtype", FLOATS, ids=name)
def test_zero_stays_zero(dtype: torch.dtype, way: Way) -> None:
    """A token, a channel, or everything: no division by zero, and the others are as good."""
    inputs = states(way, 9, dtype)
    inputs[..., 3, :] = 0
    inputs[..., 5] = 0
    for case in (inputs, torch.zeros_like(inputs)):
        integers, scales = way.quantise(case)
        steps = way.spread(scales.double(), 9)
        assert (integers[case == 0] == 0).all()
        assert scales.isfinite().all()
        assert (scales > 0).all()
        assert ((integers.double() * steps - case.double()).abs() <= NEAREST * steps).all()


@pytest.mark.parametrize("way", WAYS, ids=name)
@pytest.mark.parametrize("dtype", FLOATS, ids=name)
def test_multiples_of_a_step_are_kept_exactly(dtype: torch.dtype, way: Way) -> None:
    """Integers from -127 to 127 times a power of two come back bit for bit, and the scale too."""
    blank = torch.zeros(way.shape(130))
    scales = 2.0 ** torch.randint(-6, 6, way.quantise(blank)[1].shape)
    integers = torch.randint(-127, 128, blank.shape, dtype=torch.int8)
    integers[..., 0, :] = 127
    integers[..., 0] = -127
    integers[..., -1] = 127
    integers[..., GROUP % blank.shape[-1]] = 127
    integers[..., 128 % blank.shape[-1]] = -127
    exact = integers.double() * way.spread(scales.double(), 130)

    found, found_scales = way.quantise(exact.to(dtype))

    assert torch.equal(exact.to(dtype).double(), exact), "not representable: the test is wrong"
    assert torch.equal(found_scales, scales)
    assert torch.equal(found, integers)


@pytest.mark.parametrize("way", WAYS, ids=name)
def test_quantising_reads_any_strides(way: Way) -> None:
    """States are captured as views into larger tensors."""
    inputs = states(way, 9, torch.bfloat16)
    strided = torch.stack((torch.full_like(inputs, torch.nan), inputs), dim=-1)[..., 1]
    for ours, theirs in zip(way.quantise(strided), way.quantise(inputs), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("way", WAYS, ids=name)
@pytest.mark.parametrize("dtype", FLOATS, ids=name)
def test_what_is_not_finite_stays_visible(dtype: torch.dtype, way: Way, value: float) -> None:
    """Its scale is not finite either, and what shares it is lost; the others are as good."""
    inputs = states(way, 9, dtype)
    inputs[..., 4, 5] = value
    before = inputs.clone()

    integers, scales = way.quantise(inputs)

    steps = way.spread(scales.double(), 9)
    assert not steps[..., 4, 5].isfinite().any()
    assert not (integers.double() * steps)[..., 4, 5].isfinite().any()
    is_good = steps.isfinite()
    errors = (integers.double() * steps - inputs.double()).abs()
    assert is_good.any()
    assert (errors <= NEAREST * steps)[is_good].all()
    assert torch.equal(inputs.nan_to_num(7.0), before.nan_to_num(7.0))


def smooth_steps(scales: Tensor, channels: Tensor) -> Tensor:
    """What an integer counts at each place (T, E), in float64."""
    return scales.double()[:, None] * channels.double()


ROWS = _row_ways(72)[0]
SMOOTH_NEAREST = 0.5 + 3e-5
"""Half a step, and three roundings of up to 127 steps in float32."""


@pytest.mark.parametrize("tokens", [1, 63])
@pytest.mark.parametrize("width", [1, 60, 72, 129])
@pytest.mark.parametrize("dtype", FLOATS, ids=name)
def test_smooth_quantising_is_off_by_half_a_step_at_most(
    dtype: torch.dtype, width: int, tokens: int
) -> None:
    """Against float64, everywhere; a step is a row's scale times a channel's."""
    inputs = states(_row_ways(width)[0], tokens, dtype)
    before = inputs.clone()

    integers, scales, channels = quantise_rows_smoothly(inputs)

    assert (integers.dtype, scales.dtype, channels.dtype) == (
        torch.int8,
        torch.float32,
        torch.float32,
    )
    assert (integers.shape, scales.shape, channels.shape) == ((tokens, width), (tokens,), (width,))
    steps = smooth_steps(scales, channels)
    assert ((integers.double() * steps - inputs.double()).abs() <= SMOOTH_NEAREST * steps).all()
    assert torch.equal(inputs, before)


@pytest.mark.parametrize("tokens", [1, 63])
def test_smooth_scales_share_the_range_evenly(tokens: int) -> None:
    """A channel's is the root of its largest magnitude; a row then uses all of its range."""
    inputs = states(ROWS, tokens, torch.float32)
    integers, scales, channels = quantise_rows_smoothly(inputs)
    roots = inputs.double().abs().amax(0).sqrt()
    largest = (inputs.double().abs() / roots).amax(1)
    torch.testing.assert_close(channels.double(), roots, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(scales.double(), largest / 127, rtol=1e-6, atol=0.0)
    assert (integers.abs().amax(1) == 127).all()


def test_smooth_quantising_keeps_small_channels_beside_large_ones() -> None:
    """Hidden states have channels a thousand times larger than others in every token.

    With one scale a row, all others would be rounded to a few steps.
    """
    inputs = torch.randn(63, 72)
    inputs[:, 7] = 1000 * (1 + torch.rand(63))
    small = torch.arange(72) != 7
    integers, scales = quantise_rows(inputs)
    alone = integers.double() * scales.double()[:, None]
    integers, scales, channels = quantise_rows_smoothly(inputs)
    together = integers.double() * smooth_steps(scales, channels)
    errors = [rms((found - inputs.double())[:, small]) for found in (alone, together)]
    assert errors[1] < errors[0] / 5
    assert rms((together - inputs.double())[:, ~small]) < 0.005 * 1000


@pytest.mark.parametrize("dtype", FLOATS, ids=name)
def test_smooth_zero_stays_zero(dtype: torch.dtype) -> None:
    """A token, a channel, or everything: no division by zero, and the others are as good."""
    inputs = states(ROWS, 9, dtype)
    inputs[3] = 0
    inputs[:, 5] = 0
    for case in (inputs, torch.zeros_like(inputs)):
        integers, scales, channels = quantise_rows_smoothly(case)
        steps = smooth_steps(scales, channels)
        assert (integers[case == 0] == 0).all()
        assert steps.isfinite().all()
        assert (steps > 0).all()
        assert ((integers.double() * steps - case.double()).abs() <= SMOOTH_NEAREST * steps).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=name)
def test_smooth_quantising_keeps_what_is_not_finite_visible(
    dtype: torch.dtype, value: float
) -> None:
    """A channel's scale is shared by all rows: none of them may look whole in that channel."""
    inputs = states(ROWS, 9, dtype)
    inputs[4, 5] = value
    integers, scales, channels = quantise_rows_smoothly(inputs)
    restored = integers.double() * smooth_steps(scales, channels)
    assert not channels[5].isfinite()
    assert not scales[4].isfinite()
    assert not restored[4].isfinite().any()
    assert not restored[:, 5].isfinite().any()


def test_smooth_quantising_reads_any_strides() -> None:
    """States are captured as views into larger tensors."""
    inputs = states(ROWS, 9, torch.bfloat16)
    strided = torch.stack((torch.full_like(inputs, torch.nan), inputs), dim=-1)[..., 1]
    found = zip(quantise_rows_smoothly(strided), quantise_rows_smoothly(inputs), strict=True)
    for ours, theirs in found:
        assert torch.equal(ours, theirs)


def assert_dequantised(out: Tensor, buffer: Tensor, exact: Tensor) -> None:
    """`out` is the float64 product, rounded to float32 and to its dtype; its surroundings stay."""
    assert torch.equal(out, exact.float().to(out.dtype))
    assert_canaries(out, buffer)


@pytest.mark.parametrize("where", LAYOUTS)
@pytest.mark.parametrize("tokens", [1, 63])
@pytest.mark.parametrize("width", [1, 60, 64, 72, 100, 128])
@pytest.mark.parametrize("dtype", FLOATS, ids=name)
def test_dequantised_rows_are_float64_rounded(
    dtype: torch.dtype, width: int, tokens: int, where: str
) -> None:
    """Whole groups and the rest, in any output layout, and only there; more was stored behind."""
    stored = states(_row_ways(width)[1], tokens + 2, torch.float32)
    integers, scales = (part[:tokens] for part in quantise_rows(stored, GROUP))
    heads, buffer = padded((1, tokens, width), dtype, where)

    dequantise_rows_into(integers, scales, GROUP, heads[0])

    spread = _row_ways(width)[1].spread(scales.double(), tokens)
    assert_dequantised(heads, buffer, (integers.double() * spread)[None])


@pytest.mark.parametrize("where", LAYOUTS)
@pytest.mark.parametrize("tokens", [1, 63])
@pytest.mark.parametrize("heads", HEADS, ids=name)
@pytest.mark.parametrize("dtype", FLOATS, ids=name)
def test_dequantised_keys_and_values_are_float64_rounded(
    dtype: torch.dtype, heads: Heads, tokens: int, where: str
) -> None:
    """In any output layout, and only there; of a chunk, the first tokens may be all one needs."""
    shape = (heads.kv_heads, tokens, heads.head_dim)
    stored = torch.randn(heads.kv_heads, tokens + 2, heads.head_dim)

    integers, scales = quantise_keys(stored)
    integers = integers[:, :tokens]
    keys, buffer = padded(shape, dtype, where)
    dequantise_keys_into(integers, scales, keys)
    assert_dequantised(keys, buffer, integers.double() * scales.double()[:, None, :])

    integers, scales = (part[:, :tokens] for part in quantise_values(stored))
    values, buffer = padded(shape, dtype, where)
    dequantise_values_into(integers, scales, values)
    assert_dequantised(values, buffer, integers.double() * scales.double()[:, :, None])
