"""Conversations over an index or over nothing, by the library and by `hcache-rag chat`."""

from __future__ import annotations

import io
import json
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import Run, assert_one_error_line, assert_usage_error
from fakes import PRINTABLE, FixedRetriever, chat_tokenizer, save_tiny_model
from llama_index.core.base.llms.types import ChatMessage, MessageRole
from llama_index.core.chat_engine import SimpleChatEngine
from llama_index.core.memory import ChatMemoryBuffer
from tiny import SHAPES, tiny_model

from hcache_rag import StateStore
from hcache_rag.errors import PromptTooLongError, SourceError
from hcache_rag.llama_index import HCacheLLM
from hcache_rag.llama_index.conversation import CHATS, Conversation
from hcache_rag.store import PATHS

pytestmark = pytest.mark.usefixtures("one_thread")

PASSAGES = (
    "Venus is the second planet from the Sun, and has no moon at all.",
    "Mars has two moons, Phobos and Deimos, which were found in 1877.",
)


@pytest.fixture
def new_llm(tmp_path: Path) -> Iterator[Callable[..., HCacheLLM]]:
    """Makes LLMs with one store."""
    made: list[HCacheLLM] = []

    def make(**options: Any) -> HCacheLLM:
        its: dict[str, Any] = {
            "model": tiny_model(SHAPES[2]),
            "tokenizer": chat_tokenizer(),
            "store": tmp_path / "states",
            "max_new_tokens": 8,
            "generate_kwargs": PRINTABLE,
            "chat_memory": "always",
        }
        made.append(HCacheLLM(**its | options))
        return made[-1]

    yield make
    for llm in made:
        llm.close()


def retriever_of(*passages: str) -> FixedRetriever:
    return FixedRetriever(passages)


def spoken(*contents: str) -> list[ChatMessage]:
    """Messages of a user and an assistant in turn."""
    roles = (MessageRole.USER, MessageRole.ASSISTANT)
    return [ChatMessage(role=roles[n % 2], content=text) for n, text in enumerate(contents)]


def exact(response: Any) -> int:
    return int(response.additional_kwargs["hcache"]["exact_tokens"])


# --- the LLM --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("memory", "kept"), [("never", [False, False]), ("auto", [False, True]), ("always", [True] * 2)]
)
def test_which_conversations_are_kept(
    new_llm: Callable[..., HCacheLLM], memory: str, kept: list[bool]
) -> None:
    """By default those that hold an answer: a single question may have no second one."""
    llm = new_llm(chat_memory=memory)
    for messages, expected in zip(
        (spoken("One."), spoken("One.", "Two", "Three.")), kept, strict=True
    ):
        llm.chat(messages)
        llm.engine.flush()
        assert llm.engine.store.has_beside(PATHS) is expected


def test_what_is_no_memory_is_refused(new_llm: Callable[..., HCacheLLM]) -> None:
    with pytest.raises(ValueError, match="chat_memory"):
        new_llm(chat_memory="sometimes")


@pytest.mark.parametrize("way", ["chat", "stream_chat"])
def test_a_simple_chat_engine_goes_on(new_llm: Callable[..., HCacheLLM], way: str) -> None:
    """Turn after turn through LlamaIndex, with the answers of an LLM that remembers nothing."""
    texts = []
    for memory in ("never", "always"):
        llm = new_llm(chat_memory=memory)
        engine = SimpleChatEngine.from_defaults(
            llm=llm, memory=ChatMemoryBuffer.from_defaults(token_limit=3000, tokenizer_fn=list)
        )
        for text in ("Hello, how are you today?", "And tomorrow?", "And then?"):
            response = getattr(engine, way)(text)
            texts.append("".join(response.response_gen) if way == "stream_chat" else str(response))
        last = llm.chat([*engine.chat_history[:-1]])
        assert (exact(last) > 0.7 * last.additional_kwargs["prompt_tokens"]) is (memory == "always")
    assert texts[:3] == texts[3:]


# --- conversations --------------------------------------------------------------------------------


def test_it_goes_on_where_it_was_left(new_llm: Callable[..., HCacheLLM], tmp_path: Path) -> None:
    path = tmp_path / "chats" / "one.json"
    llm = new_llm()
    one = Conversation(llm, path, system="Be brief, and be kind.")
    first = one.say("Hello, how are you today?")
    llm.engine.flush()  # as its end would; another LLM does not wait for this one
    assert one.num_turns == 1
    again = Conversation(new_llm(), path, system="Something else.")
    assert [m.content for m in again.messages] == [m.content for m in one.messages]
    second = again.say("And tomorrow?")
    assert first.provenance["exact_tokens"] == 0
    assert second.provenance["exact_tokens"] > first.provenance["prompt_tokens"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in path.parent.iterdir()] == ["one.json"]


