"""Encryption at rest: AES-256-GCM, a key for each namespace, which is stored nowhere.

What is encrypted: records (the texts) and values. What is not: sizes, times, numbers of tokens and
uses, names of models, and that two states belong to one document. Keys of states are hashes of
token ids under the model's root: who holds a text can tell whether it is stored.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from hcache_rag.errors import StoreOpenError

KeySource: TypeAlias = bytes | str | os.PathLike[str] | Callable[[], bytes]
"""A key, the path of a file that holds it, or what gives it."""

KEY_BYTES = 32
NONCE_BYTES, TAG_BYTES = 12, 16


class Cipher:
    """Seals and opens what a namespace stores.

    Args:
        source: 32 bytes, a file with 32 bytes or 64 hexadecimal digits, or a callback.

    Raises:
        StoreOpenError: there is no such key, or `cryptography` is not installed.
    """

    def __init__(self, source: KeySource) -> None:
        try:
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        except ImportError as error:
            raise StoreOpenError(
                "encryption needs cryptography: pip install 'hcache-rag[encryption]'"
            ) from error
        key = _load(source)
        self._aead: Any = AESGCM(_derived(key, b"values"))
        self._names = _derived(key, b"names")
        self.check = _derived(key, b"check").hex()
        """By which a namespace knows its key again; it does not tell the key."""

    def seal(self, data: bytes | bytearray, place: bytes) -> bytes:
        """Encrypted, for one place only: a random nonce, the data, and a tag over both."""
        nonce = os.urandom(NONCE_BYTES)
        sealed: bytes = nonce + self._aead.encrypt(nonce, data, place)
        return sealed

    def open(self, sealed: bytes | memoryview, place: bytes) -> bytes | None:
        """The inverse of `seal`; None where it was not sealed for this place with this key."""
        from cryptography.exceptions import InvalidTag

        if len(sealed) < NONCE_BYTES + TAG_BYTES:
            return None
        try:
            data: bytes = self._aead.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], place)
            return data
        except InvalidTag:
            return None

    def name(self, name: bytes) -> bytes:
        """32 bytes that stand for a name, and tell nothing of it without the key."""
        return hashlib.blake2b(name, digest_size=32, key=self._names).digest()


def _derived(key: bytes, purpose: bytes) -> bytes:
    return hashlib.blake2b(purpose, digest_size=32, key=key, person=b"hcache-rag").digest()


def _load(source: KeySource) -> bytes:
    if isinstance(source, bytes):
        key = source
    elif callable(source):
        key = source()
    else:
        path = Path(source).expanduser()
        try:
            key = path.read_bytes()
        except OSError as error:
            raise StoreOpenError(f"the key in {path} cannot be read: {error.strerror}") from error
        if len(key) != KEY_BYTES:
            try:
                key = bytes.fromhex(key.decode().strip())
            except ValueError as error:
                raise StoreOpenError(
                    f"{path} holds neither {KEY_BYTES} bytes nor {2 * KEY_BYTES} hexadecimal digits"
                ) from error
    if not isinstance(key, bytes) or len(key) != KEY_BYTES:
        raise StoreOpenError(f"a key has {KEY_BYTES} bytes")
    return key
