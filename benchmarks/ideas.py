"""Ideas of what to read again of restored prompts, beside the library's own way.

Of documents that were read alone: fixed shares, peers' tokens, layers in the middle only, from
stored hidden states on, as many tokens as hold a part of the scores, and a prompt without the
passages that the last row looks at least. Of documents that were read behind something, see
contexts.py: fixed shares.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from bench_rag_qa import BALANCED, PREAMBLE, prompt_of
from contexts import CHAINED, STAND_IN
from peers import cacheblend, epic_positions
from torch import Tensor

from hcache_kernels import reference
from hcache_rag import HCacheEngine
from hcache_rag.layout import Representation
from hcache_rag.models import KEY, VALUE, ModelAdapter
from hcache_rag.quality import kl
from hcache_rag.questions import Record
from hcache_rag.repair import select_tokens
from hcache_rag.trial import Positions, Reader, Reading, Trial, trying

SHARES = (0.05, 0.1, BALANCED)
MASSES = (0.6, 0.7)
DROPPED = (2, 4)
ROOM_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Tried:
    """A prompt that was read in some way; `reader` holds it until the next one is asked for.

    Args:
        facts: what else is known of it, by name.
    """

    name: str
    reader: Reader
    reading: Reading
    facts: dict[str, float]


def share_name(share: float) -> str:
    return f"{100 * share:g} %"


def readings(engines: dict[str, HCacheEngine], record: Record) -> Iterator[Tried]:
    """A record's prompt, read in every way, one after another."""
    prompt = prompt_of(record.passages, record.question)
    engine = engines["alone"]
    with trying(engine, prompt, ROOM_TOKENS) as trial:
        yield from _repaired(engine, trial)
        looked_at = _looked_at(trial)
        budget = round(BALANCED * len(trial.relocated))
    for dropped in DROPPED:
        if dropped < len(looked_at):
            yield from _without(engine, record, looked_at, dropped, budget)
    for name, other in engines.items():
        if other is engine:
            continue
        shares = (0.05, 0.1, BALANCED) if name in CHAINED else (BALANCED,)
        with trying(other, prompt, ROOM_TOKENS) as trial:
            yield from _at_shares(f"{name}: ", trial, shares)
    kept = prompt.replace(PREAMBLE, PREAMBLE + STAND_IN, 1)
    with trying(engines["stand-in"], kept, ROOM_TOKENS) as trial:
        yield from _at_shares("stand-in kept: ", trial, (BALANCED,))


def _at_shares(prefix: str, trial: Trial, shares: Sequence[float]) -> Iterator[Tried]:
    nothing = trial.at("none")
    yield Tried(f"{prefix}none", trial, nothing, {})
    for share in shares:
        reading = trial.at(share)
        seen = float(kl(reading.first[None], nothing.first[None])[0])
        yield Tried(prefix + share_name(share), trial, reading, {"seen": seen})


def _repaired(engine: HCacheEngine, trial: Trial) -> Iterator[Tried]:
    """All that is read again of documents that were read alone."""
    adapter, layers = engine.adapter, engine.adapter.spec.num_layers
    relocated = len(trial.relocated)
    budget = round(BALANCED * relocated)
    yield from _at_shares("", trial, SHARES)
    yield Tried("EPIC", trial, _timed(trial, trial.read(epic_positions(trial, budget))), {})
    yield Tried("CacheBlend", trial, _timed(trial, cacheblend(adapter, trial, budget)), {})
    chosen = best(trial, budget)
    for name, first, end, is_hidden in (
        ("layers 2 to L-2", 2, layers - 2, False),
        ("layers 2 to L-2, from stored hidden states", 2, layers - 2, True),
        ("from layer 2, stored hidden states", 2, layers, True),
        ("from layer 4, stored hidden states", 4, layers, True),
    ):
        with ExitStack() as stack:
            if is_hidden:
                hidden = stored_hidden(engine, trial, first)
                stack.enter_context(stored_inputs(adapter, trial, chosen, first, hidden))
            stack.enter_context(stored_outside(adapter, trial, chosen, range(first, end)))
            reading = _timed(trial, trial.read(chosen))
        yield Tried(name, trial, reading, {})
    for mass in MASSES:
        count = tokens_holding(trial, mass)
        reading = _timed(trial, trial.read(best(trial, count)))
        yield Tried(f"{100 * mass:g} % of the scores", trial, reading, {"share": count / relocated})


