"""How many questions do several processes answer from one store, how soon, in how much memory?

    python benchmarks/bench_serving.py [--quick] [--json]

SmolLM2-135M-Instruct on the CPU, over the Solar System passages. Four processes load the model,
with one thread each, and open one store. Of these 1, 2 and 4 answer at the same time, each the
same number of questions (--quick: two processes, 1 and 2, in one round of full prefill):

  full      nothing is restored: the whole prompt is read
  restored  the passages' states come from the store, nothing is repaired (fidelity="none")

Rounds are interleaved. A round takes from the first answer's beginning to the last one's end; the
time to the first token is each answer's own. The processors' time for a question says whether the
processes are in one another's way, also where others use the machine meanwhile.

Which of the store's pages a process has in memory is told by the kernel (/proc/PID/smaps): a page
counts in the RSS of each process, and in its PSS divided by how many have it. So where the store is
in memory once, the PSS of all together are its bytes.
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, TypeAlias

from common import (
    ROOT,
    arguments,
    at_least,
    at_most,
    finish,
    machine,
    quiet_transformers,
    ratio_of_pairs,
    summary,
)

HOW = ("full", "restored")
PROCESSES = (1, 2, 4)
TOP_K = 4
ANSWER_TOKENS = 8
PATIENCE_S = 600.0

Samples: TypeAlias = dict[tuple[str, int], list[float]]
"""Of a kind and a number of processes."""


@dataclass(frozen=True, slots=True)
class Task:
    """What a process is told: to answer some prompts, beginning together with others."""

    how: str
    prompts: tuple[str, ...]
    together: int


@dataclass(frozen=True, slots=True)
class Done:
    """What it says then; times are on the clock that all processes share."""

    prompts: tuple[str, ...]
    began_s: float
    ended_s: float
    cpu_s: float
    first_token_s: tuple[float, ...]
    texts: tuple[str, ...]


def work(path: str, orders: Connection, begin: Mapping[int, Barrier]) -> None:
    """A process: says when it is ready, then does what it is told."""
    import torch

    from hcache_rag import GenerationOptions, HCacheEngine, StateStore
    from hcache_rag.llama_index import HCacheLLM

    torch.set_num_threads(1)
    quiet_transformers()
    options = GenerationOptions(max_new_tokens=ANSWER_TOKENS, temperature=0)
    with (
        StateStore.in_memory() as nothing,
        HCacheLLM(store=path, fidelity="none", keep_recurring=False) as llm,
    ):
        restoring = llm.engine
        reading = HCacheEngine(
            restoring.adapter.model,
            restoring.tokenizer,
            nothing,
            add_bos=restoring.add_bos,
            keep_recurring=False,
        )
        engines = {"full": reading, "restored": restoring}
        orders.send(None)
        while (task := orders.recv()) is not None:
            begin[task.together].wait(PATIENCE_S)
            began_s, cpu_s = time.monotonic(), time.process_time()
            answers = [engines[task.how].generate(p, options=options) for p in task.prompts]
            ended_s, cpu_s = time.monotonic(), time.process_time() - cpu_s
            first = tuple(answer.provenance.seconds["first_token"] for answer in answers)
            texts = tuple(answer.text for answer in answers)
            orders.send(Done(task.prompts, began_s, ended_s, cpu_s, first, texts))


@contextmanager
def workers(path: Path, counts: Sequence[int]) -> Iterator[list[tuple[int, Connection]]]:
    """Processes that are ready, by their ids and what they are told through.

    Args:
        counts: so many of them will begin together.
    """
    context = multiprocessing.get_context("spawn")
    begin = {count: context.Barrier(count) for count in counts}
    made = []
    for _ in range(max(counts)):
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(str(path), theirs, begin), daemon=True)
        process.start()
        made.append((process, ours))
    try:
        for _, orders in made:
            received(orders)
        yield [(process.pid or 0, orders) for process, orders in made]
        for process, orders in made:
            orders.send(None)
            process.join(PATIENCE_S)
    finally:
        for process, _ in made:
            process.kill()


def received(orders: Connection) -> Any:
    if not orders.poll(PATIENCE_S):
        raise TimeoutError(f"a process has said nothing for {PATIENCE_S:.0f} s")
    return orders.recv()


def answered(who: Sequence[tuple[int, Connection]], how: str, prompts: Sequence[str]) -> list[Done]:
    """What some processes say to the prompts; each begins with another one."""
    for number, (_, orders) in enumerate(who):
        first = number * len(prompts) // len(who)
        orders.send(Task(how, (*prompts[first:], *prompts[:first]), len(who)))
    return [received(orders) for _, orders in who]


def store_and_prompts(folder: Path, count: int) -> list[str]:
    """Index the passages, and give the prompts of some questions."""
    from hcache_rag.llama_index import HCacheLLM, HCacheRetriever
    from hcache_rag.llama_index.folder import documents_of
    from hcache_rag.llama_index.text import llm_texts
    from hcache_rag.sources import FolderContents, read_folder

    items = json.loads((ROOT / "examples/solar_system_questions.json").read_text())[:count]
    files = read_folder(ROOT / "examples" / "solar_system").files
    if count < TOP_K:
        asked = {item["file"] for item in items}
        files = tuple(sorted(files, key=lambda file: file.path not in asked)[:TOP_K])
    with HCacheLLM(max_new_tokens=ANSWER_TOKENS) as llm:
        retriever = HCacheRetriever.from_documents(
            documents_of(FolderContents(files, ())),
            llm=llm,
            persist_dir=folder,
            similarity_top_k=TOP_K,
        )
        prompts = []
        for item in items:
            nodes = [scored.node for scored in retriever.retrieve(item["question"])]
            prompts.append(llm.qa_prompt(llm_texts(nodes), item["question"]))
    return prompts


def pages(pid: int, file: Path | None = None) -> dict[str, int]:
    """RSS and PSS of a process in bytes: of all that it has in memory, or of one file's map."""
    path = Path(f"/proc/{pid}") / ("smaps" if file else "smaps_rollup")
    found = {"Rss": 0, "Pss": 0}
    is_its = file is None
    for line in path.read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in found and is_its:
            found[name] += int(rest.split()[0]) * 1024
        elif file is not None and "-" in line.split()[0]:
            is_its = line.endswith(str(file))
    return found


