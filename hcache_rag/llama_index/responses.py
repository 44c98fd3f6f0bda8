"""What a call of an LLM gives: answers as LlamaIndex's responses, whole or piece by piece."""

from __future__ import annotations

from typing import Any

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    MessageRole,
)

from hcache_rag.llama_index.awaiting import AsyncGenerationStream
from hcache_rag.provenance import Generation
from hcache_rag.streaming import GenerationStream


def completion_of(answer: Generation, streamed: str | None = None) -> CompletionResponse:
    """A finished answer, or the last item of a stream whose pieces say `streamed`."""
    text, delta = (answer.text, None) if streamed is None else (streamed, "")
    return CompletionResponse(text=text, delta=delta, additional_kwargs=account_of(answer))


def chat_of(answer: Generation, streamed: str | None = None) -> ChatResponse:
    """The same as a message."""
    text, delta = (answer.text, None) if streamed is None else (streamed, "")
    return ChatResponse(message=assistant(text), delta=delta, additional_kwargs=account_of(answer))


def assistant(text: str) -> ChatMessage:
    """What the model says."""
    return ChatMessage(role=MessageRole.ASSISTANT, content=text)


def account_of(answer: Generation) -> dict[str, Any]:
    """Token counts and provenance, as `json` writes them."""
    prompt, completion = answer.provenance.prompt_tokens, len(answer.token_ids)
    return {
        "hcache": answer.provenance.to_dict(),
        "finish_reason": answer.finish_reason,
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def completions(stream: GenerationStream) -> CompletionResponseGen:
    """The text so far with each piece, and at the end the account."""
    text = ""
    for piece in stream:
        text += piece
        yield CompletionResponse(text=text, delta=piece)
    yield completion_of(stream.result, text)


def chats(stream: GenerationStream) -> ChatResponseGen:
    """The same as messages."""
    text = ""
    for piece in stream:
        text += piece
        yield ChatResponse(message=assistant(text), delta=piece)
    yield chat_of(stream.result, text)


async def acompletions(stream: AsyncGenerationStream) -> CompletionResponseAsyncGen:
    """`completions` for a coroutine."""
    text = ""
    async for piece in stream:
        text += piece
        yield CompletionResponse(text=text, delta=piece)
    yield completion_of(stream.result, text)


async def achats(stream: AsyncGenerationStream) -> ChatResponseAsyncGen:
    """The same as messages."""
    text = ""
    async for piece in stream:
        text += piece
        yield ChatResponse(message=assistant(text), delta=piece)
    yield chat_of(stream.result, text)
