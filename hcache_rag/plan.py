"""Which representation each layer keeps. Pure: knows no torch, no disk and no clock.

For now the choice is by bytes; choosing by measured time takes this function's place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hcache_rag.layout import Representation, StateLayout
from hcache_rag.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class LayoutChoice:
    """A layout, and in one sentence why it was chosen."""

    layout: StateLayout
    reason: str


def choose_layout(spec: ModelSpec, representation: str | Sequence[str] = "auto") -> LayoutChoice:
    """Choose what a state of `spec` keeps.

    Args:
        representation: "hidden" or "kv" for every layer, one of these per layer, or "auto":
            the smaller one, which is hidden states where `E < 2 * G * D`.

    Raises:
        ValueError: an unknown representation, or not one per layer.
    """
    if not isinstance(representation, str):
        if len(representation) != spec.num_layers:
            raise ValueError(
                f"{len(representation)} representations were given for {spec.num_layers} layers"
            )
        layout = StateLayout.of([_parse(n, per_layer=True) for n in representation], spec.dtype)
        return LayoutChoice(layout, "chosen per layer by the caller")
    if representation != "auto":
        layout = StateLayout.of([_parse(representation)] * spec.num_layers, spec.dtype)
        return LayoutChoice(layout, f"{representation!r} was asked for")

    hidden, kv = spec.hidden_size, 2 * spec.kv_width
    chosen = Representation.HIDDEN if hidden < kv else Representation.KV
    reason = (
        f"kv: hidden states are {hidden} elements per token and layer, K and V {kv}"
        if chosen is Representation.KV
        else f"hidden: {hidden} elements per token and layer, where K and V take {kv}"
    )
    return LayoutChoice(StateLayout.of([chosen] * spec.num_layers, spec.dtype), reason)


def _parse(name: str, *, per_layer: bool = False) -> Representation:
    try:
        return Representation(name)
    except ValueError:
        known = ", ".join([*([] if per_layer else ["auto"]), *(r.value for r in Representation)])
        raise ValueError(f"unknown representation {name!r}; known: {known}") from None
