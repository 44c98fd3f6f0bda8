"""`HCacheLLM` against LlamaIndex's own HuggingFaceLLM, and the contract of a LlamaIndex LLM.

One token is one byte here, and answers are kept printable, so that texts can be compared.
"""

from __future__ import annotations

import asyncio
import gc
import json
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fakes import (
    PRINTABLE,
    FixedRetriever,
    Recorder,
    chat_tokenizer,
    mamba,
    save_mamba,
    save_tiny_model,
)
from llama_index.core import PromptTemplate, Settings
from llama_index.core.base.llms.types import ChatMessage, ChatResponse, CompletionResponse
from llama_index.core.base.response.schema import AsyncStreamingResponse, StreamingResponse
from llama_index.core.chat_engine import ContextChatEngine
from llama_index.core.instrumentation.events.exception import ExceptionEvent
from llama_index.core.instrumentation.events.llm import (
    LLMChatEndEvent,
    LLMChatStartEvent,
    LLMCompletionEndEvent,
    LLMCompletionStartEvent,
)
from llama_index.core.llms import LLM
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers import ResponseMode
from llama_index.llms.huggingface import HuggingFaceLLM
from llama_index_instrumentation import get_dispatcher
from threads import own_threads
from tiny import SHAPES, byte_tokenizer, tiny_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hcache_rag import (
    HCacheEngine,
    ModelNotFoundError,
    PromptTooLongError,
    StateStore,
    StoreOpenError,
    UnsupportedModelError,
)
from hcache_rag.compose import MIN_PREAMBLE_TOKENS
from hcache_rag.llama_index import HCacheLLM, StateRestoreEvent

WINDOW = 4096
THREAD = "hcache-generate"
MANY = 3000
"""So many tokens that a stream is closed long before they are generated."""

TEXTS = [
    "Mercury is the smallest planet and the closest one to the Sun.",
    "Venus is the hottest planet because of its thick atmosphere.",
    "Earth is the only planet known to have life and liquid oceans.",
]
QUESTION = "Which planet is the hottest?"
PROMPT = "Which planet comes first?"
KINDS = ["completion", "completion with bos", "chat"]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model(SHAPES[1])


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def new_llm(model: PreTrainedModel, tmp_path: Path) -> Iterator[Callable[..., HCacheLLM]]:
    """Makes LLMs of a kind with one store, and closes them all at the end."""
    made: list[HCacheLLM] = []

    def make(kind: str = "completion", **options: Any) -> HCacheLLM:
        options = {
            "model": model,
            "tokenizer": tokenizer_of(kind),
            "store": tmp_path / "states",
            "max_new_tokens": 12,
            "generate_kwargs": PRINTABLE,
            **options,
        }
        made.append(HCacheLLM(**options))
        return made[-1]

    yield make
    for llm in made:
        llm.close()


def messages(prompt: str = PROMPT) -> list[ChatMessage]:
    return [
        ChatMessage(role="system", content="Be brief."),
        ChatMessage(role="user", content=prompt),
    ]


def tokenizer_of(kind: str) -> PreTrainedTokenizerBase:
    if kind == "chat":
        return chat_tokenizer()
    return byte_tokenizer(adds_bos=kind == "completion with bos")


def reference_of(kind: str, model: PreTrainedModel) -> HuggingFaceLLM:
    """Full prefill by LlamaIndex's own LLM, of the same model."""
    return HuggingFaceLLM(
        model=model,
        tokenizer=tokenizer_of(kind),
        context_window=WINDOW,
        max_new_tokens=12,
        is_chat_model=kind == "chat",
        generate_kwargs={"do_sample": False, **PRINTABLE},
    )


def num_tokens(kind: str, prompt: str) -> int:
    """Tokens of a prompt in which every control token stands for itself."""
    return len(prompt.encode()) - 9 * prompt.count("<|im_end|>") + (kind == "completion with bos")


# Every public method, run to its end; what comes out is the last response.

Response = CompletionResponse | ChatResponse


async def last_of(stream: AsyncIterator[Any]) -> Any:
    """The last item, all others read."""
    return [item async for item in stream][-1]


async def astream_complete(llm: LLM, prompt: str = PROMPT, **kwargs: Any) -> Any:
    return await last_of(await llm.astream_complete(prompt, **kwargs))


async def astream_chat(llm: LLM, prompt: str = PROMPT, **kwargs: Any) -> Any:
    return await last_of(await llm.astream_chat(messages(prompt), **kwargs))


CALLS: dict[str, Callable[..., Any]] = {
    "complete": lambda llm, prompt=PROMPT, **kw: llm.complete(prompt, **kw),
    "stream_complete": lambda llm, prompt=PROMPT, **kw: [*llm.stream_complete(prompt, **kw)][-1],
    "acomplete": lambda llm, prompt=PROMPT, **kw: asyncio.run(llm.acomplete(prompt, **kw)),
    "astream_complete": lambda llm, **kw: asyncio.run(astream_complete(llm, **kw)),
    "chat": lambda llm, prompt=PROMPT, **kw: llm.chat(messages(prompt), **kw),
    "stream_chat": lambda llm, prompt=PROMPT, **kw: [*llm.stream_chat(messages(prompt), **kw)][-1],
    "achat": lambda llm, prompt=PROMPT, **kw: asyncio.run(llm.achat(messages(prompt), **kw)),
    "astream_chat": lambda llm, **kw: asyncio.run(astream_chat(llm, **kw)),
}
STREAMS = [name for name in CALLS if "stream" in name]


