"""What LlamaIndex and its users may expect of an LLM: events, turns, copies, programs, agents."""

from __future__ import annotations

import asyncio
import copy
import gc
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from fakes import CHAT_TEMPLATE, PRINTABLE, Recorder, chat_tokenizer, save_tiny_model
from llama_index.core.agent.workflow import ReActAgent
from llama_index.core.base.llms.types import ChatMessage, MessageRole
from llama_index.core.callbacks import CallbackManager, TokenCountingHandler
from llama_index.core.callbacks.base_handler import BaseCallbackHandler
from llama_index.core.callbacks.schema import CBEventType
from llama_index.core.instrumentation.events.exception import ExceptionEvent
from llama_index.core.instrumentation.events.llm import (
    LLMChatEndEvent,
    LLMChatStartEvent,
    LLMCompletionEndEvent,
    LLMCompletionStartEvent,
)
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index_instrumentation import get_dispatcher
from llama_index_instrumentation.events.span import SpanDropEvent
from llama_index_instrumentation.span_handlers import SimpleSpanHandler
from pydantic import BaseModel
from tiny import SHAPES, byte_tokenizer, tiny_model
from transformers import PreTrainedModel

from hcache_rag import HCacheEngine, StateStore
from hcache_rag.llama_index import HCacheLLM, StateRestoreEvent
from hcache_rag.provenance import Generation, Provenance
from hcache_rag.streaming import Computation

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = "Which planet comes first?"
MESSAGES = [ChatMessage(role="user", content=PROMPT)]
WAIT_S = 60


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model(SHAPES[1])


@pytest.fixture
def new_llm(model: PreTrainedModel) -> Iterator[Callable[..., HCacheLLM]]:
    made: list[HCacheLLM] = []

    def make(**options: Any) -> HCacheLLM:
        its: dict[str, Any] = {
            "model": model,
            "tokenizer": chat_tokenizer(),
            "store": StateStore.in_memory(),
            "max_new_tokens": 6,
            "generate_kwargs": PRINTABLE,
        }
        made.append(HCacheLLM(**its | options))
        return made[-1]

    yield make
    for llm in made:
        llm.close()


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Puts words into the model's mouth, one answer after another; the prompts it was given."""

    def script(*answers: str) -> list[str]:
        left, prompts = list(answers), list[str]()

        def generate(self: HCacheEngine, prompt: str, **options: Any) -> Generation:
            prompts.append(prompt)
            text = left.pop(0)
            if options.get("on_text"):
                for letter in text:
                    options["on_text"](letter)
            return Generation(text, tuple(range(len(text))), "stop", Provenance(9, 0, 0, 9))

        monkeypatch.setattr(HCacheEngine, "generate", generate)
        return prompts

    return script


@contextmanager
def before_every_pass(model: PreTrainedModel, action: Callable[[], None]) -> Iterator[None]:
    handle = model.register_forward_pre_hook(lambda *_: action())
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def recording() -> Iterator[Recorder]:
    recorder, root = Recorder(), get_dispatcher()
    root.add_event_handler(recorder)
    try:
        yield recorder
    finally:
        root.event_handlers.remove(recorder)


def join_generating_threads() -> None:
    for thread in threading.enumerate():
        if thread.name == "hcache-generate":
            thread.join(WAIT_S)
            assert not thread.is_alive()


# --- one start and one end ------------------------------------------------------------------------


class Pairs(BaseCallbackHandler):
    """Counts LlamaIndex's callbacks of LLM calls."""

    def __init__(self) -> None:
        super().__init__([], [])
        self.starts: list[str] = []
        self.ends: list[str] = []

    def on_event_start(
        self, event_type: Any, payload: Any = None, event_id: str = "", *_: Any, **__: Any
    ) -> str:
        if event_type == CBEventType.LLM:
            self.starts.append(event_id)
        return event_id

    def on_event_end(
        self, event_type: Any, payload: Any = None, event_id: str = "", **_: Any
    ) -> None:
        if event_type == CBEventType.LLM:
            self.ends.append(event_id)

    def start_trace(self, trace_id: str | None = None) -> None: ...

    def end_trace(self, trace_id: str | None = None, trace_map: Any = None) -> None: ...


async def _consume(stream: Any, close_early: bool) -> None:
    its = await stream
    async for _ in its:
        if close_early:
            break
    await its.aclose()


def _read(stream: Any, close_early: bool) -> None:
    for _ in stream:
        if close_early:
            break
    stream.close()


