"""The command that talks: `chat`, and what it keeps of that."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from hcache_rag.cli.console import (
    DEFAULT_STORE,
    DeviceOption,
    JsonOption,
    StoreOption,
    check_device,
    dial_position,
    err,
    out,
    print_json,
    quiet_transformers,
    reported,
    say,
    size,
    status,
)
from hcache_rag.errors import PromptTooLongError, SourceError

_EXIT = "/exit"
_FIRST = "You are a helpful assistant. Answer briefly."


@reported
def chat(
    store: StoreOption = DEFAULT_STORE,
    name: Annotated[
        str, typer.Option(help="Which conversation: it goes on where it was left.")
    ] = "default",
    new: Annotated[
        bool, typer.Option("--new", help="Begin it anew; what was said before is deleted.")
    ] = False,
    show_list: Annotated[
        bool, typer.Option("--list", help="Show the conversations that are kept, and end.")
    ] = False,
    delete: Annotated[
        bool,
        typer.Option("--delete", help="Delete the conversation and its states, and end."),
    ] = False,
    top_k: Annotated[
        int, typer.Option(min=0, help="Passages to retrieve for each message, from an index.")
    ] = 2,
    model: Annotated[
        str | None,
        typer.Option(help="Folder of a model. (default: the index's, or SmolLM2-135M-Instruct)"),
    ] = None,
    system: Annotated[str, typer.Option(help="What a new conversation begins with.")] = _FIRST,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 128,
    fidelity: Annotated[
        str, typer.Option(help="Closeness of passages to full prefill, as in `ask`.")
    ] = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Talk with a model that restores what was said before, also when it is started again.

    Each line is a message. /exit, Ctrl-D or Ctrl-C ends it; an interrupted answer is forgotten.
    """
    dial = dial_position(fidelity)
    check_device(device)
    if not name or name.startswith(".") or Path(name).name != name:
        raise typer.BadParameter(f"{name!r} is no file name", param_hint="--name")
    folder = store.expanduser()
    if show_list:
        return _show_chats(folder, as_json)
    if delete:
        return _delete(folder, name, as_json)
    with quiet_transformers(), status("loading the model", not as_json):
        from hcache_rag.llama_index.chats import chat_path, forget_chat
        from hcache_rag.llama_index.conversation import Conversation
        from hcache_rag.llama_index.model_choice import ModelChoice, has_index
        from hcache_rag.llama_index.retriever import HCacheRetriever

        is_index = has_index(folder)
        if is_index and model is not None:
            raise SourceError(f"{folder} holds an index, whose model is used; leave --model out")
        choice = (
            ModelChoice.of(folder) if is_index else ModelChoice(model and os.path.abspath(model))
        )
        llm = choice.load(
            folder,
            device=device,
            max_new_tokens=max_new_tokens,
            fidelity=dial,
            chat_memory="always",
        )
    with quiet_transformers(), closing(llm):
        retriever = None
        if is_index and top_k:
            retriever = HCacheRetriever.from_persist_dir(folder, llm=llm, similarity_top_k=top_k)
        path = chat_path(folder, name)
        if new and path.is_file():
            forget_chat(folder, name)
        conversation = Conversation(llm, path, retriever=retriever, system=system)
        if not is_index and not as_json:
            say(err, f"{folder} holds no index: there are no passages to talk about", "dim", "")
        if conversation.num_turns and not as_json:
            say(err, f"{name}: going on after {conversation.num_turns} turn(s)", "dim", "")
        if _is_person(not as_json):
            say(err, "/exit or Ctrl-D ends it", "dim", "")
        for line in _lines(not as_json):
            try:
                turn = conversation.say(
                    line, None if as_json else lambda text: out.out(text, end="", highlight=False)
                )
            except KeyboardInterrupt:
                out.print()  # what was said of the answer stands on a line of its own
                raise
            except PromptTooLongError as error:
                advice = "; begin anew with --new" if conversation.num_turns else ""
                raise SourceError(f"{error}{advice}") from error
            if as_json:
                print_json(asdict(turn))
                continue
            out.print()
            its = turn.provenance
            sources = f" · from {', '.join(turn.sources)}" if turn.sources else ""
            account = (
                f"first text after {turn.first_text_s * 1e3:,.0f} ms · of {its['prompt_tokens']:,} "
                f"tokens {its['exact_tokens']:,} restored as they were, "
                f"{its['relocated_tokens'] + its['repaired_tokens']:,} from passages, "
                f"{its['fresh_tokens']:,} read · {size(its['bytes_read'])} from the store{sources}"
            )
            say(err, account, "dim", "")


def _lines(show: bool) -> Iterator[str]:
    """Messages, up to /exit or the end of the input; empty ones are none."""
    is_person = _is_person(show)
    while True:
        try:
            line = input("> ") if is_person else sys.stdin.readline()
            line.encode()
        except EOFError:
            out.print()  # the shell's prompt stands on a line of its own
            return
        except UnicodeError as error:
            raise SourceError(f"the input is no text: {error}") from error
        if line.strip() == _EXIT or (not line and not is_person):
            return
        if line.strip():
            yield line.strip()


def _is_person(show: bool) -> bool:
    return sys.stdin.isatty() and show


def _show_chats(folder: Path, as_json: bool) -> None:
    from hcache_rag.llama_index.chats import chats_in

    chats = chats_in(folder)
    if as_json:
        print_json({"conversations": [asdict(chat) for chat in chats]})
        return
    if not chats:
        say(out, f"{folder} holds no conversation", "", "")
        return
    table = Table("name", "turns", "last turn", "last message", box=None)
    for chat in chats:
        written = datetime.fromtimestamp(chat.written_s).strftime("%Y-%m-%d %H:%M")
        said = Text(chat.last, no_wrap=True, overflow="ellipsis")
        table.add_row(Text(chat.name), f"{chat.turns:,}", written, said)
    out.print(table)
    for chat in chats:
        if chat.problem:
            say(err, "warning:", "yellow", f" {chat.problem}")


def _delete(folder: Path, name: str, as_json: bool) -> None:
    from hcache_rag.llama_index.chats import forget_chat

    num_states = forget_chat(folder, name)
    if as_json:
        print_json({"deleted": name, "states": num_states})
    else:
        say(out, f"{name}: deleted", "", f", and {num_states:,} state(s) of what was said in it")
