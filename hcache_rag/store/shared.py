"""What a process has open, once for each folder: who shares it, when it is closed, and forks."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar
from weakref import WeakSet

from hcache_rag.errors import StoreBusyError, StoreMovedError, StoreOpenError
from hcache_rag.store.gate import Gate
from hcache_rag.store.process import LOCK

FORK_WAIT_S = 5.0
"""How long, in seconds, a fork waits for what other threads do with open folders. What goes on
beyond that is the parent's, and its folder cannot be used in the child."""

MAX_MOVES = 100
"""So often something is opened again that another file has taken the place of meanwhile."""

S = TypeVar("S", bound="Shared")


class Shared:
    """Something that is open once for each folder and process, and counts its users.

    Attributes:
        path: the folder.
        pid: of the process that has opened it.
    """

    open_ones: dict[Path, Shared] = {}  # noqa: RUF012 - the process-wide table itself
    _all: WeakSet[Shared] = WeakSet()  # noqa: RUF012 - those that are, or may be, open
    _busy: list[Path] = []  # noqa: RUF012 - folders that somebody opens, closes or exchanges
    _inherited: list[Shared] = []  # noqa: RUF012 - in a fork: what is the parent's
    _changed = threading.Condition(LOCK)

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self.pid = os.getpid()
        self._users = 1
        self._gate = Gate()
        self._all.add(self)

    @classmethod
    def share(cls: type[S], folder: Path, make: Callable[[S | None], S], wait_s: float | None) -> S:
        """What is open of a folder; made, if nothing is, or if its files were exchanged.

        Args:
            make: is given what was open before, if anything.
            wait_s: for another thread that opens or closes it, in seconds.

        Raises:
            StoreBusyError: it still does.
            StoreOpenError: a fork cannot have it.
        """
        for _ in range(MAX_MOVES):
            with suppress(StoreMovedError):
                return cls._share(folder, make, wait_s)
        return cls._share(folder, make, wait_s)

    @classmethod
    def _share(
        cls: type[S], folder: Path, make: Callable[[S | None], S], wait_s: float | None
    ) -> S:
        with cls._changed:
            if not cls._changed.wait_for(lambda: folder not in cls._busy, wait_s):
                raise StoreBusyError(f"another thread still opens {folder} after {wait_s} s")
            if any(each.path == folder and each.is_current() for each in cls._inherited):
                raise StoreOpenError(
                    f"{folder} cannot be used in this process, which was forked while it was "
                    "being used; spawn processes instead"
                )
            known = cls.open_ones.get(folder)
            if isinstance(known, cls):
                known._users += 1  # nobody closes it from here on
                if not known._gate.is_closed and known.is_current():
                    return known
                known._users -= 1
            cls._busy.append(folder)
        try:
            made = make(known if isinstance(known, cls) else None)
            cls.open_ones[folder] = made
            return made
        finally:
            cls._leave(folder)

    @classmethod
    def _leave(cls, folder: Path) -> None:
        with cls._changed:
            cls._busy.remove(folder)
            cls._changed.notify_all()

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Let other threads wait that would open it."""
        with LOCK:
            self._busy.append(self.path)
        try:
            yield
        finally:
            self._leave(self.path)

    @contextmanager
    def kept_open(self) -> Iterator[None]:
        """Close it only afterwards, if it is to be closed meanwhile."""
        with LOCK:
            self._users += 1
        try:
            yield
        finally:
            self.close()

    @classmethod
    def is_open_here(cls, folder: Path) -> bool:
        """Whether this process uses a folder."""
        with LOCK:
            known = cls.open_ones.get(folder)
            return known is not None and known.is_current()

    def is_current(self) -> bool:
        """Whether its files are still those of the folder."""
        raise NotImplementedError

    def close(self) -> None:
        """Count one user less; the last one closes when the last reader has ended.

        Raises:
            StoreError: what was stored cannot be synced.
        """
        with LOCK:
            self._users -= 1
        self._close_if_unused()

    def _close_if_unused(self) -> None:
        with LOCK:
            if self._users or self.pid != os.getpid() or not self._gate.close():
                return
            self._busy.append(self.path)
        try:
            self._close()
        finally:
            with LOCK:
                self._all.discard(self)
                if self.open_ones.get(self.path) is self:
                    del self.open_ones[self.path]
            self._gate.open()
            self._leave(self.path)

    def _close(self) -> None:
        raise NotImplementedError

    def _let_go(self) -> None:
        """In a fork: close what is the parent's, and that nobody uses."""
        raise NotImplementedError


_shut: dict[int, list[Shared]] = {}
"""What is shut by each thread that forks."""


def _before_fork() -> None:
    """Wait for other threads' transactions: a child would end those that it inherits."""
    deadline = time.monotonic() + FORK_WAIT_S
    mine = _shut.setdefault(threading.get_ident(), [])
    for each in list(Shared._all):
        if each.pid == os.getpid() and each._gate.shut(max(0.0, deadline - time.monotonic())):
            mine.append(each)


def _after_fork_in_parent() -> None:
    for each in _shut.pop(threading.get_ident(), []):
        each._gate.open()
        each._close_if_unused()


def _after_fork_in_child() -> None:
    idle = _shut.pop(threading.get_ident(), [])
    _shut.clear()
    Shared._busy.clear()
    Shared.open_ones.clear()
    for each in list(Shared._all):
        is_idle = each in idle and not each._gate.is_used_here
        each._gate.open()
        if is_idle:
            Shared._all.discard(each)
            each._let_go()
        elif each not in Shared._inherited:
            Shared._inherited.append(each)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )
