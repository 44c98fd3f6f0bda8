"""Room for what is to be stored: limits, watermarks, and who has to go."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from hcache_rag.errors import StoreFullError
from hcache_rag.state import StateKey
from hcache_rag.store import eviction
from hcache_rag.store.backend import Transaction
from hcache_rag.store.description import (
    MAX_LIMIT_BYTES,
    legible,
    namespace_in,
    namespaces_in,
    put_namespace,
    set_limit,
)
from hcache_rag.store.rows import NamespaceRows, StateRows
from hcache_rag.store.session import Session

MIN_BYTES = 1 << 22
"""The smallest limit of a store."""
MIN_NAMESPACE_BYTES = 1 << 20
"""The smallest limit of a namespace."""

LOW_SHARE = 0.10
"""When a store is filled to its high watermark, states go until so much of its limit is free below
that."""
LARGEST_SHARE = 0.5
"""What is stored at once may be so much of a store's limit: more leaves no room to find room in."""
BYTES_OF_A_DELETION = 1 << 17
"""Pages that are written anew to delete a state, at most about so much."""


def high_watermark(max_bytes: int) -> int:
    """How far a store is filled; the rest is what LMDB writes before it can free anything."""
    return max_bytes - max(max_bytes // 10, 1 << 20)


def set_limits(session: Session, max_bytes: int | None, namespace_max_bytes: int | None) -> None:
    """From now on, a store and a namespace may take so many bytes; None leaves it as it is."""
    if session.read_only:
        return
    if max_bytes is not None and max_bytes != session.max_bytes:
        with suppress(StoreFullError):  # what is held stays for now
            _make_room_below(session, high_watermark(max_bytes))
        session.limit(max_bytes)  # where that fails, nothing is written down
        set_limit(session.backend, session.wait_s, max_bytes)
    if namespace_max_bytes is not None:
        with session.writing() as txn:
            its = namespace_in(txn, session.namespace)
            put_namespace(txn, session.namespace, replace(its, max_bytes=namespace_max_bytes))


def check_limits(max_bytes: int | None, namespace_max_bytes: int | None) -> None:
    """A store and a namespace may be limited so.

    Raises:
        TypeError, ValueError: they may not.
    """
    _check_limit("max_bytes", max_bytes, MIN_BYTES)
    _check_limit("namespace_max_bytes", namespace_max_bytes, MIN_NAMESPACE_BYTES)


def _check_limit(name: str, limit: int | None, smallest: int) -> None:
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool)):
        raise TypeError(f"{name} is a whole number of bytes, not {limit!r}")
    if limit is not None and not smallest <= limit <= MAX_LIMIT_BYTES:
        raise ValueError(
            f"{name} is {limit:,}, but must be from {smallest:,} to {MAX_LIMIT_BYTES:,}"
        )


def require_fits(session: Session, new: Sequence[StateRows]) -> None:
    """What is to be stored at once is not too much for the store, or for its namespace.

    Raises:
        StoreFullError: it is.
    """
    needed = sum(each.num_bytes for each in new)
    if session.max_bytes is not None and needed > LARGEST_SHARE * session.max_bytes:
        raise StoreFullError(
            f"{needed:,} bytes are to be stored at once, but {session.path} may have "
            f"{session.max_bytes:,}, and half of that at once"
        )
    with session.reading() as txn:
        quota = namespace_in(txn, session.namespace).max_bytes
    if quota is not None and needed > quota:
        raise StoreFullError(
            f"{needed:,} bytes are to be stored, but the namespace "
            f"{legible(session.namespace)!r} may have {quota:,}"
        )


