"""Looks at everything that is stored in a namespace, and puts right what does not agree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hcache_rag import codec
from hcache_rag.errors import DamagedStateError, StateError, StoreError
from hcache_rag.layout import Representation
from hcache_rag.state import KEY_BYTES, StateKey, StateRecord
from hcache_rag.store.backend import Backend, Table, Transaction
from hcache_rag.store.rows import NamespaceRows
from hcache_rag.store.tables import Totals


@dataclass(frozen=True, slots=True)
class Damage:
    """A state that is not what was stored.

    Args:
        text: of the document; empty where the record itself cannot be read.
        is_preamble: whether it is a prompt's head.
        reason: what is wrong.
    """

    key: StateKey
    text: str
    is_preamble: bool
    reason: str


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What `StateStore.verify` found.

    Args:
        states, values, num_bytes: that were looked at.
        damaged: states that cannot be used.
        strays: values and other rows that belong to no state.
        is_sum_right: whether the sums that are kept are those of the states.
    """

    states: int
    values: int
    num_bytes: int
    damaged: tuple[Damage, ...] = ()
    strays: int = 0
    is_sum_right: bool = True

    @property
    def is_whole(self) -> bool:
        """Whether nothing was found."""
        return not self.damaged and not self.strays and self.is_sum_right


def verify(
    backend: Backend,
    rows: NamespaceRows,
    on_progress: Callable[[int, int], None] | None = None,
    *,
    is_locked: bool = False,
) -> VerifyReport:
    """Read and check every record and every value of a namespace.

    Each state is read in a transaction of its own, so that others can write meanwhile; a state that
    is deleted meanwhile is passed over.

    Args:
        on_progress: called with (states done, states to do).
        is_locked: records and values cannot be decrypted, and are not looked at.
    """
    with backend.reading() as txn:
        keys = _all_keys(txn, rows)
    values = num_bytes = 0
    damaged = []
    for done, key in enumerate(keys):
        if on_progress is not None:
            on_progress(done, len(keys))
        with backend.reading() as txn:
            record = None
            try:
                record = None if is_locked else rows.record(txn, key)
                if record is not None:
                    count, size = _check_values(txn, rows, record)
                    values, num_bytes = values + count, num_bytes + size
                _check_rows(txn, rows, key, record, is_locked=is_locked)
            except StateError as error:
                damaged.append(_damage(key, record, error.reason))
            except StoreError as error:
                damaged.append(_damage(key, record, str(error)))
    if on_progress is not None:
        on_progress(len(keys), len(keys))
    with backend.reading() as txn:
        strays = len(_strays(txn, rows))
        kept = {root: totals for root, totals in rows.totals(txn).items() if totals != Totals()}
        is_sum_right = _sums(txn, rows) == kept
    return VerifyReport(len(keys), values, num_bytes, tuple(damaged), strays, is_sum_right)


def repair(
    backend: Backend, rows: NamespaceRows, report: VerifyReport, wait_s: float | None
) -> None:
    """Drop what a report names, and make the sums right."""
    for damage in report.damaged:
        with backend.writing(wait_s) as txn:
            rows.drop(txn, damage.key)
    with backend.writing(wait_s) as txn:
        for table, row_key in _strays(txn, rows):
            txn.delete(table, row_key)
        sums = _sums(txn, rows)
        for root in rows.totals(txn).keys() - sums.keys():
            txn.delete("totals", rows.prefix + root)
        for root, totals in sums.items():
            rows.put_totals(txn, root, totals)
        rows.keep_sequence(txn)


def _damage(key: StateKey, record: StateRecord | None, reason: str) -> Damage:
    if record is None:
        return Damage(key, "", False, reason)
    return Damage(key, record.text, record.is_preamble, reason)


def _all_keys(txn: Transaction, rows: NamespaceRows) -> list[StateKey]:
    """Keys of all states that have a record, or should have one."""
    found = set()
    tables: tuple[Table, ...] = ("records", "entries")
    for table in tables:
        row_key = rows.prefix
        while (row := txn.key_at_or_after(table, row_key)) is not None:
            if not row.startswith(rows.prefix):
                break
            found.add(row[len(rows.prefix) :])
            row_key = row + b"\0"
    return sorted(found)


def _check_rows(
    txn: Transaction,
    rows: NamespaceRows,
    key: StateKey,
    record: StateRecord | None,
    *,
    is_locked: bool,
) -> None:
    """What belongs to a state besides its values.

    Raises:
        DamagedStateError: something is missing.
    """
    entry, data = rows.entry(txn, key), txn.get("records", rows.prefix + key)
    if data is None and txn.view("entries", rows.prefix + key) is None:
        return  # deleted meanwhile
    if record is None and not (is_locked and data is not None):
        raise DamagedStateError(key, "its record cannot be read")
    if entry is None:
        raise DamagedStateError(key, "what is known of it besides its record is missing")
    if not entry.is_preamble and not rows.is_listed(txn, key, entry):
        raise DamagedStateError(key, "it cannot be found by its text")


def _check_values(txn: Transaction, rows: NamespaceRows, record: StateRecord) -> tuple[int, int]:
    """Values of a state, and their bytes.

    Raises:
        DamagedStateError: one of them is missing or not what was stored.
    """
    count = num_bytes = 0
    for layer, fmt in enumerate(record.layout.layers):
        if fmt.representation is Representation.NONE:
            continue
        for chunk in range(record.layout.num_chunks(record.num_tokens)):
            value = rows.value(txn, record.key, layer, chunk)
            if value is None:
                raise DamagedStateError(record.key, f"layer {layer}, chunk {chunk} is missing")
            begin = chunk * record.layout.chunk_tokens
            tokens = min(record.layout.chunk_tokens, record.num_tokens - begin)
            codec.check(fmt, tokens, record.key, layer, chunk, value)
            count, num_bytes = count + 1, num_bytes + len(value)
    if count != len(rows.chunk_keys(txn, record.key)):
        raise DamagedStateError(record.key, "there are values that its layout has none of")
    return count, num_bytes


def _strays(txn: Transaction, rows: NamespaceRows) -> list[tuple[Table, bytes]]:
    """Rows whose state has no record or no entry."""
    found: list[tuple[Table, bytes]] = [("chunks", row) for row in _stray_values(txn, rows)]
    for table, row_key, key in rows.rows_about(txn):
        if txn.view("entries", rows.prefix + key) is None:
            found.append((table, row_key))
    listed = {entry.sequence for _, entry in rows.entries(txn) if not entry.is_preamble}
    return found + [("anchors", row) for number, row in rows.anchors(txn) if number not in listed]


def _stray_values(txn: Transaction, rows: NamespaceRows) -> list[bytes]:
    """Keys of values whose state has no record."""
    found = []
    row_key = rows.prefix
    while (row := txn.key_at_or_after("chunks", row_key)) is not None:
        if not row.startswith(rows.prefix):
            break
        state = row[: len(rows.prefix) + KEY_BYTES]
        if txn.view("records", state) is not None:
            row_key = max(row + b"\0", state + b"\xff" * 7)  # behind the state's last value
            continue
        found.append(row)
        row_key = row + b"\0"
    return found


def _sums(txn: Transaction, rows: NamespaceRows) -> dict[StateKey, Totals]:
    """What the sums must be."""
    sums: dict[StateKey, Totals] = {}
    for _, entry in rows.entries(txn):
        sums[entry.root] = sums.get(entry.root, Totals()).plus(entry)
    return sums
