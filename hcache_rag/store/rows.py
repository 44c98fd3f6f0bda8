"""The rows of one namespace: what one transaction reads and changes of a state at once."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from hcache_rag.state import KEY_BYTES, StateKey, StateRecord
from hcache_rag.store import eviction
from hcache_rag.store.backend import Table, Transaction
from hcache_rag.store.tables import (
    Counters,
    Entry,
    Totals,
    anchor_value,
    bytes_on_disk,
    chunk_key,
    chunk_place,
    sequence_key,
    small_from_bytes,
    small_to_bytes,
    text_key,
    text_part,
)
from hcache_rag.texts import ANCHOR_CHARS, anchor_hashes

_TABLES: tuple[Table, ...] = (
    "records",
    "entries",
    "chunks",
    "texts",
    "anchors",
    "owners",
    "owned",
    "totals",
    "models",
)


@dataclass(frozen=True, slots=True, eq=False)
class StateRows:
    """A state as it is stored.

    Args:
        data: the record.
        chunks: (layer, chunk, value).
        saved_s: seconds that restoring the state saves.
        owners: digests of its owners.
    """

    record: StateRecord
    data: bytes
    chunks: tuple[tuple[int, int, bytes | bytearray], ...]
    saved_s: float
    owners: tuple[bytes, ...] = ()

    @property
    def value_bytes(self) -> int:
        """Of the chunks."""
        return sum(len(value) for _, _, value in self.chunks)

    @property
    def num_bytes(self) -> int:
        """On disk, with all that belongs to the state."""
        small = 500 + 2 * len(text_part(self.record.text)[0]) + 64 * len(self.owners)
        values = sum(bytes_on_disk(26, len(value)) for _, _, value in self.chunks)
        return small + bytes_on_disk(20, len(self.data)) + values


class NamespaceRows:
    """The rows whose keys begin with `prefix`."""

    def __init__(self, prefix: bytes) -> None:
        self.prefix = prefix

    def record(self, txn: Transaction, key: StateKey) -> StateRecord | None:
        """The record of a state, or None where there is none that can be read."""
        data = txn.get("records", self.prefix + key)
        return None if data is None else _parse(key, data)

    def records(self, txn: Transaction) -> Iterator[tuple[StateKey, StateRecord | None]]:
        """All records in order of their keys; None for those that cannot be read."""
        for row_key, data in txn.scan("records", self.prefix):
            key = row_key[len(self.prefix) :]
            yield key, _parse(key, data)

    def store(self, txn: Transaction, rows: StateRows) -> None:
        """Store a state, replacing what is there under its key; its owners stay."""
        record, key = rows.record, rows.record.key
        self._remove(txn, key)
        counters = self.counters(txn)
        entry = Entry(
            counters.sequence,
            rows.num_bytes,
            record.num_tokens,
            record.is_preamble,
            rows.saved_s,
            record.created_s,
            priority=eviction.priority(counters.clock, 0, rows.saved_s, rows.num_bytes),
        )
        for layer, chunk, value in rows.chunks:
            txn.put("chunks", chunk_key(self.prefix, key, layer, chunk), value)
        txn.put("entries", self.prefix + key, entry.to_bytes())
        if not record.is_preamble:
            part, is_whole = text_part(record.text)
            txn.put("texts", text_key(self.prefix, part, key), b"" if is_whole else b"+")
            place = sequence_key(self.prefix, counters.sequence)
            txn.put("anchors", place, anchor_value(record.text, _anchor(record.text)))
        for owner in rows.owners:
            self.own(txn, owner, key)
        self._add(txn, record.root, entry, 1)
        self.put_counters(txn, counters.plus(sequence=1))
        txn.put("records", self.prefix + key, rows.data)

    def drop(self, txn: Transaction, key: StateKey) -> bool:
        """Delete a state with all that belongs to it; False where there was none."""
        for row_key, _ in list(txn.scan("owned", self.prefix + key)):
            self.disown(txn, row_key[-KEY_BYTES:], key)
        return self._remove(txn, key)

    def _remove(self, txn: Transaction, key: StateKey) -> bool:
        record, entry = self.record(txn, key), self.entry(txn, key)
        found = txn.delete("records", self.prefix + key)
        for row_key in self._chunk_keys(txn, key):
            txn.delete("chunks", row_key)
        if record is not None and not record.is_preamble:
            txn.delete("texts", text_key(self.prefix, text_part(record.text)[0], key))
        if entry is not None:
            txn.delete("anchors", sequence_key(self.prefix, entry.sequence))
            if record is not None:
                self._add(txn, record.root, entry, -1)
        txn.delete("entries", self.prefix + key)
        return found

    def _chunk_keys(self, txn: Transaction, key: StateKey) -> list[bytes]:
        """Found one by one: the values are not looked at."""
        first = row_key = self.prefix + key
        found = []
        while (row := txn.key_at_or_after("chunks", row_key)) is not None and row.startswith(first):
            found.append(row)
            row_key = row + b"\0"
        return found

    def _add(self, txn: Transaction, root: StateKey, entry: Entry, sign: int) -> None:
        totals: Totals = small_from_bytes(Totals, txn.get("totals", self.prefix + root))
        self.put_totals(txn, root, totals.plus(entry, sign))

    def places(self, txn: Transaction, key: StateKey) -> list[tuple[int, int]]:
        """(layer, chunk) of all values of a state."""
        return [chunk_place(self.prefix, row_key) for row_key in self._chunk_keys(txn, key)]

    def entry(self, txn: Transaction, key: StateKey) -> Entry | None:
        """What is known of a state besides its record; None where that is missing or damaged."""
        return Entry.from_bytes(txn.get("entries", self.prefix + key))

    def put_entry(self, txn: Transaction, key: StateKey, entry: Entry) -> None:
        """Replace it."""
        txn.put("entries", self.prefix + key, entry.to_bytes())

    def entries(self, txn: Transaction) -> Iterator[tuple[StateKey, Entry]]:
        """Those of all states that can be read."""
        for row_key, value in txn.scan("entries", self.prefix):
            entry = Entry.from_bytes(value)
            if entry is not None:
                yield row_key[len(self.prefix) :], entry

    def counters(self, txn: Transaction) -> Counters:
        """What has happened in the namespace."""
        found: Counters = small_from_bytes(Counters, txn.get("totals", self.prefix))
        return found

    def put_counters(self, txn: Transaction, counters: Counters) -> None:
        """Replace them."""
        txn.put("totals", self.prefix, small_to_bytes(counters))

    def totals(self, txn: Transaction) -> dict[StateKey, Totals]:
        """Sums over the states, by the root key of their model."""
        return {
            key[len(self.prefix) :]: small_from_bytes(Totals, value)
            for key, value in txn.scan("totals", self.prefix)
            if len(key) > len(self.prefix)
        }

    def put_totals(self, txn: Transaction, root: StateKey, totals: Totals) -> None:
        """Replace those of a model."""
        txn.put("totals", self.prefix + root, small_to_bytes(totals))

    def own(self, txn: Transaction, owner: bytes, key: StateKey) -> None:
        """A state belongs to an owner."""
        txn.put("owners", self.prefix + owner + key, b"")
        txn.put("owned", self.prefix + key + owner, b"")

    def disown(self, txn: Transaction, owner: bytes, key: StateKey) -> None:
        """It does not any more."""
        txn.delete("owners", self.prefix + owner + key)
        txn.delete("owned", self.prefix + key + owner)

    def keys_of(self, txn: Transaction, owner: bytes) -> list[StateKey]:
        """The states that belong to an owner."""
        return [key[-KEY_BYTES:] for key, _ in txn.scan("owners", self.prefix + owner)]

    def is_owned(self, txn: Transaction, key: StateKey) -> bool:
        """Whether a state belongs to anybody."""
        return next(iter(txn.scan("owned", self.prefix + key)), None) is not None

    def clear(self, txn: Transaction) -> None:
        """Delete everything."""
        for table in _TABLES:
            row_key = self.prefix
            while (row := txn.key_at_or_after(table, row_key)) is not None:
                if not row.startswith(self.prefix):
                    break
                txn.delete(table, row)
                row_key = row


def evict(
    txn: Transaction,
    namespaces: Iterable[NamespaceRows],
    num_bytes: int,
    held: Collection[StateKey],
) -> int:
    """Drop the states that save least for their bytes, until `num_bytes` are free; how many."""
    rows_of = list(namespaces)
    candidates = [
        (entry.priority, entry.num_bytes, (number, key))
        for number, rows in enumerate(rows_of)
        for key, entry in rows.entries(txn)
        if not entry.is_preamble and key not in held
    ]
    chosen, clock = eviction.victims(candidates, num_bytes)
    sizes = {identity: size for _, size, identity in candidates}
    for number, rows in enumerate(rows_of):
        its = [key for n, key in chosen if n == number]
        for key in its:
            rows.drop(txn, key)
        if its:
            counters = rows.counters(txn)
            freed = sum(sizes[number, key] for key in its)
            counters = counters.plus(evictions=len(its), evicted_bytes=freed)
            rows.put_counters(txn, counters.with_clock(clock))
    return len(chosen)


def _anchor(text: str) -> int | None:
    if len(text) < ANCHOR_CHARS:
        return None
    return int(anchor_hashes(text[:ANCHOR_CHARS])[0])


def _parse(key: StateKey, data: bytes) -> StateRecord | None:
    try:
        return StateRecord.from_bytes(key, data)
    except ValueError:
        return None