def text_of(response: Response) -> str:
    if isinstance(response, ChatResponse):
        return str(response.message.content)
    return response.text


@contextmanager
def recording() -> Iterator[Recorder]:
    recorder, root = Recorder(), get_dispatcher()
    root.add_event_handler(recorder)
    try:
        yield recorder
    finally:
        root.event_handlers.remove(recorder)


@contextmanager
def before_every_pass(model: PreTrainedModel, action: Callable[[], None]) -> Iterator[None]:
    """Run `action` before every forward pass of the model, on the thread that computes."""
    handle = model.register_forward_pre_hook(lambda *_: action())
    try:
        yield
    finally:
        handle.remove()


class Counter:
    """Counts forward passes, and fails in one of them."""

    def __init__(self, failing: int | None = None) -> None:
        self.passes = 0
        self._failing = failing

    def __call__(self) -> None:
        self.passes += 1
        if self.passes == self._failing:
            raise RuntimeError("the third pass is broken")


def generating_threads() -> list[str]:
    return own_threads(THREAD)


def join_generating_threads() -> None:
    for thread in threading.enumerate():
        if thread.name == THREAD:
            thread.join()


def engine_of(llm: LLM, **options: Any) -> RetrieverQueryEngine:
    return RetrieverQueryEngine.from_args(FixedRetriever(TEXTS), llm=llm, **options)


# The same answers as HuggingFaceLLM.


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *[(kind, name) for kind in KINDS for name in ("complete", "stream_complete")],
        ("chat", "chat"),
        ("chat", "stream_chat"),
    ],
)
def test_answers_are_those_of_huggingface_llm(
    new_llm: Callable[..., HCacheLLM], model: PreTrainedModel, kind: str, name: str
) -> None:
    ours = CALLS[name](new_llm(kind, tokenization="strict"))
    theirs = CALLS[name](reference_of(kind, model))
    assert text_of(ours) == text_of(theirs)
    assert len(text_of(ours)) == 12


def test_different_prompts_have_different_answers(
    new_llm: Callable[..., HCacheLLM], model: PreTrainedModel
) -> None:
    """Else equal answers would say nothing."""
    ours, theirs = new_llm(tokenization="strict"), reference_of("completion", model)
    prompts = [f"{text} {QUESTION}" for text in TEXTS] + [PROMPT, QUESTION, "?"]
    answers = [ours.complete(prompt).text for prompt in prompts]
    assert answers == [theirs.complete(prompt).text for prompt in prompts]
    assert len(set(answers)) > len(prompts) / 2


MODES = ["compact", "refine", "tree_summarize", "accumulate", "generation"]


@pytest.mark.parametrize(
    ("mode", "streaming"),
    [(m, s) for m in MODES for s in (False, True) if (m, s) != ("accumulate", True)],
)
def test_query_engines_answer_as_with_huggingface_llm(
    new_llm: Callable[..., HCacheLLM],
    model: PreTrainedModel,
    kind: str,
    mode: str,
    *,
    streaming: bool,
) -> None:
    """LlamaIndex cannot stream in the mode "accumulate"."""
    answers = []
    for llm in (new_llm(kind, tokenization="strict"), reference_of(kind, model)):
        engine = engine_of(llm, response_mode=mode, streaming=streaming)
        response = engine.query(QUESTION)
        if streaming:
            assert isinstance(response, StreamingResponse)
            answers.append("".join(response.response_gen or []))
        else:
            answers.append(str(response))
    assert answers[0] == answers[1]
    assert len(answers[0]) >= 12


def test_segmented_answers_are_the_same_where_the_tokens_are(
    new_llm: Callable[..., HCacheLLM], model: PreTrainedModel, kind: str
) -> None:
    """One byte is one token wherever the prompt is cut, so both tokenizations agree here."""
    ours, theirs = new_llm(kind), reference_of(kind, model)
    assert str(engine_of(ours).query(QUESTION)) == str(engine_of(theirs).query(QUESTION))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("mode", ["compact", "refine", "tree_summarize"])
def test_asynchronous_query_engines_answer_as_the_others(
    new_llm: Callable[..., HCacheLLM], kind: str, mode: str, *, streaming: bool
) -> None:
    llm = new_llm(kind, tokenization="strict")
    options = {"response_mode": mode, "streaming": streaming, "use_async": True}

    async def ask() -> str:
        response = await engine_of(llm, **options).aquery(QUESTION)
        if isinstance(response, AsyncStreamingResponse):
            return "".join([piece async for piece in response.async_response_gen()])
        return str(response)

    assert asyncio.run(ask()) == str(engine_of(llm, response_mode=mode).query(QUESTION))


