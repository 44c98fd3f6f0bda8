"""Repair: which tokens of relocated documents to read again, chosen by what the last row looks at.

Documents read one by one have not seen each other. The fresh tokens are run once over the
unrepaired cache; every relocated token is scored by the attention that the last prompt position
pays it, summed over layers and heads; the best are read again together with the fresh tokens.
The row is computed from Q and K, so any attention implementation will do.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hcache_rag.cache import RestoringCache
from hcache_rag.compose import Composition
from hcache_rag.models import QUERY, ModelAdapter

FIDELITY_SHARES = {"none": 0.0, "fast": 0.05, "balanced": 0.15, "high": 0.30}
"""The dial's named positions: the share of relocated tokens that is repaired."""


def repair_share(fidelity: str | float) -> float:
    """The share of relocated tokens that a position of the dial, or a number, repairs.

    Raises:
        ValueError: neither a position nor a share from 0 to 1.
    """
    if isinstance(fidelity, str):
        known = {"exact": 0.0, **FIDELITY_SHARES}
        if fidelity not in known:
            raise ValueError(
                f"fidelity is a share from 0 to 1 or one of auto, {', '.join(known)}, "
                f"not {fidelity!r}"
            )
        return known[fidelity]
    if isinstance(fidelity, bool) or not 0 <= fidelity <= 1:
        raise ValueError(f"fidelity is a share from 0 to 1, not {fidelity!r}")
    return float(fidelity)


def check_fidelity(fidelity: str | float) -> None:
    """Refuse what is no position of the dial.

    Raises:
        ValueError: neither "auto", nor a position, nor a share from 0 to 1.
    """
    if fidelity != "auto":
        repair_share(fidelity)


def recommended(found: str | float | None) -> str | float:
    """What fidelity "auto" stands for: what a store recommends, or else "balanced".

    "exact" is not taken from a store: it needs states that are kept in full, and says so.
    """
    try:
        usable = found is not None and found != "exact" and repair_share(found) >= 0
    except ValueError:
        usable = False
    return found if found is not None and usable else "balanced"


def select_tokens(
    scores: npt.NDArray[np.float32], positions: npt.NDArray[np.int64], budget: int
) -> npt.NDArray[np.int64]:
    """The `budget` positions with the highest scores, ascending; of equal scores the first ones.

    Args:
        scores: (R,).
        positions: ascending, (R,).
    """
    best = np.argsort(-scores, kind="stable")[: max(budget, 0)]
    return np.sort(positions[best])


def begin_repair(adapter: ModelAdapter, cache: RestoringCache, share: float) -> int:
    """Score the relocated tokens and begin a pass over the fresh ones and the best of these.

    Args:
        cache: a cache whose first pass has not run; it runs here.
        share: of relocated tokens to repair, 0 to 1.

    Returns:
        How many tokens will be repaired; with 0 the cache is left as it was.
    """
    composition = cache.composition
    relocated = relocated_slots(composition)
    budget = round(share * len(relocated))
    if not budget:
        return 0
    scores = last_row_scores(adapter, cache)[relocated]
    positions = composition.restored_positions[relocated]
    chosen = select_tokens(scores, positions, budget)
    cache.begin_pass(np.sort(np.concatenate((chosen, composition.fresh_positions))))
    return len(chosen)


def relocated_slots(composition: Composition) -> npt.NDArray[np.int64]:
    """The cache slots of relocated tokens, ascending; restored tokens have the first R slots."""
    flags = [np.full(span.num_tokens, not span.is_exact) for span in composition.spans]
    return np.flatnonzero(np.concatenate(flags)) if flags else np.empty(0, dtype=np.int64)


@torch.no_grad()
def last_row_scores(adapter: ModelAdapter, cache: RestoringCache) -> npt.NDArray[np.float32]:
    """Run the pass that was begun; the attention that its last token pays each restored slot, (R,).

    Summed over layers and heads. Models whose states cannot be moved have nothing to repair, and
    nothing is scored.
    """
    queries: list[Tensor] = []
    inputs: dict[str, Any] = cache.pass_inputs()
    with ExitStack() as hooks:
        for layer in range(adapter.spec.num_layers) if adapter.is_movable else ():
            taking = adapter.catching(layer, QUERY, lambda rows: queries.append(rows[0, -1]))
            hooks.enter_context(taking)
        adapter.decoder(**inputs, past_key_values=cache, use_cache=True)
    positions = cache.position_of_slot.to(adapter.device)
    total = torch.zeros(cache.num_restored, device=adapter.device)
    for layer, query in enumerate(queries):
        keys, values = (side[layer, 0, :, : len(positions)] for side in cache.buffers.sides)
        weights = adapter.attention_weights(layer, query, keys, values, positions)
        total += weights.sum(0)[: cache.num_restored]
    scores: npt.NDArray[np.float32] = total.cpu().numpy()
    return scores
