"""Whose states they are: a state goes when the last one that it belongs to lets it go."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from hcache_rag.state import StateKey
from hcache_rag.store.backend import Transaction
from hcache_rag.store.rows import NamespaceRows

Wanted = Mapping[bytes, set[StateKey]]
"""By what stands for an owner: the states that are to belong to it."""


def is_assigned(txn: Transaction, rows: NamespaceRows, wanted: Wanted, *, add: bool) -> bool:
    """Whether all is as it is wanted; with `add`, owners may have more."""
    known = _known(txn, rows, wanted)
    return all(known[d] >= keys if add else known[d] == keys for d, keys in wanted.items())


def assign(
    txn: Transaction, rows: NamespaceRows, wanted: Wanted, *, add: bool, delete: bool
) -> int:
    """Let states that are there belong to owners, see `StateStore.assign_all`.

    Returns:
        How many were deleted.
    """
    known = _known(txn, rows, wanted)
    for digest, keys in wanted.items():
        for key in keys - known[digest]:
            if rows.entry(txn, key) is not None:
                rows.own(txn, digest, key)
    if add:
        return 0
    gone = {digest: known[digest] - keys for digest, keys in wanted.items()}
    return disown(txn, rows, gone, delete=delete)


def disown(
    txn: Transaction,
    rows: NamespaceRows,
    gone: Mapping[bytes, Iterable[StateKey]],
    *,
    delete: bool,
) -> int:
    """Let states belong to owners no more.

    Args:
        delete: those that belong to nobody then.

    Returns:
        How many were deleted.
    """
    for owner, keys in gone.items():
        for key in keys:
            rows.disown(txn, owner, key)
    left = {key for keys in gone.values() for key in keys} if delete else set()
    return sum(rows.drop(txn, key) for key in left if not rows.is_owned(txn, key))


def _known(
    txn: Transaction, rows: NamespaceRows, digests: Iterable[bytes]
) -> dict[bytes, set[StateKey]]:
    return {digest: set(rows.keys_of(txn, digest)) for digest in digests}
