"""An answer on its way, for an event loop that goes on meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress

from hcache_rag.line import Line
from hcache_rag.openmp import give_back_threads
from hcache_rag.provenance import Generation
from hcache_rag.streaming import Computation, Run


class AsyncGenerationStream(AsyncIterator[str]):
    """`GenerationStream` for a coroutine: no thread waits for a turn or for a piece of text.

    Args: see `Computation`.
    """

    def __init__(
        self,
        run: Run,
        line: Line,
        limit: int,
    ) -> None:
        self._items: asyncio.Queue[str | BaseException | None] = asyncio.Queue()
        self._computation = Computation(run, self._put, line, limit)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._finished = False
        give_back_threads()

    def _put(self, item: str | BaseException | None) -> None:
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(self._items.put_nowait, item)

    @property
    def result(self) -> Generation:
        """The finished answer.

        Raises:
            RuntimeError: the stream has not ended yet.
        """
        if self._computation.result is None:
            raise RuntimeError("the stream has not been read to its end")
        return self._computation.result

    async def __anext__(self) -> str:
        if self._finished:
            raise StopAsyncIteration
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._computation.begin()
        item = await self._items.get()
        if isinstance(item, str):
            return item
        self._finished = True
        self._computation.join()
        if item is not None:
            raise item
        raise StopAsyncIteration

    async def read(self) -> Generation:
        """Read the stream to its end and return the finished answer; cancelling stops it."""
        async with self:
            async for _ in self:
                pass
        return self.result

    def cancel(self) -> None:
        """Stop generating after the token that is being computed, without waiting for that."""
        self._finished = True
        self._computation.stop()

    async def aclose(self) -> None:
        """Stop generating and wait until the thread has ended."""
        if self._finished:
            return
        self._finished = True
        if self._computation.stop():
            while isinstance(await self._items.get(), str):
                pass
            self._computation.join()

    async def __aenter__(self) -> AsyncGenerationStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        self._computation.cancel()
