"""The commands about what is kept: `stats`, `verify`, `gc`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from hcache_rag.cli.console import (
    DEFAULT_STORE,
    JsonOption,
    StoreOption,
    bar,
    err,
    out,
    print_json,
    quiet_transformers,
    reported,
    say,
    size,
)
from hcache_rag.errors import DamagedStoreError

if TYPE_CHECKING:
    from collections.abc import Callable

    from hcache_rag.store import StateStore
    from hcache_rag.store.verify import VerifyReport


@reported
def stats(store: StoreOption = DEFAULT_STORE, as_json: JsonOption = False) -> None:
    """Show what a store holds, and how it is used."""
    from hcache_rag.llama_index.folder import open_states

    with open_states(store) as states:
        found = states.stats()
    result = {**asdict(found), "free_bytes": found.free_bytes}
    if as_json:
        print_json(result)
        return
    table = Table(title=Text(str(store)), show_header=False)
    table.add_row("documents", f"{found.documents:,}")
    table.add_row("tokens (preambles included)", f"{found.tokens:,}")
    table.add_row("preambles", f"{found.preambles:,}")
    table.add_row("bytes of states", size(found.state_bytes))
    limit = f", at most {size(found.max_bytes)}" if found.max_bytes else ""
    table.add_row("file", f"{size(found.file_bytes)}, {size(found.free_bytes)} free in it{limit}")
    for name, count in found.models.items():
        table.add_row(Text(f"documents of {name}"), f"{count:,}")
        table.add_row("  bytes a token", f"{found.bytes_per_token[name]:,.0f}")
        if name in found.layouts:
            table.add_row("  each layer keeps", Text(found.layouts[name].partition(";")[0]))
        if name in found.fidelities:
            table.add_row("  fidelity, as measured", Text(str(found.fidelities[name])))
    asked = found.hits + found.misses
    share = f"{found.hits / asked:.0%} of {asked:,}" if asked else "none was asked for"
    table.add_row("documents found when asked for", share)
    if found.damaged:
        table.add_row("damaged states, dropped", f"{found.damaged:,}")
    if found.evictions:
        table.add_row("states that had to go", f"{found.evictions:,}, {size(found.evicted_bytes)}")
    if found.documents:
        table.add_row("oldest state", f"{_age(found.oldest_s)} old")
    if found.idle_s is not None:
        table.add_row("last used", f"{_age(found.idle_s)} ago")
    if found.paths:
        table.add_row("states of conversations", f"{found.paths:,}, {size(found.path_bytes)}")
    if len(found.namespaces) > 1:
        table.add_row("namespaces", Text(", ".join(found.namespaces)))
    out.print(table)


@reported
def verify(
    store: StoreOption = DEFAULT_STORE,
    repair: Annotated[
        bool, typer.Option("--repair", help="Drop what is damaged, and read those documents again.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Read and check everything that is stored; exit code 1 if something is damaged."""
    from hcache_rag.llama_index.folder import open_states, read_again, salvage_states
    from hcache_rag.store import PATHS

    salvaged = None
    try:
        opened = open_states(store, read_only=not repair)
    except DamagedStoreError:
        if not repair:
            raise
        salvaged = salvage_states(store.expanduser())
        say(err, "the file was damaged", "red", f": {salvaged.problems[0]}")
        say(err, f"{salvaged.states:,} states were saved", "green", f"; it is in {salvaged.kept}")
        opened = open_states(store, read_only=False)
    with opened as states:
        with bar("checking states", not as_json) as on_progress:
            report = _checked(states, repair, on_progress)
        conversations = None
        if states.has_beside(PATHS):
            with states.beside(PATHS) as paths:
                conversations = _checked(paths, repair)
    texts = [d.text for d in report.damaged if d.text and not d.is_preamble]
    again = 0
    if repair and (report.damaged or salvaged is not None):
        with quiet_transformers():
            again = read_again(store.expanduser(), texts if salvaged is None else None)
    if as_json:
        its = {"conversations": _as_json(conversations, 0)} if conversations is not None else {}
        print_json({**_as_json(report, again), **its})
    else:
        _print_report(report, repair, again)
        if conversations is not None:
            _print_conversations(conversations, repair)
    is_whole = report.is_whole and (conversations is None or conversations.is_whole)
    if not is_whole and not repair:
        raise typer.Exit(1)


@reported
def gc(
    store: StoreOption = DEFAULT_STORE,
    compact: Annotated[
        bool,
        typer.Option(
            "--compact", help="Give the disk back what is free. Nobody else may have it open."
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Delete the states of texts that are not in the index any more."""
    from hcache_rag.llama_index.folder import collect_garbage

    done = collect_garbage(store.expanduser(), compact=compact)
    if as_json:
        print_json(asdict(done))
    else:
        out.print(f"{done.deleted} state(s) deleted, {size(done.freed_bytes)} free for others")
        if done.returned_bytes is not None:
            out.print(f"{size(max(0, done.returned_bytes))} given back to the disk")
    if done.refused is not None:
        say(err, "not compacted:", "red", f" {done.refused}")
        raise typer.Exit(1)


def _checked(
    states: StateStore, repair: bool, on_progress: Callable[[int, int], None] | None = None
) -> VerifyReport:
    """What is damaged in a namespace, which is repaired if that was asked for."""
    report = states.verify(on_progress)
    if repair and not report.is_whole:
        states.repair(report)
    return report


def _print_conversations(report: VerifyReport, is_repaired: bool) -> None:
    out.print(f"{report.states:,} states of conversations were checked")
    if not report.is_whole:
        what = "dropped" if is_repaired else "--repair drops them"
        say(out, "damaged: ", "red", f"{len(report.damaged) or 'some'} of these; {what}")


def _as_json(report: VerifyReport, again: int) -> dict[str, Any]:
    damaged = [
        {"key": d.key.hex(), "text": d.text[:80], "is_preamble": d.is_preamble, "reason": d.reason}
        for d in report.damaged
    ]
    return {
        **asdict(report),
        "damaged": damaged,
        "is_whole": report.is_whole,
        "read_again": again,
    }


def _print_report(report: VerifyReport, is_repaired: bool, again: int) -> None:
    out.print(
        f"{report.states:,} states, {report.values:,} values, {size(report.num_bytes)} were checked"
    )
    for damage in report.damaged:
        what = repr(damage.text[:40]) if damage.text else damage.key.hex()
        say(out, "damaged: ", "red", f"{what}: {damage.reason}")
    if report.strays:
        say(out, "strays: ", "yellow", f"{report.strays:,} rows belong to no state")
    if not report.is_sum_right:
        say(out, "sums: ", "yellow", "what is counted is not what is there")
    if report.is_whole:
        say(out, "all is well", "green", "")
    elif is_repaired:
        dropped = (
            f"; {len(report.damaged)} damaged state(s) dropped, {again} document(s) read again"
        )
        say(out, "repaired", "green", dropped)
    else:
        say(out, "nothing was changed", "", "; --repair drops it and reads those documents again")


def _age(seconds: float) -> str:
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            count = int(seconds // length)
            return f"{count} {unit}{'s' if count != 1 else ''}"
    return f"{int(seconds)} s"