METHODS: dict[str, Callable[[HCacheLLM, bool], Any]] = {
    "complete": lambda llm, _: llm.complete(PROMPT),
    "chat": lambda llm, _: llm.chat(MESSAGES),
    "stream_complete": lambda llm, early: _read(llm.stream_complete(PROMPT), early),
    "stream_chat": lambda llm, early: _read(llm.stream_chat(MESSAGES), early),
    "acomplete": lambda llm, _: asyncio.run(llm.acomplete(PROMPT)),
    "achat": lambda llm, _: asyncio.run(llm.achat(MESSAGES)),
    "astream_complete": lambda llm, e: asyncio.run(_consume(llm.astream_complete(PROMPT), e)),
    "astream_chat": lambda llm, e: asyncio.run(_consume(llm.astream_chat(MESSAGES), e)),
}


@pytest.mark.parametrize("end", ["read", "closed early", "error"])
@pytest.mark.parametrize("name", METHODS)
def test_every_call_has_one_start_and_one_end(
    new_llm: Callable[..., HCacheLLM], model: PreTrainedModel, name: str, end: str
) -> None:
    pairs = Pairs()
    llm = new_llm(callback_manager=CallbackManager([pairs]))

    def fail() -> None:
        if end == "error":
            raise RuntimeError("broken")

    llm.max_new_tokens = 2000 if end == "closed early" and "stream" in name else 6
    with recording() as recorder, before_every_pass(model, fail), suppress(RuntimeError):
        METHODS[name](llm, end == "closed early")
        join_generating_threads()  # an event that holds the end's traceback must not keep them
        assert end != "error"
    assert len(pairs.starts) == 1
    assert pairs.ends == pairs.starts
    starts = recorder.count(LLMCompletionStartEvent) + recorder.count(LLMChatStartEvent)
    ends = recorder.count(LLMCompletionEndEvent) + recorder.count(LLMChatEndEvent)
    dropped = [e for e in recorder.events if isinstance(e, SpanDropEvent)]
    of_calls = [e for e in dropped if not str(e.span_id).startswith("restore-")]
    broken = recorder.count(ExceptionEvent) or len(of_calls)
    assert starts == 1
    is_whole = end == "read" or (end == "closed early" and "stream" not in name)
    assert (ends, broken) == ((1, 0) if is_whole else (0, 1))
    assert recorder.count(StateRestoreEvent) == (end != "error")


@pytest.mark.parametrize("name", METHODS)
def test_a_restore_is_reported_within_the_span_of_its_call(
    new_llm: Callable[..., HCacheLLM], name: str
) -> None:
    """Though a thread of its own computes it; a stream is read when that span has ended."""
    spans, root = SimpleSpanHandler(), get_dispatcher()
    root.add_span_handler(spans)
    try:
        with recording() as recorder:
            METHODS[name](new_llm(), False)
    finally:
        root.span_handlers.remove(spans)
    [start] = [
        e for e in recorder.events if isinstance(e, LLMCompletionStartEvent | LLMChatStartEvent)
    ]
    [restore] = [e for e in recorder.events if isinstance(e, StateRestoreEvent)]
    [its] = [span for span in spans.completed_spans if span.id_ == restore.span_id]
    assert start.span_id is not None
    assert its.parent_id == (None if "stream" in name else start.span_id)


def test_token_counters_count(new_llm: Callable[..., HCacheLLM]) -> None:
    counter = TokenCountingHandler(tokenizer=list)
    llm = new_llm(callback_manager=CallbackManager([counter]))
    llm.complete(PROMPT)
    list(llm.stream_complete(PROMPT))
    counts = [event.total_token_count for event in counter.llm_token_counts]
    assert counts == [len(PROMPT) + 6] * 2


def test_events_can_be_written_down_and_leave_responses_as_they_are(
    new_llm: Callable[..., HCacheLLM],
) -> None:
    with recording() as recorder:
        response = new_llm().complete(PROMPT)
    account = copy.deepcopy(response.additional_kwargs)
    for event in recorder.events:
        event.model_dump_json()
    assert response.additional_kwargs == account
    assert response.raw is None


def test_what_observers_are_told_of_the_llm_is_its_metadata(
    new_llm: Callable[..., HCacheLLM],
) -> None:
    llm = new_llm(system_prompt="a secret")
    payload = llm.to_payload()
    assert payload["class_name"] == "HCacheLLM"
    assert "secret" not in str(payload)
    assert "secret" not in str(llm.metadata)


