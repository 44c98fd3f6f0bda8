"""The texts of a namespace, found in prompts without being read when the store is opened.

`texts` has the beginning of every text in sorted order, `anchors` a hash of its first characters in
order of arrival: these are read when a store is opened, and then only what has come since. Where
texts are encrypted neither would keep their secret: there they are kept in memory, decrypted.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from itertools import islice

import numpy as np

from hcache_rag.state import StateRecord
from hcache_rag.store.backend import Transaction
from hcache_rag.store.rows import NamespaceRows
from hcache_rag.store.tables import (
    Counters,
    anchor_of,
    key_of,
    sequence_key,
    small_from_bytes,
    split_text_key,
    text_key,
    text_of,
    text_part,
)
from hcache_rag.texts import AnchorSet, TextSet, TextView

MAX_ALIKE = 1024
"""Texts with the same first 480 bytes of which all are compared."""

_AFTER_ALL_KEYS = b"\xff" * 17


class StoredTexts:
    """What is known of the anchors of a namespace. Thread-safe."""

    def __init__(self, rows: NamespaceRows) -> None:
        self._rows = rows
        self._prefix = rows.prefix
        self._anchors = AnchorSet()
        self._short: set[str] = set()
        self._decrypted = TextSet()
        self._next = 0
        self._lock = threading.Lock()

    @contextmanager
    def looking(self, txn: Transaction) -> Iterator[TextView]:
        """The texts that a transaction sees."""
        with self._lock:
            self._catch_up(txn)
            if self._rows.cipher is not None:  # the table's order is of no use there
                yield _DecryptedView(txn, self._rows, self._decrypted)
            else:
                yield _View(txn, self._rows, self._anchors, self._short)

    def _catch_up(self, txn: Transaction) -> None:
        counters: Counters = small_from_bytes(Counters, txn.get("totals", self._prefix))
        if counters.sequence == self._next:
            return
        start = sequence_key(self._prefix, self._next)
        anchors, keys = [], []
        for _, value in txn.scan("anchors", self._prefix, start):
            key, anchor = key_of(value), anchor_of(value)
            if key is not None:
                keys.append(key)
            if isinstance(anchor, int):
                anchors.append(anchor)
            elif anchor:
                self._short.add(anchor)
        if anchors:
            self._anchors.add(np.array(anchors, np.uint64))
        records = (self._rows.record(txn, key) for key in keys)
        self._decrypted.add([record.text for record in records if record is not None])
        self._next = counters.sequence


class _View:
    """See `hcache_rag.texts.TextView`."""

    def __init__(
        self, txn: Transaction, rows: NamespaceRows, anchors: AnchorSet, short: set[str]
    ) -> None:
        self._txn = txn
        self._rows = rows
        self._prefix = rows.prefix
        self._anchors = anchors
        self._short = short

    @property
    def anchors(self) -> AnchorSet:
        return self._anchors

    @property
    def short(self) -> Collection[str]:
        return [text for text in self._short if _is_stored(self._txn, self._rows, text)]

    def around(self, tail: str) -> tuple[str | None, str | None]:
        part, is_whole = text_part(tail)
        first = text_key(self._prefix, part)
        after = first + _AFTER_ALL_KEYS
        if is_whole:
            return self._text(self._txn.before("texts", after)), self._text(
                self._txn.at_or_after("texts", after)
            )
        alike = sorted({record.text for record in records_alike(self._txn, self._rows, part)})
        place = bisect_right(alike, tail)
        below = alike[place - 1] if place else self._text(self._txn.before("texts", first))
        if place < len(alike):
            return below, alike[place]
        return below, self._text(self._txn.at_or_after("texts", after))

    def _text(self, row: tuple[bytes, bytes] | None) -> str | None:
        if row is None or not row[0].startswith(self._prefix):
            return None
        part, key = split_text_key(self._prefix, row[0])
        if not row[1]:
            return text_of(part)
        record = self._rows.record(self._txn, key)
        return record.text if record is not None else None


class _DecryptedView:
    """See `hcache_rag.texts.TextView`. Texts that are gone are forgotten when they are met."""

    def __init__(self, txn: Transaction, rows: NamespaceRows, known: TextSet) -> None:
        self._txn = txn
        self._rows = rows
        self._known = known

    @property
    def anchors(self) -> AnchorSet:
        return self._known.anchors

    @property
    def short(self) -> Collection[str]:
        return [text for text in self._known.short if _is_stored(self._txn, self._rows, text)]

    def around(self, tail: str) -> tuple[str | None, str | None]:
        while True:
            found = self._known.around(tail)
            gone = [t for t in found if t is not None and not _is_stored(self._txn, self._rows, t)]
            if not gone:
                return found
            for text in gone:
                self._known.discard(text)


def _is_stored(txn: Transaction, rows: NamespaceRows, text: str) -> bool:
    first = text_key(rows.prefix, rows.text_part(text)[0])
    row = txn.key_at_or_after("texts", first)
    return row is not None and row.startswith(first)


def records_alike(txn: Transaction, rows: NamespaceRows, part: bytes) -> Iterator[StateRecord]:
    """The states of all texts that begin with `part`, or are it where it is a whole text."""
    found = txn.scan("texts", text_key(rows.prefix, part))
    for row_key, _ in islice(found, MAX_ALIKE):
        record = rows.record(txn, split_text_key(rows.prefix, row_key)[1])
        if record is not None:
            yield record
