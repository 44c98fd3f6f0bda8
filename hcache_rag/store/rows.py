"""The rows of one namespace: what one transaction reads and changes of a state at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from hcache_rag.errors import DamagedStateError, StoreError
from hcache_rag.state import KEY_BYTES, StateKey, StateRecord, child_key
from hcache_rag.store import eviction
from hcache_rag.store.backend import Table, Transaction
from hcache_rag.store.cipher import Cipher
from hcache_rag.store.tables import (
    Counters,
    Entry,
    Totals,
    anchor_value,
    bytes_on_disk,
    chunk_key,
    chunk_of,
    digest16,
    key_value,
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


Values: TypeAlias = Iterable[tuple[int, int, bytes | bytearray]]
"""(layer, chunk, value) of every chunk of every layer of a state."""


@dataclass(frozen=True, slots=True, eq=False)
class NewState:
    """A state to be stored.

    Args:
        values: its chunks.
        saved_s: seconds that restoring it saves; by default in proportion to its tokens.
        owners: ids of what it belongs to, see `StateStore.assign`.
    """

    record: StateRecord
    values: Values
    saved_s: float | None = None
    owners: Sequence[str] = ()

    def require_key(self) -> None:
        """Its key must be that of its parent and token ids.

        Raises:
            ValueError: it is not.
        """
        record = self.record
        if record.key != child_key(record.parent, record.token_ids):
            raise ValueError(f"{record.key.hex()} is not the key of its parent and token ids")


@dataclass(frozen=True, slots=True, eq=False)
class StateRows:
    """A state as it is stored.

    Args:
        data: the record, as stored.
        chunks: (layer, chunk, value), as stored.
        value_bytes: of the chunks before they were encrypted.
        saved_s: seconds that restoring the state saves.
        owners: digests of its owners.
    """

    record: StateRecord
    data: bytes
    chunks: tuple[tuple[int, int, bytes | bytearray], ...]
    value_bytes: int
    saved_s: float
    owners: tuple[bytes, ...] = ()

    @property
    def num_bytes(self) -> int:
        """On disk, with all that belongs to the state."""
        small = 500 + 2 * len(text_part(self.record.text)[0]) + 64 * len(self.owners)
        values = sum(bytes_on_disk(26, len(value)) for _, _, value in self.chunks)
        return small + bytes_on_disk(20, len(self.data)) + values


class NamespaceRows:
    """The rows whose keys begin with `prefix`.

    Args:
        cipher: of an encrypted namespace. Without it, states can be dropped but not read.
    """

    def __init__(self, prefix: bytes, cipher: Cipher | None = None) -> None:
        self.prefix = prefix
        self.cipher = cipher

    def encoded(self, state: NewState) -> StateRows:
        """A state as it will be stored.

        Raises:
            ValueError: its key is not that of its parent and token ids.
        """
        state.require_key()
        record = state.record
        data, chunks = record.to_bytes(), tuple(state.values)
        value_bytes = sum(len(value) for _, _, value in chunks)
        if self.cipher is not None:
            seal, prefix = self.cipher.seal, self.prefix
            data = seal(data, prefix + record.key)
            chunks = tuple(
                (layer, chunk, seal(value, chunk_key(prefix, record.key, layer, chunk)))
                for layer, chunk, value in chunks
            )
        saved_s = record.num_tokens * 1e-3 if state.saved_s is None else state.saved_s
        owners = tuple(map(self.owner, state.owners))
        return StateRows(record, data, chunks, value_bytes, saved_s, owners)

    def owner(self, owner: str) -> bytes:
        """What stands for an owner in keys."""
        return self._digest(owner)[:KEY_BYTES]

    def text_part(self, text: str) -> tuple[bytes, bool]:
        """What stands for a text in keys of `texts`, and whether it is the whole text."""
        return text_part(text) if self.cipher is None else (self._digest(text), False)

    def _digest(self, name: str) -> bytes:
        encoded = name.encode("utf-8", "surrogatepass")
        return digest16(encoded) if self.cipher is None else self.cipher.name(encoded)

    def record(self, txn: Transaction, key: StateKey) -> StateRecord | None:
        """The record of a state, or None where there is none that can be read."""
        data = txn.get("records", self.prefix + key)
        return None if data is None else self._parse(key, data)

    def _parse(self, key: StateKey, data: bytes) -> StateRecord | None:
        if self.cipher is not None:
            opened = self.cipher.open(data, self.prefix + key)
            return None if opened is None else _parse(key, opened)
        return _parse(key, data)

    def value(self, txn: Transaction, key: StateKey, layer: int, chunk: int) -> memoryview | None:
        """The value of a chunk: where it lies, or decrypted; None where there is none.

        Raises:
            DamagedStateError: it cannot be read or decrypted.
        """
        place = chunk_key(self.prefix, key, layer, chunk)
        try:
            value = txn.view("chunks", place)
        except StoreError as error:
            raise DamagedStateError(key, f"layer {layer}, chunk {chunk}: {error}") from error
        if value is None or self.cipher is None:
            return value
        opened = self.cipher.open(value, place)
        if opened is None:
            raise DamagedStateError(key, f"layer {layer}, chunk {chunk} cannot be decrypted")
        return memoryview(opened)

    def load(self, txn: Transaction, key: StateKey, layer: int, chunk: int) -> int:
        """Touch the pages of a chunk's value, see `StoreReader.load`: LMDB's `get` does that."""
        value = txn.view("chunks", chunk_key(self.prefix, key, layer, chunk))
        return 0 if value is None else len(value)

    def records(self, txn: Transaction) -> Iterator[tuple[StateKey, StateRecord | None]]:
        """All records in order of their keys; None for those that cannot be read."""
        for row_key, data in txn.scan("records", self.prefix):
            key = row_key[len(self.prefix) :]
            yield key, self._parse(key, data)

    def store(self, txn: Transaction, rows: StateRows) -> None:
        """Store a state, replacing what is there under its key; its owners stay.

        An approximate state takes no exact one's place.
        """
        record, key = rows.record, rows.record.key
        if record.is_approximate:
            there = self.record(txn, key)
            if there is not None and not there.is_approximate:
                return
        self._remove(txn, key)
        counters = self.counters(txn)
        entry = Entry(
            counters.sequence,
            rows.num_bytes,
            record.num_tokens,
            record.is_preamble,
            record.root,
            b"" if record.is_preamble else self.text_part(record.text)[0],
            rows.saved_s,
            record.created_s,
            priority=eviction.priority(counters.clock, 0, rows.saved_s, rows.num_bytes),
        )
        for layer, chunk, value in rows.chunks:
            txn.put("chunks", chunk_key(self.prefix, key, layer, chunk), value)
        txn.put("entries", self.prefix + key, entry.to_bytes())
        if not record.is_preamble:
            part, is_whole = self.text_part(record.text)
            txn.put("texts", text_key(self.prefix, part, key), b"" if is_whole else b"+")
            place = sequence_key(self.prefix, counters.sequence)
            plain = anchor_value(record.text, _anchor(record.text))
            txn.put("anchors", place, plain if self.cipher is None else key_value(key))
        for owner in rows.owners:
            self.own(txn, owner, key)
        self._add(txn, entry, 1)
        self.put_counters(txn, counters.plus(sequence=1))
        txn.put("records", self.prefix + key, rows.data)

    def store_copy(
        self, txn: Transaction, rows: NamespaceRows, reading: Transaction, record: StateRecord
    ) -> None:
        """Store a state of other rows, with its owners and uses; neither may be encrypted."""
        key = record.key
        entry = rows.entry(reading, key)
        places = rows.chunk_keys(reading, key)
        values = ((*chunk_of(place), reading.get("chunks", place) or b"") for place in places)
        saved_s = None if entry is None else entry.saved_s
        new = self.encoded(NewState(record, tuple(values), saved_s))
        owners = (row[-KEY_BYTES:] for row, _ in reading.scan("owned", rows.prefix + key))
        self.store(txn, replace(new, owners=tuple(owners)))
        own = self.entry(txn, key)
        if entry is not None and own is not None:
            rank = eviction.priority(0.0, entry.hits, entry.saved_s, entry.num_bytes)
            used = replace(own, hits=entry.hits, used_s=entry.used_s, priority=rank)
            self.put_entry(txn, key, used)

    def drop(self, txn: Transaction, key: StateKey) -> bool:
        """Delete a state with all that belongs to it; False where there was none."""
        for owner in self.owners_of(txn, key):
            self.disown(txn, owner, key)
        return self._remove(txn, key)

    def _remove(self, txn: Transaction, key: StateKey) -> bool:
        entry = self.entry(txn, key)
        found = txn.delete("records", self.prefix + key)
        for row_key in self.chunk_keys(txn, key):
            txn.delete("chunks", row_key)
        if entry is not None:
            if not entry.is_preamble:
                txn.delete("texts", text_key(self.prefix, entry.text, key))
            txn.delete("anchors", sequence_key(self.prefix, entry.sequence))
            self._add(txn, entry, -1)
        txn.delete("entries", self.prefix + key)
        return found

    def chunk_keys(self, txn: Transaction, key: StateKey) -> list[bytes]:
        """Keys of a state's values, found one by one: the values are not looked at."""
        first = row_key = self.prefix + key
        found = []
        while (row := txn.key_at_or_after("chunks", row_key)) is not None and row.startswith(first):
            found.append(row)
            row_key = row + b"\0"
        return found

    def _add(self, txn: Transaction, entry: Entry, sign: int) -> None:
        totals: Totals = small_from_bytes(Totals, txn.get("totals", self.prefix + entry.root))
        self.put_totals(txn, entry.root, totals.plus(entry, sign))

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

    def is_listed(self, txn: Transaction, key: StateKey, entry: Entry) -> bool:
        """Whether a state that is no preamble is found where texts are looked for."""
        texts = txn.view("texts", text_key(self.prefix, entry.text, key))
        return texts is not None and (
            txn.view("anchors", sequence_key(self.prefix, entry.sequence)) is not None
        )

    def rows_about(self, txn: Transaction) -> Iterator[tuple[Table, bytes, StateKey]]:
        """(table, row's key, state's key) of rows by which states are found, but for anchors."""
        begin = len(self.prefix)
        for row_key, _ in txn.scan("texts", self.prefix):
            yield "texts", row_key, row_key[-KEY_BYTES:]
        for row_key, _ in txn.scan("owners", self.prefix):
            yield "owners", row_key, row_key[-KEY_BYTES:]
        for row_key, _ in txn.scan("owned", self.prefix):
            yield "owned", row_key, row_key[begin : begin + KEY_BYTES]

    def anchors(self, txn: Transaction) -> Iterator[tuple[int, bytes]]:
        """The numbers of states that are listed, and the keys of these rows."""
        for row_key, _ in txn.scan("anchors", self.prefix):
            yield int.from_bytes(row_key[len(self.prefix) :], "big"), row_key

    def keep_sequence(self, txn: Transaction) -> None:
        """Number states on from the last one that is listed, should the counters be lost."""
        last = txn.before("anchors", sequence_key(self.prefix, 2**64 - 1))
        if last is not None and last[0].startswith(self.prefix):
            counters = self.counters(txn)
            after = 1 + int.from_bytes(last[0][len(self.prefix) :], "big")
            if after > counters.sequence:
                self.put_counters(txn, replace(counters, sequence=after))

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

    def own(self, txn: Transaction, owner: bytes, key: StateKey, within: bytes = b"") -> None:
        """A state belongs to an owner, perhaps as a part of another one that it belongs to."""
        txn.put("owners", self.prefix + owner + key, within)
        txn.put("owned", self.prefix + key + owner, within)

    def disown(self, txn: Transaction, owner: bytes, key: StateKey) -> None:
        """It does not any more; nor to that owner's parts, nor to a whole that has no part left."""
        within = txn.get("owned", self.prefix + key + owner)
        txn.delete("owners", self.prefix + owner + key)
        txn.delete("owned", self.prefix + key + owner)
        left = self.owners_of(txn, key)
        for part, its in left.items():
            if its == owner:
                self.disown(txn, part, key)
        if within and within in left and within not in left.values():
            self.disown(txn, within, key)

    def owners_of(self, txn: Transaction, key: StateKey) -> dict[bytes, bytes]:
        """Whom a state belongs to, each with the owner that it is a part of, or nothing."""
        return {row[-KEY_BYTES:]: its for row, its in txn.scan("owned", self.prefix + key)}

    def owned_by(self, txn: Transaction, owner: bytes) -> dict[StateKey, bytes]:
        """The states that belong to an owner, each with the owner that it is a part of there."""
        return {row[-KEY_BYTES:]: its for row, its in txn.scan("owners", self.prefix + owner)}

    def keys_of(self, txn: Transaction, owner: bytes) -> list[StateKey]:
        """The states that belong to an owner."""
        return list(self.owned_by(txn, owner))

    def is_owned(self, txn: Transaction, key: StateKey) -> bool:
        """Whether a state belongs to anybody."""
        return next(iter(txn.scan("owned", self.prefix + key)), None) is not None

    def clear(self, txn: Transaction) -> None:
        """Delete everything; states go on to be numbered as before, for who has looked at them."""
        counters = self.counters(txn)
        for table in _TABLES:
            row_key = self.prefix
            while (row := txn.key_at_or_after(table, row_key)) is not None:
                if not row.startswith(self.prefix):
                    break
                txn.delete(table, row)
                row_key = row
        self.put_counters(txn, Counters(sequence=counters.sequence))


def _anchor(text: str) -> int | None:
    if len(text) < ANCHOR_CHARS:
        return None
    return int(anchor_hashes(text[:ANCHOR_CHARS])[0])


def _parse(key: StateKey, data: bytes) -> StateRecord | None:
    try:
        return StateRecord.from_bytes(key, data)
    except ValueError:
        return None
