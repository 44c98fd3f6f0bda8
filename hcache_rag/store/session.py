"""A store as one process sees it through one namespace, whatever others do to both."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from weakref import WeakSet

from hcache_rag.errors import StoreError, StoreMovedError
from hcache_rag.store.backend import Backend, Transaction
from hcache_rag.store.cipher import Cipher
from hcache_rag.store.description import (
    BELONGS,
    describe,
    ensure_namespace,
    legible,
    put_namespace,
)
from hcache_rag.store.process import LOCK
from hcache_rag.store.rows import NamespaceRows
from hcache_rag.store.tables import Namespace, namespace_prefix, small_from_bytes
from hcache_rag.store.texts import StoredTexts

MAX_MOVES = 100

logger = logging.getLogger("hcache_rag")

_sessions: WeakSet[Session] = WeakSet()


class Session:
    """Transactions of one namespace. Thread-safe.

    Args:
        cipher: of the namespace; with another one than it was made with, nothing is found.
        reopen: gives a process that has inherited this session a backend of its own.

    Attributes:
        rows: the namespace's rows.
        texts: its texts.
        is_locked: it was made with another key, or with none.
        max_bytes: the store's limit, as it was when that was last looked at.
    """

    def __init__(
        self,
        backend: Backend,
        namespace: str,
        *,
        cipher: Cipher | None,
        read_only: bool,
        wait_s: float | None,
        reopen: Callable[[], Backend] | None,
    ) -> None:
        self.path = backend.path
        self.namespace = namespace
        self.cipher = cipher
        self.read_only = read_only
        self.wait_s = wait_s
        self.reopen = reopen
        self._backend: Backend | None = backend
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._name = namespace.encode()
        description = describe(backend, wait_s, read_only=read_only)
        self.store_id = description.store_id
        self.max_bytes: int | None = description.max_bytes
        self._is_limited = backend.limit(self.max_bytes)
        check = cipher.check if cipher is not None else None
        self._seen: bytes | None = None
        self._bind(ensure_namespace(backend, namespace, check, wait_s, read_only=read_only))
        _sessions.add(self)  # whole, or else a fork would find nothing to make anew

    def _bind(self, its: Namespace) -> None:
        """From now on, see a namespace; number 0, in which nothing is, where it is locked."""
        self._its = its
        check = self.cipher.check if self.cipher is not None else None
        self.is_locked = its.number > 0 and its.key_check != check
        if self.is_locked:
            logger.warning("%s; its states cannot be used", self._locked())
        number = 0 if self.is_locked else its.number
        self.rows = NamespaceRows(namespace_prefix(number), self.cipher)
        self.texts = StoredTexts(self.rows)

    @property
    def backend(self) -> Backend:
        """The backend.

        Opened anew in a process that has inherited this session from another one, and where
        another file has taken the place of the store's.
        """
        backend = self._backend
        if backend is None:
            raise self._is_closed()
        if self.reopen is not None and self._is_stale(backend):
            with self._lock:
                before = self._backend
                if before is None:
                    raise self._is_closed()
                if not self._is_stale(before):
                    return before
                backend = self._opened_anew(before, self.reopen)
        return backend

    def _opened_anew(self, before: Backend, reopen: Callable[[], Backend]) -> Backend:
        backend = reopen()
        with LOCK:
            is_closed = self._backend is not before  # by another thread, meanwhile
            if not is_closed:
                self._backend = backend
                is_inherited, self._pid = self._pid != os.getpid(), os.getpid()
        if is_closed:
            backend.close()
            raise self._is_closed()
        self._is_limited = backend.limit(self.max_bytes)
        if not is_inherited:
            with suppress(StoreError):  # what it has is not the store's any more
                before.close()
        return backend

    def _is_closed(self) -> StoreError:
        return StoreError(f"the store {self.path} is closed")

    def _is_stale(self, backend: Backend) -> bool:
        return self._pid != os.getpid() or not backend.is_current()

    @contextmanager
    def reading(self) -> Iterator[Transaction]:
        """A transaction that reads."""
        with ExitStack() as stack:
            txn = self._enter(stack, lambda backend: backend.reading())
            self._follow(txn)
            yield txn

    @contextmanager
    def writing(self, wait_s: float | None = None) -> Iterator[Transaction]:
        """A transaction that writes, see `require_writable`.

        Args:
            wait_s: for somebody else who writes, instead of the session's own.
        """
        self.require_writable()
        wait_s = self.wait_s if wait_s is None else wait_s
        with ExitStack() as stack:
            txn = self._enter(stack, lambda backend: backend.writing(wait_s))
            self._follow(txn)
            self.require_writable()
            yield txn

    def _enter(
        self, stack: ExitStack, begin: Callable[[Backend], AbstractContextManager[Transaction]]
    ) -> Transaction:
        """Begin a transaction; another file may take the store's place while one waits for it.

        Raises:
            StoreMovedError: that has happened `MAX_MOVES` times one after another.
        """
        for _ in range(MAX_MOVES):
            with suppress(StoreMovedError):
                return stack.enter_context(begin(self.backend))
        return stack.enter_context(begin(self.backend))

    def _follow(self, txn: Transaction) -> None:
        """Others may have made the namespace meanwhile, or deleted it and made it anew."""
        data = txn.get("namespaces", self._name)
        if data == self._seen:
            return
        self._seen = data
        its: Namespace = small_from_bytes(Namespace, data)
        if its.number and its.number != self._its.number:
            self._bind(its)

    def sync(self) -> None:
        """Write everything through to the disk; that of another file, if it has taken its place."""
        for _ in range(MAX_MOVES):
            with suppress(StoreMovedError):
                self.backend.sync()
                return
        self.backend.sync()

    def make_namespace(self, txn: Transaction) -> None:
        """Make the namespace as it was, where somebody has deleted it meanwhile.

        Raises:
            StoreError: it belonged to another one, and was deleted with it.
        """
        if txn.get("namespaces", self._name) is None:
            if BELONGS in self.namespace:
                raise StoreError(f"namespace {legible(self.namespace)!r} was deleted")
            put_namespace(txn, self.namespace, self._its)

    def look_at_limit(self) -> None:
        """Others may have changed the store's limit."""
        max_bytes = describe(self.backend, self.wait_s, read_only=True).max_bytes
        if max_bytes != self.max_bytes or not self._is_limited:
            self.limit(max_bytes)

    def limit(self, max_bytes: int | None) -> None:
        """Let the file grow to so many bytes; where this thread reads, when it next stores."""
        self._is_limited = self.backend.limit(max_bytes)
        self.max_bytes = max_bytes

    def compact(self) -> None:
        """Give the disk what is free inside the file, see `StateStore.compact`."""
        self.require_writable()
        self.backend.compact(self.wait_s)

    def require_writable(self) -> None:
        """Writing must be possible here.

        Raises:
            StoreError: the store is closed or read-only, or the namespace is locked.
        """
        self.backend  # noqa: B018 - a closed store is an error
        if self.read_only:
            raise StoreError(f"the store {self.path} is open for reading only")
        if self.is_locked:
            raise StoreError(self._locked())

    def _locked(self) -> str:
        name = f"namespace {legible(self.namespace)!r} of {self.path}"
        return f"{name} was made with another key, or with none"

    def renew_locks(self) -> None:
        """In a fork: a thread that is not there may have held them."""
        self._lock = threading.Lock()
        self.texts = StoredTexts(self.rows)

    @property
    def is_open(self) -> bool:
        """Whether `close` has not been called."""
        return self._backend is not None

    def close(self) -> None:
        """End the use of the backend. Closing twice does nothing."""
        with LOCK:
            backend, self._backend = self._backend, None
        if backend is not None:
            backend.close()


def _renew_locks() -> None:
    for session in list(_sessions):
        session.renew_locks()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)