@pytest.mark.parametrize("streaming", [False, True])
def test_chat_engines_answer_as_with_huggingface_llm(
    new_llm: Callable[..., HCacheLLM], model: PreTrainedModel, *, streaming: bool
) -> None:
    answers: list[list[str]] = []
    for llm in (new_llm("chat", tokenization="strict"), reference_of("chat", model)):
        engine = ContextChatEngine.from_defaults(retriever=FixedRetriever(TEXTS), llm=llm)
        answers.append([])
        for question in (QUESTION, "And the next one?"):
            if streaming:
                answers[-1].append("".join(engine.stream_chat(question).response_gen))
            else:
                answers[-1].append(str(engine.chat(question)))
    assert answers[0] == answers[1]
    assert all(len(answer) == 12 for answer in answers[0])


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["compact", "refine"])
def test_the_real_model_answers_as_with_huggingface_llm(
    smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    solar_system: list[str],
    tmp_path: Path,
    mode: str,
) -> None:
    real, tokenizer = smollm2
    ours = HCacheLLM(
        model=real,
        tokenizer=tokenizer,
        store=tmp_path / "states",
        tokenization="strict",
        max_new_tokens=6,
    )
    theirs = HuggingFaceLLM(
        model=real,
        tokenizer=tokenizer,
        context_window=ours.metadata.context_window,
        max_new_tokens=6,
        is_chat_model=True,
        generate_kwargs={"do_sample": False},
    )
    answers = []
    for llm in (ours, theirs):
        engine = RetrieverQueryEngine.from_args(
            FixedRetriever(solar_system[:2]), llm=llm, response_mode=ResponseMode(mode)
        )
        answers.append(str(engine.query("When did Apollo 11 land?")))
    ours.close()
    assert answers[0] == answers[1]
    assert answers[0].strip()


# The eight methods agree with one another.


@pytest.mark.parametrize("name", STREAMS)
def test_the_pieces_of_a_stream_add_up_to_its_texts(
    new_llm: Callable[..., HCacheLLM], kind: str, name: str
) -> None:
    llm = new_llm(kind)
    pieces: list[Any] = []
    if name == "stream_complete":
        pieces = list(llm.stream_complete(PROMPT))
    elif name == "stream_chat":
        pieces = list(llm.stream_chat(messages()))
    else:

        async def collect() -> list[Any]:
            stream: Any = await (
                llm.astream_complete(PROMPT)
                if name == "astream_complete"
                else llm.astream_chat(messages())
            )
            return [piece async for piece in stream]

        pieces = asyncio.run(collect())
    assert len(pieces) > 2
    text = ""
    for piece in pieces:
        text += piece.delta
        assert text_of(piece) == text
    whole = llm.complete(PROMPT) if "complete" in name else llm.chat(messages())
    assert text == text_of(whole)


@pytest.mark.parametrize("name", ["stream_complete", "acomplete", "astream_complete"])
def test_all_ways_to_complete_agree(
    new_llm: Callable[..., HCacheLLM], kind: str, name: str
) -> None:
    llm = new_llm(kind)
    expected, found = CALLS["complete"](llm), CALLS[name](llm)
    assert found.text == expected.text
    for key in ("finish_reason", "prompt_tokens", "completion_tokens", "total_tokens"):
        assert found.additional_kwargs[key] == expected.additional_kwargs[key]


@pytest.mark.parametrize("name", ["stream_chat", "achat", "astream_chat"])
def test_all_ways_to_chat_agree(new_llm: Callable[..., HCacheLLM], kind: str, name: str) -> None:
    llm = new_llm(kind)
    expected, found = CALLS["chat"](llm), CALLS[name](llm)
    assert found.message == expected.message
    assert found.message.role == "assistant"
    for key in ("finish_reason", "prompt_tokens", "completion_tokens", "total_tokens"):
        assert found.additional_kwargs[key] == expected.additional_kwargs[key]


def test_an_answer_cut_inside_a_character_is_the_same_streamed(
    new_llm: Callable[..., HCacheLLM],
) -> None:
    """The longest answer may end in the middle of a character of several bytes."""
    tokenizer = byte_tokenizer()
    [lead, *_] = tokenizer.encode("é", add_special_tokens=False)
    only_lead = {"suppress_tokens": [i for i in range(260) if i != lead]}
    llm = new_llm(generate_kwargs=only_lead, max_new_tokens=1)
    assert llm.complete(PROMPT).text == "\N{REPLACEMENT CHARACTER}"
    assert "".join(str(piece.delta) for piece in llm.stream_complete(PROMPT)) == (
        "\N{REPLACEMENT CHARACTER}"
    )


@pytest.mark.parametrize("name", ["acomplete", "astream_complete", "achat", "astream_chat"])
def test_the_event_loop_goes_on_while_the_model_computes(
    new_llm: Callable[..., HCacheLLM], model: PreTrainedModel, name: str
) -> None:
    """Every forward pass waits for the loop to tick: a blocked loop fails, at any speed."""
    llm = new_llm()
    computing, ticked = threading.Event(), threading.Event()
    waited: list[bool] = []
    ticks = 0

    def wait_for_a_tick() -> None:
        ticked.clear()
        computing.set()
        waited.append(ticked.wait(timeout=20))

    async def tick() -> None:
        nonlocal ticks
        while True:
            if computing.is_set():
                computing.clear()
                ticks += 1
                ticked.set()
            await asyncio.sleep(0)

    async def call() -> None:
        ticker = asyncio.create_task(tick())
        calls: dict[str, Callable[[], Coroutine[Any, Any, Any]]] = {
            "acomplete": lambda: llm.acomplete(PROMPT, max_new_tokens=3),
            "astream_complete": lambda: astream_complete(llm, max_new_tokens=3),
            "achat": lambda: llm.achat(messages(), max_new_tokens=3),
            "astream_chat": lambda: astream_chat(llm, max_new_tokens=3),
        }
        await calls[name]()
        ticker.cancel()

    with before_every_pass(model, wait_for_a_tick):
        asyncio.run(call())
    assert waited == [True] * 3
    assert ticks >= 3


