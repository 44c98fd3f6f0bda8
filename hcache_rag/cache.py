"""The cache that restores itself while the model's own forward pass runs through it.

When the forward pass reaches a layer and calls `update`, the layer is restored, the fresh K and V
are added, and from then on it is an ordinary preallocated cache layer.

Restored tokens lie in the first slots of the buffers, in prompt order, the fresh ones behind
them: attention does not mind the order of keys, as long as the mask speaks of positions.
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
        self._pass: _Pass | None = None
        num_layers = adapter.spec.num_layers
        self.restoring_layers = [RestoringLayer(self, i) for i in range(num_layers)]
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

    def pass_inputs(self) -> dict[str, Tensor]:
        """What the pass reads: its tokens, their positions, and which slots each of them sees."""
        if self._pass is None:
            raise RuntimeError("no pass was begun")
        device, positions = self.adapter.device, self._pass.positions
        visible = self.position_of_slot[None, :] <= positions[:, None]
        # Additive, which both eager and SDPA attention take; SDPA would turn a boolean mask into
        # this one in every layer.
        mask = torch.zeros((1, 1, *visible.shape), dtype=self.adapter.dtype)
        mask.masked_fill_(~visible, torch.finfo(self.adapter.dtype).min)
        token_ids = torch.from_numpy(self.composition.token_ids.astype(np.int64))
        return {
            "input_ids": token_ids[positions].unsqueeze(0).to(device),
            "position_ids": positions.unsqueeze(0).to(device),
            "attention_mask": mask.to(device),
        }

    def copied(self, first: int, tokens: int) -> tuple[Tensor, Tensor]:
        """K and V, (L, G, n, D) each, of `tokens` tokens from position `first` on, in order.

        Those that were decoded stand behind the prompt's. The tensors have memory of their own.
        """
        if first + tokens > self.num_filled:
            raise ValueError(f"{first + tokens} tokens are not in a cache of {self.num_filled}")
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
        index = self._slots(self.restoring_layers[layer].get_seq_length())
        return (
            self.buffers.keys[layer].index_select(2, index),
            self.buffers.values[layer].index_select(2, index),
        )


class RestoringLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer of a `RestoringCache`."""

    is_sliding = False

    def __init__(self, cache: RestoringCache, layer: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._cache = cache
        self._layer = layer
        self._length = cache.num_restored
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
        """Add K and V, (1, G, n, D) each, behind what is there; return views of all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        buffers = self._cache.buffers
        end = self._cache.write(self._layer, key_states, value_states)
        if end is not None:
            self._length = end
            return self._views()
        end = self._length + key_states.shape[-2]
        if end > buffers.capacity_tokens:
            raise ValueError(f"{end} tokens do not fit into {buffers.capacity_tokens} cache slots")
        keys, values = buffers.keys[self._layer], buffers.values[self._layer]
        keys[:, :, self._length : end] = key_states
        values[:, :, self._length : end] = value_states
        self._length = end
        return self._views()

    def rewind(self) -> None:
        """Count only restored tokens again, so that a pass can follow."""
        self._length = self._cache.num_restored

    def crop(self, tokens_to_remove: int) -> None:
        """Forget so many tokens (a number below zero) that have come behind the prompt."""
        length = self._length + tokens_to_remove
        if tokens_to_remove > 0 or length < len(self._cache.position_of_slot):
            raise ValueError(f"{-tokens_to_remove} tokens cannot be taken off {self._length}")
        self._length = length

    def _views(self) -> tuple[Tensor, Tensor]:
        buffers = self._cache.buffers
        return (
            buffers.keys[self._layer][:, :, : self._length],
            buffers.values[self._layer][:, :, : self._length],
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that a query of this length will see."""
        return self._length + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens in the layer; restored ones count from the beginning."""
        return self._length

    def get_max_length(self) -> int:
        """No limit that transformers needs to know."""
        return -1