def test_a_handler_may_ask_the_llm_again(new_llm: Callable[..., HCacheLLM]) -> None:
    """What was restored is reported when the turn is over; else this would wait for ever."""
    llm, again = new_llm(), list[str]()

    class Asks(Recorder):
        def handle(self, event: Any, **_: Any) -> None:
            if isinstance(event, StateRestoreEvent) and not again:
                again.append("")
                again[0] = llm.complete(PROMPT).text

    root, handler = get_dispatcher(), Asks()
    root.add_event_handler(handler)
    try:
        text = list(llm.stream_complete(PROMPT))[-1].text
    finally:
        root.event_handlers.remove(handler)
    assert again == [text]


# --- turns ----------------------------------------------------------------------------------------


def test_calls_of_every_kind_come_in_turn(
    new_llm: Callable[..., HCacheLLM], model: PreTrainedModel
) -> None:
    """While the first computes the others join, one behind the other."""
    llm, order = new_llm(), list[int]()
    line, may_go_on, begun = llm._resident.line, threading.Event(), threading.Event()
    generate = llm.engine.generate

    def noted(prompt: str, **options: Any) -> Generation:
        order.append(int(prompt[-1]))
        return generate(prompt, **options)

    llm.engine.generate = noted  # type: ignore[method-assign]

    def stand_still() -> None:
        begun.set()
        assert may_go_on.wait(WAIT_S)

    calls: list[Callable[[], Any]] = [
        lambda: llm.complete("number 0"),
        lambda: list(llm.stream_complete("number 1")),
        lambda: asyncio.run(llm.acomplete("number 2")),
        lambda: llm.complete("number 3"),
        lambda: asyncio.run(_consume(llm.astream_complete("number 4"), False)),
    ]
    with before_every_pass(model, stand_still), ThreadPoolExecutor(len(calls)) as pool:
        futures = [pool.submit(calls[0])]
        assert begun.wait(WAIT_S)
        for number, call in enumerate(calls[1:], 1):
            futures.append(pool.submit(call))
            while len(line._waiting) < number:
                assert not futures[-1].done()
        may_go_on.set()
        for future in futures:
            future.result(WAIT_S)
    assert order == [0, 1, 2, 3, 4]


def test_a_hundred_waiting_coroutines_hold_no_threads(
    new_llm: Callable[..., HCacheLLM], model: PreTrainedModel
) -> None:
    """Neither of their own nor of the loop's executor, which others need."""
    llm, may_go_on = new_llm(max_new_tokens=1), threading.Event()
    before = threading.active_count()
    most = 0

    async def main() -> list[Any]:
        nonlocal most
        begun, loop = asyncio.Event(), asyncio.get_running_loop()

        def stand_still() -> None:
            loop.call_soon_threadsafe(begun.set)
            assert may_go_on.wait(WAIT_S)

        with before_every_pass(model, stand_still):
            tasks = [asyncio.ensure_future(llm.acomplete(PROMPT)) for _ in range(100)]
            await begun.wait()
            most = threading.active_count()
            assert await asyncio.to_thread(lambda: "there is room") == "there is room"
            may_go_on.set()
            return await asyncio.gather(*tasks)

    answers = asyncio.run(main())
    assert len({answer.text for answer in answers}) == 1
    assert most <= before + 1


@pytest.mark.parametrize("way", ["close", "aclose", "drop", "cancel"])
def test_a_closed_stream_ends_within_one_token(
    new_llm: Callable[..., HCacheLLM],
    model: PreTrainedModel,
    monkeypatch: pytest.MonkeyPatch,
    way: str,
) -> None:
    """The fourth pass stands still until the stream is closed, and is the last one."""
    llm, passes, may_pass = new_llm(max_new_tokens=1000), list[int](), threading.Semaphore(3)
    cancel = Computation.cancel

    def cancelled(self: Computation) -> None:
        cancel(self)
        for _ in range(1000):
            may_pass.release()

    def note() -> None:
        passes.append(1)
        assert may_pass.acquire(timeout=WAIT_S)

    async def main() -> None:
        stream: Any = await llm.astream_complete(PROMPT)
        await anext(stream)
        if way == "aclose":
            await stream.aclose()
        else:
            waiting = asyncio.ensure_future(_consume(asyncio.sleep(0, stream), False))
            await asyncio.sleep(0)
            waiting.cancel()
            with suppress(asyncio.CancelledError):
                await waiting

    monkeypatch.setattr(Computation, "cancel", cancelled)
    with before_every_pass(model, note):
        if way in ("aclose", "cancel"):
            asyncio.run(main())
        else:
            stream: Any = llm.stream_complete(PROMPT)
            next(stream)
            if way == "close":
                stream.close()
            del stream
            gc.collect()
        join_generating_threads()
    assert len(passes) <= 4
    assert llm.complete(PROMPT, max_new_tokens=2).text


