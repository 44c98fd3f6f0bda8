"""What a store says of itself: its format, its id, its limit, its namespaces."""

from __future__ import annotations

import json
import uuid
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from hcache_rag.errors import StoreOpenError
from hcache_rag.state import FORMAT_VERSION, read_json
from hcache_rag.store.backend import Backend, Transaction
from hcache_rag.store.tables import (
    Namespace,
    namespace_prefix,
    small_from_bytes,
    small_to_bytes,
)

MAX_LIMIT_BYTES = 1 << 46
"""No store may be larger: processors have no more addresses to map it to."""

_STORE, _TAKEN = b"store", b"namespaces"


@dataclass(frozen=True, slots=True)
class Description:
    """A store's random name, and the most bytes that its file may have."""

    store_id: str
    max_bytes: int | None = None


def describe(backend: Backend, wait_s: float | None, *, read_only: bool) -> Description:
    """The description of a store; a new one gets it.

    Raises:
        StoreOpenError: it is not one, or of a format that this release does not know.
    """
    with backend.reading() as txn:
        data = txn.get("meta", _STORE)
    if data is None and not read_only:
        with backend.writing(wait_s) as txn:
            data = txn.get("meta", _STORE)
            if data is None:
                data = _to_bytes(Description(uuid.uuid4().hex))
                txn.put("meta", _STORE, data)
    return _from_bytes(backend.path, data)


def set_limit(backend: Backend, wait_s: float | None, max_bytes: int) -> None:
    """The store's file may grow to so many bytes."""
    with backend.writing(wait_s) as txn:
        described = _from_bytes(backend.path, txn.get("meta", _STORE))
        txn.put("meta", _STORE, _to_bytes(replace(described, max_bytes=max_bytes)))


def _to_bytes(description: Description) -> bytes:
    head = {"format": FORMAT_VERSION, "id": description.store_id}
    if description.max_bytes is not None:
        head["max_bytes"] = description.max_bytes
    return json.dumps(head).encode()


def _from_bytes(path: Path, data: bytes | None) -> Description:
    try:
        head = read_json(data or b"{}")
        if not isinstance(head, dict):
            raise ValueError("its description is not one")
    except ValueError as error:
        raise StoreOpenError(f"{path} is not a state store: {error}") from error
    if head.get("format") != FORMAT_VERSION:
        raise StoreOpenError(
            f"{path} has store format {head.get('format')}, "
            f"this release reads format {FORMAT_VERSION}"
        )
    max_bytes = head.get("max_bytes")
    if not isinstance(head.get("id"), str) or not _is_limit(max_bytes):
        raise StoreOpenError(
            f"{path} is not a state store: it has no id, or no number as its limit"
        )
    return Description(head["id"], max_bytes)


def _is_limit(value: object) -> bool:
    return value is None or (type(value) is int and 0 < value <= MAX_LIMIT_BYTES)


def namespace_in(txn: Transaction, name: str) -> Namespace:
    """A namespace as a transaction sees it; number 0, in which nothing is, where there is none."""
    found: Namespace = small_from_bytes(Namespace, txn.get("namespaces", name.encode()))
    return found


def ensure_namespace(
    backend: Backend, name: str, key_check: str | None, wait_s: float | None, *, read_only: bool
) -> Namespace:
    """A namespace, which is made where it is missing; numbers are never given twice.

    Args:
        key_check: of the key that a new one is encrypted with.
    """
    with backend.reading() as txn:
        found = namespace_in(txn, name)
    if found.number or read_only:
        return found
    with backend.writing(wait_s) as txn:
        found = namespace_in(txn, name)
        if not found.number:
            found = Namespace(1 + last_number(txn), key_check=key_check)
            txn.put("meta", _TAKEN, str(found.number).encode())
            put_namespace(txn, name, found)
    return found


def last_number(txn: Transaction) -> int:
    """The largest number that a namespace ever had; where that is damaged, that any row has."""
    taken = txn.get("meta", _TAKEN) or b"0"
    found = [int(taken)] if taken.isdigit() and len(taken) < 10 else [0]
    last = txn.before("totals", b"\xff" * 20)  # each namespace has its counters there
    if last is not None:
        found.append(int.from_bytes(last[0][:4], "big"))
    found += [int.from_bytes(prefix, "big") for prefix in namespaces_in(txn).values()]
    return max(found)


def put_namespace(txn: Transaction, name: str, namespace: Namespace) -> None:
    """Make or change a namespace."""
    txn.put("namespaces", name.encode(), small_to_bytes(namespace))


def namespaces_in(txn: Transaction) -> dict[str, bytes]:
    """All namespaces by name, and what their keys begin with."""
    found = {}
    for key, value in txn.scan("namespaces"):
        number = small_from_bytes(Namespace, value).number
        with suppress(UnicodeDecodeError):
            if number:
                found[key.decode()] = namespace_prefix(number)
    return found
