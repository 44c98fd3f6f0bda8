"""LlamaIndex's engines over `HCacheLLM`: nothing raises, and documents are restored.

The rows are those of `benchmarks/bench_engines.py`, which prints the table of docs/llamaindex.md.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from bench_engines import NEXT, QUESTION, ROWS, Row, World, asked, drained, recording
from fakes import PRINTABLE, FixedRetriever, WordEmbedding, chat_tokenizer
from llama_index.core import Settings
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.base.response.schema import AsyncStreamingResponse
from llama_index.core.chat_engine import (
    CondensePlusContextChatEngine,
    CondenseQuestionChatEngine,
    ContextChatEngine,
    SimpleChatEngine,
)
from llama_index.core.llms import LLM
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers import ResponseMode
from llama_index.core.schema import Document
from llama_index.llms.huggingface import HuggingFaceLLM
from tiny import SHAPES, byte_tokenizer, tiny_model
from transformers import PreTrainedModel

from hcache_rag import StateStore
from hcache_rag.llama_index import HCacheLLM

pytestmark = pytest.mark.usefixtures("one_thread")

REPOSITORY = Path(__file__).parent.parent
WINDOW = 32768
"""One byte is one token here, so that prompts are long."""


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    tiny = tiny_model(SHAPES[1])
    tiny.config.max_position_embeddings = WINDOW
    return tiny


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    """Of several paragraphs and with quotation marks, some hundred characters each."""
    found = []
    for path in sorted((REPOSITORY / "examples" / "solar_system").glob("*.md"))[:8]:
        text = path.read_text()
        first, *others = text[: text.index(".", 300) + 1].split(". ")
        found.append(Document(text="\n\n".join([f"{first}.", ". ".join(others)]), id_=path.stem))
    return found


@pytest.fixture(autouse=True)
def _no_global_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_llm", "_embed_model"):
        monkeypatch.setattr(Settings, name, None)


@pytest.fixture
def new_llm(model: PreTrainedModel) -> Iterator[Callable[..., HCacheLLM]]:
    made: list[HCacheLLM] = []

    def make(**options: Any) -> HCacheLLM:
        its: dict[str, Any] = {
            "model": model,
            "tokenizer": chat_tokenizer() if options.pop("chat", True) else byte_tokenizer(),
            "store": StateStore.in_memory(),
            "max_new_tokens": 12,
            "generate_kwargs": PRINTABLE,
        }
        made.append(HCacheLLM(**its | options))
        return made[-1]

    yield make
    for llm in made:
        llm.close()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.label)
def test_documents_are_restored_wherever_an_engine_puts_them(
    new_llm: Callable[..., HCacheLLM], documents: list[Document], row: Row
) -> None:
    """At least the share that the row names; where prompts hold no documents there is none."""
    world = World(new_llm(fidelity="none"), documents, WordEmbedding())
    answers, record = asked(row, world)
    assert all(answers)
    if row.floor is None:
        assert record.share is None
    else:
        assert record.documents > 300
        assert record.share is not None
        assert record.share >= row.floor
        assert row.floor >= 0.99 or row.note


def test_the_page_shows_the_rows() -> None:
    page = (REPOSITORY / "docs" / "llamaindex.md").read_text()
    shown = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")]
    labels = {cells[0].removeprefix("| "): cells[-1].removesuffix(" |") for cells in shown}
    assert {row.label: labels.get(row.label, "").strip() for row in ROWS} == {
        row.label: row.note for row in ROWS
    }


# --- the oracle: HuggingFaceLLM, with nothing stored ----------------------------------------------


MODES = [
    "compact",
    "refine",
    "tree_summarize",
    "simple_summarize",
    "accumulate",
    "compact_accumulate",
    "generation",
]
WAYS = ["query", "stream", "aquery", "astream"]


def theirs(model: PreTrainedModel, *, chat: bool = True) -> HuggingFaceLLM:
    return HuggingFaceLLM(
        model=model,
        tokenizer=chat_tokenizer() if chat else byte_tokenizer(),
        context_window=WINDOW,
        max_new_tokens=12,
        is_chat_model=chat,
        generate_kwargs={"do_sample": False, **PRINTABLE},
    )


def answer(llm: LLM, texts: list[str], mode: str, way: str) -> str:
    engine = RetrieverQueryEngine.from_args(
        FixedRetriever(texts),
        llm=llm,
        response_mode=ResponseMode(mode),
        streaming="stream" in way,
        use_async=way == "aquery",
    )

    async def ask() -> str:
        response = await engine.aquery(QUESTION)
        if isinstance(response, AsyncStreamingResponse):
            return "".join([piece async for piece in response.async_response_gen()])
        return drained(response)

    return asyncio.run(ask()) if way.startswith("a") else drained(engine.query(QUESTION))


@pytest.fixture(scope="module")
def expected(model: PreTrainedModel) -> Callable[[list[str], str, bool], str]:
    """What HuggingFaceLLM answers, each once."""
    known: dict[tuple[str, bool], str] = {}

    def of(texts: list[str], mode: str, chat: bool) -> str:
        if (mode, chat) not in known:
            known[mode, chat] = answer(theirs(model, chat=chat), texts, mode, "query")
        return known[mode, chat]

    return of


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "completion"])
@pytest.mark.parametrize(
    ("mode", "way"),
    [(m, w) for m in MODES for w in WAYS if "accumulate" not in m or "stream" not in w],
)
def test_every_mode_answers_as_with_huggingface_llm(
    new_llm: Callable[..., HCacheLLM],
    documents: list[Document],
    expected: Callable[[list[str], str, bool], str],
    mode: str,
    way: str,
    *,
    chat: bool,
) -> None:
    """Whole or streamed, synchronous or not. LlamaIndex cannot stream in the accumulating modes."""
    texts = [document.text for document in documents[:3]]
    llm = new_llm(chat=chat, tokenization="strict")
    found = answer(llm, texts, mode, way)
    assert found == expected(texts, mode, chat)
    assert found


@pytest.mark.parametrize("mode", ["accumulate", "compact_accumulate"])
def test_modes_that_cannot_stream_say_so(
    new_llm: Callable[..., HCacheLLM], documents: list[Document], mode: str
) -> None:
    with pytest.raises(ValueError, match=r"[Ss]tream"):
        answer(new_llm(), [documents[0].text], mode, "stream")


@pytest.mark.parametrize("mode", ["no_text", "context_only"])
def test_modes_without_a_model_ask_none(
    new_llm: Callable[..., HCacheLLM], documents: list[Document], mode: str
) -> None:
    Settings.llm = new_llm()  # LlamaIndex wants one all the same
    with recording() as record:
        answer(Settings.llm, [documents[0].text], mode, "query")
    assert record.log == []


# --- conversations --------------------------------------------------------------------------------


def buffer() -> ChatMemoryBuffer:
    return ChatMemoryBuffer.from_defaults(token_limit=WINDOW - 64, tokenizer_fn=list)


class Changing(FixedRetriever):
    """Gives other nodes every time."""

    def _retrieve(self, query_bundle: Any) -> Any:
        self.nodes = [*self.nodes[1:], self.nodes[0]]
        return super()._retrieve(query_bundle)[:2]


CHATS: dict[str, Callable[[LLM, list[str]], Any]] = {
    "simple": lambda llm, _: SimpleChatEngine.from_defaults(llm=llm, memory=buffer()),
    "context": lambda llm, texts: ContextChatEngine.from_defaults(
        retriever=Changing(texts), llm=llm, memory=buffer(), system_prompt="Be kind."
    ),
    "condense-plus-context": lambda llm, texts: CondensePlusContextChatEngine.from_defaults(
        retriever=Changing(texts), llm=llm, memory=buffer()
    ),
    "condense-question": lambda llm, texts: CondenseQuestionChatEngine.from_defaults(
        RetrieverQueryEngine.from_args(Changing(texts), llm=llm), llm=llm, memory=buffer()
    ),
}


def said(engine: Any, text: str, way: str) -> str:
    async def ask() -> str:
        if way == "achat":
            return str(await engine.achat(text))
        response = await engine.astream_chat(text)
        pieces = [piece async for piece in response.async_response_gen()]
        return "".join(pieces)

    if way.startswith("a"):
        return asyncio.run(ask())
    if way == "stream_chat":
        return "".join(engine.stream_chat(text).response_gen)
    return str(engine.chat(text))


@pytest.mark.parametrize("way", ["chat", "stream_chat", "achat", "astream_chat"])
@pytest.mark.parametrize("name", CHATS)
def test_chat_engines_answer_as_with_huggingface_llm(
    new_llm: Callable[..., HCacheLLM],
    model: PreTrainedModel,
    documents: list[Document],
    name: str,
    way: str,
) -> None:
    texts = [document.text for document in documents[:3]]
    ours = CHATS[name](new_llm(tokenization="strict", fidelity="exact"), texts)
    reference = CHATS[name](theirs(model), texts)
    for text in (QUESTION, NEXT):
        assert said(ours, text, way) == said(reference, text, "chat")
    assert [m.content for m in ours.chat_history] == [m.content for m in reference.chat_history]
    assert len(ours.chat_history) == 4


def exact_tokens(record: Any) -> list[tuple[int, int]]:
    """Of each prompt: its tokens, and how many of the first are restored without a gap."""
    found = []
    for _, (tokens, restored) in record.log:
        gaps = [n for n in range(len(tokens)) if n not in set(restored.tolist())]
        found.append((len(tokens), gaps[0]))
    return found


TURNS = [QUESTION, NEXT, "And the largest one?", "And the smallest one of them all?"]


def test_a_simple_chat_engine_restores_all_earlier_turns_also_after_a_restart(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    """Every turn has an LLM and a memory of its own, as another process would."""
    memory, answers, lengths = buffer(), list[str](), [0]
    for turn, text in enumerate(TURNS):
        with HCacheLLM(
            model=model,
            tokenizer=chat_tokenizer(),
            store=tmp_path / "states",
            max_new_tokens=12,
            generate_kwargs=PRINTABLE,
            chat_memory="always",
        ) as llm:
            written = [(m.role.value, str(m.content)) for m in memory.get_all()]
            memory = buffer()
            memory.set([ChatMessage(role=role, content=content) for role, content in written])
            engine = SimpleChatEngine.from_defaults(llm=llm, memory=memory)
            with recording() as record:
                answers.append(str(engine.chat(text)))
            [(length, restored)] = exact_tokens(record)
            # All of the last prompt and of its answer but the last token, which was never read.
            assert restored >= lengths[-1] + (11 if turn else 0)
            lengths.append(length)
    reference = CHATS["simple"](theirs(model), [])
    assert answers == [str(reference.chat(text)) for text in TURNS]


def test_a_context_chat_engine_restores_what_its_changing_head_allows(
    new_llm: Callable[..., HCacheLLM], documents: list[Document]
) -> None:
    """It puts the passages of each turn in front of the history: the same ones make a turn go on,
    others leave documents to be restored, and the history to be read.
    """
    texts = [document.text for document in documents[:3]]
    for retriever, is_exact in ((FixedRetriever(texts[:2]), True), (Changing(texts), False)):
        llm = new_llm(fidelity="none", chat_memory="always")
        llm.engine.precompute(texts)
        engine = ContextChatEngine.from_defaults(retriever=retriever, llm=llm, memory=buffer())
        prompts = []
        for text in TURNS:
            with recording() as record:
                engine.chat(text)
            prompts += record.log
        for (before, _), (prompt, (_, restored)) in pairwise(prompts):
            documents_in = sum(len(text) for text in texts if text in prompt)
            assert len(restored) >= documents_in > 300
            goes_on = len(restored) >= len(before.replace("<|im_end|>", "?"))
            assert goes_on is is_exact
