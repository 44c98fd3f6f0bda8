"""What a forward pass shows of an attention: Q, K and V before RoPE, and who looks at whom."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hcache_kernels import reference
from hcache_rag.models.decoder import Decoder, part_of
from hcache_rag.models.families import in_halves

QUERY, KEY, VALUE = range(3)


@dataclass(frozen=True, slots=True)
class Tap:
    """Where a layer's Q, K or V come out, and how to see that as rows (B, T, heads * D)."""

    module: nn.Module
    rows: Callable[[Tensor], Tensor]


def tap_of(decoder: Decoder, layer: int, side: int) -> Tap:
    """See `ModelAdapter.tap`."""
    family, attention = decoder.family, decoder.attention(layer)
    norm = decoder.part(layer, (family.query_norm, family.key_norm, family.value_norm)[side])
    if norm is not None:
        return Tap(norm, _ROWS_OF_NORM[family.norm_shape])
    if family.is_latent and side == QUERY:
        query = part_of(attention, "q_proj") or attention.get_submodule("q_b_proj")
        return Tap(query, _as_they_are)
    if family.fused:
        spec, config = decoder.spec, decoder.model.config
        fused = attention.get_submodule(family.fused)
        return Tap(fused, lambda out: family.split(out, spec, config)[side])
    name = (family.query, family.key, family.value)[side]
    return Tap(attention.get_submodule(name), _as_they_are)


def attention_weights(
    decoder: Decoder, layer: int, query: Tensor, rotated: Tensor, other: Tensor, positions: Tensor
) -> Tensor:
    """See `ModelAdapter.attention_weights`."""
    attention, last = decoder.attention(layer), positions.max().view(1)
    heads, keys = _query_and_keys(decoder, layer, query, rotated, other, last)
    scaling = float(getattr(attention, "scaling", keys.shape[-1] ** -0.5))
    grouped = heads.view(len(keys), -1, heads.shape[-1])
    logits = (grouped @ keys.transpose(1, 2)).float().flatten(0, 1) * scaling
    cap = getattr(attention, "attn_logit_softcapping", None)
    if cap is not None:
        logits = (logits / cap).tanh() * cap
    window = decoder.windows[layer]
    if window is not None:
        logits.masked_fill_(positions <= last - window, -torch.inf)
    sinks = getattr(attention, "sinks", None)
    if sinks is not None:  # GPT-OSS: a logit that nothing stands behind
        logits = torch.cat((logits, sinks.detach().float().view(-1, 1)), -1)
    return logits.softmax(-1)[:, : len(positions)]


def _query_and_keys(
    decoder: Decoder, layer: int, query: Tensor, rotated: Tensor, other: Tensor, position: Tensor
) -> tuple[Tensor, Tensor]:
    """A query (H, 1, D) as it meets K (G, n, D)."""
    spec, family = decoder.spec, decoder.family
    heads = query.view(spec.num_heads, 1, -1)
    cos, sin = decoder.position_embeddings(position, decoder.rope_kinds[layer])
    turn = partial(reference.rope, cos=cos, sin=sin, is_interleaved=family.is_interleaved)
    if not family.is_latent:
        return turn(heads).to(rotated.dtype), rotated
    plain, turned = heads[..., : -spec.head_dim], heads[..., -spec.head_dim :]
    turned = turn(in_halves(turned, decoder.model.config)).to(plain.dtype)
    expand: Any = decoder.attention(layer)
    keys: Tensor = expand.expand_kv(other.unsqueeze(0), rotated.unsqueeze(0))[0][0]
    return torch.cat((plain, turned), -1), keys


def _as_they_are(rows: Tensor) -> Tensor:
    return rows


def _joined_heads(by_head: Tensor) -> Tensor:
    return by_head.flatten(-2)


def _joined_first_heads(by_head: Tensor) -> Tensor:
    return by_head.transpose(1, 2).flatten(-2)


_ROWS_OF_NORM: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": _as_they_are,
    "tokens": _joined_heads,
    "heads": _joined_first_heads,
}
