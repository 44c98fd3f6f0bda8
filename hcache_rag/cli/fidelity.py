"""The command `fidelity`: how near each position of the dial is to full prefill."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from hcache_rag.cli.console import (
    DEFAULT_STORE,
    DeviceOption,
    JsonOption,
    bar,
    check_device,
    err,
    one_of,
    out,
    picture,
    print_json,
    quiet_transformers,
    reported,
    say,
    status,
    writing,
)
from hcache_rag.errors import HCacheError

if TYPE_CHECKING:
    from hcache_rag.fidelity import Case, Estimate, FidelityReport
    from hcache_rag.llama_index.llm import HCacheLLM

ContextOption = Annotated[
    str | None,
    typer.Option(
        help="What passages are read after besides the preamble: none, or documents (those before "
        "them). (default: as the index was made, or none)"
    ),
]


_LEGEND = (
    "KL from full prefill of the next token in nats, first and over full prefill's answer; same "
    "first token; negative log-likelihood of the answer, per token, more than full prefill's; "
    "ROUGE-L against its answer; tokens read; seconds to the first token. Under means, the ends of "
    "95 % bootstrap intervals."
)
FEW = 10
"""With fewer prompts, intervals are rough."""


@reported
def fidelity(
    store: Annotated[
        Path | None,
        typer.Option(
            "--store", "-s", help="Index whose documents are asked about. (default: hcache-store)"
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Questions with passages instead: a HotpotQA, SQuAD, MuSiQue, NQ-open or "
            "LongBench file. The passages' states go to a temporary folder."
        ),
    ] = None,
    questions: Annotated[
        Path | None,
        typer.Option(
            help="Text file, a question a line. (default: first sentences of some documents)"
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Folder of a model. (default: the store's, or SmolLM2-135M-Instruct)"),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32 or bfloat16. (default: the store's, or float32)"),
    ] = None,
    device: DeviceOption = "auto",
    context_at_index: ContextOption = None,
    share: Annotated[
        list[float] | None,
        typer.Option(
            min=0, max=1, help="Also read this share of relocated tokens again; may be repeated."
        ),
    ] = None,
    tolerance: Annotated[
        float, typer.Option(help="Largest mean KL at the first token that is near enough, in nats.")
    ] = 0.1,
    records: Annotated[
        int | None,
        typer.Option(
            min=2, help="So many prompts. (default: 20, with --quick 4, or all --questions)"
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Documents in a prompt. (default: 4; with --data, a question's own passages)",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="The longest answer. (default: 32, with --quick 8)"),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Few prompts and short answers: a minute.")
    ] = False,
    write: Annotated[
        bool,
        typer.Option(
            "--write", help="Let the store use what is recommended, wherever no fidelity is named."
        ),
    ] = False,
    figure: Annotated[
        Path | None, typer.Option(help="Draw quality against time, as PNG, PDF or SVG.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare every position of the dial with full prefill, and recommend one.

    Each prompt is read in full and, restored, at every position; all that differs is measured.
    """
    started = time.perf_counter()
    if dtype is not None:
        one_of("--dtype", dtype, ("float32", "bfloat16"))
    check_device(device)
    if context_at_index is not None:
        one_of("--context-at-index", context_at_index, ("none", "documents"))
        if data is None:
            raise typer.BadParameter(
                "the documents of an index have been read already; it goes with --data",
                param_hint="--context-at-index",
            )
    if questions is not None and data is not None:
        raise typer.BadParameter("--data has its own questions", param_hint="--questions")
    if not (tolerance > 0 and math.isfinite(tolerance)):
        raise typer.BadParameter(f"{tolerance} is not a positive number", param_hint="--tolerance")
    target = _drawable(figure)
    persist_dir = (store or DEFAULT_STORE).expanduser()
    with quiet_transformers(), status("loading the model", not as_json):
        from hcache_rag.fidelity import POSITIONS, measure_fidelity
        from hcache_rag.llama_index import cases as sources
        from hcache_rag.llama_index.folder import open_states
        from hcache_rag.questions import read_questions, read_records

        choice = sources.model_for(
            persist_dir,
            model,
            dtype,
            needs_index=write or data is None or store is not None,
            context_at_index=context_at_index,
        )
        items = read_records(data.expanduser()) if data is not None else []
        asked = read_questions(questions.expanduser()) if questions is not None else []
        if write:
            open_states(persist_dir, read_only=False).close()  # before anything is measured
        llm = choice.load(None if data is not None else persist_dir, device=device, fidelity="none")
    count = records or (
        sources.QUICK_PROMPTS if quick else len(asked) if asked else sources.PROMPTS
    )

    def cases(on_progress: Callable[[int, int], None]) -> list[Case]:
        if data is not None:
            return sources.cases_of_records(
                llm, items, count=count, top_k=top_k, on_progress=on_progress
            )
        return sources.cases_of_index(
            persist_dir, llm, count=count, top_k=top_k or sources.TOP_K, questions=asked
        )

    with quiet_transformers(), closing(llm):
        with bar("reading passages", not as_json) as on_progress:
            prompts = cases(on_progress)
        with bar("comparing prompts", not as_json) as on_progress:
            report = measure_fidelity(
                llm.engine,
                prompts,
                (*POSITIONS, *(share or ())),
                tolerance_nats=tolerance,
                budget_s=sources.QUICK_S - (time.perf_counter() - started) if quick else math.inf,
                max_new_tokens=max_new_tokens
                or (sources.QUICK_ANSWER_TOKENS if quick else sources.ANSWER_TOKENS),
                on_progress=on_progress,
            )
        _show(report, llm, data or persist_dir, as_json)
        if target is not None:
            _draw(report, target)
        if write:
            sources.write_recommendation(persist_dir, llm, report)
            say(err, "written: ", "", f"{persist_dir} now asks for {report.recommendation}")