@pytest.mark.parametrize("at_once", [1, 4])
def test_many_questions_at_once_get_their_own_answers(
    new_llm: Callable[..., HCacheLLM], at_once: int
) -> None:
    llm = new_llm(max_concurrency=at_once, keep_recurring=False)
    llm.engine.precompute(TEXTS[:2])
    prompts = [f"{text} {QUESTION}" for text in TEXTS] * 3
    expected = [llm.complete(prompt).text for prompt in prompts]

    async def ask_all() -> list[str]:
        answers = await asyncio.gather(*(llm.acomplete(prompt) for prompt in prompts))
        return [answer.text for answer in answers]

    async def stream_all() -> list[str]:
        streams = [await llm.astream_complete(prompt) for prompt in prompts]
        answers = await asyncio.gather(*(last_of(stream) for stream in streams))
        return [answer.text for answer in answers]

    assert asyncio.run(ask_all()) == expected
    assert asyncio.run(stream_all()) == expected


# Ends, early ends and errors.


@pytest.mark.parametrize("how", ["close", "drop"])
@pytest.mark.parametrize("name", ["stream_complete", "stream_chat"])
def test_closing_a_stream_stops_the_computation(
    new_llm: Callable[..., HCacheLLM], model: PreTrainedModel, name: str, how: str
) -> None:
    llm, counter = new_llm(), Counter()
    expected = text_of(CALLS[name](llm))
    with before_every_pass(model, counter):
        stream: Any = (
            llm.stream_complete(PROMPT, max_new_tokens=MANY)
            if name == "stream_complete"
            else llm.stream_chat(messages(), max_new_tokens=MANY)
        )
        assert next(stream).delta
        assert len(generating_threads()) == 1
        if how == "close":
            stream.close()
        else:
            del stream
            gc.collect()
        assert generating_threads() == []
    assert counter.passes < MANY
    assert text_of(CALLS[name](llm)) == expected


@pytest.mark.parametrize("name", ["astream_complete", "astream_chat"])
def test_closing_an_asynchronous_stream_stops_the_computation(
    new_llm: Callable[..., HCacheLLM], model: PreTrainedModel, name: str
) -> None:
    llm, counter = new_llm(), Counter()
    expected = text_of(CALLS[name](llm))

    async def begin_and_close() -> None:
        stream: Any = await (
            llm.astream_complete(PROMPT, max_new_tokens=MANY)
            if name == "astream_complete"
            else llm.astream_chat(messages(), max_new_tokens=MANY)
        )
        assert (await anext(stream)).delta
        assert len(generating_threads()) == 1
        await stream.aclose()
        del stream
        gc.collect()
        await asyncio.to_thread(join_generating_threads)

    with before_every_pass(model, counter):
        asyncio.run(begin_and_close())
    assert counter.passes < MANY
    assert text_of(CALLS[name](llm)) == expected


def test_cancelling_the_task_that_reads_a_stream_stops_the_computation(
    new_llm: Callable[..., HCacheLLM], model: PreTrainedModel
) -> None:
    llm, counter = new_llm(), Counter()

    async def cancelled() -> None:
        begun = asyncio.Event()

        async def read() -> None:
            async for _ in await llm.astream_complete(PROMPT, max_new_tokens=MANY):
                begun.set()

        task = asyncio.create_task(read())
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.to_thread(join_generating_threads)

    with before_every_pass(model, counter):
        asyncio.run(cancelled())
    assert counter.passes < MANY


@pytest.mark.parametrize("name", ["acomplete", "achat"])
def test_cancelling_an_asynchronous_call_stops_the_computation(
    new_llm: Callable[..., HCacheLLM], model: PreTrainedModel, name: str
) -> None:
    llm, counter = new_llm(), Counter()
    expected = text_of(CALLS[name](llm))

    async def cancelled() -> None:
        begun, loop = asyncio.Event(), asyncio.get_running_loop()

        def begin() -> None:
            loop.call_soon_threadsafe(begun.set)

        with before_every_pass(model, begin):
            call = (
                llm.acomplete(PROMPT, max_new_tokens=MANY)
                if name == "acomplete"
                else llm.achat(messages(), max_new_tokens=MANY)
            )
            task = asyncio.ensure_future(call)
            await begun.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert generating_threads() == []

    with before_every_pass(model, counter):
        asyncio.run(cancelled())
    assert counter.passes < MANY
    assert text_of(CALLS[name](llm)) == expected


def test_a_stream_that_is_never_read_computes_nothing(
    new_llm: Callable[..., HCacheLLM], model: PreTrainedModel
) -> None:
    counter = Counter()
    with before_every_pass(model, counter):
        stream: Any = new_llm().stream_complete(PROMPT)
        stream.close()
    assert counter.passes == 0
    assert generating_threads() == []


def test_a_stream_that_waits_does_not_hold_up_other_calls(
    new_llm: Callable[..., HCacheLLM],
) -> None:
    llm = new_llm()
    expected = llm.complete(PROMPT).text
    stream = llm.stream_complete(PROMPT)
    first = next(stream)
    assert llm.complete(PROMPT).text == expected
    assert [first, *stream][-1].text == expected


