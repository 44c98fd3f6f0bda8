"""The command that talks: `chat`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

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

_FIRST = "You are a helpful assistant. Answer briefly."


@reported
def chat(
    store: StoreOption = DEFAULT_STORE,
    name: Annotated[
        str, typer.Option(help="Which conversation: it goes on where it was left.")
    ] = "default",
    new: Annotated[bool, typer.Option("--new", help="Begin it anew.")] = False,
    top_k: Annotated[
        int, typer.Option(min=0, help="Passages to retrieve for each message, from an index.")
    ] = 2,
    model: Annotated[
        str | None,
        typer.Option(help="Folder of a model.  [default: the index's, or SmolLM2-135M-Instruct]"),
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

    Reads a message from each line; an empty line, the end of the input or Ctrl-C ends it. An answer
    that is interrupted is forgotten.
    """
    dial = dial_position(fidelity)
    check_device(device)
    if not name or name.startswith(".") or Path(name).name != name:
        raise typer.BadParameter(f"{name!r} is no file name", param_hint="--name")
    folder = store.expanduser()
    with quiet_transformers(), status("loading the model", not as_json):
        from hcache_rag.llama_index.conversation import CHATS, Conversation
        from hcache_rag.llama_index.folder import ModelChoice, has_index
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
        path = folder / CHATS / f"{name}.json"
        if new:
            path.unlink(missing_ok=True)
        conversation = Conversation(llm, path, retriever=retriever, system=system)
        if not is_index and not as_json:
            say(err, f"{folder} holds no index: there are no passages to talk about", "dim", "")
        if conversation.num_turns and not as_json:
            say(err, f"{name}: going on after {conversation.num_turns} turn(s)", "dim", "")
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
    """Messages, up to the first empty one."""
    is_person = sys.stdin.isatty() and show
    while True:
        try:
            line = input("> ") if is_person else sys.stdin.readline()
            line.encode()
        except EOFError:
            return
        except UnicodeError as error:
            raise SourceError(f"the input is no text: {error}") from error
        if not line.strip():
            return
        yield line.strip()
