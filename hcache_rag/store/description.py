"""What a store says of itself: its format, its id, its limit, its namespaces."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from hcache_rag.errors import DamagedStoreError, StoreOpenError
from hcache_rag.state import FORMAT_VERSION, read_json
from hcache_rag.store.backend import Backend, Transaction
from hcache_rag.store.tables import (
    Namespace,
    namespace_prefix,
    sealed,
    small_from_bytes,
    small_to_bytes,
    unsealed,
)

MAX_LIMIT_BYTES = 1 << 46
"""No store may be larger: processors have no more addresses to map it to."""

_STORE, _TAKEN = b"store", b"namespaces"
_COPY, _COPY_OF = b"store copy", b"namespace copy "
"""Rows of `meta` that hold again what nothing could be found without."""

PATHS = "paths"
"""What the namespace of exact paths is for, see `hcache_rag.paths`."""

BELONGS = "\x1f"
"""Between a namespace's name and what another one is for that belongs to it; in no other name."""


@dataclass(frozen=True, slots=True)
class Description:
    """A store's random name, and the most bytes that its file may have."""

    store_id: str
    max_bytes: int | None = None


def describe(backend: Backend, wait_s: float | None, *, read_only: bool) -> Description:
    """The description of a store; a new one gets it.

    Raises:
        StoreOpenError: it is not one, or of a format that this release does not know.
        DamagedStoreError: it cannot be read.
    """
    with backend.reading() as txn:
        found, is_whole = _found(backend.path, partial(txn.get, "meta"))
    if not (is_whole or read_only):
        with backend.writing(wait_s) as txn:
            found, is_whole = _found(backend.path, partial(txn.get, "meta"))
            if not is_whole:
                found = found or Description(uuid.uuid4().hex)
                _put(txn, found)
    return found if found is not None else _from_bytes(backend.path, None)


def is_damaged(get: Callable[[bytes], bytes | None]) -> bool:
    """Whether a description is there that cannot be read.

    Args:
        get: a row of `meta`.
    """
    try:
        _found(Path(), get)
    except DamagedStoreError:
        return True
    except StoreOpenError:
        return False  # another release can read it
    return False


def forget(txn: Transaction) -> None:
    """Forget the description, so that `describe` makes a new one."""
    txn.delete("meta", _STORE)
    txn.delete("meta", _COPY)


def _found(path: Path, get: Callable[[bytes], bytes | None]) -> tuple[Description | None, bool]:
    """The description, None where there is none yet; and whether both of its rows say it."""
    data, copy = get(_STORE), unsealed(get(_COPY))
    if data is None and copy is None:
        return None, False
    return _from_bytes(path, data if copy is None else copy), data == copy


def _put(txn: Transaction, description: Description) -> None:
    data = _to_bytes(description)
    txn.put("meta", _STORE, data)
    txn.put("meta", _COPY, sealed(data))


def set_limit(backend: Backend, wait_s: float | None, max_bytes: int) -> None:
    """The store's file may grow to so many bytes."""
    with backend.writing(wait_s) as txn:
        found, _ = _found(backend.path, partial(txn.get, "meta"))
        described = found or _from_bytes(backend.path, None)
        _put(txn, replace(described, max_bytes=max_bytes))


def _to_bytes(description: Description) -> bytes:
    head = {"format": FORMAT_VERSION, "id": description.store_id}
    if description.max_bytes is not None:
        head["max_bytes"] = description.max_bytes
    return json.dumps(head).encode()


def _from_bytes(path: Path, data: bytes | None) -> Description:
    if data is None:
        raise StoreOpenError(f"{path} holds no state store yet: nobody has finished making it")
    try:
        head = read_json(data)
        if not isinstance(head, dict):
            raise ValueError("its description is not one")
    except ValueError as error:
        raise DamagedStoreError(path, [f"its description cannot be read ({error})"]) from error
    if head.get("format") != FORMAT_VERSION:
        raise StoreOpenError(
            f"{path} has store format {head.get('format')}, "
            f"this release reads format {FORMAT_VERSION}"
        )
    max_bytes = head.get("max_bytes")
    if not isinstance(head.get("id"), str) or not _is_limit(max_bytes):
        raise DamagedStoreError(path, ["it has no id, or no number as its limit"])
    return Description(head["id"], max_bytes)


def _is_limit(value: object) -> bool:
    return value is None or (type(value) is int and 0 < value <= MAX_LIMIT_BYTES)


def namespace_in(txn: Transaction, name: str) -> Namespace:
    """A namespace as a transaction sees it; number 0, in which nothing is, where there is none."""
    found: Namespace = small_from_bytes(Namespace, txn.get("namespaces", name.encode()))
    if not found.number:
        found = small_from_bytes(Namespace, txn.get("meta", _COPY_OF + name.encode()))
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
    txn.put("meta", _COPY_OF + name.encode(), small_to_bytes(namespace))


def drop_namespace(txn: Transaction, name: str) -> None:
    """Forget a namespace; its rows are deleted elsewhere."""
    txn.delete("namespaces", name.encode())
    txn.delete("meta", _COPY_OF + name.encode())


def namespaces_in(txn: Transaction) -> dict[str, bytes]:
    """All namespaces by name, and what their keys begin with."""
    names = {key for key, _ in txn.scan("namespaces")}
    copies = {key[len(_COPY_OF) :] for key, _ in txn.scan("meta", _COPY_OF)}
    found: dict[str, int] = {}
    for key in sorted(names | copies, key=lambda key: (key not in names & copies, key)):
        with suppress(UnicodeDecodeError):
            number = namespace_in(txn, key.decode()).number
            if number and number not in found.values():  # a damaged name is nobody's
                found[key.decode()] = number
    return {name: namespace_prefix(number) for name, number in found.items()}


def belonging(name: str, purpose: str) -> str:
    """The name of a namespace that belongs to another one."""
    return f"{name}{BELONGS}{purpose}"


def belongs(name: str, to: str) -> bool:
    """Whether a namespace is another one, or belongs to it."""
    return name == to or name.startswith(to + BELONGS)


def legible(name: str) -> str:
    """A namespace's name for people."""
    owner, *purposes = name.split(BELONGS)
    return owner + "".join(f" ({purpose})" for purpose in purposes)