def test_passages_stand_in_their_own_turn_and_once(new_llm: Callable[..., HCacheLLM]) -> None:
    """So that what was said before stays a beginning of what is said next."""
    llm = new_llm()
    llm.engine.precompute(PASSAGES)
    conversation = Conversation(llm, retriever=retriever_of(PASSAGES[0]))
    first = conversation.say("Does Venus have a moon?")
    assert first.provenance["documents_restored"] == 1
    assert len(first.sources) == 1
    conversation._retriever = retriever_of(*PASSAGES)
    second = conversation.say("And Mars?")
    assert second.provenance["documents_restored"] == 1
    assert second.provenance["exact_tokens"] >= first.provenance["prompt_tokens"]
    texts = [message.content for message in conversation.messages if message.role == "user"]
    assert texts == [
        f"{PASSAGES[0]}\n\nDoes Venus have a moon?",
        f"{PASSAGES[1]}\n\nAnd Mars?",
    ]


def test_what_fails_was_not_said(new_llm: Callable[..., HCacheLLM], tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    conversation = Conversation(new_llm(), path)
    conversation.say("Hello.")
    before = path.read_text()
    with pytest.raises(SourceError, match="empty"):
        conversation.say("  ")
    with pytest.raises(PromptTooLongError):
        conversation.say("too long " * 1000)
    assert conversation.num_turns == 1
    assert path.read_text() == before


@pytest.mark.parametrize(
    "data",
    ["", "{", "{}", "[1]", '[{"role": "nobody", "content": ""}]', '[{"role": "user"}]', "[" * 5000],
)
def test_a_file_that_holds_no_conversation_is_one_error(
    new_llm: Callable[..., HCacheLLM], tmp_path: Path, data: str
) -> None:
    path = tmp_path / "chat.json"
    path.write_text(data)
    with pytest.raises(SourceError, match="holds no conversation"):
        Conversation(new_llm(), path)


def test_two_that_go_on_from_one_file_do_not_lose_each_other(
    new_llm: Callable[..., HCacheLLM], tmp_path: Path
) -> None:
    """Who comes second is told."""
    path = tmp_path / "chat.json"
    one, two = Conversation(new_llm(), path), Conversation(new_llm(), path)
    one.say("Hello.")
    before = path.read_text()
    with pytest.raises(SourceError, match="goes on elsewhere"):
        two.say("Good morning.")
    assert path.read_text() == before
    one.say("And now?")
    assert Conversation(new_llm(), path).num_turns == 2


def test_a_file_that_cannot_be_written_is_one_error(
    new_llm: Callable[..., HCacheLLM], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    conversation = Conversation(new_llm(), tmp_path / "file" / "chat.json")
    with pytest.raises(SourceError, match="cannot be written"):
        conversation.say("Hello.")


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), chat=True))


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """What somebody types."""
    return lambda text: monkeypatch.setattr("sys.stdin", io.StringIO(text))


def test_chat_goes_on_after_a_restart(
    run: Run, typed: Callable[[str], None], model: str, tmp_path: Path
) -> None:
    its = ("--store", tmp_path / "store", "--model", model, "--max-new-tokens", "6", "--json")
    typed("Hello, how are you today?\nAnd tomorrow?\n")
    outcome = run("chat", *its)
    assert outcome.code == 0
    assert outcome.err == ""
    first, second = map(json.loads, outcome.out.splitlines())
    assert second["provenance"]["exact_tokens"] > first["provenance"]["prompt_tokens"]
    typed("\n\nAnd then?\n\n  /exit \nnot read any more\n")
    outcome = run("chat", *its)
    [third] = map(json.loads, outcome.out.splitlines())
    assert third["provenance"]["exact_tokens"] > second["provenance"]["prompt_tokens"]
    typed("And then?\n")
    [anew] = map(json.loads, run("chat", *its, "--new").out.splitlines())
    assert anew["provenance"]["prompt_tokens"] < third["provenance"]["prompt_tokens"]
    assert [path.name for path in (tmp_path / "store" / CHATS).iterdir()] == ["default.json"]


def test_conversations_are_listed_and_deleted_with_their_states(
    run: Run, typed: Callable[[str], None], model: str, tmp_path: Path
) -> None:
    """What was said in another one stays, and is restored."""
    store = tmp_path / "store"
    its = ("--store", store, "--model", model, "--max-new-tokens", "6", "--json")
    for name in ("secrets", "weather"):
        typed(f"Let us talk of {name} today.\nWhat else of {name}?\n")
        run("chat", *its, "--name", name)
    (store / CHATS / "broken.json").write_text("{}")
    listed = json.loads(run("chat", "--store", store, "--list", "--json").out)["conversations"]
    assert {row["name"]: (row["turns"], row["last"]) for row in listed} == {
        "secrets": (2, "What else of secrets?"),
        "weather": (2, "What else of weather?"),
        "broken": (0, ""),
    }
    shown = run("chat", "--store", store, "--list")
    assert "What else of weather?" in shown.out
    assert "broken.json holds no conversation: not a list of messages" in shown.err

    assert texts_of_paths(store, "secrets") == texts_of_paths(store, "weather") == 2
    outcome = run("chat", "--store", store, "--name", "secrets", "--delete")
    assert outcome.out == "secrets: deleted, and 2 state(s) of what was said in it\n"
    assert (texts_of_paths(store, "secrets"), texts_of_paths(store, "weather")) == (0, 2)
    assert_one_error_line(
        run("chat", "--store", store, "--name", "secrets", "--delete"),
        "holds no conversation 'secrets'; it holds: broken, weather",
    )
    assert run("chat", "--store", store, "--name", "broken", "--delete").code == 0
    typed("And now?\n")
    turn = json.loads(run("chat", *its, "--name", "weather").out)
    assert turn["provenance"]["exact_tokens"] > len("What else of weather?")


