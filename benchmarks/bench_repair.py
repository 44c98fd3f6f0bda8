"""What does each position of the dial cost in time, and is the repair as fast as it can be?

    python benchmarks/bench_repair.py [--rounds N] [--passages N ...] [--quick] [--json]

SmolLM2-135M-Instruct on the CPU, prompts of the Solar System passages; interleaved in one run:

  first token   full prefill by transformers, and `HCacheEngine.generate` at each position
  selection     the question's tokens are run over the restored cache and all relocated tokens
                are scored and chosen; against the bare pass of the question's tokens
  repair        one pass over chosen and fresh tokens, 15 %; against transformers' forward of as
                many tokens over a cache of its own that holds the rest of the prompt
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from common import (
    ROOT,
    Target,
    arguments,
    at_most,
    finish,
    machine,
    quiet_transformers,
    ratio_of_pairs,
    summary,
)

from hcache_rag import GenerationOptions, HCacheEngine, StateStore
from hcache_rag.bound import Fidelity
from hcache_rag.bundled import default_model_path
from hcache_rag.models import load_model
from hcache_rag.repair import FIDELITY_SHARES, last_row_scores, select_tokens
from hcache_rag.sources import read_folder
from hcache_rag.trial import Trial, read_as_a_whole, trying

PREAMBLE = "Answer the question from the passages in a few words.\n\n"
QUESTIONS = (
    "Which planet has the shortest day, and how long is it?",
    "What do the rings of Saturn consist of?",
    "When was Neptune found, and by whom?",
)
ONE_TOKEN = GenerationOptions(max_new_tokens=1, temperature=0)
BALANCED = FIDELITY_SHARES["balanced"]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, help="default 12, with --quick 3")
    parser.add_argument("--passages", type=int, nargs="+", metavar="N")
    options = parser.parse_args()
    rounds = options.rounds or (3 if options.quick else 12)
    quiet_transformers()
    model, tokenizer = load_model(str(default_model_path()))
    texts = [file.text.strip() for file in read_folder(ROOT / "examples" / "solar_system").files]
    rows, targets = [], list[Target]()
    with tempfile.TemporaryDirectory() as folder:

        def engine(fidelity: Fidelity, store: StateStore | str) -> HCacheEngine:
            its: dict[str, Any] = {"preamble": PREAMBLE, "keep_recurring": False}
            return HCacheEngine(model, tokenizer, store, fidelity=fidelity, **its)

        first = engine("none", folder)
        engines = {name: engine(name, first.store) for name in ("fast", "balanced", "high")}
        first.precompute(texts[: max(options.passages or [10])])
        for count in options.passages or ([4] if options.quick else [4, 10]):
            prompts = [prompt_of(texts[:count], question) for question in QUESTIONS]
            its_rows, its_targets = measured(count, {"none": first, **engines}, prompts, rounds)
            rows += its_rows
            targets += its_targets
        first.close()
    finish(rows, targets, machine(), options.json)


def prompt_of(passages: Sequence[str], question: str) -> str:
    return f"{PREAMBLE}{chr(10).join(p + chr(10) for p in passages)}\nQuestion: {question}\nAnswer:"


def measured(
    count: int, engines: dict[str, HCacheEngine], prompts: Sequence[str], rounds: int
) -> tuple[list[dict[str, Any]], list[Target]]:
    """Everything about prompts of some passages."""
    samples: dict[str, list[float]] = defaultdict(list)
    for number in range(-1, rounds):  # the first round warms up
        prompt = prompts[number % len(prompts)]
        found = {**first_tokens(engines, prompt), **passes(engines["none"], prompt)}
        for name, seconds in found.items() if number >= 0 else ():
            samples[name].append(seconds)
    rows: list[dict[str, Any]] = [
        {"passages": count, "what": name, **summary(its)} for name, its in samples.items()
    ]
    print(f"{count} passages, {engines['none'].count_tokens(prompts[0]):,} prompt tokens; ms")
    for row in rows:
        full = f"{ratio_of_pairs(samples['full'], samples[row['what']]):6.2f}x sooner"
        shown = full if row["what"] in engines else ""
        print(f"  {row['what']:22}{row['p50'] * 1e3:9.1f} (p95 {row['p95'] * 1e3:.1f})  {shown}")
    ratios = {
        "selection / a pass of the question's tokens": ("selection", "question", 1.15),
        "repair / transformers' forward of as many tokens": ("repair", "forward", 1.2),
    }
    return rows, [
        at_most(f"{count} passages: {name}", ratio_of_pairs(samples[a], samples[b]), bound)
        for name, (a, b, bound) in ratios.items()
    ]


def first_tokens(engines: dict[str, HCacheEngine], prompt: str) -> dict[str, float]:
    """Seconds to the first token."""
    engine = engines["none"]
    with read_as_a_whole(engine.adapter, engine.prompt_tokens(prompt).tolist()) as (_, reading):
        found = {"full": reading.seconds}
    for name, its in engines.items():
        answer = its.generate(prompt, options=ONE_TOKEN)
        found[name] = answer.provenance.seconds["first_token"]
    return found


def passes(engine: HCacheEngine, prompt: str) -> dict[str, float]:
    """Seconds of each kind of pass over one restored cache."""
    with trying(engine, prompt, room_tokens=0) as trial, torch.no_grad():
        relocated = trial.relocated
        positions = trial.composition.restored_positions[relocated]
        budget = round(BALANCED * len(relocated))
        chosen = select_tokens(trial.scores[relocated], positions, budget)

        def select() -> None:
            scores = last_row_scores(engine.adapter, trial.cache)
            select_tokens(scores[relocated], positions, budget)

        fresh = trial.composition.fresh_positions
        every = np.union1d(chosen, fresh)
        found = {
            "question": timed(trial, fresh, lambda: forward(trial, engine)),
            "selection": timed(trial, fresh, select),
            "repair": timed(trial, every, lambda: forward(trial, engine)),
        }
        ids = trial.composition.token_ids.tolist()
    held = len(ids) - len(every)
    with read_as_a_whole(engine.adapter, ids[:held]) as (reader, _):
        cache = copy.deepcopy(reader._cache)
        tail = torch.tensor([ids[held:]])
        started = time.perf_counter()
        with torch.no_grad():
            engine.adapter.decoder(input_ids=tail, past_key_values=cache, use_cache=True)
        found["forward"] = time.perf_counter() - started
    return found


def timed(trial: Trial, positions: Any, run: Callable[[], None]) -> float:
    trial.reset()
    trial.cache.begin_pass(positions)
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def forward(trial: Trial, engine: HCacheEngine) -> None:
    engine.adapter.decoder(**trial.cache.pass_inputs(), past_key_values=trial.cache, use_cache=True)


if __name__ == "__main__":
    main()
