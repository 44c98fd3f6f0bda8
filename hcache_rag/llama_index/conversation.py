"""A conversation with an LLM, over an index or over nothing, that goes on where it was left."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.llms.types import ChatMessage, MessageRole

from hcache_rag.errors import SourceError
from hcache_rag.llama_index.llm import HCacheLLM
from hcache_rag.llama_index.text import file_of, llm_text

CHATS = "chats"
"""The folder of conversations in a store's folder."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What was said to a message.

    Args:
        text: the answer.
        sources: files, or ids of nodes, whose passages were put before the message.
        first_text_s: from the message to the first piece of the answer.
        provenance: `hcache_rag.Provenance.to_dict()`.
    """

    text: str
    sources: tuple[str, ...]
    first_text_s: float
    provenance: dict[str, Any]


class Conversation:
    """Messages and answers, one after another.

    The passages that are retrieved for a message stand in that message, and none stands twice: so a
    prompt only ever grows at its end, and all that was said before is restored as it was.

    Args:
        llm: with `chat_memory="always"`, what is said is kept in its store.
        path: a file that holds the messages, and is written after each turn.
        retriever: gives the passages for a message.
        system: what a new conversation begins with.

    Raises:
        SourceError: the file holds no conversation.
    """

    def __init__(
        self,
        llm: HCacheLLM,
        path: Path | None = None,
        *,
        retriever: BaseRetriever | None = None,
        system: str = "",
    ) -> None:
        self._llm = llm
        self._path = path
        self._retriever = retriever
        self._held = path.read_bytes() if path is not None and path.is_file() else None
        found = (
            messages_in(path, self._held) if path is not None and self._held is not None else None
        )
        first = [ChatMessage(role=MessageRole.SYSTEM, content=system)] if system else []
        self.messages: list[ChatMessage] = found if found is not None else first

    @property
    def num_turns(self) -> int:
        """Answers that were given."""
        return sum(message.role == MessageRole.ASSISTANT for message in self.messages)

    def say(self, text: str, on_text: Callable[[str], None] | None = None) -> Turn:
        """Say something; the answer. Where it fails, nothing was said.

        Raises:
            PromptTooLongError: the conversation fills the model's window.
            SourceError: nothing was said.
        """
        if not text.strip():
            raise SourceError("the message is empty")
        started, first_text_s = time.perf_counter(), 0.0
        passages, sources = self._passages(text)
        content = "\n\n".join([*passages, text])
        messages = [*self.messages, ChatMessage(role=MessageRole.USER, content=content)]
        response = None
        for response in self._llm.stream_chat(messages):
            if response.delta:
                first_text_s = first_text_s or time.perf_counter() - started
                if on_text:
                    on_text(response.delta)
        if response is None:
            raise SourceError("the model gave no answer")
        answer = response.message.content or ""
        self.messages = [*messages, ChatMessage(role=MessageRole.ASSISTANT, content=answer)]
        if self._path is not None:
            self._held = _write(self._path, self.messages, self._held)
        its = response.additional_kwargs["hcache"]
        return Turn(answer, tuple(sources), first_text_s, its)

    def _passages(self, text: str) -> tuple[list[str], list[str]]:
        """Passages for a message that were not there before, and where they come from."""
        if self._retriever is None:
            return [], []
        said = "\n".join(message.content or "" for message in self.messages)
        found = {
            passage: file_of(node.node)
            for node in self._retriever.retrieve(text)
            if (passage := llm_text(node.node)) and passage not in said
        }
        return list(found), list(dict.fromkeys(found.values()))


def messages_in(path: Path, data: bytes) -> list[ChatMessage]:
    """What a conversation's file holds.

    Raises:
        SourceError: that is no conversation.
    """
    try:
        rows = json.loads(data)
        if not isinstance(rows, list):
            raise ValueError("not a list of messages")
        return [ChatMessage(role=MessageRole(r["role"]), content=str(r["content"])) for r in rows]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise SourceError(f"{path} holds no conversation: {error}") from error


def _write(path: Path, messages: Sequence[ChatMessage], held: bytes | None) -> bytes:
    """Replace the file at once; only its user can read it.

    Args:
        held: what it held when it was last looked at, None where there was none.

    Returns:
        What it holds now.

    Raises:
        SourceError: that does not go, or it holds something else by now.
    """
    rows = [{"role": m.role.value, "content": m.content or ""} for m in messages]
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        if (path.read_bytes() if path.is_file() else None) != held:
            raise SourceError(f"{path} goes on elsewhere: this turn is not kept")
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        data = json.dumps(rows, indent=1).encode()
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        beside.replace(path)
    except OSError as error:
        with suppress(OSError):
            beside.unlink()
        raise SourceError(f"{path} cannot be written: {error.strerror}") from error
    return data
