"""Room for what is to be stored: limits, watermarks, and who has to go."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence

from hcache_rag.errors import StoreFullError
from hcache_rag.store.backend import Backend
from hcache_rag.store.description import namespace_in, namespaces_in
from hcache_rag.store.rows import NamespaceRows, StateRows, evict

HIGH_WATERMARK, LOW_WATERMARK = 0.90, 0.80
"""When a write would fill a store to more than the first share of its limit, states go until it is
filled to the second. The rest is what LMDB needs to write before it can free."""


def make_room(
    backend: Backend,
    namespace: str,
    rows: NamespaceRows,
    new: Sequence[StateRows],
    held: Collection[bytes],
    *,
    max_bytes: int | None,
    attempt: int = 0,
    wait_s: float | None = None,
) -> None:
    """Let states go where `new` would fill the namespace, or the store, too much.

    Args:
        held: keys of records that stay.
        max_bytes: the store's limit.
        attempt: with each more goes than the time before.

    Raises:
        StoreFullError: `new` alone is too much.
    """
    needed = sum(each.num_bytes for each in new)
    with backend.reading() as txn:
        quota = namespace_in(txn, namespace).max_bytes
        filled = sum(totals.num_bytes for totals in rows.totals(txn).values())
        every = [NamespaceRows(prefix) for prefix in namespaces_in(txn).values()]
        used = txn.used_bytes()
        replaced = [rows.entry(txn, each.record.key) for each in new]
    filled -= sum(entry.num_bytes for entry in replaced if entry is not None)
    if max_bytes is not None and needed > HIGH_WATERMARK * max_bytes:
        raise StoreFullError(
            f"{needed:,} bytes are to be stored, but {backend.path} may have {max_bytes:,}"
        )
    if quota is not None:
        if needed > quota:
            raise StoreFullError(
                f"{needed:,} bytes are to be stored, but the namespace {namespace!r} may have "
                f"{quota:,}"
            )
        if filled + needed > quota:
            wanted = filled + needed - int(LOW_WATERMARK * quota)
            _evict(backend, [rows], wanted, held, wait_s)
            with backend.reading() as txn:
                filled = sum(totals.num_bytes for totals in rows.totals(txn).values())
                replaced = [rows.entry(txn, each.record.key) for each in new]
            filled -= sum(entry.num_bytes for entry in replaced if entry is not None)
            if filled + needed > quota:
                raise StoreFullError(
                    f"{needed:,} bytes are to be stored in namespace {namespace!r} of {quota:,}, "
                    f"where {filled:,} cannot be spared"
                )
    if max_bytes is None:
        return
    if attempt or used + needed > HIGH_WATERMARK * max_bytes:
        low = (LOW_WATERMARK - 0.1 * attempt) * max_bytes
        _evict(backend, every, used + needed - int(low), held, wait_s)


def _evict(
    backend: Backend,
    namespaces: Sequence[NamespaceRows],
    num_bytes: int,
    held: Collection[bytes],
    wait_s: float | None,
) -> None:
    with backend.writing(wait_s) as txn:
        evict(txn, namespaces, num_bytes, held)
    with backend.writing(wait_s) as txn:  # LMDB gives a page away two transactions after its end
        txn.put("meta", b"evicted", str(time.time()).encode())
