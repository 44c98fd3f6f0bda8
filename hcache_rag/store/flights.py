"""States on their way here: each comes once, for all who ask.

States that a restore waits for go first, those that were only announced come when nothing else
does. What has landed is kept in memory for a while: who began to read before cannot see it anywhere
else.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TypeAlias, TypeVar, cast

from hcache_rag.errors import DamagedStateError, UnreachableStateError
from hcache_rag.state import StateKey
from hcache_rag.store.flight import Flight, Place, Source

logger = logging.getLogger("hcache_rag")

T = TypeVar("T")
FlightKey: TypeAlias = tuple[str, StateKey]

AT_ONCE = 8
"""So many blocks are asked for at once."""
WAIT_S = 10.0
"""After so long without a block a state is out of reach."""
AHEAD_BYTES = 1 << 28
"""So much of what was only announced is on its way at most."""
LANDED_BYTES = 1 << 26
"""So much of what has landed is kept in memory."""


class Flights:
    """All states on their way to this process. Thread-safe.

    Args:
        wait_s: after so long without news a state is out of reach.
    """

    def __init__(self, wait_s: float = WAIT_S) -> None:
        self.wait_s = wait_s
        self._lock = threading.Lock()
        self._air: dict[FlightKey, tuple[Flight, Callable[[Flight], None]]] = {}
        self._queue: list[Flight] = []
        self._landed: OrderedDict[FlightKey, Flight] = OrderedDict()
        self._workers: set[threading.Thread] = set()
        self._carriers: dict[Flight, threading.Thread] = {}
        self._gone: set[str] = set()
        self._is_closed = False

    def of(self, source: Source, key: StateKey) -> Flight | None:
        """The flight of a state that is on its way, or has landed not long ago."""
        with self._lock:
            found = self._air.get((source.name, key))
            return found[0] if found is not None else self._landed.get((source.name, key))

    def start(
        self,
        source: Source,
        key: StateKey,
        places: Sequence[tuple[int, int, Place]],
        keep: Callable[[Flight], None],
        *,
        is_wanted: bool,
    ) -> Flight | None:
        """The flight of a state; None where it has no values, or is not wanted and finds no room.

        Args:
            keep: is called with the flight when all has come, if this call has begun it.

        Raises:
            UnreachableStateError: what was asked for last did not come, not long ago.
        """
        if (flight := self.of(source, key)) is not None or not places:
            return flight
        flight = Flight(source, key, places)
        with self._lock:
            name = source.name, key
            if name in self._air:
                return self._air[name][0]
            if (why := self._why_not(source)) is not None:
                raise UnreachableStateError(key, why)
            ahead = sum(each.num_bytes for each, _ in self._air.values() if not each.is_wanted)
            if not is_wanted and ahead + flight.num_bytes > AHEAD_BYTES:
                return None
            flight.is_wanted = is_wanted
            self._air[name] = flight, keep
            self._queue.append(flight)
            if len(self._workers) < AT_ONCE:
                worker = threading.Thread(target=self._work, name="hcache-fetch", daemon=True)
                self._workers.add(worker)
                worker.start()
        return flight

    def why_not(self, source: Source) -> str | None:
        """Why nothing is to be asked of an object now; None if something is."""
        with self._lock:
            return self._why_not(source)

    def _why_not(self, source: Source) -> str | None:
        if self._is_closed:
            return "its store is closed"
        if source.name in self._gone:
            return f"the values of {source.name} are not there"
        return f"{source.name} has not answered just now" if source.link.is_down else None

    def value(self, flight: Flight, layer: int, chunk: int) -> memoryview:
        """A value of a flight, see `Flight.value`."""
        try:
            return flight.value(layer, chunk, self.wait_s)
        except UnreachableStateError as error:
            if not flight.has_failed:  # nothing came: whoever carries it may never come back
                flight.source.link.failed()
                self._lose(flight, error.reason)
            raise
        except DamagedStateError:
            with self._lock:
                self._landed.pop((flight.source.name, flight.key), None)
            raise

    def asked(self, ask: Callable[[], T], name: str) -> T:
        """What a file system answers, if it does in time.

        Raises: whatever it does; `TimeoutError`.
        """
        answers: list[tuple[T | None, Exception | None]] = []

        def run() -> None:
            try:
                answers.append((ask(), None))
            except Exception as error:  # every file system has errors of its own
                answers.append((None, error))

        thread = threading.Thread(target=run, name="hcache-ask", daemon=True)
        thread.start()
        thread.join(self.wait_s)
        if not answers:
            raise TimeoutError(f"{name} has not answered for {self.wait_s:g} s")
        answer, error = answers[0]
        if error is not None:
            raise error
        return cast("T", answer)

    def probe(self, source: Source, num_bytes: int) -> None:
        """See how fast a link is by the first bytes of an object; fetch nothing if it fails."""
        source.link.begin()
        came = 0
        try:
            came = len(self.asked(lambda: source.read(0, num_bytes), source.name))
        except Exception as error:  # every file system has errors of its own
            logger.info("%s: %s", source.name, source.told(error))
            if not isinstance(error, FileNotFoundError):
                source.link.failed()
        finally:
            source.link.end(came)

    def join(self, wait_s: float) -> None:
        """Wait until nothing is on its way.

        Raises:
            TimeoutError: a state is, after `wait_s`.
        """
        with self._lock:
            its = [flight for flight, _ in self._air.values()]
        for flight in its:
            if not flight.landed.wait(wait_s):
                raise TimeoutError(f"state {flight.key.hex()} is on its way after {wait_s:g} s")

    def cancel(self, source: Source) -> None:
        """Nobody asks for anything of this object any more."""
        with self._lock:
            its = [flight for flight, _ in self._air.values() if flight.source is source]
            for name in [name for name in self._landed if name[0] == source.name]:
                del self._landed[name]
        self._leave(its)

    def clear(self) -> None:
        """Leave what is on its way, and forget what has landed."""
        with self._lock:
            its = [flight for flight, _ in self._air.values()]
            self._landed.clear()
        self._leave(its)

    def close(self) -> None:
        """Leave what is on its way for ever; who still carries something is not waited for."""
        with self._lock:
            self._is_closed = True
        self.clear()

    def _leave(self, its: Sequence[Flight]) -> None:
        """What is whole already is kept first; nothing else is waited for."""
        for flight in its:
            if flight.missing_share or not flight.landed.wait(self.wait_s):
                self._lose(flight, "it was given up", num_bytes=None)

    def _lose(self, flight: Flight, why: str, num_bytes: int | None = 0) -> None:
        """It will not come; `num_bytes` as for `_put_down`."""
        flight.failed(why)
        with self._lock:
            self._air.pop((flight.source.name, flight.key), None)
            if flight in self._queue:
                self._queue.remove(flight)
        carrier = self._put_down(flight, num_bytes)
        if carrier is not None and carrier is not threading.current_thread():
            with self._lock:
                self._workers.discard(carrier)  # it may never come back: another takes its place
        flight.landed.set()

    def _put_down(self, flight: Flight, num_bytes: int | None) -> threading.Thread | None:
        """Nobody carries it now, after so much has come, or given up; who did, if somebody did."""
        with self._lock:
            carrier = self._carriers.pop(flight, None)
        if carrier is not None and num_bytes is not None:
            flight.source.link.end(num_bytes)
        elif carrier is not None:
            flight.source.link.left()
        return carrier

    def _work(self) -> None:
        while (flight := self._next()) is not None:
            try:
                block, begin, end = flight.carry()
                data = flight.source.read(begin, end)
                flight.arrived(block, data)
                self._put_down(flight, len(data))
                self._go_on(flight)
            except FileNotFoundError as error:  # an answer: other objects may be there
                with self._lock:
                    self._gone.add(flight.source.name)
                self._lose(flight, f"it is not there: {flight.source.told(error)}")
            except Exception as error:  # every file system has errors of its own
                flight.source.link.failed()
                self._lose(flight, f"it cannot be fetched: {flight.source.told(error)}")

    def _next(self) -> Flight | None:
        """The flight whose block this thread is to bring next; None: it is to end."""
        me = threading.current_thread()
        with self._lock:
            if me not in self._workers:
                return None
            if not self._queue:
                self._workers.discard(me)
                return None
            flight = next((each for each in self._queue if each.is_wanted), self._queue[0])
            self._queue.remove(flight)
            self._carriers[flight] = me
            flight.source.link.begin()
        return flight

    def _go_on(self, flight: Flight) -> None:
        """A block has come: the next one is to follow, or all is there."""
        name = flight.source.name, flight.key
        with self._lock:
            if flight.has_failed:  # it was cancelled
                return
            if flight.missing_share:
                self._queue.append(flight)
                return
            self._landed[name] = flight
            while len(self._landed) > 1 and self._landed_bytes() > LANDED_BYTES:
                self._landed.popitem(last=False)
            keep = self._air[name][1]
        try:
            keep(flight)
        finally:
            with self._lock:
                self._air.pop(name, None)
            flight.landed.set()

    def _landed_bytes(self) -> int:
        return sum(flight.num_bytes for flight in self._landed.values())
