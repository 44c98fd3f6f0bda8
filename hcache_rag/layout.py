"""What each layer of a state keeps, and how many bytes that is. Knows no hardware, no tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

from hcache_rag.spec import DTYPE_BYTES, ModelSpec

GROUP_CHANNELS = 64
"""Channels of a hidden row that share one scale in the storage dtype `int8-g64`."""
VALUE_BYTES = 1 << 19
"""About what one stored value should hold: smaller ones waste pages and requests."""
MAX_LAYERS = 4096
"""No stored layout has more."""

MIN_CHUNK_TOKENS, MAX_CHUNK_TOKENS = 64, 1024
LARGEST_CHUNK_TOKENS = 65535
"""What the header of a stored value has room for."""
HEADER_BYTES = 48
"""In front of the arrays of every stored value, see `codec`."""
_PART_ALIGNMENT = 4


class Representation(str, Enum):
    """How a layer's state is kept."""

    HIDDEN = "hidden"
    """The layer's input, before its norm: `E` elements a token."""
    KV = "kv"
    """K before RoPE, and V: `2 * G * D` elements a token."""
    NONE = "none"
    """Nothing: the layer is computed from the tokens. Only first layers can be left out."""

    def __str__(self) -> str:
        return self.value


STORAGE_DTYPES = {
    Representation.HIDDEN: (*DTYPE_BYTES, "float8_e4m3", "int8", "int8-g64", "int8-smooth"),
    Representation.KV: (*DTYPE_BYTES, "float8_e4m3", "int8"),
    Representation.NONE: ("",),
}
"""The dtypes that a representation can be stored in. `int8` and `float8_e4m3` have a scale for each
hidden row, or for each channel of K and each token and head of V; `int8-g64` one for each 64
channels of a row; `int8-smooth` one for each row and one for each channel."""


