"""Streams that end when they are closed, though LlamaIndex's callbacks stand in between.

The callbacks put a generator of their own around a method's, and leave that one to the garbage
collector when theirs is closed: whoever keeps the event of that closing keeps it alive.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator
from contextvars import ContextVar
from functools import wraps
from inspect import iscoroutinefunction, signature
from typing import Any, TypeVar

from hcache_rag.llama_index.awaiting import AsyncGenerationStream
from hcache_rag.streaming import GenerationStream

Stream = TypeVar("Stream", GenerationStream, AsyncGenerationStream)

_opened: ContextVar[list[Any] | None] = ContextVar("hcache_rag_opened_streams", default=None)
"""What the streaming method that is being called has opened so far."""


def opened(stream: Stream) -> Stream:
    """A stream that ends with what the streaming method returns."""
    streams = _opened.get()
    if streams is not None:
        streams.append(stream)
    return stream


def closing(callback: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A callback of LlamaIndex for a method that returns a generator; when what then is returned is
    closed, so is everything inside.
    """

    def wrap(method: Any) -> Any:
        its_signature, reported = signature(method), callback(method)

        @wraps(method)
        def streamed(self: Any, *args: Any, **kwargs: Any) -> Any:
            streams: list[GenerationStream] = []
            token = _opened.set(streams)
            try:
                return _closed(reported(self, *args, **kwargs), streams)
            finally:
                _opened.reset(token)

        @wraps(method)
        async def astreamed(self: Any, *args: Any, **kwargs: Any) -> Any:
            streams: list[AsyncGenerationStream] = []
            token = _opened.set(streams)
            try:
                return _aclosed(await reported(self, *args, **kwargs), streams)
            finally:
                _opened.reset(token)

        found: Any = astreamed if iscoroutinefunction(method) else streamed
        found.__signature__ = its_signature  # the callback leaves a mark that inspect takes for one
        return found

    return wrap


def _closed(
    responses: Generator[Any, None, None], streams: list[GenerationStream]
) -> Generator[Any, None, None]:
    try:
        yield from responses
    finally:
        for stream in streams:
            stream.close()


async def _aclosed(
    responses: AsyncGenerator[Any, None], streams: list[AsyncGenerationStream]
) -> AsyncGenerator[Any, None]:
    """It may be closed when no loop runs any more, so that closing waits for nothing."""
    try:
        async for response in responses:
            yield response
    finally:
        for stream in streams:
            stream.cancel()
        await responses.aclose()
