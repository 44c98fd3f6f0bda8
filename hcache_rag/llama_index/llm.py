"""`HCacheLLM`: a LlamaIndex LLM that restores the documents it finds in its prompts.

All public methods stand on two undecorated ones, so that one call is one pair of events.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

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

from hcache_rag.bundled import MODEL_NAME, default_model_path
from hcache_rag.engine import Fidelity, HCacheEngine
from hcache_rag.generation import GenerationOptions
from hcache_rag.layout import StateLayout
from hcache_rag.llama_index.events import report_restore
from hcache_rag.models import ModelAdapter, load_model
from hcache_rag.profile import HardwareProfile
from hcache_rag.prompt import Tokenization
from hcache_rag.provenance import Generation, Provenance
from hcache_rag.store import StateStore
from hcache_rag.streaming import GenerationStream

_MARK = "\x02documents\x03"
_PATIENCE_S = 0.05
"""A call that waits for its turn looks so often whether it was cancelled."""

_OPTIONS = ("max_new_tokens", "temperature", "top_p", "top_k", "stop", "seed")


class HCacheLLM(CustomLLM):
    """A local transformers model that reads each document once.

    Args:
        model_name: a folder with a transformers model; by default the bundled
            SmolLM2-135M-Instruct.
        model, tokenizer: a loaded model and its fast tokenizer, instead of `model_name`.
        store: where states are kept, a `StateStore` or a folder. Without one, the first retriever
            that is built with this LLM and a `persist_dir` brings its own; a program that never
            names one gets a temporary folder.
        dtype: what `model_name` is loaded as, "float32" or "bfloat16".
        device: where it is loaded to, "cpu" or "cuda".
        max_new_tokens: the longest answer.
        temperature: 0 (the default) decodes greedily.
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
        max_concurrency: calls that may compute at once; others wait.
        chat_memory: which conversations are kept, so that their next turn restores them exactly:
            "auto", those that hold an answer already; "always", from the first turn on; "never".
        keep_recurring: keep rows of documents that recur as exact paths, see `HCacheEngine`.

    `complete`, `chat` and the streaming and asynchronous forms take `max_new_tokens`,
    `temperature`, `top_p`, `top_k`, `stop` and `seed` per call. Responses carry token counts and
    the provenance ("hcache") in `additional_kwargs`.

    Examples:
        `pip install hcache-rag`

        ```python
        from hcache_rag.llama_index import HCacheLLM

        llm = HCacheLLM(model_name="path/to/a/model", store="storage/states")
        print(llm.complete("The capital of France is"))
        ```
    """

    model_name: str = Field(default="", description="A folder with a transformers model.")
    dtype: str = Field(default="float32", description="The dtype that the model is loaded as.")
    max_new_tokens: int = Field(default=256, description="The longest answer, in tokens.", gt=0)
    temperature: float = Field(default=0.0, description="0 decodes greedily.", ge=0)
    is_chat_model: bool = Field(default=True, description="Whether a chat template is applied.")
    tokenization: str = Field(default="segmented", description="'segmented' or 'strict'.")
    fidelity: str | float = Field(default="auto", description="The dial, or a share.")
    context_at_index: str = Field(default="none", description="'none' or 'documents'.")
    generate_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="More arguments for transformers' generate."
    )
    max_concurrency: int = Field(default=1, description="Calls that compute at once.", gt=0)
    chat_memory: Literal["auto", "always", "never"] = Field(
        default="auto", description="Which conversations are kept."
    )
    keep_recurring: bool = Field(default=False, description="Rows of documents become exact.")

    _model: PreTrainedModel = PrivateAttr()
    _adapter: ModelAdapter = PrivateAttr()
    _tokenizer: PreTrainedTokenizerBase = PrivateAttr()
    _representation: str | Sequence[str] | StateLayout = PrivateAttr()
    _storage_dtype: str | None = PrivateAttr()
    _profile: HardwareProfile | Literal["auto"] | None = PrivateAttr()
    _template: BasePromptTemplate | None = PrivateAttr()
    _store: StateStore | None = PrivateAttr()
    _owns_store: bool = PrivateAttr()
    _temporary: tempfile.TemporaryDirectory[str] | None = PrivateAttr()
    _engine: HCacheEngine | None = PrivateAttr()
    _reference_mode: bool = PrivateAttr()
    _slots: threading.Semaphore = PrivateAttr()
    _lock: threading.Lock = PrivateAttr()

    def __init__(
        self,
        model_name: str | os.PathLike[str] | None = None,
        *,
        model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        store: StateStore | str | os.PathLike[str] | None = None,
        dtype: str = "float32",
        device: str = "cpu",
        max_new_tokens: int = 256,
        temperature: float = 0.0,
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
        chat_memory: Literal["auto", "always", "never"] = "auto",
        keep_recurring: bool = False,
        reference_mode: bool = False,
        **kwargs: Any,
    ) -> None:
        if (model is None) != (tokenizer is None):
            raise ValueError("give both of model= and tokenizer=, or neither")
        if model is not None and model_name is not None:
            raise ValueError("give either model_name or model= and tokenizer=, not both")
        if model is None or tokenizer is None:
            path = str(model_name) if model_name is not None else str(default_model_path())
            model, tokenizer = load_model(path, dtype=dtype, device=device)
            name = path if model_name is not None else MODEL_NAME
        else:
            name = str(model.config.name_or_path or model.config.model_type)
        if is_chat_model is None:
            is_chat_model = tokenizer.chat_template is not None
        if is_chat_model and kwargs.get("messages_to_prompt") is None:
            kwargs["messages_to_prompt"] = _chat_template_of(tokenizer)
        unknown = sorted(set(kwargs) - set(type(self).model_fields))
        if unknown:
            raise TypeError(f"unknown argument(s): {', '.join(unknown)}")
        super().__init__(
            model_name=name,
            dtype=str(model.dtype).removeprefix("torch."),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            is_chat_model=is_chat_model,
            fidelity=fidelity,
            context_at_index=context_at_index,
            tokenization=tokenization,
            generate_kwargs=generate_kwargs or {},
            max_concurrency=max_concurrency,
            chat_memory=chat_memory,
            keep_recurring=keep_recurring,
            **kwargs,
        )
        self._model, self._tokenizer = model, tokenizer
        self._adapter = ModelAdapter(model, name)  # refuses an unsupported model at once
        self._representation = representation
        self._storage_dtype = storage_dtype
        self._profile = profile
        self._template = text_qa_template
        self._reference_mode = reference_mode
        self._temporary = None
        self._engine = None
        self._slots = threading.Semaphore(max_concurrency)
        self._lock = threading.Lock()
        self._store = None
        self._owns_store = not isinstance(store, StateStore)
        if store is not None:
            self._store = store if isinstance(store, StateStore) else _open(store)
        if self._store is not None:
            try:
                self._engine = self._new_engine(self._store)
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
            context_window=self._adapter.spec.window_tokens,
            num_output=self.max_new_tokens,
            is_chat_model=self.is_chat_model,
            is_function_calling_model=False,
            model_name=self.model_name,
        )

    @property
    def engine(self) -> HCacheEngine:
        """The engine behind this LLM; made, and with it a temporary store, at the first use."""
        with self._lock:
            if self._engine is None:
                self._temporary = tempfile.TemporaryDirectory(prefix="hcache-rag-")
                self._store = StateStore.open(self._temporary.name)
                self._engine = self._new_engine(self._store)
            return self._engine

    @property
    def adapter(self) -> ModelAdapter:
        """The model as capturing and restoring see it."""
        return self._adapter

    @property
    def has_store(self) -> bool:
        """Whether a store was named, by the caller or by a retriever."""
        return self._store is not None and self._temporary is None

    def use_store(self, path: str | os.PathLike[str]) -> None:
        """Keep states in the folder `path` from now on.

        Raises:
            ValueError: the LLM has another store already.
        """
        with self._lock:
            if self.has_store and self._store is not None:
                raise ValueError(f"this LLM already keeps its states in {self._store.path}")
            store = _open(path)
            self._close_temporary()
            self._store, self._engine = store, self._new_engine(store)

    def close(self) -> None:
        """Close the store, unless the caller brought it open; the LLM cannot be used any more."""
        if self._engine is not None:
            self._engine.close()
        if self._store is not None and self._owns_store:
            self._store.close()
        self._close_temporary()

    def _close_temporary(self) -> None:
        if self._temporary is not None:
            if self._engine is not None:
                self._engine.close()
            if self._store is not None:
                self._store.close()
            self._temporary.cleanup()
            self._temporary = None

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
        return self._completion(self._generate(self._formatted(prompt, formatted), True, kwargs))

    @llm_completion_callback()
    def stream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponseGen:
        """Complete a prompt piece by piece; closing the generator stops the computation."""
        stream = self._stream(self._formatted(prompt, formatted), True, kwargs)

        def responses() -> CompletionResponseGen:
            with stream:
                text = ""
                for piece in stream:
                    text += piece
                    yield CompletionResponse(text=text, delta=piece)
                yield self._completion(stream.result, text)

        return responses()

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer a conversation."""
        prompt, remember = self._prompt_of(messages), self._remembers(messages)
        return self._chat(self._generate(prompt, False, kwargs, remember))

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """Answer a conversation piece by piece; closing the generator stops the computation."""
        stream = self._chat_stream(messages, kwargs)

        def responses() -> ChatResponseGen:
            with stream:
                text = ""
                for piece in stream:
                    text += piece
                    yield ChatResponse(message=_assistant(text), delta=piece)
                yield self._chat(stream.result, text)

        return responses()

    @llm_completion_callback()
    async def acomplete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponse:
        """`complete` on another thread; the event loop goes on, cancelling stops it."""
        return self._completion(
            await _read(self._stream(self._formatted(prompt, formatted), True, kwargs))
        )

    @llm_completion_callback()
    async def astream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponseAsyncGen:
        """`stream_complete` on another thread; the event loop goes on."""
        stream = self._stream(self._formatted(prompt, formatted), True, kwargs)

        async def responses() -> CompletionResponseAsyncGen:
            text = ""
            try:
                while (piece := await asyncio.to_thread(next, stream, None)) is not None:
                    text += piece
                    yield CompletionResponse(text=text, delta=piece)
                yield self._completion(stream.result, text)
            finally:
                await asyncio.to_thread(stream.close)

        return responses()

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """`chat` on another thread; the event loop goes on, cancelling stops it."""
        return self._chat(await _read(self._chat_stream(messages, kwargs)))

    @llm_chat_callback()
    async def astream_chat(
        self, messages: Sequence[ChatMessage], **kwargs: Any
    ) -> ChatResponseAsyncGen:
        """`stream_chat` on another thread; the event loop goes on."""
        stream = self._chat_stream(messages, kwargs)

        async def responses() -> ChatResponseAsyncGen:
            text = ""
            try:
                while (piece := await asyncio.to_thread(next, stream, None)) is not None:
                    text += piece
                    yield ChatResponse(message=_assistant(text), delta=piece)
                yield self._chat(stream.result, text)
            finally:
                await asyncio.to_thread(stream.close)

        return responses()

    def _new_engine(self, store: StateStore) -> HCacheEngine:
        return HCacheEngine(
            self._model,
            self._tokenizer,
            store,
            preamble=self.preamble,
            add_bos=not self.is_chat_model,
            representation=self._representation,
            storage_dtype=self._storage_dtype,
            profile=self._profile,
            fidelity=self.fidelity,  # type: ignore[arg-type]
            keep_recurring=self.keep_recurring,
            context_at_index=self.context_at_index,  # type: ignore[arg-type]
            tokenization=self.tokenization,  # type: ignore[arg-type]
            reference_mode=self._reference_mode,
            name=self.model_name,
        )

    def _remembers(self, messages: Sequence[ChatMessage]) -> bool:
        """Whether a conversation is kept."""
        has_answer = any(message.role == MessageRole.ASSISTANT for message in messages)
        return self.chat_memory == "always" or (self.chat_memory == "auto" and has_answer)

    def _generate(
        self, prompt: str, add_bos: bool, kwargs: dict[str, Any], remember: bool = False
    ) -> Generation:
        options, engine = self._options(kwargs), self.engine
        with self._slots:
            answer = engine.generate(prompt, options=options, add_bos=add_bos, remember=remember)
        report_restore(answer)
        return answer

    def _stream(
        self, prompt: str, add_bos: bool, kwargs: dict[str, Any], remember: bool = False
    ) -> GenerationStream:
        options, engine, slots = self._options(kwargs), self.engine, self._slots

        def run(on_text: Callable[[str], None], cancelled: threading.Event) -> Generation:
            while not slots.acquire(timeout=_PATIENCE_S):
                if cancelled.is_set():
                    return Generation("", (), "cancelled", Provenance(0, 0, 0, 0))
            try:
                answer = engine.generate(
                    prompt,
                    options=options,
                    add_bos=add_bos,
                    remember=remember,
                    on_text=on_text,
                    cancelled=cancelled,
                )
            finally:
                slots.release()
            report_restore(answer)
            return answer

        return GenerationStream(run)

    def _chat_stream(
        self, messages: Sequence[ChatMessage], kwargs: dict[str, Any]
    ) -> GenerationStream:
        remember = self._remembers(messages)
        return self._stream(self._prompt_of(messages), False, kwargs, remember)

    def _options(self, kwargs: dict[str, Any]) -> GenerationOptions:
        unknown = sorted(set(kwargs) - set(_OPTIONS))
        if unknown:
            known = ", ".join(_OPTIONS)
            raise TypeError(f"unknown argument(s) {', '.join(unknown)}; known per call: {known}")
        given = {"max_new_tokens": self.max_new_tokens, "temperature": self.temperature, **kwargs}
        if ("top_p" in kwargs or "top_k" in kwargs) and not given["temperature"]:
            given["temperature"] = kwargs.get("temperature", 1.0)  # asked to sample
        return GenerationOptions(**given, extra=self.generate_kwargs)

    def _formatted(self, prompt: str, formatted: bool) -> str:
        if formatted or self.completion_to_prompt is None:
            return prompt
        return self.completion_to_prompt(prompt)

    def _prompt_of(self, messages: Sequence[ChatMessage]) -> str:
        if self.messages_to_prompt is None:
            raise ValueError("this LLM has no messages_to_prompt")
        return self.messages_to_prompt(messages)

    def _completion(self, answer: Generation, streamed: str | None = None) -> CompletionResponse:
        text = answer.text if streamed is None else streamed
        delta = None if streamed is None else ""
        return CompletionResponse(text=text, delta=delta, additional_kwargs=_account(answer))

    def _chat(self, answer: Generation, streamed: str | None = None) -> ChatResponse:
        text = answer.text if streamed is None else streamed
        delta = None if streamed is None else ""
        return ChatResponse(
            message=_assistant(text), delta=delta, additional_kwargs=_account(answer)
        )


def _open(path: str | os.PathLike[str]) -> StateStore:
    """The store in a folder; one that cannot be written is read."""
    folder = Path(path).expanduser()
    return StateStore.open(folder, read_only=folder.is_dir() and not os.access(folder, os.W_OK))


async def _read(stream: GenerationStream) -> Generation:
    try:
        return await asyncio.to_thread(stream.read)
    finally:
        await asyncio.to_thread(stream.close)


def _assistant(text: str) -> ChatMessage:
    return ChatMessage(role=MessageRole.ASSISTANT, content=text)


def _account(answer: Generation) -> dict[str, Any]:
    prompt, completion = answer.provenance.prompt_tokens, len(answer.token_ids)
    return {
        "hcache": answer.provenance.to_dict(),
        "finish_reason": answer.finish_reason,
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def _chat_template_of(
    tokenizer: PreTrainedTokenizerBase,
) -> Callable[[Sequence[ChatMessage]], str]:
    def messages_to_prompt(messages: Sequence[ChatMessage]) -> str:
        plain = [{"role": m.role.value, "content": m.content or ""} for m in messages]
        return str(tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True))

    return messages_to_prompt
