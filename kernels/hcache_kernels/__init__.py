"""Tensor functions of restoring, each with a naive twin in `reference`.

Shapes in one alphabet: `T` tokens, `E` hidden size, `G` KV heads, `D` head dim.
"""

from hcache_kernels.fused import dequantise_rows_into, quantise_rows, row_scale
from hcache_kernels.quant import (
    copy_numbers,
    dequantise_keys_into,
    dequantise_values_into,
    quantise_keys,
    quantise_rows_smoothly,
    quantise_values,
)
from hcache_kernels.torch_ops import fold_projection, project_kv, rope_into

__all__ = [
    "copy_numbers",
    "dequantise_keys_into",
    "dequantise_rows_into",
    "dequantise_values_into",
    "fold_projection",
    "project_kv",
    "quantise_keys",
    "quantise_rows",
    "quantise_rows_smoothly",
    "quantise_values",
    "rope_into",
    "row_scale",
]
