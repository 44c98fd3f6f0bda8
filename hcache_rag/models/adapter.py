"""A loaded decoder as capturing and restoring see it, whatever its family.

Nothing of a model is changed; hooks are removed when their block ends. Knows neither storage nor
plans.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from hcache_kernels.operands import KeyNorm
from hcache_rag.layout import Representation
from hcache_rag.models.decoder import Decoder
from hcache_rag.models.hooks import EnoughLayersError, inputs_of, outputs_of
from hcache_rag.models.norms import key_norm_of
from hcache_rag.models.projecting import (
    Projection,
    RowsNorm,
    check_projections,
    folded,
    norms_of_rows,
    project,
    scale_of_rows,
)
from hcache_rag.models.taps import KEY, VALUE, Tap, attention_weights, tap_of


@dataclass(frozen=True, slots=True)
class CapturedLayer:
    """A layer of a captured batch: (hidden (B, T, E), None) or (K before RoPE, V) (B, T, G * D).

    Both are None where nothing was to be caught.
    """

    first: Tensor | None
    second: Tensor | None


class ModelAdapter(Decoder):
    """A loaded decoder, seen as capturing and restoring see it.

    Args:
        model: a transformers causal language model, or a `PeftModel` of one. Where its family is
            none of `FAMILIES`, K and V are kept as its own cache receives them.
        name: what a person calls it; by default the path that it was loaded from.

    Raises:
        UnsupportedModelError: the family, or a feature of this model, cannot be restored.
    """

    def __init__(self, model: PreTrainedModel, name: str | None = None) -> None:
        super().__init__(model, name)
        if self.is_known:
            check_projections(self)

    # From a layer's input to K and V

    def row_scale(self, layer: int, hidden: Tensor) -> Tensor:
        """What the norm multiplies rows (..., E) of a layer's input by, less its gain, (...,)."""
        return scale_of_rows(self, layer, hidden)

    @cached_property
    def projections(self) -> list[Projection]:
        """The folded projection of every layer; made once, costs `2 * G * D * E` elements each."""
        return [folded(self, layer) for layer in range(self.spec.num_layers)]

    @cached_property
    def rows_norms(self) -> list[tuple[RowsNorm | None, RowsNorm | None]]:
        """Of every layer: what its K, and its V, go through behind their projection."""
        return [norms_of_rows(self, layer) for layer in range(self.spec.num_layers)]

    @cached_property
    def key_norms(self) -> list[KeyNorm | None]:
        """Of every layer: the same norm of K, in numbers."""
        norms = (self.part(i, self.family.key_norm) for i in range(self.spec.num_layers))
        return [
            None if norm is None else key_norm_of(norm, self.family, self.spec) for norm in norms
        ]

    @torch.no_grad()
    def project(self, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """K before RoPE and V (G, T, D) of layer inputs (T, E), by the model's own modules."""
        return project(self, layer, hidden)

    # What a forward pass shows

    def tap(self, layer: int, side: int) -> Tap:
        """Where Q, K or V of a layer come out, right before RoPE.

        Args:
            side: `QUERY`, `KEY` or `VALUE`.
        """
        return tap_of(self, layer, side)

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
        return attention_weights(self, layer, query, rotated, other, positions)

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