def test_cancelling_a_call_that_waits_does_not_wait_for_the_one_in_front(
    new_llm: Callable[..., HCacheLLM], model: PreTrainedModel
) -> None:
    """The call in front goes on, and stands still until the other one has been cancelled."""
    llm, may_go_on = new_llm(), threading.Event()
    expected = llm.complete(PROMPT).text

    async def cancelled() -> str:
        begun, loop = asyncio.Event(), asyncio.get_running_loop()

        def stand_still() -> None:
            loop.call_soon_threadsafe(begun.set)
            assert may_go_on.wait(120)

        with before_every_pass(model, stand_still):
            front = asyncio.create_task(llm.acomplete(PROMPT))
            await begun.wait()
            waiting = asyncio.create_task(llm.acomplete(PROMPT))
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(waiting, 0.2)
            may_go_on.set()
            return str((await front).text)

    assert asyncio.run(cancelled()) == expected


@pytest.mark.parametrize("name", CALLS)
def test_an_error_while_generating_reaches_the_caller(
    new_llm: Callable[..., HCacheLLM], model: PreTrainedModel, name: str
) -> None:
    llm = new_llm()
    expected = text_of(CALLS[name](llm))
    with (
        before_every_pass(model, Counter(failing=3)),
        pytest.raises(RuntimeError, match="third pass is broken"),
    ):
        CALLS[name](llm)
    assert generating_threads() == []
    assert text_of(CALLS[name](llm)) == expected


def test_what_came_before_an_error_is_streamed(
    new_llm: Callable[..., HCacheLLM], model: PreTrainedModel
) -> None:
    llm = new_llm()
    expected = llm.complete(PROMPT, max_new_tokens=2).text
    seen: list[str] = []
    with (
        before_every_pass(model, Counter(failing=3)),
        pytest.raises(RuntimeError, match="third pass is broken"),
    ):
        seen.extend(piece.text for piece in llm.stream_complete(PROMPT))
    assert seen[-1] == expected


@pytest.mark.parametrize("kind", ["completion", "chat"])
def test_an_error_reaches_the_reader_of_a_streaming_query_engine(
    new_llm: Callable[..., HCacheLLM], model: PreTrainedModel, kind: str
) -> None:
    response = engine_of(new_llm(kind), streaming=True).query(QUESTION)
    assert isinstance(response, StreamingResponse)
    assert response.response_gen is not None
    with (
        before_every_pass(model, Counter(failing=3)),
        pytest.raises(RuntimeError, match="third pass is broken"),
    ):
        list(response.response_gen)


@pytest.mark.parametrize("name", CALLS)
def test_a_prompt_beyond_the_window_is_refused_with_numbers(
    new_llm: Callable[..., HCacheLLM], name: str
) -> None:
    with pytest.raises(PromptTooLongError, match="window is 4096 tokens") as raised:
        CALLS[name](new_llm(), prompt="x" * 5000)
    assert raised.value.prompt_tokens >= 5000
    assert raised.value.window_tokens == WINDOW


def test_an_answer_ends_where_the_window_does(new_llm: Callable[..., HCacheLLM]) -> None:
    answer = new_llm().complete("x" * (WINDOW - 3), max_new_tokens=12)
    assert answer.additional_kwargs["completion_tokens"] == 3
    assert answer.additional_kwargs["finish_reason"] == "length"


# Events and accounts.


@pytest.mark.parametrize("name", CALLS)
def test_one_call_is_one_pair_of_events(new_llm: Callable[..., HCacheLLM], name: str) -> None:
    llm = new_llm()
    with recording() as recorder:
        response = CALLS[name](llm)
    starts = (recorder.count(LLMCompletionStartEvent), recorder.count(LLMChatStartEvent))
    ends = (recorder.count(LLMCompletionEndEvent), recorder.count(LLMChatEndEvent))
    assert starts == ends == ((1, 0) if "complete" in name else (0, 1))
    assert recorder.count(ExceptionEvent) == 0
    [restore] = [e for e in recorder.events if isinstance(e, StateRestoreEvent)]
    account = response.additional_kwargs["hcache"]
    assert restore.provenance == account
    assert json.loads(json.dumps(restore.provenance))["prompt_tokens"] == account["prompt_tokens"]


def test_every_call_of_a_query_engine_is_reported_once(
    new_llm: Callable[..., HCacheLLM],
) -> None:
    with recording() as recorder:
        engine_of(new_llm(), response_mode="refine").query(QUESTION)
    assert recorder.count(LLMCompletionStartEvent) == len(TEXTS)
    assert recorder.count(LLMCompletionEndEvent) == len(TEXTS)
    assert recorder.count(StateRestoreEvent) == len(TEXTS)


def test_a_call_that_fails_reports_no_restore(
    new_llm: Callable[..., HCacheLLM], model: PreTrainedModel
) -> None:
    llm = new_llm()
    with (
        recording() as recorder,
        before_every_pass(model, Counter(failing=3)),
        pytest.raises(RuntimeError),
    ):
        llm.complete(PROMPT)
    assert recorder.count(StateRestoreEvent) == 0


@pytest.mark.parametrize("name", CALLS)
def test_responses_carry_token_counts_and_provenance(
    new_llm: Callable[..., HCacheLLM], kind: str, name: str
) -> None:
    llm = new_llm(kind)
    account = CALLS[name](llm).additional_kwargs
    assert json.loads(json.dumps(account)) is not None
    assert account["completion_tokens"] == 12
    assert account["total_tokens"] == account["prompt_tokens"] + 12
    assert account["finish_reason"] == "length"
    if "complete" in name:
        assert account["prompt_tokens"] == num_tokens(kind, PROMPT)
    elif kind == "chat":
        prompt = f"[system]\nBe brief.<|im_end|>\n[user]\n{PROMPT}<|im_end|>\n[assistant]\n"
        assert account["prompt_tokens"] == num_tokens(kind, prompt)
    spent = account["hcache"]
    assert spent["prompt_tokens"] == account["prompt_tokens"] == spent["fresh_tokens"]
    assert spent["restored_tokens"] == 0
    assert spent["seconds"]["first_token"] > 0