def test_a_loop_that_ends_leaves_nothing_computing(
    new_llm: Callable[..., HCacheLLM],
) -> None:
    llm = new_llm(max_new_tokens=2000)

    async def begin() -> None:
        stream = await llm.astream_complete(PROMPT)
        await anext(stream)  # and forget it

    asyncio.run(begin())
    join_generating_threads()
    assert llm.complete(PROMPT, max_new_tokens=2).text


# --- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"chat_memory": "sometimes"}, "chat_memory is 'auto', 'always' or 'never', not 'some"),
        ({"tokenization": "loose"}, "tokenization is 'segmented' or 'strict', not 'loose'"),
        ({"context_at_index": "all"}, "context_at_index is 'none' or 'documents', not 'all'"),
        ({"max_concurrency": 0}, "max_concurrency must be positive, not 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be positive, not 0"),
        ({"generate_kwargs": {"use_cache": False}}, "use_cache=False"),
        ({"generate_kwargs": {"prompt_lookup_num_tokens": 3}}, "prompt_lookup_num_tokens: spec"),
        ({"generate_kwargs": {"assistant_model": "another"}}, "assistant_model: speculative"),
        ({"generate_kwargs": {"num_beams": 2}}, "num_beams=2: only one sequence"),
        ({"generate_kwargs": {"max_new_tokens": 3}}, "max_new_tokens: set by the library"),
        ({"generate_kwargs": {"top_p": 3}}, "top_p lies between 0 and 1, but is 3"),
    ],
)
def test_what_cannot_be_is_refused_at_once_with_what_can(
    new_llm: Callable[..., HCacheLLM], wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        new_llm(store=None, **wrong)


def test_sampling_as_huggingface_llm_takes_it(new_llm: Callable[..., HCacheLLM]) -> None:
    """Its users write it into generate_kwargs."""
    greedy = new_llm().complete(PROMPT).text
    kwargs = {"do_sample": True, "temperature": 3.0, "top_k": 50, **PRINTABLE}
    llm = new_llm(generate_kwargs=kwargs)
    assert llm.temperature == 3.0
    drawn = {llm.complete(PROMPT, seed=seed).text for seed in range(4)}
    assert len(drawn) > 1
    assert llm.complete(PROMPT, temperature=0).text == greedy
    assert llm.complete(PROMPT, top_k=1).text == greedy
    assert new_llm(generate_kwargs=kwargs | {"do_sample": False}).complete(PROMPT).text == greedy
    assert new_llm(generate_kwargs=kwargs, temperature=0).complete(PROMPT).text == greedy
    assert new_llm(generate_kwargs={"do_sample": True, **PRINTABLE}).temperature == 1.0
    padded = {"pad_token_id": 257, "num_beams": 1, "use_cache": True, **PRINTABLE}
    assert new_llm(generate_kwargs=padded).complete(PROMPT).text == greedy


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("has_bos", [False, True])
def test_a_conversation_has_one_bos(
    new_llm: Callable[..., HCacheLLM], model: PreTrainedModel, *, own: bool, has_bos: bool
) -> None:
    """The tokenizer's template knows whether it wants one; to others one is given, once."""
    tokenizer: Any = byte_tokenizer(adds_bos=True)
    tokenizer.chat_template = ("{{ bos_token }}" if has_bos else "") + CHAT_TEMPLATE
    first = "<bos>" if has_bos else ""
    options = {"messages_to_prompt": lambda m: f"{first}{m[0].content}"} if own else {}
    llm = new_llm(tokenizer=tokenizer, **options)
    seen: list[Any] = []
    handle = model.register_forward_pre_hook(
        lambda _m, _a, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    llm.chat(MESSAGES)
    handle.remove()
    assert seen[0][0].tolist().count(256) == (1 if own or has_bos else 0)
    assert llm.engine.add_bos is own


def test_roles_that_templates_call_otherwise(new_llm: Callable[..., HCacheLLM]) -> None:
    llm = new_llm()
    roles = (MessageRole.DEVELOPER, MessageRole.USER, MessageRole.CHATBOT, MessageRole.MODEL)
    messages = [ChatMessage(role=role, content="x") for role in roles]
    prompt = llm._prompt_of(messages)
    assert [line for line in prompt.splitlines() if line.startswith("[")] == [
        *("[system]", "[user]", "[assistant]", "[assistant]", "[assistant]"),
    ]


def test_messages_that_a_template_refuses(new_llm: Callable[..., HCacheLLM]) -> None:
    tokenizer: Any = byte_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}?"
    )
    llm = new_llm(tokenizer=tokenizer, store=None, text_qa_template=PromptTemplate("{query_str}"))
    with pytest.raises(ValueError, match=r"chat_template refuses messages \(system\): no system"):
        llm.chat([ChatMessage(role="system", content="x")])


