"""What is known about a stored state besides its values: its key, tokens and layout.

A state knows no positions (K is kept before RoPE) and nothing of where it is stored.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hcache_rag.layout import StateLayout

FORMAT_VERSION = 1
KEY_BYTES = 16

StateKey = bytes
"""16 bytes: `H(parent key, token ids)`; the tree's root is `root_key`."""

TokenIds = npt.NDArray[np.uint32]
"""Token ids, shape (T,)."""


def token_array(token_ids: object) -> TokenIds:
    """Token ids as the one array type that keys are computed from, shape (T,)."""
    return np.ascontiguousarray(token_ids, dtype=np.uint32)


def root_key(model_fingerprint: str, tokenizer_fingerprint: str) -> StateKey:
    """The root of the state tree of one model with one tokenizer in one format version."""
    text = f"hcache-rag/{FORMAT_VERSION}\0{model_fingerprint}\0{tokenizer_fingerprint}"
    return hashlib.blake2b(text.encode(), digest_size=KEY_BYTES).digest()


def child_key(parent: StateKey, token_ids: TokenIds) -> StateKey:
    """The key of the state of `token_ids` computed right after the path `parent`."""
    digest = hashlib.blake2b(parent, digest_size=KEY_BYTES)
    digest.update(token_ids.tobytes())
    return digest.digest()


def common_prefix(a: TokenIds, b: TokenIds) -> int:
    """With how many tokens both begin."""
    length = min(len(a), len(b))
    differing = np.flatnonzero(a[:length] != b[:length])
    return int(differing[0]) if len(differing) else length


def read_json(data: bytes | str) -> Any:
    """What some JSON says.

    Raises:
        ValueError: it is none, or goes too deep.
    """
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ValueError("JSON that goes too deep") from error


def _record_checksum(key: StateKey, data: bytes) -> bytes:
    return hashlib.blake2b(key + data, digest_size=16).digest()


@dataclass(frozen=True, slots=True, eq=False)
class StateRecord:
    """One stored state, without its values.

    Args:
        key: `child_key(parent, token_ids)`.
        parent: the path that the state was computed after.
        root: the root of that path: which model and tokenizer.
        token_ids: shape (T,).
        text: the text of these tokens, by which prompts are searched.
        layout: what each layer keeps.
        created_s: seconds since the epoch.
        is_preamble: the text is a prompt's head and is never searched for.
        is_approximate: something in front of it, or of it, was restored with a loss.
    """

    key: StateKey
    parent: StateKey
    root: StateKey
    token_ids: TokenIds
    text: str
    layout: StateLayout
    created_s: float
    is_preamble: bool = False
    is_approximate: bool = False

    @property
    def num_tokens(self) -> int:
        """`T`."""
        return len(self.token_ids)

    def is_in_full(self, dtype: str) -> bool:
        """Whether a model of this dtype gets back every bit of what it would compute."""
        return self.layout.is_lossless(dtype) and not self.is_approximate

    def to_bytes(self) -> bytes:
        """The record as stored: a line of JSON, then the token ids (little-endian uint32)."""
        head = {
            "version": FORMAT_VERSION,
            "parent": self.parent.hex(),
            "root": self.root.hex(),
            "text": self.text,
            "layout": self.layout.to_json(),
            "created_s": self.created_s,
            "is_preamble": self.is_preamble,
            **({"is_approximate": True} if self.is_approximate else {}),
        }
        data = json.dumps(head).encode() + b"\n" + self.token_ids.astype("<u4").tobytes()
        return data + _record_checksum(self.key, data)

    @classmethod
    def from_bytes(cls, key: StateKey, data: bytes) -> StateRecord:
        """The inverse of `to_bytes`.

        Raises:
            ValueError: not a record of this format version, or not the one of `key`.
        """
        data, checksum = data[:-16], data[-16:]
        if _record_checksum(key, data) != checksum:
            raise ValueError("the record fails its checksum")
        head_bytes, _, ids_bytes = data.partition(b"\n")
        head = read_json(head_bytes)
        if not isinstance(head, dict) or head.get("version") != FORMAT_VERSION:
            raise ValueError("not a record of format version 1")
        try:
            record = cls(
                key=key,
                parent=bytes.fromhex(head["parent"]),
                root=bytes.fromhex(head["root"]),
                token_ids=np.frombuffer(ids_bytes, dtype="<u4").astype(np.uint32),
                text=head["text"],
                layout=StateLayout.from_json(head["layout"]),
                created_s=float(head["created_s"]),
                is_preamble=bool(head["is_preamble"]),
                is_approximate=bool(head.get("is_approximate")),
            )
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"a record lacks or mistypes a field: {error!r}") from error
        if not isinstance(record.text, str) or len(record.root) != KEY_BYTES:
            raise ValueError("a record's text or root is not one")
        if not math.isfinite(record.created_s):
            raise ValueError("a record's time is none")
        if child_key(record.parent, record.token_ids) != key:
            raise ValueError("the key is not that of the parent and token ids")
        return record