def test_metadata_is_the_model_s_own(new_llm: Callable[..., HCacheLLM], kind: str) -> None:
    metadata = new_llm(kind).metadata
    assert metadata.context_window == WINDOW
    assert metadata.num_output == 12
    assert metadata.is_chat_model == (kind == "chat")
    assert not metadata.is_function_calling_model
    assert metadata.model_name == "llama"


def test_the_window_is_what_the_engine_takes(new_llm: Callable[..., HCacheLLM]) -> None:
    """LlamaIndex sizes its prompts by it: one that says too much has them refused."""
    short: Any = tiny_model(next(s for s in SHAPES if s.family == "mistral"))
    short.config.max_position_embeddings = 512
    short.config.sliding_window = 64  # which ends no prompt
    llm = new_llm(model=short)
    assert llm.complete("x" * 500).text
    with pytest.raises(PromptTooLongError, match="window is 512 tokens"):
        llm.complete("x" * 600)
    assert llm.metadata.context_window == 512


# Arguments per call.


@pytest.mark.parametrize("name", CALLS)
def test_the_longest_answer_can_be_given_per_call(
    new_llm: Callable[..., HCacheLLM], name: str
) -> None:
    llm = new_llm()
    whole = text_of(CALLS[name](llm))
    cut = CALLS[name](llm, max_new_tokens=5)
    assert text_of(cut) == whole[:5]
    assert cut.additional_kwargs["completion_tokens"] == 5
    assert text_of(CALLS[name](llm)) == whole


@pytest.mark.parametrize("name", CALLS)
def test_a_seed_repeats_an_answer_that_temperature_varies(
    new_llm: Callable[..., HCacheLLM], name: str
) -> None:
    llm = new_llm()
    greedy = text_of(CALLS[name](llm))
    drawn = [text_of(CALLS[name](llm, temperature=2.0, seed=seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1]
    assert len({greedy, *drawn}) == 3
    assert text_of(CALLS[name](llm, temperature=2.0, top_k=1)) == greedy
    assert text_of(CALLS[name](llm, temperature=2.0, top_p=1e-9)) == greedy
    assert text_of(CALLS[name](llm)) == greedy


def test_the_temperature_of_the_constructor_can_be_overridden(
    new_llm: Callable[..., HCacheLLM],
) -> None:
    warm, greedy = new_llm(temperature=2.0), new_llm().complete(PROMPT).text
    assert warm.complete(PROMPT, seed=1).text != greedy
    assert warm.complete(PROMPT, temperature=0).text == greedy


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("as_list", [False, True])
def test_an_answer_ends_before_a_stop_string(
    new_llm: Callable[..., HCacheLLM], name: str, *, as_list: bool
) -> None:
    llm = new_llm()
    whole = text_of(CALLS[name](llm))
    stop = whole[4:7]
    answer = CALLS[name](llm, stop=["not in it", stop] if as_list else stop)
    assert text_of(answer) == whole[: whole.find(stop)]
    assert answer.additional_kwargs["finish_reason"] == "stop"
    assert answer.additional_kwargs["completion_tokens"] <= 7


@pytest.mark.parametrize("name", CALLS)
def test_unknown_arguments_are_refused_by_name(
    new_llm: Callable[..., HCacheLLM], name: str
) -> None:
    with pytest.raises(TypeError, match=r"unknown argument\(s\) max_tokens; known per call: max_"):
        CALLS[name](new_llm(), max_tokens=3)


@pytest.mark.parametrize("name", CALLS)
def test_an_argument_that_is_none_is_not_given(
    new_llm: Callable[..., HCacheLLM], name: str
) -> None:
    """As callers say that pass on arguments of their own."""
    llm = new_llm()
    given = dict.fromkeys(("max_new_tokens", "temperature", "top_p", "top_k", "stop", "seed"))
    assert text_of(CALLS[name](llm, **given)) == text_of(CALLS[name](llm))


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"max_new_tokens": -5},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
    ],
)
def test_arguments_that_make_no_sense_are_refused(
    new_llm: Callable[..., HCacheLLM], wrong: dict[str, Any]
) -> None:
    llm = new_llm()
    with pytest.raises(ValueError, match="must"):
        llm.complete(PROMPT, **wrong)
    with pytest.raises(ValueError, match="must"):
        new_llm(**wrong)


def test_stop_strings_are_strings(new_llm: Callable[..., HCacheLLM]) -> None:
    with pytest.raises(TypeError, match=r"stop strings are strings, not \['a', 1\]"):
        new_llm().complete(PROMPT, stop=["a", 1])


@pytest.mark.parametrize("name", CALLS)
def test_half_a_character_is_read_as_an_unknown_one(
    new_llm: Callable[..., HCacheLLM], name: str
) -> None:
    """Tokenizers refuse it, and files that were read wrongly hold it."""
    llm = new_llm()
    document = "A document that \ud83d holds half a character, long enough to be found."
    assert llm.engine.precompute([document, "Another document."]).stored == 2
    assert llm.complete(document + "\n\nWhat?").additional_kwargs["hcache"]["documents_missed"] == 0
    assert llm.tokenize("a\udfffb") == llm.tokenize("a\ufffdb")
    answers = [CALLS[name](llm, prompt=f"Half {half}") for half in ("\ud83d", "\ufffd")]
    assert text_of(answers[0]) == text_of(answers[1])