# --- copies ---------------------------------------------------------------------------------------


def test_a_copy_shares_the_engine_and_honours_what_is_changed(
    new_llm: Callable[..., HCacheLLM],
) -> None:
    llm = new_llm(store=None)
    its = llm.model_copy(update={"max_new_tokens": 2, "temperature": 3.0})
    assert its.engine is llm.engine  # though none was there when it was copied
    whole = llm.complete(PROMPT).text
    assert its.complete(PROMPT, temperature=0).text == whole[:2]
    assert len({its.complete(PROMPT, seed=seed).text for seed in range(5)}) > 1
    assert llm.complete(PROMPT).text == whole
    wrapped = llm.model_copy(update={"completion_to_prompt": lambda text: f"<<{text}>>"})
    assert wrapped.complete(PROMPT).text == llm.complete(f"<<{PROMPT}>>").text
    assert wrapped.metadata.num_output == 6


@pytest.mark.parametrize("way", ["model_copy", "deep", "copy", "deepcopy"])
def test_every_way_to_copy_shares_the_model(new_llm: Callable[..., HCacheLLM], way: str) -> None:
    llm = new_llm()
    ways: dict[str, Callable[[], HCacheLLM]] = {
        "model_copy": llm.model_copy,
        "deep": lambda: llm.model_copy(deep=True),
        "copy": lambda: copy.copy(llm),
        "deepcopy": lambda: copy.deepcopy(llm),
    }
    its = ways[way]()
    assert its is not llm
    assert its.engine is llm.engine
    its.max_new_tokens = 2
    assert llm.max_new_tokens == 6
    answers = [str(one.chat(MESSAGES).message.content) for one in (llm, its)]
    assert answers[1] == answers[0][:2]


def test_a_copy_may_read_otherwise_from_the_same_store(
    new_llm: Callable[..., HCacheLLM],
) -> None:
    llm = new_llm(fidelity="none")
    text = "Mercury is the smallest planet and the closest one to the Sun. " * 3
    llm.engine.precompute([text])
    exact = llm.model_copy(update={"fidelity": "exact"})
    assert exact.engine is not llm.engine
    assert exact.engine.store is llm.engine.store
    prompt = f"Something else in front.\n\n{text.strip()}\n\nWhat?"
    spent = [its.complete(prompt).additional_kwargs["hcache"] for its in (llm, exact)]
    assert [s["fidelity"] for s in spent] == ["none", "exact"]
    assert spent[0]["relocated_tokens"] == len(text.strip())
    assert spent[1]["relocated_tokens"] == 0
    llm.fidelity = "exact"
    assert llm.engine is exact.engine


def test_copies_compute_in_turn(new_llm: Callable[..., HCacheLLM], model: PreTrainedModel) -> None:
    llm = new_llm()
    its, inside, most, lock = llm.model_copy(), 0, 0, threading.Lock()

    def enter() -> None:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)

    def leave(*_: Any) -> None:
        nonlocal inside
        with lock:
            inside -= 1

    handle = model.register_forward_hook(leave)
    with before_every_pass(model, enter), ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda one: one.complete(PROMPT), [llm, its] * 3))
    handle.remove()
    assert most == 1


@pytest.mark.parametrize("update", [{"model_name": "x"}, {"dtype": "bfloat16"}, {"nonsense": 1}])
def test_a_copy_cannot_be_another_model(
    new_llm: Callable[..., HCacheLLM], update: dict[str, Any]
) -> None:
    llm = new_llm()
    with pytest.raises(ValueError, match=next(iter(update))):
        llm.model_copy(update=update)
    with pytest.raises(ValueError, match=next(iter(update))):
        setattr(llm, *update.popitem())


