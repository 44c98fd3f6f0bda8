"""Keys and small values of the tables, see "On disk" in docs/design.md.

All tables but `meta` and `namespaces` have keys that begin with a namespace's number, so that a
namespace is a stretch of each of them and nothing else is ever looked at.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from dataclasses import Field, asdict, dataclass, fields, replace
from typing import Any

import xxhash

from hcache_rag.state import KEY_BYTES, StateKey, read_json
from hcache_rag.store.backend import PAGE_BYTES

_NAMESPACE = struct.Struct(">I")
_CHUNK = struct.Struct(">HI")
_SEQUENCE = struct.Struct(">Q")
_ANCHOR = struct.Struct("<Q")
_TEXT_BYTES = 480
"""LMDB's keys have at most 511 bytes."""
MAX_HITS = 2**32 - 1
_TEXT_END = b"\0\1"


def namespace_prefix(number: int) -> bytes:
    """What every key of a namespace begins with."""
    return _NAMESPACE.pack(number)


def chunk_key(prefix: bytes, key: StateKey, layer: int, chunk: int) -> bytes:
    """Of `chunks`: a layer's chunks lie together, and a state's layers."""
    return prefix + key + _CHUNK.pack(layer, chunk)


def chunk_of(row_key: bytes) -> tuple[int, int]:
    """Layer and chunk of a key of `chunks`."""
    layer, chunk = _CHUNK.unpack(row_key[-_CHUNK.size :])
    return layer, chunk


def sequence_key(prefix: bytes, sequence: int) -> bytes:
    """Of `anchors`: texts in the order in which they came."""
    return prefix + _SEQUENCE.pack(sequence)


def key_value(key: StateKey) -> bytes:
    """Of `anchors`, where texts are encrypted: the state whose record holds the text."""
    return b"k" + key


def key_of(value: bytes) -> StateKey | None:
    """The inverse; None for another value."""
    return value[1:] if value[:1] == b"k" and len(value) == 1 + KEY_BYTES else None


def anchor_value(text: str, anchor: int | None) -> bytes:
    """Of `anchors`: the hash of a text's beginning, or the text itself where it is too short."""
    if anchor is None:
        return b"s" + text.encode("utf-8", "surrogatepass")
    return b"a" + _ANCHOR.pack(anchor)


def anchor_of(value: bytes) -> int | str | None:
    """What `anchor_value` was given; None where it cannot be read."""
    if value[:1] == b"s":
        try:
            return value[1:].decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            return None
    return int(_ANCHOR.unpack(value[1:])[0]) if value[:1] == b"a" and len(value) == 9 else None


def text_part(text: str) -> tuple[bytes, bool]:
    """The part of a text that stands in a key of `texts`, and whether it is the whole text.

    The bytes of these parts are in the order of the texts' characters: a character of value zero is
    written as two bytes, so that the end of a part sorts before everything that could go on.
    """
    encoded = text[:_TEXT_BYTES].encode("utf-8", "surrogatepass").replace(b"\0", b"\0\xff")
    part = encoded[:_TEXT_BYTES]
    if part.endswith(b"\0"):
        part += b"\xff"  # what a zero is written as is not cut
    return part, len(encoded) < _TEXT_BYTES  # at that length, others may go on from there


def text_key(prefix: bytes, part: bytes, key: StateKey = b"") -> bytes:
    """Of `texts`; without a state's key, what the keys of all states of such texts begin with."""
    return prefix + part + _TEXT_END + key


def split_text_key(prefix: bytes, key: bytes) -> tuple[bytes, StateKey]:
    """Part and state key of a key of `texts`."""
    return key[len(prefix) : -KEY_BYTES - len(_TEXT_END)], key[-KEY_BYTES:]


def text_of(part: bytes) -> str:
    """The text of a part that is a whole text; some other text where it is damaged."""
    encoded = part.replace(b"\0\xff", b"\0")
    try:
        return encoded.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return encoded.decode("utf-8", "replace")


def digest16(name: bytes) -> bytes:
    """16 bytes that stand for a name of any length."""
    return hashlib.blake2b(name, digest_size=KEY_BYTES).digest()


def bytes_on_disk(key_bytes: int, value_bytes: int) -> int:
    """What a row takes, roughly: whole pages from half a page on."""
    size = key_bytes + 8 + value_bytes
    return size if size < PAGE_BYTES // 2 else -(-(16 + value_bytes) // PAGE_BYTES) * PAGE_BYTES


def sealed(data: bytes) -> bytes:
    """A small value with its checksum in front."""
    return xxhash.xxh3_64_digest(data) + data