def main() -> None:
    parser = arguments(__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    options = parser.parse_args()
    counts, num_prompts = (PROCESSES[:2], 1) if options.quick else (PROCESSES, 2)
    rounds = {"full": 1 if options.quick else options.repeats, "restored": options.repeats}
    quiet_transformers()
    with tempfile.TemporaryDirectory(prefix="bench-serving-") as name:
        folder = Path(name).resolve()
        prompts = store_and_prompts(folder, num_prompts)
        with workers(folder / "states", counts) as every:
            answered(every, "restored", prompts)  # brings the store into memory
            seen = measure(every, prompts, counts, rounds)
            memory = memory_of([pid for pid, _ in every], folder / "states" / "data.mdb")
    rows, most = report(seen, memory), max(counts)
    speed_up = ratio_of_pairs(seen.rates["restored", 2], seen.rates["restored", 1])
    sooner = summary(seen.rates["restored", most])["p50"] / summary(seen.rates["full", most])["p50"]
    effort = ratio_of_pairs(seen.cpu_s["restored", 2], seen.cpu_s["restored", 1])
    copies = memory["store_pss_bytes"] / memory["store_once_bytes"]
    targets = [
        at_most("answers that another process does not give", different(seen.texts), 0),
        at_least("restored: questions a second of two processes / of one", speed_up, 1.6),
        at_most("restored: processors' time for a question, two / one", effort, 1.25),
        at_least(f"{most} processes: questions a second, restored / full", sooner, 2),
        at_most("the store in memory: PSS of all / RSS of one", copies, 1.1),
    ]
    finish(rows, targets, {**machine(), "threads_of_a_process": 1}, options.json)


@dataclass(frozen=True, slots=True)
class Seen:
    """What was measured, by kind and number of processes.

    Args:
        rates: questions a second of each round.
        cpu_s: seconds of the processors for a question, of each round.
        first_token_s: of each answer.
        texts: all answers to each prompt, by kind.
    """

    rates: Samples
    cpu_s: Samples
    first_token_s: Samples
    texts: dict[tuple[str, str], set[str]]


def report(seen: Seen, memory: Mapping[str, float]) -> list[dict[str, Any]]:
    """Print the tables; their rows."""
    rows: list[dict[str, Any]] = []
    print(
        f"{'':9} {'processes':>9} {'questions/s':>12} {'min':>6} {'max':>6} {'of one':>7} "
        f"{'CPU s each':>11} {'first token ms':>15} {'p95':>7}"
    )
    for (how, together), its in seen.rates.items():
        speed, soon = summary(its), summary(seen.first_token_s[how, together])
        of_one = ratio_of_pairs(its, seen.rates[how, 1])
        cpu = summary(seen.cpu_s[how, together])
        print(
            f"{how:9} {together:9} {speed['p50']:12.2f} {speed['min']:6.2f} {speed['max']:6.2f} "
            f"{of_one:6.2f}x {cpu['p50']:11.2f} "
            f"{soon['p50'] * 1e3:15,.0f} {soon['p95'] * 1e3:7,.0f}"
        )
        rows.append(
            {
                "how": how,
                "processes": together,
                "questions_per_s": speed,
                "of_one": of_one,
                "cpu_s": cpu,
                "first_token_s": soon,
            }
        )
    megabytes = {name: f"{value / 1e6:,.1f} MB" for name, value in memory.items()}
    print(
        f"memory of {max(together for _, together in seen.rates)} processes: "
        f"{megabytes['rss_bytes']} RSS and {megabytes['pss_bytes']} PSS each\n"
        f"of these the store: {megabytes['store_rss_bytes']} RSS and "
        f"{megabytes['store_pss_bytes']} PSS of all together, "
        f"{megabytes['store_once_bytes']} RSS of one"
    )
    return [*rows, {"what": "memory", **memory}]


def measure(
    every: Sequence[tuple[int, Connection]],
    prompts: Sequence[str],
    counts: Sequence[int],
    rounds: Mapping[str, int],
) -> Seen:
    """Let some processes answer, in both ways, in turn.

    Args:
        counts: how many at a time.
        rounds: of each way.
    """
    kinds = [(how, together) for how in HOW for together in counts]
    rates, cpu_s, first_token_s = ({kind: list[float]() for kind in kinds} for _ in range(3))
    seen = Seen(rates, cpu_s, first_token_s, {})
    for number in range(max(rounds.values())):
        for how, together in kinds:
            if number >= rounds[how]:
                continue
            done = answered(every[:together], how, prompts)
            count = together * len(prompts)
            spent_s = max(d.ended_s for d in done) - min(d.began_s for d in done)
            seen.rates[how, together].append(count / spent_s)
            seen.cpu_s[how, together].append(sum(d.cpu_s for d in done) / count)
            for d in done:
                seen.first_token_s[how, together] += d.first_token_s
                for prompt, text in zip(d.prompts, d.texts, strict=True):
                    seen.texts.setdefault((how, prompt), set()).add(text)
    return seen


def different(texts: Mapping[tuple[str, str], set[str]]) -> int:
    """Answers beyond one to the same prompt."""
    return sum(len(each) - 1 for each in texts.values())


def memory_of(pids: Sequence[int], file: Path) -> dict[str, float]:
    """What processes have in memory, and what of it is a file."""
    whole = [pages(pid) for pid in pids]
    its = [pages(pid, file) for pid in pids]
    return {
        "rss_bytes": sum(p["Rss"] for p in whole) / len(pids),
        "pss_bytes": sum(p["Pss"] for p in whole) / len(pids),
        "store_rss_bytes": sum(p["Rss"] for p in its),
        "store_pss_bytes": sum(p["Pss"] for p in its),
        "store_once_bytes": max(p["Rss"] for p in its),
    }


if __name__ == "__main__":
    main()