def _show(report: FidelityReport, llm: HCacheLLM, source: Path, as_json: bool) -> None:
    if as_json:
        print_json({"model": llm.model_name, "source": str(source), **report.to_dict()})
        return
    prompts = f"{report.prompts} prompts of {report.prompt_tokens:,.0f} tokens"
    say(out, prompts, "bold", f", {report.documents} documents, {llm.model_name}")
    out.print(table_of(report))
    out.print(_LEGEND, style="dim", highlight=False)
    out.print(layers_of(report))
    out.print("Relative error of restored tokens' K, and V.", style="dim", highlight=False)
    show_recommendation(report)


def table_of(report: FidelityReport) -> Table:
    """A row for full prefill and one for each position; means with the ends of intervals."""
    names = ("KL first", "KL", "same %", "NLL", "ROUGE-L", "read", "s")
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row("full", *[""] * 5, f"{report.prompt_tokens:,.0f}", f"{report.full_s:.2f}")
    for row in report.positions:
        chosen = row.position == report.recommendation
        table.add_row(
            Text(str(row.position), "bold" if chosen else ""),
            *map(_interval, (row.kl_first, row.kl)),
            _interval(row.top1, is_share=True),
            *map(_interval, (row.nll, row.rouge_l)),
            f"{row.tokens:,.0f}",
            f"{row.seconds:.2f}",
        )
    return table


def layers_of(report: FidelityReport) -> Table:
    """A row for each position: the errors of K and V of some layers, the first and the last too."""
    last = len(report.positions[0].layers.keys) - 1
    shown = sorted({round(last * quarter / 4) for quarter in range(5)})
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for layer in shown:
        table.add_column(f"layer {layer}", justify="right", no_wrap=True)
    for row in report.positions:
        pairs = [(row.layers.keys[layer], row.layers.values[layer]) for layer in shown]
        table.add_row(str(row.position), *(f"{key:.1%} {value:.1%}" for key, value in pairs))
    return table


def show_recommendation(report: FidelityReport) -> None:
    """The recommendation in a sentence, and why prompts were left out."""
    for reason, count in Counter(report.left_out).items():
        say(err, "left out:", "yellow", f" {count} prompt(s): {reason}")
    if report.prompts < FEW:
        rough = f" {report.prompts} prompts give rough intervals; see --records"
        say(err, "note:", "yellow", rough)
    say(out, f"recommended: {report.recommendation}", "bold", f", {report.reason}")


def _interval(estimate: Estimate, is_share: bool = False) -> str:
    """The mean, and under it the ends of its interval."""
    if is_share:
        mean, low, high = (100 * end for end in (estimate.mean, estimate.low, estimate.high))
        return f"{mean:.0f}\n{low:.0f}..{high:.0f}"
    return f"{_short(estimate.mean)}\n{_short(estimate.low)}..{_short(estimate.high)}"


def _short(number: float) -> str:
    """Two or three decimals; what rounds to nothing has no sign."""
    digits = 2 if abs(number) >= 0.1 else 3
    return f"{round(number, digits) + 0.0:.{digits}f}"


def check(persist_dir: Path, llm: HCacheLLM, as_json: bool) -> dict[str, Any]:
    """Measure an index shortly, write down what is recommended, and say so; or why not.

    Returns:
        The report for `--json`, with `written`, or the `error` that kept it from being made.
    """
    from hcache_rag.llama_index.cases import check_index, write_recommendation

    report, error, found = None, None, dict[str, Any]()
    try:
        with bar("comparing prompts", not as_json) as on_progress:
            report = check_index(persist_dir, llm, on_progress=on_progress)
        write_recommendation(persist_dir, llm, report)
    except HCacheError as failure:
        error = failure
    if report is not None:
        found = report.to_dict()
    if not as_json:
        if report is not None:
            show_recommendation(report)
        if error is not None:
            say(err, "fidelity:", "yellow", f" {error}")
    return {**found, "written": error is None, "error": str(error) if error else None}


def _drawable(figure: Path | None) -> Path | None:
    """Where the figure goes; what keeps it from being drawn is found out before anything else."""
    if figure is None:
        return None
    target = picture(figure.expanduser())
    with writing(target):
        from matplotlib.figure import Figure

        formats: Any = Figure().canvas.get_supported_filetypes()
        if target.suffix.removeprefix(".") not in formats:
            raise ValueError(f"a figure is one of {', '.join(sorted(formats))}")
        if not target.parent.is_dir():
            raise FileNotFoundError(None, "no such folder")
    return target


def _draw(report: FidelityReport, target: Path) -> None:
    with writing(target):
        from hcache_rag.figure import draw_fidelity

        draw_fidelity(report, target)
    say(err, "drawn: ", "", str(target))
