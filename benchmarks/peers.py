"""What peers would read again of the same prompt, from their papers and code.

CacheBlend (Yao et al., EuroSys 2025): layer 0 of all tokens is computed with full attention, V of
layer 1 is compared with the stored one, and the share of tokens whose V differs most goes on
through all other layers, over K and V of layer 1 that are all new.

EPIC's LegoLink (Hu et al., ICML 2025): the first k tokens of every document but the first, and the
question; k is what the same number of tokens allows.
"""

from __future__ import annotations

import numpy as np
import torch
from transformers import DynamicCache

from hcache_kernels import reference
from hcache_rag.layout import Representation
from hcache_rag.models import ModelAdapter
from hcache_rag.trial import Positions, Reading, Trial

CHECKED_LAYER = 1


def epic_positions(trial: Trial, budget: int) -> Positions:
    """The first k tokens of every relocated document, with k so large as the budget allows."""
    spans = [span for span in trial.composition.spans if not span.is_exact]
    chosen = np.empty(0, np.int64)
    for k in range(1, max((span.num_tokens for span in spans), default=0) + 1):
        more = np.concatenate(
            [np.arange(s.position, s.position + min(k, s.num_tokens)) for s in spans]
        )
        if len(more) > budget:
            break
        chosen = more
    return chosen


@torch.no_grad()
def cacheblend(adapter: ModelAdapter, trial: Trial, budget: int) -> Reading:
    """Read a prompt as CacheBlend does.

    The chosen tokens see K and V of layers 0 and 1 as a full pass makes them, and of the layers
    above as they are stored.
    """
    composition = trial.composition
    kinds = [Representation.KV] * (CHECKED_LAYER + 1)
    token_ids = composition.token_ids.tolist()
    captured = adapter.capture([token_ids], kinds, DynamicCache())[CHECKED_LAYER]
    keys, values = (
        side[0].view(len(token_ids), adapter.spec.num_kv_heads, adapter.spec.head_dim)
        for side in (captured.first, captured.second)
        if side is not None
    )
    restored = torch.from_numpy(composition.restored_positions)
    new = values[restored].transpose(0, 1)
    _, old = trial.stale(CHECKED_LAYER)
    deviation = (new.float() - old.float()).pow(2).sum((0, 2)).numpy()
    relocated = trial.relocated
    order = np.argsort(-deviation[relocated], kind="stable")[:budget]
    chosen = np.sort(composition.restored_positions[relocated[order]])
    cos, sin = adapter.position_embeddings(restored)
    trial.reset()
    buffers = trial.cache.buffers
    count = len(restored)
    buffers.keys[CHECKED_LAYER, 0, :, :count] = reference.rope(
        keys[restored].transpose(0, 1), cos, sin
    )
    buffers.values[CHECKED_LAYER, 0, :, :count] = new
    return trial.read(chosen, is_stale=False)