def _timed(trial: Trial, reading: Reading) -> Reading:
    """With the seconds of restoring and of scoring."""
    return replace(reading, seconds=trial.scoring_s + reading.seconds)


def best(trial: Trial, budget: int) -> Positions:
    """The positions of the relocated tokens that the last row looks at most."""
    relocated = trial.relocated
    positions = trial.composition.restored_positions[relocated]
    return select_tokens(trial.scores[relocated], positions, budget)


def tokens_holding(trial: Trial, mass: float) -> int:
    """How many of the best relocated tokens hold a part of the scores' sum."""
    falling = np.sort(trial.scores[trial.relocated].astype(float))[::-1]
    reached = np.cumsum(falling) / max(falling.sum(), np.finfo(float).tiny)
    return min(int(np.searchsorted(reached, mass)) + 1, len(falling))


def _looked_at(trial: Trial) -> list[float]:
    """What the last row pays each document, in their order."""
    sums, begin = [], 0
    for span in trial.composition.spans:
        if not span.record.is_preamble:
            sums.append(float(trial.scores[begin : begin + span.num_tokens].sum()))
        begin += span.num_tokens
    return sums


def _without(
    engine: HCacheEngine, record: Record, looked_at: Sequence[float], dropped: int, budget: int
) -> Iterator[Tried]:
    """The prompt without the passages that the last row looks at least; as many tokens repaired."""
    kept = sorted(np.argsort(looked_at, kind="stable")[dropped:])
    prompt = prompt_of([record.passages[number] for number in kept], record.question)
    with trying(engine, prompt, ROOM_TOKENS) as trial:
        left = {"prompt_tokens": float(len(trial.composition.token_ids))}
        reading = _timed(trial, trial.read(best(trial, budget)))
        yield Tried(f"{dropped} passages dropped", trial, reading, left)


def _rows(trial: Trial, positions: Positions) -> tuple[Tensor, Tensor]:
    """Of restored tokens: their rows in the pass that reads them again, and their slots."""
    every = np.union1d(positions, trial.composition.fresh_positions)
    slots = np.searchsorted(trial.composition.restored_positions, positions)
    return torch.from_numpy(np.searchsorted(every, positions)), torch.from_numpy(slots)


@contextmanager
def stored_outside(
    adapter: ModelAdapter, trial: Trial, positions: Positions, layers: range
) -> Iterator[None]:
    """In all other layers, K and V of tokens that are read again stay as they are stored.

    The projections' outputs are exchanged: V, and K turned back by RoPE.
    """
    rows, slots = _rows(trial, positions)
    cos, sin = adapter.position_embeddings(torch.from_numpy(positions))
    with ExitStack() as stack:
        for layer in set(range(adapter.spec.num_layers)) - set(layers):
            keys, values = (side[:, slots] for side in trial.stale(layer))
            unrotated = reference.rope(keys, cos, -sin)
            for side, states in ((KEY, unrotated), (VALUE, values)):
                module = adapter.tap(layer, side).module
                kept = states.transpose(0, 1).flatten(1)

                def exchange(_module: Any, _args: Any, output: Tensor, kept: Tensor = kept) -> Any:
                    return output.index_copy(1, rows, kept[None])

                handle = module.register_forward_hook(exchange)
                stack.callback(handle.remove)
        yield


@contextmanager
def stored_inputs(
    adapter: ModelAdapter, trial: Trial, positions: Positions, layer: int, hidden: Tensor
) -> Iterator[None]:
    """Tokens that are read again enter a layer with their stored hidden states (R, E), by slot."""
    rows, slots = _rows(trial, positions)

    def exchange(_module: Any, args: tuple[Tensor, ...]) -> Any:
        return (args[0].index_copy(1, rows, hidden[slots][None]), *args[1:])

    handle = adapter.layers[layer].register_forward_pre_hook(exchange)
    try:
        yield
    finally:
        handle.remove()


def stored_hidden(engine: HCacheEngine, trial: Trial, layer: int) -> Tensor:
    """A layer's inputs (R, E) for the restored tokens, each document read behind the preamble."""
    adapter, spans = engine.adapter, trial.composition.spans
    after = adapter.prefill(engine.prompt_tokens(engine.preamble).tolist())
    kinds = [Representation.NONE] * layer + [Representation.HIDDEN]
    found = []
    for span in spans:
        behind = adapter.prefill([]) if span.record.is_preamble else after
        caught = adapter.capture([span.record.token_ids.tolist()], kinds, behind)[layer].first
        assert caught is not None
        found.append(caught[0, : span.num_tokens])
    return torch.cat(found)