def test_a_prompt_may_be_given_by_name_and_must_be_given(
    new_llm: Callable[..., HCacheLLM],
) -> None:
    llm = new_llm()
    assert llm.complete(prompt=PROMPT).text == llm.complete(PROMPT).text
    with pytest.raises(ValueError, match="No prompt"):
        llm.complete()
    with pytest.raises(ValueError, match="the prompt is empty"):
        llm.complete("")


def test_prompts_are_wrapped_unless_they_are_formatted(
    new_llm: Callable[..., HCacheLLM],
) -> None:
    llm = new_llm(completion_to_prompt=lambda text: f"<<{text}>>")
    plain = new_llm()
    expected = plain.complete(f"<<{PROMPT}>>").text
    assert llm.complete(PROMPT).text == expected
    assert list(llm.stream_complete(PROMPT))[-1].text == expected
    assert llm.complete(PROMPT, formatted=True).text == plain.complete(PROMPT).text


# Documents in prompts.


TEMPLATE = PromptTemplate("Read this:\n{context_str}\nNow: {query_str}\nSay:")
BARE = PromptTemplate("{context_str}\n\nNow: {query_str}\nSay:")
SETUPS: dict[str, dict[str, Any]] = {
    "default": {},
    "system prompt": {"system_prompt": "You know the planets."},
    "template": {"text_qa_template": TEMPLATE},
    "template and system prompt": {"text_qa_template": TEMPLATE, "system_prompt": "Be kind."},
    "nothing before the documents": {"text_qa_template": BARE},
    "wrapped": {"text_qa_template": TEMPLATE, "completion_to_prompt": lambda t: f"((\n{t}\n))"},
}


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every prompt that reaches an engine, as it is read."""
    seen: list[str] = []
    generate = HCacheEngine.generate

    def recorded(self: HCacheEngine, prompt: str, **options: Any) -> Any:
        seen.append(prompt)
        return generate(self, prompt, **options)

    monkeypatch.setattr(HCacheEngine, "generate", recorded)
    return seen


@pytest.mark.parametrize("setup", SETUPS)
def test_the_preamble_is_what_stands_before_the_documents_and_they_are_restored(
    new_llm: Callable[..., HCacheLLM], prompts: list[str], kind: str, setup: str
) -> None:
    options = SETUPS[setup]
    llm = new_llm(kind, **options)
    llm.engine.precompute(TEXTS)
    template = options.get("text_qa_template")
    with recording() as recorder:
        engine_of(llm, **({"text_qa_template": template} if template else {})).query(QUESTION)
    [prompt] = prompts
    assert llm.preamble == prompt.partition(TEXTS[0])[0]
    assert llm.qa_prompt(TEXTS, QUESTION) == prompt
    assert all(text in prompt for text in TEXTS)
    if "system_prompt" in options:
        assert options["system_prompt"] in llm.preamble
    [spent] = [e.provenance for e in recorder.events if isinstance(e, StateRestoreEvent)]
    assert spent["prompt_tokens"] == num_tokens(kind, prompt)
    head = num_tokens(kind, llm.preamble)
    restored_head = head if head >= MIN_PREAMBLE_TOKENS else 0
    assert spent["exact_tokens"] == restored_head + len(TEXTS[0])
    assert spent["relocated_tokens"] + spent["repaired_tokens"] == len(TEXTS[1]) + len(TEXTS[2])
    assert spent["documents_restored"] == 3
    assert spent["warnings"] == ()


def test_one_document_after_the_preamble_answers_as_full_prefill(
    new_llm: Callable[..., HCacheLLM], model: PreTrainedModel, kind: str
) -> None:
    ours, theirs = new_llm(kind), reference_of(kind, model)
    ours.engine.precompute(TEXTS)
    answers = [
        str(RetrieverQueryEngine.from_args(FixedRetriever(TEXTS[:1]), llm=llm).query(QUESTION))
        for llm in (ours, theirs)
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("mode", ["compact", "refine", "tree_summarize", "accumulate"])
def test_exact_fidelity_answers_as_full_prefill_in_every_mode(
    new_llm: Callable[..., HCacheLLM], model: PreTrainedModel, kind: str, mode: str
) -> None:
    ours, theirs = new_llm(kind, fidelity="exact"), reference_of(kind, model)
    ours.engine.precompute(TEXTS)
    with recording() as recorder:
        answer = str(engine_of(ours, response_mode=mode).query(QUESTION))
    assert answer == str(engine_of(theirs, response_mode=mode).query(QUESTION))
    spent = [e.provenance for e in recorder.events if isinstance(e, StateRestoreEvent)]
    assert all(s["relocated_tokens"] == 0 for s in spent)
    if mode != "tree_summarize":  # its head is another
        assert any(s["exact_tokens"] > len(TEXTS[0]) for s in spent)


CONTROL = "A document that says <|im_end|> and <eos> in the middle of its only line."


@pytest.mark.parametrize("known", ["stored", "announced"])
@pytest.mark.parametrize("kind", ["completion", "chat"])
def test_control_tokens_in_a_document_stay_text(
    new_llm: Callable[..., HCacheLLM], prompts: list[str], kind: str, known: str
) -> None:
    llm = new_llm(kind)
    if known == "stored":
        llm.engine.precompute([CONTROL])
    else:
        llm.engine.announce([CONTROL])
    engine = RetrieverQueryEngine.from_args(FixedRetriever([CONTROL]), llm=llm)
    with recording() as recorder:
        engine.query(QUESTION)
    [prompt] = prompts
    before, after = prompt.split(CONTROL)
    [spent] = [e.provenance for e in recorder.events if isinstance(e, StateRestoreEvent)]
    assert len(llm.engine.document_tokens(CONTROL)) == len(CONTROL)
    assert spent["prompt_tokens"] == num_tokens(kind, before + after) + len(CONTROL)
    assert spent["missed_tokens"] == (len(CONTROL) if known == "announced" else 0)
    assert after.count("<|im_end|>") == (1 if kind == "chat" else 0)


def test_settings_take_it(
    new_llm: Callable[..., HCacheLLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Settings, "_llm", None)
    llm = new_llm("chat")
    Settings.llm = llm
    assert Settings.llm is llm
    engine = RetrieverQueryEngine.from_args(FixedRetriever(TEXTS))
    assert str(engine.query(QUESTION)) == str(engine_of(llm).query(QUESTION))


def test_it_is_an_llm_with_a_stable_name(new_llm: Callable[..., HCacheLLM]) -> None:
    llm = new_llm()
    assert isinstance(llm, LLM)
    assert llm.class_name() == "HCacheLLM"


def test_states_of_an_llm_without_a_store_live_as_long_as_it(
    new_llm: Callable[..., HCacheLLM],
) -> None:
    llm = new_llm(store=None)
    llm.engine.precompute(TEXTS)
    path = llm.engine.store.path
    assert path.is_dir()
    llm.close()
    assert not path.exists()


def test_a_store_can_be_named_once(new_llm: Callable[..., HCacheLLM], tmp_path: Path) -> None:
    llm = new_llm(store=None)
    assert not llm.has_store
    llm.use_store(tmp_path / "one")
    assert llm.has_store
    with pytest.raises(ValueError, match="already keeps its states in"):
        llm.use_store(tmp_path / "two")
    assert not (tmp_path / "two").exists()


# What a constructor refuses.


def test_a_model_and_its_tokenizer_come_together(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="both of model= and tokenizer="):
        HCacheLLM(model=model)
    with pytest.raises(ValueError, match="both of model= and tokenizer="):
        HCacheLLM(tokenizer=byte_tokenizer())
    with pytest.raises(ValueError, match="not both"):
        HCacheLLM("some/folder", model=model, tokenizer=byte_tokenizer())


@pytest.mark.parametrize("what", ["missing", "empty", "file", "no weights", "broken config"])
def test_a_path_without_a_model_is_an_error_in_one_line(tmp_path: Path, what: str) -> None:
    path = tmp_path / "model"
    if what in ("empty", "broken config"):
        path.mkdir()
    if what == "file":
        path.write_text("text")
    if what == "no weights":
        save_tiny_model(path)
        (path / "model.safetensors").unlink()
    if what == "broken config":
        (path / "config.json").write_text("{")
    with pytest.raises(ModelNotFoundError) as raised:
        HCacheLLM(path, store=tmp_path / "states")
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "states").exists()


def test_an_unsupported_family_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"'mamba'.*cannot be served"):
        HCacheLLM(save_mamba(tmp_path / "mamba"), store=tmp_path / "states")
    assert not (tmp_path / "states").exists()


@pytest.mark.parametrize("named", [True, False])
def test_a_loaded_model_of_an_unsupported_family_is_refused_at_once(
    tmp_path: Path, *, named: bool
) -> None:
    loaded = mamba()
    store = tmp_path / "states" if named else None
    with pytest.raises(UnsupportedModelError, match=r"'mamba'.*cannot be served"):
        HCacheLLM(model=loaded, tokenizer=byte_tokenizer(), store=store)


def test_a_store_that_is_a_file_is_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    (tmp_path / "states").write_text("text")
    with pytest.raises(StoreOpenError, match="is a file; a state store is a folder"):
        HCacheLLM(model=model, tokenizer=byte_tokenizer(), store=tmp_path / "states")
    assert (tmp_path / "states").read_text() == "text"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"fidelity": "perfect"}, "fidelity"),
        ({"tokenization": "loose"}, "tokenization"),
        ({"representation": "pixels"}, "pixels"),
        ({"max_concurrency": 0}, "max_concurrency"),
        ({"nonsense": 1}, "nonsense"),
    ],
)
def test_arguments_that_do_not_exist_are_refused_by_name(
    new_llm: Callable[..., HCacheLLM], wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        new_llm(**wrong)


def test_a_model_folder_gives_the_name_and_the_same_answers(
    new_llm: Callable[..., HCacheLLM], tmp_path: Path
) -> None:
    folder = save_tiny_model(tmp_path / "model", chat=True)
    llm = HCacheLLM(folder, store=tmp_path / "loaded", max_new_tokens=12, generate_kwargs=PRINTABLE)
    assert llm.metadata.model_name == str(folder)
    assert llm.metadata.is_chat_model
    assert text_of(llm.chat(messages())) == text_of(new_llm("chat").chat(messages()))
    with StateStore.open(tmp_path / "loaded") as store:
        assert llm.engine.store.store_id == store.store_id
    llm.close()


def test_a_chat_model_without_a_template_is_refused_at_once(
    new_llm: Callable[..., HCacheLLM],
) -> None:
    with pytest.raises(ValueError, match="chat_template"):
        new_llm("completion", is_chat_model=True)