def texts_of_paths(store: Path, word: str) -> int:
    """How many states of conversations hold a word."""
    with StateStore.open(store / "states") as states, states.beside(PATHS) as paths:
        return sum(word in record.text for record in paths.records())


def test_a_folder_without_conversations_says_so(run: Run, tmp_path: Path) -> None:
    outcome = run("chat", "--store", tmp_path, "--list")
    assert (outcome.code, outcome.out) == (0, f"{tmp_path} holds no conversation\n")
    assert_one_error_line(run("chat", "--store", tmp_path, "--delete"), "it holds: none")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_conversations_only_is_looked_after(
    run: Run, typed: Callable[[str], None], model: str, tmp_path: Path
) -> None:
    typed("Hello, how are you today?\n")
    run("chat", "--store", tmp_path / "store", "--model", model, "--max-new-tokens", "4")
    assert json.loads(run("stats", "--store", tmp_path / "store", "--json").out)["paths"] == 1
    assert "1 states of conversations" in run("verify", "--store", tmp_path / "store").out
    outcome = run("gc", "--store", tmp_path / "store", "--compact", "--json")
    assert (outcome.code, json.loads(outcome.out)["deleted"]) == (0, 0)
    assert json.loads(run("stats", "--store", tmp_path / "store", "--json").out)["paths"] == 1


def test_chat_over_an_index_reads_its_passages(
    run: Run, typed: Callable[[str], None], model: str, tmp_path: Path
) -> None:
    folder = tmp_path / "docs"
    folder.mkdir()
    for number, passage in enumerate(PASSAGES):
        (folder / f"{number}.txt").write_text(passage)
    store = tmp_path / "store"
    run("index", folder, "--store", store, "--model", model)
    typed("What of Mars?\n")
    outcome = run("chat", "--store", store, "--top-k", "1", "--max-new-tokens", "4")
    assert outcome.code == 0
    assert "from 1.txt" in " ".join(outcome.err.split()) or "from 0.txt" in outcome.err
    assert "restored as they were" in " ".join(outcome.err.split())
    typed("And now?\n")
    outcome = run("chat", "--store", store, "--top-k", "0", "--max-new-tokens", "4")
    assert "going on after 1 turn(s)" in outcome.err
    typed("")
    assert_one_error_line(run("chat", "--store", store, "--model", model), "leave --model out")


def test_chat_refuses_what_it_cannot_do(
    run: Run, typed: Callable[[str], None], model: str, tmp_path: Path
) -> None:
    its = ("--store", tmp_path / "store", "--model", model)
    typed("too long " * 2000)
    assert_one_error_line(run("chat", *its, "--json"), "window")
    assert_usage_error(run("chat", *its, "--name", "../x"), "no file name")
    assert_usage_error(run("chat", *its, "--fidelity", "2"), "share")
    typed("Hello.\n")
    assert_one_error_line(run("chat", "--store", tmp_path / "s", "--model", "nowhere"), "nowhere")


def test_conversations_are_counted_and_verified(
    run: Run, typed: Callable[[str], None], model: str, tmp_path: Path
) -> None:
    """By `stats` and `verify`, apart from documents; damaged ones are dropped by a repair."""
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "one.txt").write_text(PASSAGES[0])
    store = tmp_path / "store"
    run("index", folder, "--store", store, "--model", model)
    assert "states of conversations" not in run("stats", "--store", store).out
    typed("What of Mars?\nAnd now?\n")
    run("chat", "--store", store, "--max-new-tokens", "4")
    counted = json.loads(run("stats", "--store", store, "--json").out)
    assert (counted["documents"], counted["paths"]) == (1, 2)
    assert counted["path_bytes"] > 0
    outcome = run("verify", "--store", store)
    assert (outcome.code, "2 states of conversations" in outcome.out) == (0, True)
    with StateStore.open(store / "states") as states, states.beside(PATHS) as paths:
        key = next(paths.records()).key
        with paths._writing() as txn:
            (row, *_) = paths._rows.chunk_keys(txn, key)
            txn.put("chunks", row, b"damaged")
    outcome = run("verify", "--store", store)
    assert outcome.code == 1
    assert "1 of these; --repair drops them" in outcome.out
    assert json.loads(run("verify", "--store", store, "--json").out)["conversations"]["damaged"]
    assert run("verify", "--store", store, "--repair").code == 0
    assert "1 states of conversations" in run("verify", "--store", store).out
