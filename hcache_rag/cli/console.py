"""What all commands share: the consoles, one-line errors, options, quiet libraries."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, ParamSpec

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from hcache_rag.errors import HCacheError

out = Console()
err = Console(stderr=True)
_P = ParamSpec("_P")

StoreOption = Annotated[
    Path, typer.Option("--store", "-s", help="Folder that holds the index and the states.")
]
DeviceOption = Annotated[
    str,
    typer.Option(
        help="Where the model computes: cpu, cuda, cuda:1, or auto, a GPU if torch sees one."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
DEFAULT_STORE = Path("hcache-store")


def reported(command: Callable[_P, None]) -> Callable[_P, None]:
    """Make every foreseeable failure of a command one line and exit code 1."""

    @wraps(command)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt:
            stays = "; what was stored stays, the next run goes on from there"
            say(err, "interrupted", "yellow", stays if command.__name__ == "index" else "")
            raise typer.Exit(130) from None
        except HCacheError as error:
            say(err, "error:", "red", f" {error}")
            raise typer.Exit(1) from None

    return run


def say(console: Console, label: str, style: str, text: str) -> None:
    """One line with a coloured beginning; nothing in `text` is markup."""
    console.print(Text.assemble((label, style), text), soft_wrap=True)


def one_of(option: str, value: str, known: tuple[str, ...]) -> None:
    """Refuse a value that is not known.

    Raises:
        typer.BadParameter: naming the option and what is known.
    """
    if value not in known:
        raise typer.BadParameter(f"{value!r} is not one of {', '.join(known)}", param_hint=option)


def check_device(device: str) -> None:
    """Refuse a device that this machine has not.

    Raises:
        typer.BadParameter: naming the devices that there are.
    """
    if device in ("auto", "cpu"):
        return
    from hcache_rag.models import device_named

    try:
        device_named(device)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--device") from error


def dial_position(fidelity: str) -> str | float:
    """A position of the dial, by name or as a share.

    Raises:
        typer.BadParameter: neither.
    """
    try:
        share = float(fidelity)
    except ValueError:
        one_of("--fidelity", fidelity, ("auto", "exact", "high", "balanced", "fast", "none"))
        return fidelity
    if not 0 <= share <= 1:
        raise typer.BadParameter(f"{fidelity} is not a share from 0 to 1", param_hint="--fidelity")
    return share


@contextmanager
def status(text: str, show: bool) -> Iterator[Callable[[str], None]]:
    """A line that says what is being done; call what is given to change it."""
    if not show:
        yield lambda _text: None
        return
    with err.status(text) as shown:
        yield shown.update


@contextmanager
def bar(text: str, show: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal; call what is given with (done, all)."""
    with progress_of(show) as progress:
        task = progress.add_task(text, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def progress_of(show: bool) -> Progress:
    """What bars are drawn on, if somebody looks; it is gone afterwards."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=err, disable=not (show and err.is_terminal), transient=True)


def picture(path: Path) -> Path:
    """Where a picture goes: PNG, if the name does not say what else."""
    return path if path.suffix or path.is_dir() else path.with_suffix(".png")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Make what keeps a picture from being written one line; folders are refused at once.

    Raises:
        HCacheError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        yield
    except ImportError as error:
        raise HCacheError(
            f"drawing needs matplotlib: pip install 'hcache-rag[plot]' ({error})"
        ) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise HCacheError(f"cannot write {path}: {reason}") from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
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


def print_json(result: Any) -> None:
    """One JSON object on a line of its own."""
    typer.echo(json.dumps(result))


def size(num_bytes: float) -> str:
    """Bytes for people."""
    from rich.filesize import decimal

    return decimal(round(num_bytes))
