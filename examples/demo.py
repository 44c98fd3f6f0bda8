"""The main job: index a folder once, then answer with and without the documents' states.

Run it with `make demo`; run it twice: the second run finds the states on disk.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.llms.huggingface import HuggingFaceLLM
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from hcache_rag import GenerationOptions, HCacheEngine
from hcache_rag.bundled import default_model_path
from hcache_rag.llama_index import HCacheLLM, HCacheRetriever
from hcache_rag.llama_index.folder import Answer, answer, documents_of
from hcache_rag.models import load_model
from hcache_rag.sources import read_folder

HERE = Path(__file__).parent
console = Console()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", type=Path, default=HERE.parent / ".demo")
    parser.add_argument("--questions", type=int, default=4, help="how many questions to ask")
    options = parser.parse_args()
    quiet: Any = transformers_logging
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()
    logging.getLogger("sentence_transformers").setLevel(logging.WARNING)

    console.rule("1. The model")
    started = time.perf_counter()
    path = default_model_path(lambda text: console.print(f"first run: {text} (about 20 s)"))
    model, tokenizer = load_model(str(path))
    spent = time.perf_counter() - started
    console.print(f"SmolLM2-135M-Instruct, float32, on the CPU: loaded in {spent:.1f} s")

    console.rule("2. Every document is read once")
    llm = HCacheLLM(model=model, tokenizer=tokenizer, max_new_tokens=40)
    retriever = index(options.store / "kv", llm)

    console.rule("3. The same questions, without and with the states")
    plain = HuggingFaceLLM(
        model=model,
        tokenizer=tokenizer,
        is_chat_model=True,
        context_window=8192,
        max_new_tokens=40,
        generate_kwargs={"do_sample": False},
    )
    questions = json.loads((HERE / "solar_system_questions.json").read_text())
    unrepaired = HCacheLLM(
        model=model,
        tokenizer=tokenizer,
        store=llm.engine.store,
        fidelity="none",
        max_new_tokens=40,
    )
    for item in questions[: options.questions]:
        before, after, fastest = (
            answer(engine_of(retriever, one), item["question"]) for one in (plain, llm, unrepaired)
        )
        console.print(side_by_side(item["question"], before, after, fastest))
    console.print(
        "The documents' states were computed one document at a time; 'balanced' (the default) "
        "reads 15 % of their tokens again. Answers may still differ from full prefill's: see "
        "'When not to use it' in the README.",
        style="dim",
    )

    console.rule("4. What a state keeps: hidden states, or K and V")
    console.print(representations(options.store, model, tokenizer, llm.preamble))
    console.print(
        "Hidden states halve the bytes of the multi-head model and cost one projection; with the "
        "states in the page cache, as here, reading is nearly free and the projection shows.",
        style="dim",
    )


def index(folder: Path, llm: HCacheLLM) -> HCacheRetriever:
    """Index the Solar System passages, or find them indexed."""
    documents = documents_of(read_folder(HERE / "solar_system"))
    started = time.perf_counter()
    columns = (TextColumn("reading"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("reading", total=len(documents))
        retriever = HCacheRetriever.from_documents(
            documents,
            llm=llm,
            persist_dir=folder,
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    report, choice = retriever.report, llm.engine.choice
    if report is None:
        raise RuntimeError("from_documents left no report")
    spent = time.perf_counter() - started
    console.print(
        f"{report.stored} documents read now, {report.reused} found on disk; {spent:.1f} s in all"
    )
    console.print(f"representation {choice.layout}; {choice.reason}")
    return retriever


def engine_of(retriever: HCacheRetriever, llm: Any) -> RetrieverQueryEngine:
    """An ordinary streaming query engine."""
    return RetrieverQueryEngine.from_args(retriever, llm=llm, streaming=True)


def side_by_side(question: str, before: Answer, *after: Answer) -> Table:
    table = Table(title=question, title_justify="left", title_style="bold", show_lines=True)
    table.add_column("")
    for name in ("HuggingFaceLLM", "HCacheLLM, balanced", "HCacheLLM, nothing repaired"):
        table.add_column(name, ratio=1)
    sooner = [
        f"[bold green]{a.first_text_s * 1e3:,.0f} ms[/] "
        f"({before.first_text_s / a.first_text_s:.1f}x sooner)"
        for a in after
    ]
    tokens = [
        f"{a.provenance['fresh_tokens']:,} read, {a.provenance['repaired_tokens']:,} repaired, "
        f"{a.provenance['restored_tokens']:,} restored"
        for a in after
    ]
    num_tokens = after[0].provenance["prompt_tokens"]
    table.add_row("answer", before.text, *(a.text for a in after))
    table.add_row("first text after", f"{before.first_text_s * 1e3:,.0f} ms", *sooner)
    table.add_row("prompt tokens", f"about {num_tokens:,} read", *tokens)
    stored = [f"{a.provenance['bytes_read'] / 1e6:,.1f} MB" for a in after]
    table.add_row("read from the store", "-", *stored)
    return table


def representations(store: Path, model: Any, tokenizer: Any, preamble: str) -> Table:
    """Both representations of two models of one size, one prompt of four documents."""
    texts = [file.text.strip() for file in read_folder(HERE / "solar_system").files[:4]]
    prompt = preamble + "\n\n".join(texts) + "\n---------------------\nWhat is this about?"
    table = Table(
        title=f"{len(texts)} documents, nothing repaired: bytes, and time to the first token"
    )
    for column in ("model", "keeps", "bytes/token", "first token", "full prefill"):
        table.add_column(column, justify="right" if column != "model" else "left")
    for name, candidate in (
        ("SmolLM2 (3 KV heads for 9 heads)", model),
        ("random weights (9 KV heads for 9)", multi_head(model)),
    ):
        with HCacheEngine(candidate, tokenizer, store / "empty", add_bos=False) as engine:
            full = first_token_s(engine, prompt)
        for representation in ("kv", "hidden"):
            with HCacheEngine(
                candidate,
                tokenizer,
                store / f"{candidate.config.num_key_value_heads}-{representation}",
                preamble=preamble,
                add_bos=False,
                representation=representation,
                fidelity="none",
            ) as engine:
                engine.precompute(texts)
                restored = first_token_s(engine, prompt)
                width = engine.choice.layout.bytes_per_token(engine.adapter.spec)
            table.add_row(
                name,
                representation,
                f"{width:,.0f}",
                f"{restored * 1e3:,.0f} ms",
                f"{full * 1e3:,.0f} ms",
            )
    return table


def multi_head(model: Any) -> Any:
    """A random-weight model of SmolLM2's size with as many KV heads as heads."""
    config = copy.deepcopy(model.config)
    config.num_key_value_heads = config.num_attention_heads
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()  # type: ignore[no-untyped-call]


def first_token_s(engine: HCacheEngine, prompt: str) -> float:
    """Median seconds to the first token of three calls, after one to warm up."""
    options = GenerationOptions(max_new_tokens=1, temperature=0)
    runs = [
        engine.generate(prompt, options=options).provenance.seconds["first_token"] for _ in range(4)
    ]
    return statistics.median(runs[1:])


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; what was stored stays, the next run goes on from there")
