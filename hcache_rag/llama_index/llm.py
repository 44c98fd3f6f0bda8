"""`HCacheLLM`: a LlamaIndex LLM that restores the documents it finds in its prompts.

All public methods stand on one undecorated one, so that one call is one pair of events.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any, Literal, get_args

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
    MessageRole,
)
from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.custom import CustomLLM
from llama_index.core.prompts import BasePromptTemplate
from llama_index.core.prompts.default_prompt_selectors import DEFAULT_TEXT_QA_PROMPT_SEL
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hcache_rag.bound import Fidelity
from hcache_rag.engine import HCacheEngine
from hcache_rag.generation import GenerationOptions
from hcache_rag.layout import StateLayout
from hcache_rag.llama_index.arguments import refuse_unknown
from hcache_rag.llama_index.awaiting import AsyncGenerationStream
from hcache_rag.llama_index.calls import chat_template_of, options_of, temperature_of
from hcache_rag.llama_index.closing import closing, opened
from hcache_rag.llama_index.events import generate
from hcache_rag.llama_index.resident import Keeping, Reading, Resident, load
from hcache_rag.llama_index.responses import (
    achats,
    acompletions,
    chat_of,
    chats,
    completion_of,
    completions,
)
from hcache_rag.models import ModelAdapter
from hcache_rag.profile import HardwareProfile
from hcache_rag.prompt import Tokenization, readable
from hcache_rag.provenance import Generation
from hcache_rag.repair import check_fidelity
from hcache_rag.store import StateStore
from hcache_rag.streaming import GenerationStream

ChatMemory = Literal["auto", "always", "never"]

_MARK = "\x02documents\x03"
_LOADED = ("model_name", "dtype")
"""What a copy cannot change: it shares the loaded model."""


@dataclass(frozen=True, slots=True)
class _Call:
    """A prompt to answer, and how."""

    engine: HCacheEngine
    prompt: str
    options: GenerationOptions
    add_bos: bool
    remember: bool = False

    def run(
        self,
        on_text: Callable[[str], None] | None = None,
        cancelled: threading.Event | None = None,
        end_turn: Callable[[], None] = lambda: None,
    ) -> Generation:
        """Answer it."""
        return generate(
            self.engine,
            self.prompt,
            end_turn,
            options=self.options,
            add_bos=self.add_bos,
            remember=self.remember,
            on_text=on_text,
            cancelled=cancelled,
        )


class HCacheLLM(CustomLLM):
    """A local transformers model that reads each document once.

    Args:
        model_name: a folder with a transformers model; by default the bundled
            SmolLM2-135M-Instruct.
        model, tokenizer: a loaded model and its fast tokenizer, instead of `model_name`.
        store: where states are kept, a `StateStore` or a folder. Without one, the first retriever
            that is built with this LLM and a `persist_dir` brings its own; a program that never
            names one gets a temporary folder.
        dtype: what `model_name` is loaded as, "float32", "bfloat16", or "auto": bfloat16 where it
            pays on this machine, by measurement.
        device: where it is loaded to, "cpu", "cuda", "cuda:1", or "auto", the default: the GPU
            where torch sees one, else the CPU.
        max_new_tokens: the longest answer.
        temperature: 0 decodes greedily, and is the default where `generate_kwargs` say nothing.
        representation: "auto", "hidden", "kv", one of the latter two per layer, or a layout.
        storage_dtype: what states are stored in, see `HCacheEngine`.
        profile: the machine, see `HCacheEngine`.
        fidelity: how close to full prefill answers are: "exact", "high", "balanced", "fast",
            "none", or the share of relocated tokens that is repaired. "auto", the default, is what
            `hcache-rag fidelity --write` has put into the store, or else "balanced".
        context_at_index: what documents are read after besides the preamble: "none", or
            "documents": those before them in the same call, which needs less repair later.
        tokenization: "segmented", or "strict" for token ids equal to transformers'.
        is_chat_model: whether prompts go through the tokenizer's chat template; by default
            whether it has one.
        text_qa_template: the template whose head documents are read after. Change it together
            with the query engine's; a prompt with another head still restores its documents.
        generate_kwargs: more arguments for transformers' `generate`.
        max_concurrency: calls that may compute at once; others wait, first come, first served.
        chat_memory: which conversations are kept, so that their next turn restores them exactly:
            "auto", those that hold an answer already; "always", from the first turn on; "never".
        keep_recurring: keep rows of documents that recur as exact paths, see `HCacheEngine`.
        store_missed: read documents that had no state afterwards, when nobody waits, see
            `HCacheEngine`.

    A copy (`model_copy`, `copy`, `deepcopy`) shares the model and the store, and with equal reading
    the engine; changed fields count from the next call on. `close` closes them for all copies.
    Unpickling loads the model anew and opens the same store.

    `complete`, `chat` and the streaming and asynchronous forms take `max_new_tokens`,
    `temperature`, `top_p`, `top_k`, `stop` and `seed` per call. Responses carry token counts and
    the provenance ("hcache") in `additional_kwargs`.

    Raises:
        ModelNotFoundError: there is no model in `model_name`.
        UnsupportedModelError: the model cannot be restored on.
        StoreOpenError: `store` is a path that cannot hold a store.
        ValueError: an argument makes no sense.

    Examples:
        `pip install hcache-rag`

        ```python
        from hcache_rag.llama_index import HCacheLLM

        llm = HCacheLLM(model_name="path/to/a/model", store="storage/states")
        print(llm.complete("The capital of France is"))
        ```
    """

    model_name: str = Field(
        default="", description="A folder with a transformers model.", frozen=True
    )
    dtype: str = Field(
        default="float32", description="The dtype that the model is loaded as.", frozen=True
    )
    max_new_tokens: int = Field(default=256, description="The longest answer, in tokens.")
    temperature: float = Field(default=0.0, description="0 decodes greedily.")
    is_chat_model: bool = Field(default=True, description="Whether a chat template is applied.")
    tokenization: str = Field(default="segmented", description="'segmented' or 'strict'.")
    fidelity: str | float = Field(default="auto", description="The dial, or a share.")
    context_at_index: str = Field(default="none", description="'none' or 'documents'.")
    generate_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="More arguments for transformers' generate."
    )
    max_concurrency: int = Field(default=1, description="Calls that compute at once.")
    chat_memory: str = Field(default="auto", description="Which conversations are kept.")
    keep_recurring: bool = Field(default=True, description="Rows of documents become exact.")
    store_missed: bool = Field(default=True, description="Missed documents are read afterwards.")

    _resident: Resident = PrivateAttr()
    _template: BasePromptTemplate | None = PrivateAttr()
    _chat_template: Callable[[Sequence[ChatMessage]], str] = PrivateAttr()

    def __init__(
        self,
        model_name: str | os.PathLike[str] | None = None,
        *,
        model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        store: StateStore | str | os.PathLike[str] | None = None,
        dtype: str = "float32",
        device: str = "auto",
        max_new_tokens: int = 256,
        temperature: float | None = None,
        representation: str | Sequence[str] | StateLayout = "auto",
        storage_dtype: str | None = None,
        profile: HardwareProfile | Literal["auto"] | None = "auto",
        fidelity: Fidelity = "auto",
        context_at_index: Literal["none", "documents"] = "none",
        tokenization: Tokenization = "segmented",
        is_chat_model: bool | None = None,
        text_qa_template: BasePromptTemplate | None = None,
        generate_kwargs: dict[str, Any] | None = None,
        max_concurrency: int = 1,
        chat_memory: ChatMemory = "auto",
        keep_recurring: bool = True,
        store_missed: bool = True,
        reference_mode: bool = False,
        **kwargs: Any,
    ) -> None:
        known = {*signature(HCacheLLM.__init__).parameters, *type(self).model_fields}
        refuse_unknown(kwargs, known - {"self", "kwargs"})
        _check_choice("chat_memory", chat_memory, get_args(ChatMemory))
        _check_choice("tokenization", tokenization, get_args(Tokenization))
        _check_choice("context_at_index", context_at_index, ("none", "documents"))
        check_fidelity(fidelity)
        if max_concurrency < 1:
            raise ValueError(f"max_concurrency must be positive, not {max_concurrency}")
        generate_kwargs = dict(generate_kwargs or {})
        if temperature is None:
            temperature = temperature_of(generate_kwargs, 0.0)
        for name in ("do_sample", "temperature"):
            generate_kwargs.pop(name, None)
        options_of(max_new_tokens, temperature, generate_kwargs, {})  # refuses at once
        loaded = load(model_name, model, tokenizer, dtype, device)
        model, tokenizer, name = loaded.model, loaded.tokenizer, loaded.name
        if is_chat_model is None:
            is_chat_model = tokenizer.chat_template is not None
        chat_template = chat_template_of(tokenizer)
        if is_chat_model and kwargs.get("messages_to_prompt") is None:
            kwargs["messages_to_prompt"] = chat_template
        super().__init__(
            model_name=name,
            dtype=str(model.dtype).removeprefix("torch."),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            is_chat_model=is_chat_model,
            fidelity=fidelity,
            context_at_index=context_at_index,
            tokenization=tokenization,
            generate_kwargs=generate_kwargs,
            max_concurrency=max_concurrency,
            chat_memory=chat_memory,
            keep_recurring=keep_recurring,
            store_missed=store_missed,
            **kwargs,
        )
        self._template = text_qa_template
        self._chat_template = chat_template
        keeping = Keeping(representation, storage_dtype, profile, reference_mode)
        self._resident = Resident(loaded, store, keeping)
        if store is not None:
            try:
                _ = self.engine
            except BaseException:
                self.close()
                raise

    @classmethod
    def class_name(cls) -> str:
        """The stable name in serialised forms."""
        return "HCacheLLM"

    @property
    def metadata(self) -> LLMMetadata:
        """What LlamaIndex sizes its prompts by."""
        return LLMMetadata(
            context_window=self.adapter.spec.window_tokens,
            num_output=self.max_new_tokens,
            is_chat_model=self.is_chat_model,
            is_function_calling_model=False,
            model_name=self.model_name,
        )

    @property
    def engine(self) -> HCacheEngine:
        """The engine behind this LLM; made, and with it a temporary store, at the first use."""
        return self._resident.engine(self._reading, lambda: self.preamble)

    @property
    def adapter(self) -> ModelAdapter:
        """The model as capturing and restoring see it."""
        return self._resident.adapter

    @property
    def keeping(self) -> Keeping:
        """How states are kept."""
        return self._resident.keeping

    @property
    def has_store(self) -> bool:
        """Whether a store was named, by the caller or by a retriever."""
        return self._resident.store is not None

    def use_store(self, path: str | os.PathLike[str]) -> None:
        """Keep states in the folder `path` from now on.

        Raises:
            ValueError: the LLM has another store already.
        """
        self._resident.use_store(path, self._reading, lambda: self.preamble)

    def close(self) -> None:
        """Close the store, unless the caller brought it open; the LLM cannot be used any more."""
        self._resident.close()

    def __enter__(self) -> HCacheLLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def tokenize(self, text: str) -> list[int]:
        """The model's own token ids of a text, for `Settings.tokenizer`."""
        tokenizer = self._resident.loaded.tokenizer
        ids: list[int] = tokenizer.encode(readable(text), add_special_tokens=False)
        return ids

    def model_copy(
        self, *, update: Mapping[str, Any] | None = None, deep: bool = False
    ) -> HCacheLLM:
        """A copy that shares the model and the store, with some fields changed.

        Raises:
            ValueError: what is changed belongs to the loaded model, or there is no such field.
        """
        update = dict(update or {})
        loaded = [name for name in _LOADED if name in update]
        if loaded:
            raise ValueError(f"a copy shares the loaded model: {', '.join(loaded)} cannot change")
        unknown = sorted(set(update) - set(type(self).model_fields))
        if unknown:
            raise ValueError(f"there is no field {', '.join(unknown)}")
        return super().model_copy(update=update, deep=deep)

    def __reduce__(self) -> tuple[Any, ...]:
        model_name, its = self._resident.elsewhere()
        left_out = {"model_name", "callback_manager"}
        if not self._chat_adds_bos:
            left_out.add("messages_to_prompt")
        fields = {n: getattr(self, n) for n in type(self).model_fields if n not in left_out}
        its |= {"text_qa_template": self._template}
        return _made_again, (type(self), model_name, fields | its)

    @property
    def preamble(self) -> str:
        """The text in front of the documents in the prompts of the question-answering template."""
        text = self._templated(_MARK, "?")
        return text.partition(_MARK)[0] if _MARK in text else ""

    def qa_prompt(self, documents: Sequence[str], question: str) -> str:
        """The prompt that a query engine makes of a question and the documents found for it."""
        return self._templated("\n\n".join(text.strip() for text in documents), question)

    def _templated(self, context: str, question: str) -> str:
        template = self._template or DEFAULT_TEXT_QA_PROMPT_SEL
        arguments = {"context_str": context, "query_str": question}
        if self.is_chat_model:
            return self._prompt_of(self._get_messages(template, **arguments))
        return self._get_prompt(template, **arguments)

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Complete a prompt."""
        return completion_of(self._answer(self._completion(prompt, formatted, kwargs)))

    @closing(llm_completion_callback())
    def stream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponseGen:
        """Complete a prompt piece by piece; closing the generator stops the computation."""
        return completions(self._stream(self._completion(prompt, formatted, kwargs)))

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer a conversation."""
        return chat_of(self._answer(self._conversation(messages, kwargs)))

    @closing(llm_chat_callback())
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """Answer a conversation piece by piece; closing the generator stops the computation."""
        return chats(self._stream(self._conversation(messages, kwargs)))

    @llm_completion_callback()
    async def acomplete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponse:
        """`complete` on another thread; the event loop goes on, cancelling stops it."""
        call = self._completion(prompt, formatted, kwargs)
        return completion_of(await self._async_stream(call).read())

    @closing(llm_completion_callback())
    async def astream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponseAsyncGen:
        """`stream_complete` on another thread; the event loop goes on."""
        return acompletions(self._async_stream(self._completion(prompt, formatted, kwargs)))

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """`chat` on another thread; the event loop goes on, cancelling stops it."""
        call = self._conversation(messages, kwargs)
        return chat_of(await self._async_stream(call).read())

    @closing(llm_chat_callback())
    async def astream_chat(
        self, messages: Sequence[ChatMessage], **kwargs: Any
    ) -> ChatResponseAsyncGen:
        """`stream_chat` on another thread; the event loop goes on."""
        return achats(self._async_stream(self._conversation(messages, kwargs)))

    def _answer(self, call: _Call) -> Generation:
        with self._resident.line.turn(self.max_concurrency) as place:
            return call.run(end_turn=place.leave)

    def _stream(self, call: _Call) -> GenerationStream:
        line = self._resident.line
        return opened(GenerationStream(call.run, line, self.max_concurrency))

    def _async_stream(self, call: _Call) -> AsyncGenerationStream:
        line = self._resident.line
        return opened(AsyncGenerationStream(call.run, line, self.max_concurrency))

    def _completion(self, prompt: str, formatted: bool, kwargs: dict[str, Any]) -> _Call:
        """A call of the completion methods; what is not formatted is, as `predict` would."""
        if not formatted and self.completion_to_prompt is not None:
            prompt = self._extend_prompt(self.completion_to_prompt(prompt))
        return _Call(self.engine, prompt, self._options(kwargs), add_bos=True)

    def _conversation(self, messages: Sequence[ChatMessage], kwargs: dict[str, Any]) -> _Call:
        """A call of the chat methods."""
        has_answer = any(message.role == MessageRole.ASSISTANT for message in messages)
        remember = self.chat_memory == "always" or (self.chat_memory == "auto" and has_answer)
        prompt, options = self._prompt_of(messages), self._options(kwargs)
        return _Call(self.engine, prompt, options, self._chat_adds_bos, remember)

    def _options(self, kwargs: dict[str, Any]) -> GenerationOptions:
        return options_of(self.max_new_tokens, self.temperature, self.generate_kwargs, kwargs)

    def _prompt_of(self, messages: Sequence[ChatMessage]) -> str:
        if self.messages_to_prompt is None:
            raise ValueError("this LLM has no messages_to_prompt")
        return self.messages_to_prompt(messages)

    @property
    def _chat_adds_bos(self) -> bool:
        """Whether a conversation gets the tokenizer's first token in front, if it has none: the
        chat template has put everything there that it wants.
        """
        return self.messages_to_prompt is not self._chat_template

    @property
    def _reading(self) -> Reading:
        return Reading(
            self.fidelity,  # type: ignore[arg-type]
            self.context_at_index,  # type: ignore[arg-type]
            self.tokenization,  # type: ignore[arg-type]
            self.keep_recurring,
            self.store_missed,
            add_bos=self._chat_adds_bos if self.is_chat_model else True,
        )


def _made_again(cls: type[HCacheLLM], model_name: str | None, fields: dict[str, Any]) -> HCacheLLM:
    return cls(model_name, **fields)


def _check_choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        *others, last = map(repr, allowed)
        raise ValueError(f"{name} is {', '.join(others)} or {last}, not {value!r}")
