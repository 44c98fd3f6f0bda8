"""Whose states they are: a state goes when the last one that it belongs to lets it go."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from hcache_rag.state import StateKey
from hcache_rag.store.backend import Transaction
from hcache_rag.store.rows import NamespaceRows

Wanted = Mapping[bytes, set[StateKey]]
"""By what stands for an owner: the states that are to belong to it."""


def is_assigned(
    txn: Transaction, rows: NamespaceRows, wanted: Wanted, *, add: bool, within: bytes = b""
) -> bool:
    """Whether all is as it is wanted; with `add`, owners may have more."""
    known = _known(txn, rows, wanted)
    if any(_to_put(keys, known[digest], within) for digest, keys in wanted.items()):
        return False
    return add or all(known[digest].keys() == keys for digest, keys in wanted.items())


def assign(
    txn: Transaction,
    rows: NamespaceRows,
    wanted: Wanted,
    *,
    add: bool,
    delete: bool,
    within: bytes = b"",
) -> int:
    """Let states that are there belong to owners, see `StateStore.assign_all`.

    Returns:
        How many were deleted.
    """
    known = _known(txn, rows, wanted)
    for digest, keys in wanted.items():
        for key in _to_put(keys, known[digest], within):
            if rows.entry(txn, key) is not None:
                rows.own(txn, digest, key, within)
                if within and within not in rows.owners_of(txn, key):
                    rows.own(txn, within, key)
    if add:
        return 0
    gone = {digest: known[digest].keys() - keys for digest, keys in wanted.items()}
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
) -> dict[bytes, dict[StateKey, bytes]]:
    """By owner: its states, each with the owner that it is a part of there."""
    return {digest: rows.owned_by(txn, digest) for digest in digests}


def _to_put(
    keys: Iterable[StateKey], known: Mapping[StateKey, bytes], within: bytes
) -> list[StateKey]:
    """What is to be written down: what an owner does not have yet, or not as a part of `within`."""
    return [key for key in keys if key not in known or (within and known[key] != within)]
