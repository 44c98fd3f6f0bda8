"""From a layer's input to its K and V: the norm and the projections, folded into one or not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hcache_kernels import fold_projection, row_scale
from hcache_rag.errors import UnsupportedModelError
from hcache_rag.models.decoder import Decoder
from hcache_rag.models.norms import epsilon

RowsNorm = Callable[[Tensor], Tensor]
"""What rows (T, G * D) of K, or of V, go through behind their projection."""


@dataclass(frozen=True, slots=True)
class Projection:
    """A layer's way from its input to K and V, see `hcache_kernels.project_kv`."""

    weight: Tensor
    bias: Tensor | None


def in_heads(rows: Tensor, heads: int) -> Tensor:
    """Rows (..., heads * D) as (..., heads, D)."""
    return rows.view(*rows.shape[:-1], heads, -1)


def scale_of_rows(decoder: Decoder, layer: int, hidden: Tensor) -> Tensor:
    """What the norm multiplies rows (..., E) of a layer's input by, less its gain, (...,)."""
    norm = decoder.norm(layer)
    if norm is None:
        return torch.ones(hidden.shape[:-1], device=hidden.device)
    return row_scale(hidden, epsilon(norm), is_centred=decoder.family.is_centred)


def folded(decoder: Decoder, layer: int) -> Projection:
    """The projection of a layer with its norm's gain in the weights."""
    norm, family = decoder.norm(layer), decoder.family
    key, value = _weights(decoder, layer)
    weights: Any = getattr(norm, "weight", None)
    gain: Tensor = torch.ones_like(key[0]) if weights is None else weights.detach()
    if family.gain_offset:
        gain = gain.float() + family.gain_offset
    weight = fold_projection(gain, key, value, is_centred=family.is_centred)
    biases = [b for b in _biases(decoder, layer) if b is not None]
    bias = torch.cat(biases) if biases else None
    shift: Any = getattr(norm, "bias", None)
    if shift is not None:
        moved = torch.cat((key, value)).float() @ shift.detach().float()
        bias = (moved if bias is None else moved + bias.float()).to(key.dtype)
    return Projection(weight, bias)


def norms_of_rows(decoder: Decoder, layer: int) -> tuple[RowsNorm | None, RowsNorm | None]:
    """What a layer's K, and its V, go through behind their projection."""
    names = decoder.family.key_norm, decoder.family.value_norm
    key, value = (_rows_norm(decoder, decoder.part(layer, name)) for name in names)
    return key, value


def project(decoder: Decoder, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """K before RoPE and V (G, T, D) of layer inputs (T, E), by the model's own modules."""
    family, attention, norm = decoder.family, decoder.attention(layer), decoder.norm(layer)
    rows = hidden.unsqueeze(0)
    rows = rows if norm is None else norm.forward(rows)
    if family.fused:
        every = attention.get_submodule(family.fused).forward(rows)
        _, key, value = family.split(every, decoder.spec, decoder.model.config)
    else:
        key = attention.get_submodule(family.key).forward(rows)
        value = attention.get_submodule(family.value).forward(rows)
    sides = []
    for side, norm_of in zip((key[0], value[0]), norms_of_rows(decoder, layer), strict=True):
        normed = side if norm_of is None else norm_of(side)
        sides.append(in_heads(normed, decoder.spec.num_kv_heads).transpose(0, 1))
    return sides[0], sides[1]


def check_projections(decoder: Decoder) -> None:
    """Refuse what cannot be folded.

    Raises:
        UnsupportedModelError: naming the layer and what is odd about it.
    """
    spec, family = decoder.spec, decoder.family
    widths = {family.key: spec.kv_width, family.value: spec.value_width}
    for i in range(spec.num_layers):
        for name in [family.fused] if family.fused else [family.key, family.value]:
            module = decoder.attention(i).get_submodule(name)
            width = _weight(module).shape[0] if family.fused else widths[name]
            if not _is_linear(module) or tuple(_weight(module).shape) != (width, spec.hidden_size):
                raise UnsupportedModelError(
                    f"layer {i} projects K or V with {module}, not with a plain "
                    f"{spec.hidden_size} -> {width} linear layer"
                )
        key, value = _biases(decoder, i)
        if (key is None) != (value is None):
            raise UnsupportedModelError(f"layer {i} has a bias on only one of K and V")


def _weights(decoder: Decoder, layer: int) -> tuple[Tensor, Tensor]:
    """The weights of K and of V, (G * D, E) each."""
    family, attention = decoder.family, decoder.attention(layer)
    if not family.fused:
        modules = [attention.get_submodule(n) for n in (family.key, family.value)]
        return _weight(modules[0]), _weight(modules[1])
    columns = _weight(attention.get_submodule(family.fused)).t()
    _, key, value = family.split(columns, decoder.spec, decoder.model.config)
    return key.t(), value.t()


def _biases(decoder: Decoder, layer: int) -> tuple[Tensor | None, Tensor | None]:
    family, attention = decoder.family, decoder.attention(layer)
    if not family.fused:
        key, value = (attention.get_submodule(n) for n in (family.key, family.value))
        return _detached(key.bias), _detached(value.bias)
    bias = _detached(attention.get_submodule(family.fused).bias)
    if bias is None:
        return None, None
    _, of_keys, of_values = family.split(bias, decoder.spec, decoder.model.config)
    return of_keys, of_values


def _rows_norm(decoder: Decoder, norm: nn.Module | None) -> RowsNorm | None:
    if norm is None:
        return None
    # `forward` itself: others' hooks are for what the model does.
    call: Callable[[Tensor], Tensor] = norm.forward
    shape, heads = decoder.family.norm_shape, decoder.spec.num_kv_heads

    def normed(rows: Tensor) -> Tensor:
        if shape == "rows":
            return call(rows.unsqueeze(0))[0]
        by_head = in_heads(rows, heads).unsqueeze(0)
        if shape == "tokens":
            return call(by_head)[0].flatten(-2)
        return call(by_head.transpose(1, 2))[0].transpose(0, 1).flatten(-2)

    return normed


def _weight(linear: nn.Module) -> Tensor:
    """The weights of a linear layer, (out, in)."""
    weight: Any = linear.weight
    found: Tensor = weight.detach()
    return found.t() if type(linear) is Conv1D else found


def _detached(bias: Any) -> Tensor | None:
    return None if bias is None else bias.detach()


def _is_linear(module: nn.Module) -> bool:
    return type(module) in (nn.Linear, Conv1D) or type(module).__name__ == "FalconLinear"
