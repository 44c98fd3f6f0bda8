"""A loaded decoder as capturing and restoring see it, whatever its family.

Nothing of a model is changed; hooks are removed when their block ends. Knows neither storage nor
plans.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hcache_kernels import fold_projection, reference, row_scale
from hcache_kernels.operands import KeyNorm
from hcache_rag.errors import UnsupportedModelError
from hcache_rag.identity import model_fingerprint, signs_of_change, unwrapped
from hcache_rag.layout import Representation
from hcache_rag.models.configuration import spec_of, why_refused, windows_of
from hcache_rag.models.families import Positions, family_of, in_halves
from hcache_rag.models.hooks import EnoughLayersError, inputs_of, outputs_of
from hcache_rag.models.norms import epsilon, key_norm_of
from hcache_rag.models.tensors import torch_dtype
from hcache_rag.models.unknown import probed_spec, warn_once

QUERY, KEY, VALUE = range(3)


@dataclass(frozen=True, slots=True)
class CapturedLayer:
    """A layer of a captured batch: (hidden (B, T, E), None) or (K before RoPE, V) (B, T, G * D).

    Both are None where nothing was to be caught.
    """

    first: Tensor | None
    second: Tensor | None


@dataclass(frozen=True, slots=True)
class Projection:
    """A layer's way from its input to K and V, see `hcache_kernels.project_kv`."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True, slots=True)
class Tap:
    """Where a layer's Q, K or V come out, and how to see that as rows (B, T, heads * D)."""

    module: nn.Module
    rows: Callable[[Tensor], Tensor]


RowsNorm = Callable[[Tensor], Tensor]
"""What rows (T, G * D) of K, or of V, go through behind their projection."""