def make_room(session: Session, new: Sequence[StateRows], attempt: int = 0) -> None:
    """Let states go where `new` would fill the namespace, or the store, too much.

    Args:
        attempt: with each more goes than the time before.

    Raises:
        StoreFullError: what is left cannot be spared.
    """
    needed = sum(each.num_bytes for each in new)
    held = {session.rows.prefix + each.record.key for each in new}
    quota, filled = _filled(session, new)
    if quota is not None and filled + needed > quota:
        wanted = filled + needed - int((1 - 2 * LOW_SHARE) * quota)
        _evict(session, [session.rows], wanted, held)
        _, filled = _filled(session, new)
        if filled + needed > quota:
            raise StoreFullError(
                f"{needed:,} bytes are to be stored in namespace {legible(session.namespace)!r} of "
                f"{quota:,}, where {filled:,} cannot be spared"
            )
    if session.max_bytes is not None:
        high = high_watermark(session.max_bytes) - attempt * session.max_bytes // 10
        _make_room_below(session, high, needed, held)


def _filled(session: Session, new: Sequence[StateRows]) -> tuple[int | None, int]:
    """A namespace's limit, and the bytes of its states but for those that are replaced."""
    with session.reading() as txn:
        quota = namespace_in(txn, session.namespace).max_bytes
        filled = sum(totals.num_bytes for totals in session.rows.totals(txn).values())
        replaced = [session.rows.entry(txn, each.record.key) for each in new]
    return quota, filled - sum(entry.num_bytes for entry in replaced if entry is not None)


def _make_room_below(
    session: Session, high: int, needed: int = 0, held: set[bytes] | None = None
) -> None:
    with session.reading() as txn:
        used = txn.used_bytes()
        every = [NamespaceRows(prefix) for prefix in namespaces_in(txn).values()]
    if used + needed > high:
        low = high - int(LOW_SHARE * high)
        _evict(session, every, used + needed - low, held or set())
        with session.reading() as txn:
            used = txn.used_bytes()
        limit = session.max_bytes
        if limit is not None and used + needed > max(high, high_watermark(limit)):
            raise StoreFullError(
                f"{needed:,} bytes are to be stored in {session.path} of {limit:,}, where "
                f"{used:,} cannot be spared"
            )


def _evict(
    session: Session, namespaces: Sequence[NamespaceRows], num_bytes: int, held: set[bytes]
) -> None:
    """Drop the states that save least for their bytes, until `num_bytes` are free.

    A few at a time: what they leave can be used only by later transactions, and each takes pages
    itself before it leaves any.
    """
    held = {*session.backend.pins, *held}
    with session.reading() as txn:
        chosen, clock = _victims(txn, namespaces, num_bytes, held)
    room = (session.max_bytes or 0) - high_watermark(session.max_bytes or 0)
    at_once = max(8, room // BYTES_OF_A_DELETION) if session.max_bytes else 256
    while chosen:
        some, rest = chosen[:at_once], chosen[at_once:]
        try:
            with session.writing() as txn:
                for rows, keys in _by_namespace(some):
                    _drop(txn, rows, keys, clock)
            chosen = rest
        except StoreFullError:
            if at_once == 1:
                raise
            at_once //= 2
    with session.writing() as txn:  # LMDB gives a page away two transactions after its end
        txn.put("meta", b"evicted", str(time.time()).encode())


Victim = tuple[NamespaceRows, StateKey]


def _victims(
    txn: Transaction, namespaces: Sequence[NamespaceRows], num_bytes: int, held: set[bytes]
) -> tuple[list[Victim], float]:
    """The states that go, and the priority of the last one."""
    return eviction.victims(
        (
            (entry.priority, entry.num_bytes, (rows, key))
            for rows in namespaces
            for key, entry in rows.entries(txn)
            if not entry.is_preamble and rows.prefix + key not in held
        ),
        num_bytes,
    )


def _by_namespace(victims: Sequence[Victim]) -> list[tuple[NamespaceRows, list[StateKey]]]:
    found: dict[bytes, tuple[NamespaceRows, list[StateKey]]] = {}
    for rows, key in victims:
        found.setdefault(rows.prefix, (rows, []))[1].append(key)
    return list(found.values())


def _drop(txn: Transaction, rows: NamespaceRows, keys: Sequence[StateKey], clock: float) -> None:
    counters = rows.counters(txn)
    for key in keys:
        entry = rows.entry(txn, key)
        if entry is not None and rows.drop(txn, key):
            counters = counters.plus(evictions=1, evicted_bytes=entry.num_bytes)
    rows.put_counters(txn, counters.with_clock(clock))
