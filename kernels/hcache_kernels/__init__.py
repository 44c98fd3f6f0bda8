"""Tensor functions of restoring, each with a naive twin in `reference`.

Shapes in one alphabet: `T` tokens, `E` hidden size, `G` KV heads, `D` head dim.
"""

from hcache_kernels.torch_ops import fold_projection, project_kv, rope_into, row_scale

__all__ = ["fold_projection", "project_kv", "rope_into", "row_scale"]
