"""How much a restored answer differs: next-token distributions against a reference's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
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
        its = kl(reference, other)
        kls.append(its)
        lasts.append(its[-1:])
        tops.append(reference.argmax(-1) == other.argmax(-1))
    every, top = torch.cat(kls), torch.cat(tops)
    return Divergence(
        float(every.mean()), float(torch.cat(lasts).mean()), float(top.double().mean()), len(every)
    )


def kl(reference: Tensor, other: Tensor) -> Tensor:
    """KL(reference || other) in nats of the distributions of logits (n, vocabulary), (n,)."""
    expected = reference.double().log_softmax(-1)
    found = other.double().log_softmax(-1)
    return (expected.exp() * (expected - found)).sum(-1)


def log_likelihood(logits: Tensor, token_ids: Sequence[int]) -> float:
    """Of tokens (n,), per token, in nats, by the logits (n, vocabulary) in front of each."""
    log_probabilities = logits.double().log_softmax(-1)
    return float(log_probabilities[range(len(token_ids)), list(token_ids)].mean())


def relative_error(reference: Tensor, other: Tensor) -> float:
    """The Frobenius norm of the difference, over that of the reference."""
    expected = reference.double()
    return float((other.double() - expected).norm() / expected.norm())


def bootstrap_interval(samples: npt.ArrayLike, repeats: int = 4000) -> tuple[float, float]:
    """95 % percentile bootstrap of the mean (Efron, 1979); the same samples, the same interval."""
    values = np.asarray(samples, float)
    drawn = np.random.default_rng(0).integers(0, len(values), (repeats, len(values)))
    low, high = np.percentile(values[drawn].mean(1), (2.5, 97.5))
    return float(low), float(high)


def rouge_l(reference: Sequence[str], other: Sequence[str]) -> float:
    """ROUGE-L's F-measure (Lin, 2004): by the longest common subsequence of words; 1 if both are
    empty.
    """
    if not reference or not other:
        return float(not reference and not other)
    lengths = [0] * (len(other) + 1)
    for word in reference:
        diagonal = 0
        for place, candidate in enumerate(other, 1):
            above = lengths[place]
            lengths[place] = diagonal + 1 if word == candidate else max(above, lengths[place - 1])
            diagonal = above
    return 2 * lengths[-1] / (len(reference) + len(other))