def unsealed(value: bytes | None) -> bytes | None:
    """What `sealed` was given; None where it is missing or damaged."""
    if value is None or xxhash.xxh3_64_digest(value[8:]) != value[:8]:
        return None
    return value[8:]


@dataclass(frozen=True, slots=True)
class Entry:
    """What the store knows of a state besides its record.

    Args:
        sequence: when it came, counted in states.
        num_bytes: on disk.
        num_tokens, is_preamble: as in its record.
        root: of its model.
        text: what stands for its text in a key of `texts`; empty for a preamble.
        saved_s: seconds that restoring it saves.
        created_s, used_s: seconds since the epoch; `used_s` is 0 before the first use.
        hits: how often it was restored.
        priority: see `hcache_rag.store.eviction`.
    """

    sequence: int
    num_bytes: int
    num_tokens: int
    is_preamble: bool
    root: StateKey
    text: bytes
    saved_s: float
    created_s: float
    used_s: float = 0.0
    hits: int = 0
    priority: float = 0.0

    _FORMAT = struct.Struct("<QQI?16sdddId")

    def to_bytes(self) -> bytes:
        """As stored: the text last, since its length differs."""
        numbers = (getattr(self, f.name) for f in fields(self) if f.name != "text")
        return sealed(self._FORMAT.pack(*numbers) + self.text)

    @classmethod
    def from_bytes(cls, value: bytes | None) -> Entry | None:
        """The inverse; None where it is missing or damaged."""
        data, size = unsealed(value), cls._FORMAT.size
        if data is None or len(data) < size:
            return None
        numbers: tuple[Any, ...] = cls._FORMAT.unpack(data[:size])
        if not all(map(math.isfinite, (*numbers[5:8], numbers[9]))):
            return None
        values = (*numbers[:5], data[size:], *numbers[5:])
        return cls(*values)


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over the states of one model in one namespace."""

    documents: int = 0
    preambles: int = 0
    num_tokens: int = 0
    num_bytes: int = 0

    def plus(self, entry: Entry, sign: int = 1) -> Totals:
        """With a state more, or with `sign` -1 one less."""
        return Totals(
            self.documents + sign * (not entry.is_preamble),
            self.preambles + sign * entry.is_preamble,
            self.num_tokens + sign * entry.num_tokens,
            self.num_bytes + sign * entry.num_bytes,
        )


@dataclass(frozen=True, slots=True)
class Counters:
    """What has happened in a namespace since it was made.

    Args:
        sequence: states that have come.
        hits, misses: documents in prompts that had a usable state, or had none.
        hit_tokens, missed_tokens: the same in tokens.
        evictions, evicted_bytes: states that had to go for others.
        damaged: states that were found damaged and dropped.
        clock: of the eviction policy.
    """

    sequence: int = 0
    hits: int = 0
    misses: int = 0
    hit_tokens: int = 0
    missed_tokens: int = 0
    evictions: int = 0
    evicted_bytes: int = 0
    damaged: int = 0
    clock: float = 0.0

    def plus(self, **more: float) -> Counters:
        """With some counters higher."""
        changes: dict[str, Any] = {name: getattr(self, name) + n for name, n in more.items()}
        return replace(self, **changes)

    def with_clock(self, clock: float) -> Counters:
        """With the eviction policy's clock at least so high."""
        return replace(self, clock=max(self.clock, clock))


def small_to_bytes(value: Totals | Counters | Namespace) -> bytes:
    """A small value as sealed JSON."""
    return sealed(json.dumps(asdict(value)).encode())


def small_from_bytes(kind: type[Any], value: bytes | None) -> Any:
    """The inverse; the default where it is missing or damaged."""
    data = unsealed(value)
    if data is None:
        return kind()
    try:
        found = kind(**read_json(data))
    except (ValueError, TypeError):
        return kind()
    return found if all(_is_sound(found, each) for each in fields(kind)) else kind()


def _is_sound(found: object, its: Field[Any]) -> bool:
    """Whether a field's value is of the field's type, and numbers are what can be counted to."""
    value, kind = getattr(found, its.name), str(its.type)
    if value is None:
        return kind.endswith("| None")
    if kind.startswith("str"):
        return isinstance(value, str)
    if kind.startswith("float"):
        return type(value) in (int, float) and 0 <= value < 1e300
    return type(value) is int and 0 <= value < 1 << 53


@dataclass(frozen=True, slots=True)
class Namespace:
    """A namespace.

    Args:
        number: what its keys begin with.
        max_bytes: the most that its states may take.
        key_check: by which its encryption key is known again; None where nothing is encrypted.
    """

    number: int = 0
    max_bytes: int | None = None
    key_check: str | None = None
