"""The cache that restores itself while the model's own forward pass runs through it.

When the forward pass reaches a layer and calls `update`, the layer is restored, the fresh K and V
are added, and from then on it is an ordinary preallocated cache layer.

Restored tokens lie in the first slots of the buffers, in prompt order, the fresh ones behind
them: attention does not mind the order of keys, as long as the mask speaks of positions. Decoding
masks nothing, but in layers with a sliding window, which are put in the order of positions first
and show their last tokens only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from hcache_rag.buffers import Buffers
from hcache_rag.compose import Composition
from hcache_rag.models import ModelAdapter


@dataclass(frozen=True, slots=True, eq=False)
class _Pass:
    """A forward pass over some positions (F,) of the prompt, and the slots (F,) they belong to."""

    positions: Tensor
    slots: Tensor
    is_contiguous: bool


class RestoringCache(Cache):
    """A transformers cache that starts with the states of a composition.

    Use `hcache_rag.executor.open_restoring`.

    Args:
        adapter: the model that will run through it.
        composition: what is restored and what is read afresh.
        buffers: at least as many slots as the sequence will have tokens.
        restore_layer: writes a layer's restored K and V into the first slots.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        composition: Composition,
        buffers: Buffers,
        restore_layer: Callable[[int], None],
    ) -> None:
        self.adapter = adapter
        self.composition = composition
        self.buffers = buffers
        self.restore_layer = restore_layer
        restored = composition.restored_positions
        self.num_restored = len(restored)
        self.position_of_slot = torch.from_numpy(
            np.concatenate((restored, composition.fresh_positions))
        )
        self._slot_of_position = torch.argsort(self.position_of_slot)
        self._is_in_order = bool((self.position_of_slot.diff() > 0).all())
        self._pass: _Pass | None = None
        num_layers = adapter.spec.num_layers
        windows = adapter.windows or [None] * num_layers
        self.restoring_layers = [RestoringLayer(self, i, w) for i, w in enumerate(windows)]
        super().__init__(layers=list(self.restoring_layers))
        if self.num_restored:
            self.begin_pass(composition.fresh_positions)

    def begin_pass(self, positions: npt.NDArray[np.int64]) -> None:
        """Make the next forward pass read the prompt's tokens at `positions` (F,), ascending.

        What it writes goes to the slots of these positions, over what is there.
        """
        at = torch.from_numpy(positions)
        slots = self._slot_of_position[at]
        is_contiguous = bool((slots.diff() == 1).all())
        # Where the model is, once for all layers: a copy in each would wait for the layer before.
        on_device = slots if is_contiguous else slots.to(self.adapter.device)
        self._pass = _Pass(at, on_device, is_contiguous)
        for layer in self.restoring_layers:
            layer.rewind()

    @property
    def is_in_order(self) -> bool:
        """Whether slots are positions."""
        return self._is_in_order

    @property
    def is_in_pass(self) -> bool:
        """Whether a pass was begun and has not gone through all layers."""
        return self._pass is not None

    def write(self, layer: int, key_states: Tensor, value_states: Tensor) -> int | None:
        """Write a pass's K and V to their slots; the filled length, or None outside a pass."""
        if self._pass is None:
            return None
        slots = self._pass.slots
        if key_states.shape[-2] != len(slots):
            raise ValueError(f"{key_states.shape[-2]} tokens in a pass over {len(slots)} positions")
        for buffer, states in (
            (self.buffers.keys, key_states),
            (self.buffers.values, value_states),
        ):
            if self._pass.is_contiguous:
                buffer[layer][:, :, slots[0] : slots[-1] + 1] = states
            else:
                buffer[layer].index_copy_(2, slots, states)
        if layer == len(self.restoring_layers) - 1:
            self._pass = None
        return len(self.position_of_slot)

    def pass_inputs(self) -> dict[str, Any]:
        """What the pass reads: its tokens, their positions, and which slots each of them sees.

        Models whose states cannot be moved make their own mask: they read what follows a prefix.
        """
        if self._pass is None:
            raise RuntimeError("no pass was begun")
        device, positions = self.adapter.device, self._pass.positions
        token_ids = torch.from_numpy(self.composition.token_ids.astype(np.int64))
        inputs: dict[str, Any] = {
            "input_ids": token_ids[positions].unsqueeze(0).to(device),
            "position_ids": positions.unsqueeze(0).to(device),
            "attention_mask": self._mask() if self.adapter.is_movable else None,
        }
        if not self.adapter.takes_positions:
            inputs.pop("position_ids")
        return inputs

    def _mask(self) -> Tensor | dict[str, Tensor]:
        """The mask of the pass, (1, 1, F, N); one for each layer type where windows differ."""
        windows = self.adapter.windows
        if len(set(windows)) == 1:
            return self._mask_of(windows[0])
        types = self.adapter.model.config.layer_types
        by_type = dict(zip(types, windows, strict=True))
        return {kind: self._mask_of(window) for kind, window in by_type.items()}

    def _mask_of(self, window: int | None) -> Tensor:
        if self._pass is None:
            raise RuntimeError("no pass was begun")
        positions = self._pass.positions
        visible = self.position_of_slot[None, :] <= positions[:, None]
        if window is not None:
            visible &= self.position_of_slot[None, :] > positions[:, None] - window
        # Additive, which both eager and SDPA attention take; SDPA would turn a boolean mask into
        # this one in every layer.
        mask = torch.zeros((1, 1, *visible.shape), dtype=self.adapter.dtype)
        mask.masked_fill_(~visible, torch.finfo(self.adapter.dtype).min)
        return mask.to(self.adapter.device)

    def reorder(self, layer: int, *, by_position: bool) -> None:
        """Put a layer's slots of the prompt in the order of positions, or back."""
        order = self._slot_of_position if by_position else self.position_of_slot
        index = order.to(self.adapter.device)
        for side in self.buffers.sides:
            side[layer][:, :, : len(index)] = side[layer].index_select(2, index)

    def copied(self, first: int, tokens: int) -> tuple[Tensor, Tensor]:
        """K and V, (L, G, n, D) each, of `tokens` tokens from position `first` on, in order.

        Those that were decoded stand behind the prompt's. The tensors have memory of their own.
        """
        if first + tokens > self.num_filled:
            raise ValueError(f"{first + tokens} tokens are not in a cache of {self.num_filled}")
        for layer in self.restoring_layers:
            layer.back_to_slots()
        index = self._slots(self.num_filled)[first : first + tokens]
        return (
            self.buffers.keys[:, 0].index_select(2, index),
            self.buffers.values[:, 0].index_select(2, index),
        )

    def _slots(self, filled: int) -> Tensor:
        """The slots of `filled` tokens in the order of positions, those decoded at the end."""
        decoded = torch.arange(len(self.position_of_slot), filled)
        return torch.cat((self._slot_of_position, decoded)).to(self.adapter.device)

    @property
    def num_filled(self) -> int:
        """Tokens whose K and V are in every layer."""
        return self.restoring_layers[-1].get_seq_length()

    def by_position(self, layer: int) -> tuple[Tensor, Tensor]:
        """K and V of a layer in the order of positions, (1, G, n, D) each; copies."""
        self.restoring_layers[layer].back_to_slots()
        index = self._slots(self.restoring_layers[layer].get_seq_length())
        return (
            self.buffers.keys[layer].index_select(2, index),
            self.buffers.values[layer].index_select(2, index),
        )


class RestoringLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer of a `RestoringCache`.

    Args:
        window: how many tokens up to its own a token sees; None for all.
    """

    def __init__(self, cache: RestoringCache, layer: int, window: int | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._cache = cache
        self._layer = layer
        self._window = window
        self._length = cache.num_restored
        self._is_by_position = False
        self.is_sliding = window is not None
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Restore the layer; called by the first `update`."""
        if key_states.shape[0] != 1:
            raise ValueError(f"the cache holds one sequence, not a batch of {key_states.shape[0]}")
        self._cache.restore_layer(self._layer)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add K and V, (1, G, n, D) each, behind what is there; return views of what is seen."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        key_states, value_states = self._cache.adapter.as_cached(key_states, value_states)
        buffers = self._cache.buffers
        end = self._cache.write(self._layer, key_states, value_states)
        if end is not None:
            self._length = end
            return self._views(0)
        num_new = key_states.shape[-2]
        end = self._length + num_new
        if end > buffers.capacity_tokens:
            raise ValueError(f"{end} tokens do not fit into {buffers.capacity_tokens} cache slots")
        if self._window is not None:
            self._by_position()
        keys, values = buffers.keys[self._layer], buffers.values[self._layer]
        keys[:, :, self._length : end] = key_states
        values[:, :, self._length : end] = value_states
        first = self._first_seen()
        self._length = end
        return self._views(first)

    def _by_position(self) -> None:
        if not (self._is_by_position or self._cache.is_in_order):
            self._cache.reorder(self._layer, by_position=True)
            self._is_by_position = True

    def back_to_slots(self) -> None:
        """Let slots be what the cache says they are, if the layer is in the order of positions."""
        if self._is_by_position:
            self._cache.reorder(self._layer, by_position=False)
            self._is_by_position = False

    def rewind(self) -> None:
        """Count only restored tokens again, so that a pass can follow."""
        self.back_to_slots()
        self._length = self._cache.num_restored

    def crop(self, tokens_to_remove: int) -> None:
        """Forget so many tokens (a number below zero) that have come behind the prompt."""
        length = self._length + tokens_to_remove
        if tokens_to_remove > 0 or length < len(self._cache.position_of_slot):
            raise ValueError(f"{-tokens_to_remove} tokens cannot be taken off {self._length}")
        self._length = length

    def _views(self, first: int) -> tuple[Tensor, Tensor]:
        buffers = self._cache.buffers
        return self._cache.adapter.as_cached(
            buffers.keys[self._layer][:, :, first : self._length],
            buffers.values[self._layer][:, :, first : self._length],
        )

    def _first_seen(self) -> int:
        """The first token that one behind those that are there sees."""
        return 0 if self._window is None else max(0, self._length - self._window + 1)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that a query of this length will see."""
        first = self._first_seen()
        return self._length - first + query_length, first

    def get_seq_length(self) -> int:
        """Tokens in the layer; restored ones count from the beginning."""
        return self._length

    def get_max_length(self) -> int:
        """No limit that transformers needs to know."""
        return -1