class ModelAdapter:
    """A loaded decoder, seen as capturing and restoring see it.

    Args:
        model: a transformers causal language model, or a `PeftModel` of one. Where its family is
            none of `FAMILIES`, K and V are kept as its own cache receives them.
        name: what a person calls it; by default the path that it was loaded from.

    Raises:
        UnsupportedModelError: the family, or a feature of this model, cannot be restored.
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
            _check_projections(self)
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

    # From a layer's input to K and V

    def attention(self, layer: int) -> nn.Module:
        """The attention of a layer."""
        return self.layers[layer].get_submodule(self.family.attention)

    def norm(self, layer: int) -> nn.Module | None:
        """The norm in front of a layer's attention."""
        its = self.layers[layer]
        return next((f for name in self.family.norms if (f := _part(its, name)) is not None), None)

    def row_scale(self, layer: int, hidden: Tensor) -> Tensor:
        """What the norm multiplies rows (..., E) of a layer's input by, less its gain, (...,)."""
        norm = self.norm(layer)
        if norm is None:
            return torch.ones(hidden.shape[:-1], device=hidden.device)
        return row_scale(hidden, epsilon(norm), is_centred=self.family.is_centred)

    @cached_property
    def projections(self) -> list[Projection]:
        """The folded projection of every layer; made once, costs `2 * G * D * E` elements each."""
        return [self._fold(layer) for layer in range(self.spec.num_layers)]

    def _fold(self, layer: int) -> Projection:
        norm, family = self.norm(layer), self.family
        key, value = self._weights(layer)
        weights: Any = getattr(norm, "weight", None)
        gain: Tensor = torch.ones_like(key[0]) if weights is None else weights.detach()
        if family.gain_offset:
            gain = gain.float() + family.gain_offset
        weight = fold_projection(gain, key, value, is_centred=family.is_centred)
        biases = [b for b in self._biases(layer) if b is not None]
        bias = torch.cat(biases) if biases else None
        shift: Any = getattr(norm, "bias", None)
        if shift is not None:
            moved = torch.cat((key, value)).float() @ shift.detach().float()
            bias = (moved if bias is None else moved + bias.float()).to(key.dtype)
        return Projection(weight, bias)

    def _weights(self, layer: int) -> tuple[Tensor, Tensor]:
        """The weights of K and of V, (G * D, E) each."""
        family, attention = self.family, self.attention(layer)
        if not family.fused:
            modules = [attention.get_submodule(n) for n in (family.key, family.value)]
            return _weight(modules[0]), _weight(modules[1])
        columns = _weight(attention.get_submodule(family.fused)).t()
        _, key, value = family.split(columns, self.spec, self.model.config)
        return key.t(), value.t()

    def _biases(self, layer: int) -> tuple[Tensor | None, Tensor | None]:
        family, attention = self.family, self.attention(layer)
        if not family.fused:
            key, value = (attention.get_submodule(n) for n in (family.key, family.value))
            return _detached(key.bias), _detached(value.bias)
        bias = _detached(attention.get_submodule(family.fused).bias)
        if bias is None:
            return None, None
        _, of_keys, of_values = family.split(bias, self.spec, self.model.config)
        return of_keys, of_values

    @cached_property
    def rows_norms(self) -> list[tuple[RowsNorm | None, RowsNorm | None]]:
        """Of every layer: what its K, and its V, go through behind their projection."""
        names = self.family.key_norm, self.family.value_norm
        found = []
        for layer in range(self.spec.num_layers):
            key, value = (self._rows_norm(self._part(layer, name)) for name in names)
            found.append((key, value))
        return found

    @cached_property
    def key_norms(self) -> list[KeyNorm | None]:
        """Of every layer: the same norm of K, in numbers."""
        norms = (self._part(i, self.family.key_norm) for i in range(self.spec.num_layers))
        return [
            None if norm is None else key_norm_of(norm, self.family, self.spec) for norm in norms
        ]

    def _rows_norm(self, norm: nn.Module | None) -> RowsNorm | None:
        if norm is None:
            return None
        # `forward` itself: others' hooks are for what the model does.
        call: Callable[[Tensor], Tensor] = norm.forward
        shape, heads = self.family.norm_shape, self.spec.num_kv_heads

        def normed(rows: Tensor) -> Tensor:
            if shape == "rows":
                return call(rows.unsqueeze(0))[0]
            by_head = in_heads(rows, heads).unsqueeze(0)
            if shape == "tokens":
                return call(by_head)[0].flatten(-2)
            return call(by_head.transpose(1, 2))[0].transpose(0, 1).flatten(-2)

        return normed

    @torch.no_grad()
    def project(self, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """K before RoPE and V (G, T, D) of layer inputs (T, E), by the model's own modules."""
        family, attention, norm = self.family, self.attention(layer), self.norm(layer)
        rows = hidden.unsqueeze(0)
        rows = rows if norm is None else norm.forward(rows)
        if family.fused:
            every = attention.get_submodule(family.fused).forward(rows)
            _, key, value = family.split(every, self.spec, self.model.config)
        else:
            key = attention.get_submodule(family.key).forward(rows)
            value = attention.get_submodule(family.value).forward(rows)
        sides = []
        for side, norm_of in zip((key[0], value[0]), self.rows_norms[layer], strict=True):
            normed = side if norm_of is None else norm_of(side)
            sides.append(in_heads(normed, self.spec.num_kv_heads).transpose(0, 1))
        return sides[0], sides[1]

    # What a forward pass shows

    def tap(self, layer: int, side: int) -> Tap:
        """Where Q, K or V of a layer come out, right before RoPE.

        Args:
            side: `QUERY`, `KEY` or `VALUE`.
        """
        family, attention = self.family, self.attention(layer)
        norm = self._part(layer, (family.query_norm, family.key_norm, family.value_norm)[side])
        if norm is not None:
            return Tap(norm, _ROWS_OF_NORM[family.norm_shape])
        if family.is_latent and side == QUERY:
            query = _part(attention, "q_proj") or attention.get_submodule("q_b_proj")
            return Tap(query, _as_they_are)
        if family.fused:
            spec, config = self.spec, self.model.config
            fused = attention.get_submodule(family.fused)
            return Tap(fused, lambda out: family.split(out, spec, config)[side])
        name = (family.query, family.key, family.value)[side]
        return Tap(attention.get_submodule(name), _as_they_are)

    def _part(self, layer: int, name: str) -> nn.Module | None:
        return _part(self.attention(layer), name) if name else None

    @contextmanager
    def catching(self, layer: int, side: int, take: Callable[[Tensor], None]) -> Iterator[None]:
        """Pass Q, K or V of a layer, (B, T, heads * D), to `take` in this thread's passes."""
        tap = self.tap(layer, side)
        with outputs_of(tap.module, lambda out: take(tap.rows(out))):
            yield

    def attention_weights(
        self, layer: int, query: Tensor, rotated: Tensor, other: Tensor, positions: Tensor
    ) -> Tensor:
        """The attention (H, n) that the last of some tokens pays to each of them.

        Args:
            query: its own, as `catching` gives it, (H * D,).
            rotated, other: K after RoPE and V, (G, n, D) each.
            positions: of the tokens, (n,), in any order.
        """
        attention, last = self.attention(layer), positions.max().view(1)
        heads, keys = self._query_and_keys(layer, query, rotated, other, last)
        scaling = float(getattr(attention, "scaling", keys.shape[-1] ** -0.5))
        grouped = heads.view(len(keys), -1, heads.shape[-1])
        logits = (grouped @ keys.transpose(1, 2)).float().flatten(0, 1) * scaling
        cap = getattr(attention, "attn_logit_softcapping", None)
        if cap is not None:
            logits = (logits / cap).tanh() * cap
        window = self.windows[layer]
        if window is not None:
            logits.masked_fill_(positions <= last - window, -torch.inf)
        sinks = getattr(attention, "sinks", None)
        if sinks is not None:  # GPT-OSS: a logit that nothing stands behind
            logits = torch.cat((logits, sinks.detach().float().view(-1, 1)), -1)
        return logits.softmax(-1)[:, : len(positions)]

    def _query_and_keys(
        self, layer: int, query: Tensor, rotated: Tensor, other: Tensor, position: Tensor
    ) -> tuple[Tensor, Tensor]:
        """A query (H, 1, D) as it meets K (G, n, D)."""
        spec = self.spec
        heads = query.view(spec.num_heads, 1, -1)
        cos, sin = self.position_embeddings(position, self.rope_kinds[layer])
        turn = partial(reference.rope, cos=cos, sin=sin, is_interleaved=self.family.is_interleaved)
        if not self.family.is_latent:
            return turn(heads).to(rotated.dtype), rotated
        plain, turned = heads[..., : -spec.head_dim], heads[..., -spec.head_dim :]
        turned = turn(in_halves(turned, self.model.config)).to(plain.dtype)
        expand: Any = self.attention(layer)
        keys: Tensor = expand.expand_kv(other.unsqueeze(0), rotated.unsqueeze(0))[0][0]
        return torch.cat((plain, turned), -1), keys

    # Reading

    @torch.no_grad()
    def prefill(self, token_ids: Sequence[int]) -> DynamicCache:
        """The KV cache of `token_ids`, read from position 0; also sliding layers keep all of it."""
        cache = DynamicCache()
        if len(token_ids):
            ids = torch.tensor([list(token_ids)], device=self.device)
            self.decoder(input_ids=ids, past_key_values=cache, use_cache=True)
        return cache

    def capture(
        self,
        batch: Sequence[Sequence[int]],
        representations: Sequence[Representation],
        after: DynamicCache,
    ) -> list[CapturedLayer]:
        """Read a batch of documents after a prefix, and catch the inputs or K and V of its layers.

        Args:
            batch: B documents' token ids; shorter ones are padded on the right, where causal
                attention keeps the padding from their tokens.
            representations: what is caught of the first layers; those behind are not computed.
            after: the KV cache of the prefix, batch of one; it is left as it was.

        Returns:
            One `CapturedLayer` per representation, padded to the longest document.
        """
        if not self.is_known:
            return self._capture_cached(batch, representations, after)
        with self._catching(representations) as caught:
            self.read_batch(batch, after, num_layers=len(representations))
        return [CapturedLayer(*layer) for layer in caught]

    def _capture_cached(
        self,
        batch: Sequence[Sequence[int]],
        representations: Sequence[Representation],
        after: DynamicCache,
    ) -> list[CapturedLayer]:
        """As `capture`, out of the model's own cache."""
        first = after.get_seq_length()
        cache = self.read_batch(batch, after)
        found = []
        for representation, layer in zip(representations, cache.layers, strict=False):
            if representation is Representation.HIDDEN:
                raise ValueError(f"hidden states of {self.spec.family!r} cannot be kept")
            its: Any = layer
            sides = (side[:, :, first:].transpose(1, 2) for side in (its.keys, its.values))
            kept = representation is Representation.KV
            found.append(CapturedLayer(*(side.flatten(2) if kept else None for side in sides)))
        return found

    @torch.no_grad()
    def read_batch(
        self,
        batch: Sequence[Sequence[int]],
        after: DynamicCache,
        *,
        num_layers: int | None = None,
    ) -> DynamicCache:
        """Run a padded batch of documents after a prefix through first layers, see `capture`.

        Returns:
            The cache with them behind the prefix.
        """
        longest = max(len(ids) for ids in batch)
        ids = torch.zeros((len(batch), longest), dtype=torch.long, device=self.device)
        for row, document in enumerate(batch):
            ids[row, : len(document)] = torch.tensor(document, device=self.device)
        cache = _repeat(after, len(batch))
        with self._stopping_before(num_layers), suppress(EnoughLayersError):
            self.decoder(input_ids=ids, past_key_values=cache, use_cache=True)
        return cache

    @contextmanager
    def _stopping_before(self, layer: int | None) -> Iterator[None]:
        """End this thread's forward pass when it comes to a layer, None for never."""
        if layer is None or layer >= len(self.layers):
            yield
            return

        def stop(_input: Tensor) -> None:
            raise EnoughLayersError

        with inputs_of(self.layers[layer], stop):
            yield

    @contextmanager
    def _catching(self, representations: Sequence[Representation]) -> Iterator[list[list[Any]]]:
        caught: list[list[Any]] = [[None, None] for _ in representations]
        with ExitStack() as hooks:
            for i, representation in enumerate(representations):
                put = caught[i].__setitem__
                if representation is Representation.HIDDEN:
                    hooks.enter_context(inputs_of(self.layers[i], partial(put, 0)))
                elif representation is Representation.KV:
                    hooks.enter_context(self.catching(i, KEY, partial(put, 0)))
                    hooks.enter_context(self.catching(i, VALUE, partial(put, 1)))
            yield caught


def in_heads(rows: Tensor, heads: int) -> Tensor:
    """Rows (..., heads * D) as (..., heads, D)."""
    return rows.view(*rows.shape[:-1], heads, -1)


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


def _part(module: nn.Module, name: str) -> Any:
    """A submodule; None where there is none of that name."""
    found = getattr(module, name, None)
    return found if isinstance(found, nn.Module) else None


def _weight(linear: nn.Module) -> Tensor:
    """The weights of a linear layer, (out, in)."""
    weight: Any = linear.weight
    found: Tensor = weight.detach()
    return found.t() if type(linear) is Conv1D else found


def _detached(bias: Any) -> Tensor | None:
    return None if bias is None else bias.detach()


def _is_linear(module: nn.Module) -> bool:
    return type(module) in (nn.Linear, Conv1D) or type(module).__name__ == "FalconLinear"


def _check_projections(adapter: ModelAdapter) -> None:
    spec, family = adapter.spec, adapter.family
    if len(adapter.layers) != spec.num_layers:
        raise UnsupportedModelError(
            f"the configuration names {spec.num_layers} layers, the model has {len(adapter.layers)}"
        )
    widths = {family.key: spec.kv_width, family.value: spec.value_width}
    for i in range(spec.num_layers):
        for name in [family.fused] if family.fused else [family.key, family.value]:
            module = adapter.attention(i).get_submodule(name)
            width = _weight(module).shape[0] if family.fused else widths[name]
            if not _is_linear(module) or tuple(_weight(module).shape) != (width, spec.hidden_size):
                raise UnsupportedModelError(
                    f"layer {i} projects K or V with {module}, not with a plain "
                    f"{spec.hidden_size} -> {width} linear layer"
                )
        key, value = adapter._biases(i)
        if (key is None) != (value is None):
            raise UnsupportedModelError(f"layer {i} has a bias on only one of K and V")


def _repeat(cache: DynamicCache, batch_size: int) -> DynamicCache:
    repeated = DynamicCache()
    layers: list[Any] = cache.layers
    for index, layer in enumerate(layers):
        if layer.is_initialized:
            repeated.update(
                layer.keys.expand(batch_size, -1, -1, -1),
                layer.values.expand(batch_size, -1, -1, -1),
                index,
            )
    return repeated
