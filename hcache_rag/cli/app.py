"""The commands: arguments to calls, results to tables. Heavy imports wait until they are needed."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, ParamSpec

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from hcache_rag.errors import HCacheError

app = typer.Typer(
    name="hcache-rag",
    help="Let a local language model read each document once, and answer from what it kept.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_out = Console()
_err = Console(stderr=True)
_P = ParamSpec("_P")

StoreOption = Annotated[
    Path, typer.Option("--store", "-s", help="Folder that holds the index and the states.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
DEFAULT_STORE = Path("hcache-store")


def main() -> None:
    """Run the command line; every foreseeable failure is one line and exit code 1."""
    logging.getLogger("hcache_rag").addHandler(logging.NullHandler())  # warnings are printed here
    app()


def _reported(command: Callable[_P, None]) -> Callable[_P, None]:
    @wraps(command)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt:
            rest = "; what was stored stays, the next run goes on from there"
            _say(_err, "interrupted", "yellow", rest)
            raise typer.Exit(130) from None
        except HCacheError as error:
            _say(_err, "error:", "red", f" {error}")
            raise typer.Exit(1) from None

    return run


def _say(console: Console, label: str, style: str, text: str) -> None:
    """One line with a coloured beginning; nothing in `text` is markup."""
    console.print(Text.assemble((label, style), text), soft_wrap=True)


@app.command()
@_reported
def index(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Folder of text files, searched recursively.")
    ],
    store: StoreOption = DEFAULT_STORE,
    model: Annotated[
        str | None,
        typer.Option(help="Folder of a transformers model.  [default: SmolLM2-135M-Instruct]"),
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    representation: Annotated[
        str, typer.Option(help="What states keep: auto, hidden or kv.")
    ] = "auto",
    as_json: JsonOption = False,
) -> None:
    """Read every document of FOLDER once and keep its states."""
    from hcache_rag.sources import read_folder

    _one_of("--dtype", dtype, ("float32", "bfloat16"))
    _one_of("--representation", representation, ("auto", "hidden", "kv"))
    contents = read_folder(folder)
    for name, reason in contents.skipped:
        _say(_err, "skipped", "yellow", f" {name}: {reason}")
    with _quiet_transformers(), _status("loading the model", not as_json):
        from hcache_rag.llama_index.folder import ModelChoice, index_folder
    persist_dir = store.expanduser()
    with _quiet_transformers(), _reading_bar(not as_json) as on_progress:
        report, llm = index_folder(
            contents,
            persist_dir,
            ModelChoice(model and os.path.abspath(model), dtype, representation),
            on_progress=on_progress,
        )
    choice = llm.engine.choice
    result = {
        "store": str(persist_dir),
        "files": len(contents.files),
        "files_skipped": [list(item) for item in contents.skipped],
        "model": llm.model_name,
        "layout": str(choice.layout),
        "layout_reason": choice.reason,
        "bytes_per_token": choice.layout.bytes_per_token(llm.engine.adapter.spec),
        **asdict(report),
    }
    llm.close()
    if as_json:
        _print_json(result)
        return
    _out.print(
        f"[bold]{report.stored}[/] document(s) read, [bold]{report.reused}[/] were there already, "
        f"{len(contents.skipped)} file(s) skipped"
    )
    if report.stored:
        rate = report.stored_tokens / report.seconds
        _out.print(
            f"{report.stored_tokens:,} tokens in {report.seconds:.1f} s ({rate:,.0f} tokens/s), "
            f"{_size(report.stored_bytes)} of states"
        )
    for text, reason in report.skipped:
        _say(_out, "not stored", "yellow", f" {text!r}: {reason}")
    _say(_out, "each layer keeps ", "", f"{choice.layout}; {choice.reason}")
    _say(_out, "now try: ", "", f'hcache-rag ask "..." --store {store}')


@app.command()
@_reported
def ask(
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What you want to know.")],
    store: StoreOption = DEFAULT_STORE,
    top_k: Annotated[int, typer.Option(min=1, help="Passages to answer from.")] = 4,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 128,
    fidelity: Annotated[
        str, typer.Option(help="Closeness to full prefill: exact, high, balanced, fast or none.")
    ] = "balanced",
    as_json: JsonOption = False,
) -> None:
    """Answer QUESTION from an index."""
    _one_of("--fidelity", fidelity, ("exact", "high", "balanced", "fast", "none"))
    from hcache_rag.llama_index.vectors import read_manifest

    persist_dir = store.expanduser()
    read_manifest(persist_dir)
    with _quiet_transformers(), _status("loading the model", not as_json):
        from hcache_rag.llama_index.folder import ModelChoice
        from hcache_rag.llama_index.folder import ask as ask_index

        llm = ModelChoice.of(persist_dir).load(
            persist_dir, max_new_tokens=max_new_tokens, fidelity=fidelity
        )
    with _quiet_transformers():
        answer = ask_index(
            persist_dir,
            llm,
            question,
            top_k=top_k,
            on_text=None if as_json else lambda text: _out.out(text, end="", highlight=False),
        )
    llm.close()
    if as_json:
        _print_json(asdict(answer))
        return
    tokens = answer.provenance
    _out.print()
    account = (
        f"first text after {answer.first_text_s * 1e3:,.0f} ms · {tokens['restored_tokens']:,} of "
        f"{tokens['prompt_tokens']:,} prompt tokens restored, {tokens['fresh_tokens']:,} read, "
        f"{tokens['repaired_tokens']:,} repaired · "
        f"{_size(tokens['bytes_read'])} from the store · from {', '.join(answer.sources)}"
    )
    _say(_err, account, "dim", "")
    for warning in tokens["warnings"]:
        _say(_err, "warning:", "yellow", f" {warning}")


@app.command()
@_reported
def stats(store: StoreOption = DEFAULT_STORE, as_json: JsonOption = False) -> None:
    """Show what a store holds."""
    from hcache_rag.llama_index.folder import open_states

    with open_states(store) as states:
        result = asdict(states.stats())
    if as_json:
        _print_json(result)
        return
    table = Table(title=Text(str(store)), show_header=False)
    table.add_row("documents", f"{result['documents']:,}")
    table.add_row("tokens", f"{result['tokens']:,}")
    table.add_row("preambles", f"{result['preambles']:,}")
    if result["unreadable"]:
        table.add_row("unreadable records", f"{result['unreadable']:,}")
    table.add_row("bytes on disk", _size(result["file_bytes"]))
    for name, count in result["models"].items():
        table.add_row(Text(f"documents of {name}"), f"{count:,}")
    for name, layout in result["layouts"].items():
        table.add_row(Text(f"states of {name} keep"), Text(layout))
    _out.print(table)


@app.command()
@_reported
def doctor(
    store: Annotated[
        Path | None, typer.Option("--store", "-s", help="A store to look at as well.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Folder of a model.  [default: SmolLM2-135M-Instruct]")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check versions, model, store, room, and answer one tiny question end to end."""
    from hcache_rag.cli.doctor import examine

    with _quiet_transformers(), _status("examining", not as_json):
        checks = examine(model, store.expanduser() if store else None)
    healthy = all(check.ok for check in checks)
    if as_json:
        _print_json({"healthy": healthy, "checks": [asdict(check) for check in checks]})
    else:
        table = Table(show_header=False, box=None)
        for check in checks:
            mark = "[green]ok[/]" if check.ok else "[red]FAILED[/]"
            table.add_row(mark, check.name, Text(check.detail))
        _out.print(table, highlight=False)
    if not healthy:
        raise typer.Exit(1)


def _one_of(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise typer.BadParameter(f"{value!r} is not one of {', '.join(known)}", param_hint=option)


@contextmanager
def _status(text: str, show: bool) -> Iterator[None]:
    if not show:
        yield
        return
    with _err.status(text):
        yield


@contextmanager
def _reading_bar(show: bool) -> Iterator[Callable[[int, int], None]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns, console=_err, disable=not (show and _err.is_terminal), transient=True
    ) as progress:
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


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No hub access, and none of transformers' own bars and notices among ours."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers.utils import logging

    transformers_logging: Any = logging
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()


def _print_json(result: Any) -> None:
    typer.echo(json.dumps(result))


def _size(num_bytes: int) -> str:
    from rich.filesize import decimal

    return decimal(num_bytes)
