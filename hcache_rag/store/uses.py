"""Which states were used, remembered for a while so that reading does not write each time."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace

from hcache_rag.errors import StoreError
from hcache_rag.state import StateKey
from hcache_rag.store import eviction
from hcache_rag.store.backend import Transaction
from hcache_rag.store.rows import NamespaceRows
from hcache_rag.store.session import Session
from hcache_rag.store.tables import MAX_HITS

AT_ONCE = 256
"""So many uses of states are remembered before they are written down."""


class Uses:
    """What has happened to states since it was last written down. Thread-safe."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._hits: dict[StateKey, int] = {}
        self._counted: dict[str, float] = {}

    def add(self, keys: Iterable[StateKey], **counted: float) -> None:
        """Some states were restored, and what else there is to count."""
        self._forget_in_a_fork()
        with self._lock:
            for key in keys:
                self._hits[key] = self._hits.get(key, 0) + 1
            for name, count in counted.items():
                self._counted[name] = self._counted.get(name, 0) + count
            is_due = len(self._hits) >= AT_ONCE
        if is_due:
            with suppress(StoreError):  # somebody else writes: next time
                self.flush(wait_s=0.0)

    def flush(self, wait_s: float | None = None) -> None:
        """Write it down; a read-only session forgets it."""
        self._forget_in_a_fork()
        with self._lock:
            hits, self._hits = self._hits, {}
            counted, self._counted = self._counted, {}
        if self._session.read_only or not (hits or any(counted.values())):
            return
        try:
            with self._session.writing(wait_s) as txn:
                _write(txn, self._session.rows, hits, counted)
        except StoreError:
            with self._lock:
                for key, times in hits.items():
                    self._hits[key] = self._hits.get(key, 0) + times
                for name, count in counted.items():
                    self._counted[name] = self._counted.get(name, 0) + count
            raise

    def _forget_in_a_fork(self) -> None:
        """What the parent has counted, it writes down itself; its threads are not here."""
        if self._pid != os.getpid():
            self._pid, self._lock = os.getpid(), threading.Lock()
            self._hits, self._counted = {}, {}


def _write(
    txn: Transaction, rows: NamespaceRows, hits: dict[StateKey, int], counted: dict[str, float]
) -> None:
    now = time.time()
    counters = rows.counters(txn)
    for key, times in hits.items():
        entry = rows.entry(txn, key)
        if entry is not None:
            total = min(entry.hits + times, MAX_HITS)
            rank = eviction.priority(counters.clock, total, entry.saved_s, entry.num_bytes)
            rows.put_entry(txn, key, replace(entry, hits=total, used_s=now, priority=rank))
    rows.put_counters(txn, counters.plus(**counted))
