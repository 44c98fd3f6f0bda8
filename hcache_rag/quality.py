"""How much a restored answer differs: next-token distributions against a reference's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hcache_rag.engine import HCacheEngine


@torch.no_grad()
def fresh_logits(engine: HCacheEngine, prompt: str) -> Tensor:
    """The logits (F, vocabulary) behind each fresh token of a prompt, its documents restored.

    Nothing is repaired. The last row is what the first answer token is drawn from.
    """
    with engine.restoring(prompt) as (composition, cache):
        ids = torch.from_numpy(composition.token_ids.astype("int64")).unsqueeze(0)
        output = engine.adapter.model(input_ids=ids, past_key_values=cache, use_cache=True)
    logits: Tensor = output.logits[0]
    return logits


@dataclass(frozen=True, slots=True)
class Divergence:
    """How far distributions are from a reference's, over n positions.

    Args:
        kl: KL(reference || this) of the next token, mean, in nats.
        kl_last: the same of each prompt's last position, where the answer begins.
        top1: share of positions with the same most probable token.
        positions: n.
    """

    kl: float
    kl_last: float
    top1: float
    positions: int


def divergence(references: list[Tensor], others: list[Tensor]) -> Divergence:
    """Compare logits (F, vocabulary) of the same prompts, position by position."""
    kls, tops, lasts = [], [], []
    for reference, other in zip(references, others, strict=True):
        expected = reference.double().log_softmax(-1)
        found = other.double().log_softmax(-1)
        kl = (expected.exp() * (expected - found)).sum(-1)
        kls.append(kl)
        lasts.append(kl[-1:])
        tops.append(expected.argmax(-1) == found.argmax(-1))
    kl, top = torch.cat(kls), torch.cat(tops)
    return Divergence(
        float(kl.mean()), float(torch.cat(lasts).mean()), float(top.double().mean()), len(kl)
    )
