"""What does keeping states in fewer bytes cost, in answers and on disk?

    python benchmarks/bench_storage.py [--quick] [--json] [--data FOLDER] [--only FORM ...]

SmolLM2-135M-Instruct in float32 over SQuAD passages (one each, exact) and HotpotQA records (four
passages, relocated, nothing repaired). For every form that states can be stored in: KL of the
next-token distribution against the unquantised states, over all tokens of the question and at its
last one, where the answer begins; how often the most probable token is the same; bytes of a token.

The yardstick is the last row: the same model computing in bfloat16, which people accept. A form may
be the default if it moves the distribution by at most a quarter of that. "int8 weights" is what
the default for hidden states would give if they were projected by integer products.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from common import ROOT, arguments, at_most, finish, machine, quiet_transformers
from precision import rounded_projections

from hcache_rag import HCacheEngine
from hcache_rag.bundled import default_model_path
from hcache_rag.choice import DEFAULT_HIDDEN_DTYPE, DEFAULT_KV_DTYPE
from hcache_rag.layout import Representation
from hcache_rag.models import load_model
from hcache_rag.quality import divergence, fresh_logits

PREAMBLE = "Answer the question from the passages.\n\n"
FORMS = [
    ("kv", "float16"),
    ("kv", "bfloat16"),
    ("kv", "int8"),
    ("kv", "float8_e4m3"),
    ("hidden", "float32"),
    ("hidden", "float16"),
    ("hidden", "bfloat16"),
    ("hidden", "int8"),
    ("hidden", "float8_e4m3"),
    ("hidden", "int8-g64"),
    ("hidden", "int8-smooth"),
]
INT8_WEIGHTS = "hidden int8-smooth, int8 weights"


def prompts_of(data: Path, squad: int, hotpot: int) -> list[tuple[list[str], str]]:
    """Passages and a question about them."""
    found = []
    articles = json.loads((data / "squad_small.json").read_text())["data"]
    for paragraph in [p for article in articles for p in article["paragraphs"]][:squad]:
        questions = [qa["question"] for qa in paragraph["qas"] if not qa["is_impossible"]]
        if questions:
            found.append(([paragraph["context"].strip()], questions[0]))
    for record in json.loads((data / "hotpotqa_100.json").read_text())[:hotpot]:
        passages = [f"{title}: {''.join(lines).strip()}" for title, lines in record["context"]]
        found.append((passages[:4], record["question"]))
    return found


def text_of(passages: Sequence[str], question: str) -> str:
    body = "\n\n".join(passages)
    return f"{PREAMBLE}{body}\n\nQuestion: {question}\nAnswer:"


def main() -> None:
    parser = arguments(__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    names = [*map(" ".join, FORMS), INT8_WEIGHTS]
    parser.add_argument("--only", nargs="+", metavar="FORM", choices=names, help=", ".join(names))
    options = parser.parse_args()
    quiet_transformers()
    if not (options.data / "squad_small.json").is_file():
        raise SystemExit(f"{options.data} holds no squad_small.json; see --data")
    prompts = prompts_of(options.data, *((1, 1) if options.quick else (50, 20)))
    documents = [passage for passages, _ in prompts for passage in passages]
    path = str(default_model_path())

    models = {dtype: load_model(path, dtype=dtype) for dtype in ("float32", "bfloat16")}

    def logits(
        form: tuple[str, str], dtype: str = "float32", *, has_int8_weights: bool = False
    ) -> tuple[list[torch.Tensor], float]:
        model, tokenizer = models[dtype]
        with (
            tempfile.TemporaryDirectory(prefix="bench-storage-") as folder,
            HCacheEngine(
                model,
                tokenizer,
                folder,
                preamble=PREAMBLE,
                representation=form[0],
                storage_dtype=form[1],
                fidelity="none",
            ) as engine,
        ):
            report = engine.precompute(documents)
            if has_int8_weights:
                adapter, ids = engine.adapter, tokenizer(documents[0]).input_ids
                kept = [Representation.HIDDEN] * adapter.spec.num_layers
                after = adapter.prefill(tokenizer(PREAMBLE).input_ids)
                adapter.projections = rounded_projections(
                    adapter, adapter.capture([ids], kept, after)
                )
            found = [fresh_logits(engine, text_of(*prompt)) for prompt in prompts]
        return found, report.stored_bytes / report.stored_tokens

    print(f"{len(prompts)} prompts, {len(documents)} passages, SmolLM2-135M-Instruct in float32")
    print(f"{'stored as':20} {'bytes/token':>11} {'KL':>10} {'KL at answer':>12} {'top-1':>7}")
    reference, size = logits(("kv", "float32"))
    rows: list[dict[str, Any]] = []

    def report(name: str, found: list[torch.Tensor], width: float) -> dict[str, Any]:
        row = {"form": name, "bytes_per_token": width, **asdict(divergence(reference, found))}
        rows.append(row)
        print(
            f"{name:20} {width:11,.0f} {row['kl']:10.2e} {row['kl_last']:12.2e} {row['top1']:7.2%}",
            flush=True,
        )
        return row

    report("kv float32", reference, size)
    plain = ("float32", "float16") if options.quick else ()
    wanted = options.only or [" ".join(form) for form in FORMS if form[1] not in plain]
    for form in (f for f in FORMS if " ".join(f) in wanted):
        report(" ".join(form), *logits(form))
    if options.only is None or INT8_WEIGHTS in options.only:
        report(INT8_WEIGHTS, *logits(("hidden", "int8-smooth"), has_int8_weights=True))
    yardstick = report("computing in bf16", *logits(("kv", "bfloat16"), "bfloat16"))
    defaults = (f"hidden {DEFAULT_HIDDEN_DTYPE}", f"kv {DEFAULT_KV_DTYPE}")
    targets = [
        at_most(f"{row['form']}: KL / that of computing in bf16", row["kl"] / yardstick["kl"], 0.25)
        for row in rows
        if row["form"] in defaults
    ]
    finish(rows, targets, {**machine(), "prompts": len(prompts)}, options.json)


if __name__ == "__main__":
    main()
