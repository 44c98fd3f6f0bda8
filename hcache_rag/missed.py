"""Documents that were asked for without a state: read later, when nobody waits for an answer.

On a CPU the model has one set of processors, and an answer needs all of them. So nothing is read
while a prompt is being answered: a document that is being read then is left at the next layer, and
begun anew afterwards. Where there is never a pause, nothing is stored, and nothing is slower.
"""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from hcache_rag.background import Background
from hcache_rag.errors import HCacheError
from hcache_rag.forks import ForkedLock
from hcache_rag.models import inputs_of

logger = logging.getLogger("hcache_rag")

MAX_WAITING = 64
"""So many documents may wait to be read; what comes then waits until it is asked for again."""


class MissedReader:
    """Reads documents, one by one, while no request is being computed. Thread-safe.

    Args:
        read: reads a text and stores its state.
        layers: of the model that it is read by.
    """

    def __init__(
        self, read: Callable[[str], object], layers: Callable[[], Sequence[nn.Module]]
    ) -> None:
        self._read = read
        self._layers = layers
        self._background = Background("hcache-missed")
        self._lock = ForkedLock()
        self._is_closed = False
        self._start()

    def _start(self) -> None:
        self._pid = os.getpid()
        self._waiting: OrderedDict[str, None] = OrderedDict()
        self._requests = 0
        self._is_reading = False

    def _follow_fork(self) -> None:
        """Neither the thread nor the requests of the parent are here."""
        if self._pid != os.getpid():
            self._start()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Something else is being computed; what is being read ends at the next layer."""
        with self._lock:
            self._follow_fork()
            self._requests += 1
        try:
            yield
        finally:
            with self._lock:
                if self._pid == os.getpid():
                    self._requests = max(0, self._requests - 1)
            self._go_on()

    def add(self, texts: Iterable[str]) -> int:
        """Read some texts later.

        Returns:
            How many of them are waiting now.
        """
        wanted = dict.fromkeys(texts)
        with self._lock:
            self._follow_fork()
            room = MAX_WAITING - len(self._waiting)
            new = [text for text in wanted if text not in self._waiting]
            self._waiting.update(dict.fromkeys(new[: max(0, room)]))
            waiting = sum(text in self._waiting for text in wanted)
        self._go_on()
        return waiting

    def _go_on(self) -> None:
        with self._lock:
            if self._is_reading or self._is_stopped or not self._waiting:
                return
            self._is_reading = True
        if not self._background.submit(self._read_all):
            self._is_reading = False

    @property
    def _is_stopped(self) -> bool:
        return self._requests > 0 or self._is_closed

    def _read_all(self) -> None:
        while (text := self._next()) is not None:
            try:
                with self._interruptible():
                    self._read(text)
            except _Interrupted:
                continue
            except HCacheError as error:
                logger.info("a document that was missed is not stored: %s", error)
            except Exception:  # nobody is there to be told, and others are waiting
                logger.exception("a document that was missed is not stored")
            with self._lock:
                self._waiting.pop(text, None)

    def _next(self) -> str | None:
        with self._lock:
            if self._is_stopped or not self._waiting:
                self._is_reading = False
                return None
            return next(iter(self._waiting))

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        def look(_input: Tensor) -> None:
            if self._is_stopped:
                raise _Interrupted

        with ExitStack() as hooks:
            for layer in self._layers():
                hooks.enter_context(inputs_of(layer, look))
            yield

    def flush(self) -> None:
        """Wait until all is read that can be."""
        self._background.flush()

    def close(self) -> None:
        """Forget what is waiting, leave what is being read, and wait for the thread."""
        with self._lock:
            self._is_closed = True
        self._background.close()


class _Interrupted(Exception):  # noqa: N818 - not an error: somebody wants an answer
    """A request has come."""
