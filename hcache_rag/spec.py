"""`ModelSpec`: the numbers of a decoder. Knows neither torch nor transformers."""

from __future__ import annotations

from dataclasses import dataclass

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What restoring needs to know about a decoder-only transformer.

    Args:
        name: what a person calls the model.
        family: transformers' `model_type`, such as "llama".
        num_layers: decoder layers, `L`.
        hidden_size: width of a layer's input, `E`.
        num_heads: query heads, `H`.
        num_kv_heads: key/value heads, `G`.
        head_dim: width of one head of Q and K, `D`.
        window_tokens: the longest sequence that the model attends to in full.
        dtype: the dtype of weights and states, one of `DTYPE_BYTES`.
        mlp_size: width between the MLP's matrices; 0 where it is not known.
        mlp_matrices: 3 with a gate (SwiGLU), 2 without.
        value_dim: width of one head of V; 0 where it is `head_dim`.
    """

    name: str
    family: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window_tokens: int
    dtype: str
    mlp_size: int = 0
    mlp_matrices: int = 3
    value_dim: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"dtype {self.dtype!r} is not one of {', '.join(DTYPE_BYTES)}")
        sizes = (
            self.num_layers,
            self.hidden_size,
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
        )
        if min(sizes) < 1:
            raise ValueError(f"layers, width, heads, KV heads and head width are {sizes}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{self.num_heads} query heads do not divide over {self.num_kv_heads} KV heads"
            )

    @property
    def kv_width(self) -> int:
        """Elements of K of one token in one layer, `d_kv = G * D`."""
        return self.num_kv_heads * self.head_dim

    @property
    def value_width(self) -> int:
        """Elements of V of one token in one layer; as many as of K but in MLA."""
        return self.num_kv_heads * (self.value_dim or self.head_dim)

    @property
    def dtype_bytes(self) -> int:
        """Bytes of one element."""
        return DTYPE_BYTES[self.dtype]

    @property
    def query_width(self) -> int:
        """Elements of Q of one token in one layer, `H * D`."""
        return self.num_heads * self.head_dim

    @property
    def projection_flops(self) -> int:
        """Floating-point operations of one token's way from a layer's input to K and V."""
        return 2 * self.hidden_size * (self.kv_width + self.value_width)

    @property
    def layer_flops(self) -> int:
        """Operations of one token in one layer, without attention: Q, K, V, O and the MLP."""
        attention = 4 * self.hidden_size * self.query_width + self.projection_flops
        return attention + 2 * self.mlp_matrices * self.hidden_size * self.mlp_size

    @property
    def attention_flops(self) -> int:
        """Operations of one token attending to one token in one layer: Q times K, P times V."""
        return 4 * self.query_width
