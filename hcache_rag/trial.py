"""One prompt, restored once and read in several ways: what is read again decides the answer."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache

from hcache_rag.cache import RestoringCache
from hcache_rag.compose import Composition
from hcache_rag.engine import HCacheEngine
from hcache_rag.models import ModelAdapter
from hcache_rag.repair import last_row_scores, relocated_slots, repair_share, select_tokens

Positions = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """A prompt that was read in some way, and what the model says then.

    Args:
        first: logits (V,) behind the prompt's last token.
        seconds: that reading it took, after its states were restored.
        tokens: that were read by the model.
    """

    first: Tensor
    seconds: float
    tokens: int


class Reader:
    """A model and a cache that holds a prompt.

    Args:
        cache: of which everything behind the prompt can be cropped.
    """

    def __init__(self, adapter: ModelAdapter, cache: Cache) -> None:
        self._adapter = adapter
        self._cache = cache

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """K, as it is used at its position, and V of a layer, (G, N, D) each, by position."""
        layers: list[Any] = self._cache.layers
        keys, values = self._adapter.as_cached(layers[layer].keys, layers[layer].values)
        return keys[0], values[0]

    @torch.no_grad()
    def behind(self, token_ids: Sequence[int]) -> Tensor:
        """The logits (n, V) behind each of some tokens that follow the prompt."""
        if not token_ids:
            return torch.empty(0, self._adapter.model.config.vocab_size)
        before = self._cache.get_seq_length()
        model: Any = self._adapter.model
        ids = torch.tensor([list(token_ids)], device=self._adapter.device)
        logits: Tensor = model(input_ids=ids, past_key_values=self._cache, use_cache=True).logits[0]
        self._crop(before)
        return logits

    @torch.no_grad()
    def answer(self, first: Tensor, max_new_tokens: int, ends: set[int]) -> list[int]:
        """The greedy answer, without the token that ends it."""
        before, found = self._cache.get_seq_length(), list[int]()
        model: Any = self._adapter.model
        logits = first
        while len(found) < max_new_tokens and int(logits.argmax()) not in ends:
            found.append(int(logits.argmax()))
            ids = torch.tensor([found[-1:]], device=self._adapter.device)
            logits = model(input_ids=ids, past_key_values=self._cache, use_cache=True).logits[0, -1]
        self._crop(before)
        return found

    def _crop(self, length: int) -> None:
        more = self._cache.get_seq_length() - length
        layers: list[Any] = self._cache.layers
        for layer in layers if more else ():
            layer.crop(-more)


@contextmanager
def read_as_a_whole(
    adapter: ModelAdapter, token_ids: Sequence[int]
) -> Iterator[tuple[Reader, Reading]]:
    """Full prefill by transformers: the reference."""
    cache = DynamicCache()  # sliding layers as well keep all that is compared
    model: Any = adapter.model
    started = time.perf_counter()
    with torch.no_grad():
        ids = torch.tensor([list(token_ids)], device=adapter.device)
        output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    seconds = time.perf_counter() - started
    yield Reader(adapter, cache), Reading(output.logits[0, -1], seconds, len(token_ids))


class Trial(Reader):
    """A prompt whose documents are restored. Use `trying`."""

    def __init__(self, adapter: ModelAdapter, cache: RestoringCache) -> None:
        super().__init__(adapter, cache)
        self.composition: Composition = cache.composition
        self.cache = cache
        started = time.perf_counter()
        self.scores = last_row_scores(adapter, cache)
        """The attention that the last row pays to each restored token, (R,)."""
        self.scoring_s = time.perf_counter() - started
        restored = cache.num_restored
        self._stale = [
            side[..., :restored, :].clone() for side in (cache.buffers.keys, cache.buffers.values)
        ]

    @property
    def relocated(self) -> Positions:
        """The slots of relocated tokens, ascending."""
        return relocated_slots(self.composition)

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """As `Reader.layer`; copies."""
        keys, values = self.cache.by_position(layer)
        return keys[0], values[0]

    def stale(self, layer: int) -> tuple[Tensor, Tensor]:
        """K and V, (G, R, D) each, of a layer's restored tokens, with nothing repaired."""
        keys, values = self._stale
        return keys[layer, 0], values[layer, 0]

    @torch.no_grad()
    def read(self, positions: Positions, *, is_stale: bool = True) -> Reading:
        """Read the tokens at some positions again, together with all that is fresh.

        Args:
            is_stale: everything else is as it was restored; otherwise as it is now in the cache.
        """
        if is_stale:
            self.reset()
        started = time.perf_counter()
        every = np.union1d(positions, self.composition.fresh_positions)
        self.cache.begin_pass(every)
        inputs: dict[str, Any] = self.cache.pass_inputs()
        model: Any = self._adapter.model
        output = model(**inputs, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return Reading(output.logits[0, -1], time.perf_counter() - started, len(every))

    def repair(self, share: float) -> Reading:
        """Read the share of relocated tokens again that the last row looks at most."""
        relocated = self.relocated
        positions = self.composition.restored_positions[relocated]
        budget = round(share * len(relocated))
        return self.read(select_tokens(self.scores[relocated], positions, budget))

    def at(self, fidelity: str | float) -> Reading:
        """Read as `HCacheEngine` does with this fidelity; `seconds` are those of restoring as well.

        With "exact", what is not kept in full is read afresh, and restoring the rest is not timed.

        Raises:
            ValueError: no position of the dial, and no share.
        """
        share = repair_share(fidelity)
        if fidelity == "exact":
            return self.read(self.inexact)
        reading = self.repair(share)
        if not share:
            return replace(reading, seconds=max(self.scoring_s, reading.seconds))
        return replace(reading, seconds=self.scoring_s + reading.seconds)

    @property
    def inexact(self) -> Positions:
        """The positions of restored tokens that fidelity "exact" does not restore."""
        dtype = self._adapter.spec.dtype
        spans = [
            np.arange(span.position, span.position + span.num_tokens)
            for span in self.composition.spans
            if not span.is_in_full(dtype)
        ]
        return np.concatenate(spans) if spans else np.empty(0, np.int64)

    def reset(self) -> None:
        """Let the cache hold the restored tokens as they were."""
        for side, stale in zip(
            (self.cache.buffers.keys, self.cache.buffers.values), self._stale, strict=True
        ):
            side[..., : self.cache.num_restored, :].copy_(stale)


@contextmanager
def trying(engine: HCacheEngine, prompt: str, room_tokens: int) -> Iterator[Trial]:
    """Restore a prompt's documents and score their tokens.

    Args:
        room_tokens: that may follow the prompt.

    Raises:
        StateError: a state that cannot be used.
    """
    with engine.restoring(prompt, room_tokens=room_tokens) as (_, cache):
        yield Trial(engine.adapter, cache)
