"""The commands: arguments to calls, results to tables. Heavy imports wait until they are needed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from hcache_rag import __version__
from hcache_rag.cli import chatting, keeping, planning, selftest
from hcache_rag.cli.console import (
    DEFAULT_STORE,
    DeviceOption,
    JsonOption,
    StoreOption,
    check_device,
    dial_position,
    err,
    one_of,
    out,
    print_json,
    progress_of,
    quiet_transformers,
    reported,
    say,
    size,
    status,
)
from hcache_rag.cli.fidelity import ContextOption, check
from hcache_rag.cli.fidelity import fidelity as fidelity_command
from hcache_rag.layout import STORAGE_DTYPES, Representation

if TYPE_CHECKING:
    from hcache_rag.choice import LayoutChoice
    from hcache_rag.indexing import PrecomputeReport

app = typer.Typer(
    name="hcache-rag",
    help="Let a local language model read each document once, and answer from what it kept.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line; every foreseeable failure is one line and exit code 1."""
    app()


def _show_version(wanted: bool) -> None:
    if wanted:
        out.print(f"hcache-rag {__version__}")
        raise typer.Exit


@app.callback()
def every_command(
    _version: Annotated[
        bool,
        typer.Option("--version", help="Show it and exit.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    """Let a local language model read each document once, and answer from what it kept."""


@app.command()
@reported
def index(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Folder of text files, searched recursively.")
    ],
    store: StoreOption = DEFAULT_STORE,
    model: Annotated[
        str | None,
        typer.Option(help="Folder of a transformers model. (default: SmolLM2-135M-Instruct)"),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, or auto: bfloat16 where `profile` says it pays.")
    ] = "float32",
    device: DeviceOption = "auto",
    representation: Annotated[
        str, typer.Option(help="What states keep: auto, hidden or kv.")
    ] = "auto",
    storage_dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16, float16, float8_e4m3, int8; for hidden states also int8-g64 "
            "and int8-smooth. (default: int8, int8-smooth)"
        ),
    ] = None,
    context_at_index: ContextOption = None,
    shards: Annotated[
        int | None,
        typer.Option(min=1, help="Keep the states in so many files.  [default: one]"),
    ] = None,
    check_fidelity: Annotated[
        bool,
        typer.Option(
            "--check-fidelity",
            help="Then compare a few prompts with full prefill, and write down which fidelity "
            "`ask` needs (about a minute; see `hcache-rag fidelity`).",
        ),
    ] = False,
    measure: Annotated[
        bool,
        typer.Option(help="Measure this machine first (some seconds), if that was not done yet."),
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Read every document of FOLDER once and keep its states."""
    from hcache_rag.sources import read_folder

    one_of("--dtype", dtype, ("float32", "bfloat16", "auto"))
    check_device(device)
    one_of("--representation", representation, ("auto", "hidden", "kv"))
    if storage_dtype is not None:
        known = STORAGE_DTYPES[Representation("kv" if representation == "kv" else "hidden")]
        one_of("--storage-dtype", storage_dtype, known)
    if context_at_index is not None:
        one_of("--context-at-index", context_at_index, ("none", "documents"))
    contents = read_folder(folder)
    for name, reason in contents.skipped:
        say(err, "skipped", "yellow", f" {name}: {reason}")
    with quiet_transformers(), status("loading the model", not as_json):
        from hcache_rag.llama_index.folder import index_folder
        from hcache_rag.llama_index.model_choice import ModelChoice, context_of
    persist_dir = store.expanduser()
    choice = ModelChoice(
        model and os.path.abspath(model),
        dtype,
        representation,
        storage_dtype,
        context_at_index or context_of(persist_dir),
    )
    with quiet_transformers(), _reading_bar(not as_json) as on_progress:
        report, llm = index_folder(
            contents,
            persist_dir,
            choice,
            device=device,
            shards=shards,
            on_progress=on_progress,
            on_measure=(lambda _step: None) if measure else None,
        )
    kept = llm.engine.choice
    result = {
        "store": str(persist_dir),
        "files": len(contents.files),
        "files_skipped": [list(item) for item in contents.skipped],
        "model": llm.model_name,
        "layout": str(kept.layout),
        "layout_reason": kept.reason,
        "bytes_per_token": kept.layout.bytes_per_token(llm.engine.adapter.spec),
        **asdict(report),
    }
    with closing(llm):
        if not as_json:
            _show(report, kept, len(contents.skipped))
        if check_fidelity:
            with quiet_transformers():
                result["fidelity"] = check(persist_dir, llm, as_json)
    if as_json:
        print_json(result)
        return
    say(out, "now try: ", "", f'hcache-rag ask "..." --store {store}')


def _show(report: PrecomputeReport, kept: LayoutChoice, num_skipped: int) -> None:
    out.print(
        f"[bold]{report.stored}[/] document(s) read, [bold]{report.reused}[/] were there already, "
        f"{num_skipped} file(s) skipped"
    )
    if report.stored:
        rate = report.stored_tokens / report.seconds
        out.print(
            f"{report.stored_tokens:,} tokens in {report.seconds:.1f} s ({rate:,.0f} tokens/s), "
            f"{size(report.stored_bytes)} of states"
        )
    if report.continued:
        out.print(
            f"{report.continued_tokens:,} tokens of {report.continued} changed document(s) come "
            "before the first change, and were not read again"
        )
    for text, reason in report.skipped:
        say(out, "not stored", "yellow", f" {text!r}: {reason}")
    say(out, "each layer keeps ", "", f"{kept.layout}; {kept.reason}")


@app.command()
@reported
def ask(
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What you want to know.")],
    store: StoreOption = DEFAULT_STORE,
    top_k: Annotated[int, typer.Option(min=1, help="Passages to answer from.")] = 4,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 128,
    fidelity: Annotated[
        str,
        typer.Option(
            help="Closeness to full prefill: exact, high, balanced, fast, none, or the share of "
            "relocated tokens that is read again, such as 0.2; auto is what `fidelity --write` "
            "found, or else balanced."
        ),
    ] = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Answer QUESTION from an index."""
    dial = dial_position(fidelity)
    check_device(device)
    from hcache_rag.llama_index.persisted import read_manifest

    persist_dir = store.expanduser()
    read_manifest(persist_dir)
    with quiet_transformers(), status("loading the model", not as_json):
        from hcache_rag.llama_index.folder import ask as ask_index
        from hcache_rag.llama_index.model_choice import ModelChoice

        llm = ModelChoice.of(persist_dir).load(
            persist_dir, device=device, max_new_tokens=max_new_tokens, fidelity=dial
        )
    with quiet_transformers(), closing(llm):
        answer = ask_index(
            persist_dir,
            llm,
            question,
            top_k=top_k,
            on_text=None if as_json else lambda text: out.out(text, end="", highlight=False),
        )
    if as_json:
        print_json(asdict(answer))
        return
    tokens = answer.provenance
    out.print()
    account = (
        f"first text after {answer.first_text_s * 1e3:,.0f} ms · {tokens['restored_tokens']:,} of "
        f"{tokens['prompt_tokens']:,} prompt tokens restored, {tokens['fresh_tokens']:,} read, "
        f"{tokens['repaired_tokens']:,} repaired ({tokens['fidelity']}) · "
        f"{size(tokens['bytes_read'])} from the store · from {', '.join(answer.sources)}"
    )
    if answer.num_prompts > 1:
        account = f"the last of {answer.num_prompts} prompts: {account}"
    say(err, account, "dim", "")
    for warning in tokens["warnings"]:
        say(err, "warning:", "yellow", f" {warning}")


app.command()(chatting.chat)

for _keeping in (keeping.stats, keeping.verify, keeping.gc):
    app.command()(_keeping)

app.command()(fidelity_command)

for _planning in (planning.profile, planning.plan, planning.simulate):
    app.command()(_planning)


@app.command()
@reported
def doctor(
    store: Annotated[
        Path | None, typer.Option("--store", "-s", help="A store to look at as well.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Folder of a model. (default: SmolLM2-135M-Instruct)")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check versions, model, store, room, and answer one tiny question end to end."""
    from hcache_rag.cli.doctor import examine

    with quiet_transformers(), status("examining", not as_json):
        checks = examine(model, store.expanduser() if store else None)
    healthy = all(check.ok for check in checks)
    if as_json:
        print_json({"healthy": healthy, "checks": [asdict(check) for check in checks]})
    else:
        table = Table(show_header=False, box=None)
        for check in checks:
            mark = "[green]ok[/]" if check.ok else "[red]FAILED[/]"
            table.add_row(mark, check.name, Text(check.detail))
        out.print(table, highlight=False)
    if not healthy:
        raise typer.Exit(1)


app.command("gpu-selftest")(selftest.gpu_selftest)


@contextmanager
def _reading_bar(show: bool) -> Iterator[Callable[[int, int], None]]:
    with progress_of(show) as progress:
        task = progress.add_task("loading the model", total=None)
        started = False

        def advance(done: int, total: int) -> None:
            nonlocal started
            text = "reading documents"
            if not started and 0 < done < total:
                text = f"going on: {done} of {total} documents have their states already"
                progress.console.print(text, highlight=False)
            started = True
            progress.update(task, description="reading documents", completed=done, total=total)

        yield advance