def test_a_pickle_loads_the_model_and_opens_the_store_anew(
    new_llm: Callable[..., HCacheLLM], tmp_path: Path
) -> None:
    folder = save_tiny_model(tmp_path / "model", chat=True)
    text = "Mercury is the smallest planet and the closest one to the Sun."
    options: dict[str, Any] = {"generate_kwargs": PRINTABLE, "fidelity": "none"}
    llm = HCacheLLM(folder, store=tmp_path / "states", temperature=0, **options)
    llm.engine.precompute([text])
    llm.max_new_tokens = 7
    again: HCacheLLM = pickle.loads(pickle.dumps(llm))
    assert again.engine is not llm.engine
    assert again.to_dict() == llm.to_dict()
    answers = [its.complete(f"{text}\n\nWhat?") for its in (llm, again)]
    assert answers[0].text == answers[1].text
    assert len(answers[1].text) == 7
    assert answers[1].additional_kwargs["hcache"]["documents_restored"] == 1
    again.close()
    llm.close()


def test_what_cannot_be_pickled_says_why(new_llm: Callable[..., HCacheLLM], tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="make it with model_name"):
        pickle.dumps(new_llm())
    folder = save_tiny_model(tmp_path / "model", chat=True)
    with (
        HCacheLLM(folder, store=StateStore.in_memory()) as llm,
        pytest.raises(TypeError, match="in memory"),
    ):
        pickle.dumps(llm)


# --- programs and agents --------------------------------------------------------------------------


class Planet(BaseModel):
    """A planet."""

    name: str
    moons: int


MARS = '{"name": "Mars", "moons": 2}'
ABOUT = PromptTemplate("Tell me about {what}.")


def test_structured_output(
    new_llm: Callable[..., HCacheLLM], says: Callable[..., list[str]]
) -> None:
    """Through LlamaIndex's text-completion program: a schema in the prompt, the answer parsed."""
    llm = new_llm()
    prompts = says(f"Here it is:\n{MARS}\n", MARS, MARS, MARS)
    mars = Planet(name="Mars", moons=2)
    assert llm.structured_predict(Planet, ABOUT, what="Mars") == mars
    assert asyncio.run(llm.astructured_predict(Planet, ABOUT, what="Mars")) == mars
    assert "Tell me about Mars." in prompts[0]
    assert '"moons"' in prompts[0]
    structured = llm.as_structured_llm(Planet)
    assert structured.complete("Tell me about Mars.").raw == mars
    assert structured.chat(MESSAGES).raw == mars


def test_structured_output_with_arguments_of_a_call(
    new_llm: Callable[..., HCacheLLM], says: Callable[..., list[str]]
) -> None:
    says(MARS)
    its = {"max_new_tokens": 50, "temperature": 0.0}
    assert new_llm().structured_predict(Planet, ABOUT, llm_kwargs=its, what="Mars").moons == 2


@pytest.mark.parametrize("streaming", [False, True])
def test_a_react_agent_calls_its_tools(
    new_llm: Callable[..., HCacheLLM], says: Callable[..., list[str]], *, streaming: bool
) -> None:
    """Agents fall back to ReAct, since this is no function-calling model."""
    called: list[tuple[int, int]] = []

    def add(a: int, b: int) -> int:
        """Add two numbers."""
        called.append((a, b))
        return a + b

    prompts = says(
        'Thought: I need a tool.\nAction: add\nAction Input: {"a": 2, "b": 3}\n',
        "Thought: I can answer without using any more tools.\nAnswer: It is 5.\n",
    )
    agent = ReActAgent(tools=[FunctionTool.from_defaults(add)], llm=new_llm(), streaming=streaming)

    async def run() -> str:
        return str(await agent.run("What is 2 + 3?"))

    assert asyncio.run(run()) == "It is 5."
    assert called == [(2, 3)]
    assert "Observation: 5" in prompts[1]


def test_predicting_is_completing_what_is_formatted(
    new_llm: Callable[..., HCacheLLM], says: Callable[..., list[str]]
) -> None:
    """`complete` of a bare prompt reads what `predict` reads, a system prompt included."""
    llm = new_llm(
        tokenizer=byte_tokenizer(),
        store=None,
        system_prompt="Be kind.",
        completion_to_prompt=lambda text: f"<<{text}>>",
    )
    prompts = says("a", "b", "c", "d")
    llm.predict(PromptTemplate("{x}"), x="Hello")
    llm.complete("Hello")
    list(llm.stream(PromptTemplate("{x}"), x="Hello"))
    list(llm.stream_complete("Hello"))
    assert len(set(prompts)) == 1
    assert prompts[0] == "Be kind.\n\n<<Hello>>"
