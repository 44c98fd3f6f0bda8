"""The conversations of a folder: which there are, and forgetting one, its states included."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from llama_index.core.base.llms.types import ChatMessage, MessageRole

from hcache_rag.errors import SourceError
from hcache_rag.llama_index.conversation import CHATS, messages_in
from hcache_rag.llama_index.model_choice import STATES
from hcache_rag.store import PATHS, StateStore


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation that is kept.

    Args:
        name: of it.
        turns: answers that were given.
        last: what was said last, without the passages that were put in front.
        written_s: when, in seconds since 1970.
        problem: why it cannot be read, if it cannot.
    """

    name: str
    turns: int
    last: str
    written_s: float
    problem: str = ""


def chat_path(folder: Path, name: str) -> Path:
    """The file of a conversation."""
    return folder / CHATS / f"{name}.json"


def chats_in(folder: Path) -> list[Chat]:
    """The conversations of a folder, the last one first."""
    found = [_chat(path) for path in (folder / CHATS).glob("*.json")]
    return sorted(found, key=lambda chat: (-chat.written_s, chat.name))


def forget_chat(folder: Path, name: str) -> int:
    """Delete a conversation and the states that keep what was said in it; their number.

    A state goes where it holds a message of it, also where that is part of another conversation,
    which is then read afresh once.

    Raises:
        SourceError: there is no such conversation.
        StoreError: its states cannot be deleted; the conversation stays.
    """
    path = chat_path(folder, name)
    if not path.is_file():
        names = ", ".join(chat.name for chat in chats_in(folder)) or "none"
        raise SourceError(f"{folder} holds no conversation {name!r}; it holds: {names}")
    num_deleted = 0
    with suppress(SourceError):  # then nobody can say which states are its
        num_deleted = _delete_states(folder, messages_in(path, path.read_bytes()))
    path.unlink()
    return num_deleted


def _chat(path: Path) -> Chat:
    written_s = path.stat().st_mtime
    try:
        messages = messages_in(path, path.read_bytes())
    except SourceError as error:
        return Chat(path.stem, 0, "", written_s, str(error))
    asked = [m.content or "" for m in messages if m.role == MessageRole.USER]
    turns = sum(message.role == MessageRole.ASSISTANT for message in messages)
    return Chat(path.stem, turns, asked[-1].rpartition("\n\n")[2] if asked else "", written_s)


def _delete_states(folder: Path, messages: Sequence[ChatMessage]) -> int:
    asked = [(m.content or "").strip() for m in messages if m.role == MessageRole.USER]
    if not (folder / STATES).is_dir():
        return 0
    with StateStore.open(folder / STATES) as states:
        if not states.has_beside(PATHS):
            return 0
        with states.beside(PATHS) as paths:
            keys = [
                record.key
                for record in paths.records()
                if any(message in record.text for message in asked)
            ]
            return sum(map(paths.delete, keys))
