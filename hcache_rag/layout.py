"""What each layer of a state keeps, and how many bytes that is. Knows no hardware, no tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import groupby

from hcache_rag.spec import DTYPE_BYTES, ModelSpec

ROW_SCALE_BYTES = 4
"""Each hidden row carries its float32 `1/rms`, so that restoring is one plain GEMM."""


class Representation(str, Enum):
    """How a layer's state is kept."""

    HIDDEN = "hidden"
    """The layer's input, before its norm: `E` elements a token."""
    KV = "kv"
    """K before RoPE, and V: `2 * G * D` elements a token."""

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, slots=True)
class LayerFormat:
    """One layer's representation and the dtype that it is stored in."""

    representation: Representation
    dtype: str

    def bytes_per_token(self, spec: ModelSpec) -> int:
        """Payload bytes of one token of this layer."""
        element_bytes = DTYPE_BYTES[self.dtype]
        if self.representation is Representation.HIDDEN:
            return spec.hidden_size * element_bytes + ROW_SCALE_BYTES
        return 2 * spec.kv_width * element_bytes


@dataclass(frozen=True, slots=True)
class StateLayout:
    """The formats of all layers, and how many tokens one stored value (a chunk) holds."""

    layers: tuple[LayerFormat, ...]
    chunk_tokens: int = 64

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("a layout needs at least one layer")
        if self.chunk_tokens < 1:
            raise ValueError(f"chunk_tokens must be positive, not {self.chunk_tokens}")

    @classmethod
    def of(cls, representations: Sequence[Representation], dtype: str) -> StateLayout:
        """Build a layout from one representation per layer."""
        return cls(tuple(LayerFormat(r, dtype) for r in representations))

    def bytes_per_token(self, spec: ModelSpec) -> int:
        """Payload bytes of one token over all layers."""
        return sum(layer.bytes_per_token(spec) for layer in self.layers)

    def num_chunks(self, num_tokens: int) -> int:
        """How many chunks hold `num_tokens` tokens of one layer."""
        return -(-num_tokens // self.chunk_tokens)

    def __str__(self) -> str:
        runs = [(fmt, len(list(run))) for fmt, run in groupby(self.layers)]
        return " + ".join(f"{n} x {fmt.representation} ({fmt.dtype})" for fmt, n in runs)

    def to_json(self) -> dict[str, object]:
        """A form that `json` writes and `from_json` reads."""
        return {
            "chunk_tokens": self.chunk_tokens,
            "layers": [[fmt.representation.value, fmt.dtype] for fmt in self.layers],
        }

    @classmethod
    def from_json(cls, data: dict[str, object]) -> StateLayout:
        """The inverse of `to_json`.

        Raises:
            ValueError: the data is not a layout this version knows.
        """
        layers, chunk_tokens = data.get("layers"), data.get("chunk_tokens")
        if not isinstance(layers, list) or not isinstance(chunk_tokens, int):
            raise ValueError(f"not a state layout: {data!r}")
        try:
            formats = tuple(LayerFormat(Representation(name), str(dtype)) for name, dtype in layers)
        except TypeError as error:
            raise ValueError(f"not a state layout: {data!r}") from error
        if any(fmt.dtype not in DTYPE_BYTES for fmt in formats):
            raise ValueError(f"unknown storage dtype in layout {data!r}")
        return cls(formats, chunk_tokens)
