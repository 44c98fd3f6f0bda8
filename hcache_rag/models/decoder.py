"""Where things are in a loaded decoder, whatever its family: layers, norms, RoPE, and its numbers.

Knows what a family's facts say, and nothing of what is done with it.
"""

from __future__ import annotations

import inspect
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hcache_rag.errors import UnsupportedModelError
from hcache_rag.identity import model_fingerprint, signs_of_change, unwrapped
from hcache_rag.models.configuration import spec_of, why_refused, windows_of
from hcache_rag.models.families import Positions, family_of
from hcache_rag.models.tensors import torch_dtype
from hcache_rag.models.unknown import probed_spec, warn_once


class Decoder:
    """A loaded decoder: its modules, and its numbers.

    Args:
        model: a transformers causal language model, or a `PeftModel` of one.
        name: what a person calls it; by default the path that it was loaded from.

    Raises:
        UnsupportedModelError: models of its family cannot be served.
    """

    def __init__(self, model: PreTrainedModel, name: str | None = None) -> None:
        model = unwrapped(model)
        config = model.config
        reason = why_refused(config)
        if reason is not None:
            raise UnsupportedModelError(
                f"models of family {config.model_type!r} cannot be served: {reason}"
            )
        self.model = model
        self.family = family_of(config)
        name = name or str(config.name_or_path or config.model_type)
        dtype = str(model.dtype).removeprefix("torch.")
        self.layers: list[nn.Module] = []
        self.windows: list[int | None] = []
        if self.is_known:
            self.decoder: Any = model.get_submodule(self.family.decoder)
            self.layers = list(self.decoder.get_submodule(self.family.layers).children())
            self.windows = windows_of(config)
            self.spec = spec_of(config, name, dtype)
            if len(self.layers) != self.spec.num_layers:
                raise UnsupportedModelError(
                    f"the configuration names {self.spec.num_layers} layers, the model has "
                    f"{len(self.layers)}"
                )
        else:
            self.decoder = model.base_model
            self.spec = probed_spec(model, name, dtype)
            warn_once(config.model_type)
        self._signs = signs_of_change(model)

    @property
    def is_known(self) -> bool:
        """Whether there are facts about this family."""
        return self.family.positions is not Positions.UNKNOWN

    @property
    def is_movable(self) -> bool:
        """Whether a state can be put anywhere; otherwise it is valid on its exact path only."""
        return self.family.is_movable

    @property
    def why_not_movable(self) -> str:
        """Why a state is valid on its exact path only, in words."""
        return f"it was computed at another place, and {self.family.positions.value}"

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return torch_dtype(self.spec.dtype)

    @cached_property
    def fingerprint(self) -> str:
        """See `hcache_rag.identity.model_fingerprint`."""
        return model_fingerprint(self.model)

    @property
    def is_changed(self) -> bool:
        """Whether weights, or which adapters are in use, are others than when this was made."""
        return signs_of_change(self.model) != self._signs

    @property
    def is_training(self) -> bool:
        """Whether the model is in training mode, where dropout would get into states."""
        return bool(self.model.training)

    @cached_property
    def takes_positions(self) -> bool:
        """Whether the model is told where its tokens stand."""
        return "position_ids" in inspect.signature(self.model.forward).parameters

    # Positions

    @cached_property
    def rope_kinds(self) -> list[str | None]:
        """By what each layer rotates, see `position_embeddings`."""
        if not self.is_movable:
            return [None] * self.spec.num_layers
        config = self.model.config
        return [self.family.rope_kind(config, layer) for layer in range(self.spec.num_layers)]

    def position_embeddings(
        self, positions: Tensor, kind: str | None = ""
    ) -> tuple[Tensor, Tensor]:
        """The model's own RoPE cosines and sines, (T, R) each, at `positions` (T,).

        Args:
            kind: one of `rope_kinds`.

        Returns:
            As many channels as are rotated: none of a layer without RoPE. Float32 where the model
            rotates in float32, else the model's dtype.
        """
        probe = torch.empty(0, dtype=self.dtype, device=self.device)
        if kind is None:
            nothing = probe.new_empty((len(positions), 0))
            return nothing, nothing
        rotary = self.decoder.get_submodule(self.family.rotary)
        with torch.no_grad():
            cos, sin = self.family.cos_sin(rotary, probe, positions.unsqueeze(0), kind)
        return cos[0], sin[0]

    def all_position_embeddings(self, positions: Tensor) -> dict[str | None, tuple[Tensor, Tensor]]:
        """`position_embeddings` of every kind that some layer has."""
        kinds = set(self.rope_kinds)
        return {kind: self.position_embeddings(positions, kind) for kind in kinds}

    def as_cached(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """What is rotated and what is not, as the model's own cache has them, and the reverse."""
        return (second, first) if self.family.is_latent else (first, second)

    # Modules

    def attention(self, layer: int) -> nn.Module:
        """The attention of a layer."""
        return self.layers[layer].get_submodule(self.family.attention)

    def norm(self, layer: int) -> nn.Module | None:
        """The norm in front of a layer's attention."""
        its = self.layers[layer]
        return next(
            (f for name in self.family.norms if (f := part_of(its, name)) is not None), None
        )

    def part(self, layer: int, name: str) -> nn.Module | None:
        """A module of a layer's attention, by its name; None where there is none of that name."""
        return part_of(self.attention(layer), name) if name else None


def part_of(module: nn.Module, name: str) -> nn.Module | None:
    """A submodule; None where there is none of that name."""
    found = getattr(module, name, None)
    return found if isinstance(found, nn.Module) else None