class Part(NamedTuple):
    """One array of a stored chunk: its name, bytes of an element, and shape."""

    name: str
    element_bytes: int
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the array, padded so that the next part is aligned."""
        return -(-self.element_bytes * math.prod(self.shape) // _PART_ALIGNMENT) * _PART_ALIGNMENT


@dataclass(frozen=True, slots=True)
class LayerFormat:
    """One layer's representation and the dtype that it is stored in."""

    representation: Representation
    dtype: str = ""

    def __post_init__(self) -> None:
        known = STORAGE_DTYPES[self.representation]
        if self.dtype not in known:
            raise ValueError(
                f"{self.representation} cannot be stored as {self.dtype!r}; known: "
                + ", ".join(map(repr, known))
            )

    @property
    def is_quantised(self) -> bool:
        """Whether the elements have eight bits, and scales beside them."""
        return self.representation is not Representation.NONE and self.dtype not in DTYPE_BYTES

    def parts(self, spec: ModelSpec, tokens: int) -> tuple[Part, ...]:
        """The arrays that `tokens` tokens of this layer are stored as, in their order on disk.

        hidden: `rows` (t, E), `row_scales` (t,) float32 `1 / rms`, and where quantised
        `quant_scales` (t,) or (t, groups), for `int8-smooth` also `channel_scales` (E,). kv:
        `keys`, `values` (G, t, D), and where quantised `key_scales` (G, D), `value_scales` (G, t).
        V may be of another width than K.
        """
        element = 1 if self.is_quantised else DTYPE_BYTES.get(self.dtype, 0)
        heads, width = spec.num_kv_heads, spec.head_dim
        if self.representation is Representation.NONE:
            return ()
        if self.representation is Representation.HIDDEN:
            rows = (
                Part("rows", element, (tokens, spec.hidden_size)),
                Part("row_scales", 4, (tokens,)),
            )
            if not self.is_quantised:
                return rows
            groups = (-(-spec.hidden_size // GROUP_CHANNELS),) if self.dtype == "int8-g64" else ()
            scales = Part("quant_scales", 4, (tokens, *groups))
            if self.dtype != "int8-smooth":
                return (*rows, scales)
            return (*rows, scales, Part("channel_scales", 4, (spec.hidden_size,)))
        pair = (
            Part("keys", element, (heads, tokens, width)),
            Part("values", element, (heads, tokens, spec.value_dim or width)),
        )
        if not self.is_quantised:
            return pair
        return (
            *pair,
            Part("key_scales", 4, (heads, width)),
            Part("value_scales", 4, (heads, tokens)),
        )

    def num_bytes(self, spec: ModelSpec, tokens: int) -> int:
        """Payload bytes of one chunk of `tokens` tokens of this layer."""
        return sum(part.num_bytes for part in self.parts(spec, tokens))

    def value_bytes(self, spec: ModelSpec, tokens: int) -> int:
        """Bytes of the stored value of one chunk: header and payload; 0 where nothing is kept."""
        payload = self.num_bytes(spec, tokens)
        return HEADER_BYTES + payload if payload else 0

    def __str__(self) -> str:
        return f"{self.representation} ({self.dtype})" if self.dtype else str(self.representation)


@dataclass(frozen=True, slots=True)
class StateLayout:
    """The formats of all layers, and how many tokens one stored value (a chunk) holds.

    Raises:
        ValueError: no layers, an impossible chunk, or a layer that keeps nothing behind one that
            keeps something: it could not be computed from the tokens.
    """

    layers: tuple[LayerFormat, ...]
    chunk_tokens: int = MIN_CHUNK_TOKENS
    runs: tuple[tuple[LayerFormat, int], ...] = field(init=False, repr=False, compare=False)
    """Formats of neighbouring layers, and how many layers each of them has."""

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("a layout needs at least one layer")
        if not 1 <= self.chunk_tokens <= LARGEST_CHUNK_TOKENS:
            raise ValueError(
                f"chunk_tokens must be from 1 to {LARGEST_CHUNK_TOKENS}, not {self.chunk_tokens}"
            )
        runs = tuple((fmt, len(list(run))) for fmt, run in groupby(self.layers))
        object.__setattr__(self, "runs", runs)
        if any(fmt.representation is Representation.NONE for fmt, _ in self.runs[1:]):
            raise ValueError(f"only first layers can keep nothing, not those of {self}")

    @classmethod
    def of(cls, spec: ModelSpec, layers: Sequence[LayerFormat]) -> StateLayout:
        """A layout whose chunks are of the size that storage likes, see `VALUE_BYTES`."""
        largest = max((fmt.num_bytes(spec, 1024) for fmt in layers), default=0) / 1024
        tokens = int(VALUE_BYTES / largest) if largest else MAX_CHUNK_TOKENS
        step = MIN_CHUNK_TOKENS
        tokens = max(MIN_CHUNK_TOKENS, min(MAX_CHUNK_TOKENS, tokens // step * step))
        return cls(tuple(layers), tokens)

    def is_lossless(self, dtype: str) -> bool:
        """Whether a model of this dtype gets back every bit of what is stored."""
        return all(fmt.dtype in ("", dtype) for fmt, _ in self.runs)

    @property
    def num_none(self) -> int:
        """How many first layers keep nothing."""
        first, count = self.runs[0]
        return count if first.representation is Representation.NONE else 0

    def bytes_per_token(self, spec: ModelSpec) -> float:
        """Payload bytes of one token over all layers, in full chunks."""
        tokens = self.chunk_tokens
        return sum(fmt.num_bytes(spec, tokens) * count for fmt, count in self.runs) / tokens

    def num_chunks(self, num_tokens: int) -> int:
        """How many chunks hold `num_tokens` tokens of one layer."""
        return -(-num_tokens // self.chunk_tokens)

    def __str__(self) -> str:
        return " + ".join(f"{count} x {fmt}" for fmt, count in self.runs)

    def to_json(self) -> dict[str, object]:
        """A form that `json` writes and `from_json` reads."""
        return {
            "chunk_tokens": self.chunk_tokens,
            "runs": [[fmt.representation.value, fmt.dtype, count] for fmt, count in self.runs],
        }

    @classmethod
    def from_json(cls, data: dict[str, object]) -> StateLayout:
        """The inverse of `to_json`.

        Raises:
            ValueError: the data is not a layout this version knows.
        """
        runs, chunk_tokens = data.get("runs"), data.get("chunk_tokens")
        if not isinstance(runs, list) or type(chunk_tokens) is not int:
            raise ValueError(f"not a state layout: {str(data)[:200]}")
        try:
            return _parsed(
                tuple((str(n), str(d), int(count)) for n, d, count in runs), chunk_tokens
            )
        except (TypeError, OverflowError) as error:
            raise ValueError(f"not a state layout: {str(data)[:200]}") from error


@lru_cache(maxsize=256)
def _parsed(runs: tuple[tuple[str, str, int], ...], chunk_tokens: int) -> StateLayout:
    """Thousands of records have the same few layouts: one object for each of them."""
    if not all(1 <= count <= MAX_LAYERS for _, _, count in runs) or len(runs) > MAX_LAYERS:
        raise ValueError(f"a layout has runs of 1 to {MAX_LAYERS} layers")
    formats = [LayerFormat(Representation(name), dtype) for name, dtype, _ in runs]
    counts = [count for _, _, count in runs]
    if sum(counts) > MAX_LAYERS:
        raise ValueError(f"a layout of {sum(counts)} layers")
    layers = [fmt for fmt, count in zip(formats, counts, strict=True) for _ in range(count)]
    return StateLayout(tuple(layers), chunk_tokens)
