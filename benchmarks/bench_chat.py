"""Does the first token come as soon in a long conversation as in a short one?

    python benchmarks/bench_chat.py [--turns N] [--figure FILE] [--quick] [--json]

SmolLM2-135M-Instruct on the CPU holds one conversation of N turns, each turn twice, one after
the other:

  memory    what was said is kept as a path, and restored (`generate(..., remember=True)`)
  without   the whole prompt is read

While a turn with memory is written in the background, an answer to something else is decoded, and
again when nothing is being written: the time between its tokens shows what the writing costs. The
last turn is taken again after the store was closed and opened.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from common import (
    Target,
    arguments,
    at_least,
    at_most,
    finish,
    machine,
    quiet_transformers,
    ratio_of_pairs,
)

from hcache_rag import HCacheEngine
from hcache_rag.bundled import default_model_path
from hcache_rag.generation import GenerationOptions
from hcache_rag.models import load_model

MESSAGES = (
    "Tell me something about the planet Mars.",
    "How long does it take to get there?",
    "What would I see in the sky at night?",
    "Has it always been so cold?",
    "Who was the first to describe its moons?",
    "And what about its volcanoes?",
    "Why is the ground red?",
    "Could plants grow in that soil?",
    "What do people breathe in a space suit?",
    "Tell me a story about somebody who lives there.",
)
SYSTEM = "You are a helpful assistant who answers in two or three sentences."


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--turns", type=int, default=20, metavar="N")
    parser.add_argument("--figure", type=Path, help="draw the time to the first token here")
    options = parser.parse_args()
    turns = 5 if options.quick else options.turns
    quiet_transformers()
    model, tokenizer = load_model(str(default_model_path()))
    with tempfile.TemporaryDirectory() as folder:
        with (
            HCacheEngine(model, tokenizer, folder, add_bos=False) as engine,
            HCacheEngine(model, tokenizer, folder, add_bos=False, paths_max_bytes=0) as plain,
        ):
            talk = Talk(engine, plain, 16 if options.quick else 48)
            talk.turn()  # warm
            talk.messages = talk.messages[:1]
            rows = [talk.turn() for _ in range(turns)]
        with HCacheEngine(model, tokenizer, folder, add_bos=False) as engine:
            again = Talk(engine, engine, talk.new_tokens)
            again.messages = talk.messages[:-2]
            reopened = again.say(engine, talk.messages[-2]["content"])
    show(rows)
    if options.figure:
        draw(rows, options.figure)
    finish(rows, targets(rows, reopened, talk.messages[-1]["content"]), machine(), options.json)


class Talk:
    """One conversation, with an engine that remembers and one that does not."""

    def __init__(self, engine: HCacheEngine, plain: HCacheEngine, new_tokens: int) -> None:
        self._engine = engine
        self._plain = plain
        self.new_tokens = new_tokens
        self.messages = [{"role": "system", "content": SYSTEM}]

    def turn(self) -> dict[str, Any]:
        """The next turn, with memory and without."""
        message = MESSAGES[(len(self.messages) // 2) % len(MESSAGES)]
        without = self.say(self._plain, message)
        memory = self.say(self._engine, message)
        beside = self.other()
        self._engine.flush()
        alone = self.other()
        self.messages += [
            {"role": "user", "content": message},
            {"role": "assistant", "content": memory["text"]},
        ]
        return {
            "turn": len(self.messages) // 2,
            "prompt_tokens": memory["prompt_tokens"],
            "read_tokens": memory["prompt_tokens"] - memory["exact_tokens"],
            "memory_s": memory["first_s"],
            "without_s": without["first_s"],
            "is_same": memory["text"] == without["text"],
            "decode_beside_writing_s": beside,
            "decode_alone_s": alone,
        }

    def say(self, engine: HCacheEngine, message: str) -> dict[str, Any]:
        """An answer to the conversation so far and a message."""
        messages = [*self.messages, {"role": "user", "content": message}]
        prompt = engine.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        answer = engine.generate(
            str(prompt),
            options=GenerationOptions(max_new_tokens=self.new_tokens, temperature=0),
            remember=True,
        )
        its = answer.provenance
        return {
            "text": answer.text,
            "first_s": its.seconds["first_token"],
            "prompt_tokens": its.prompt_tokens,
            "exact_tokens": its.exact_tokens,
        }

    def other(self) -> float:
        """The time between two tokens of an answer to something else, in seconds."""
        times: list[float] = []
        self._plain.generate(
            "Once upon a time",
            options=GenerationOptions(
                max_new_tokens=24, temperature=0, extra={"min_new_tokens": 24}
            ),
            on_text=lambda _text: times.append(time.perf_counter()),
        )
        return (times[-1] - times[0]) / (len(times) - 1)


def show(rows: list[dict[str, Any]]) -> None:
    print(f"{'turn':>5}{'tokens':>8}{'read':>6}{'memory':>10}{'without':>10}   same answer")
    for row in rows:
        print(
            f"{row['turn']:5}{row['prompt_tokens']:8}{row['read_tokens']:6}"
            f"{row['memory_s'] * 1e3:8.0f}ms{row['without_s'] * 1e3:8.0f}ms   {row['is_same']}"
        )


def targets(rows: list[dict[str, Any]], reopened: dict[str, Any], answer: str) -> list[Target]:
    later = rows[1:]
    third = max(1, len(later) // 3)
    growth = statistics.median(r["memory_s"] for r in later[-third:]) / statistics.median(
        r["memory_s"] for r in later[:third]
    )
    writing = ratio_of_pairs(
        [row["decode_beside_writing_s"] for row in rows], [row["decode_alone_s"] for row in rows]
    )
    gain = ratio_of_pairs(
        [r["without_s"] for r in rows[-third:]], [r["memory_s"] for r in rows[-third:]]
    )
    return [
        at_least("turns with the same answer", statistics.mean(r["is_same"] for r in rows), 1),
        at_most("first token, last third of the turns / first third", growth, 1.5),
        at_least("first token, without / with memory, last third", gain, 2.0),
        at_most("time between tokens, while writing / alone", writing, 1.04),
        at_least("after reopening: the same answer", float(reopened["text"] == answer), 1),
        at_least(
            "after reopening: share of the prompt restored",
            reopened["exact_tokens"] / reopened["prompt_tokens"],
            0.8,
        ),
    ]


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, label in (("memory_s", "with memory"), ("without_s", "without")):
        axes.plot([row["turn"] for row in rows], [row[name] for row in rows], "o-", label=label)
    axes.set_xlabel("turn")
    axes.set_ylabel("seconds to the first token")
    axes.set_ylim(0)
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
