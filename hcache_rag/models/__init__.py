"""Language models as capturing and restoring see them: families, adapters, loading."""

from hcache_rag.models.adapter import CapturedLayer, ModelAdapter
from hcache_rag.models.computing import (
    COMPUTE_DTYPES,
    PAYS_FROM,
    bfloat16_speedup,
    device_named,
    dtype_named,
    why_not_in,
)
from hcache_rag.models.configuration import spec_of, why_refused
from hcache_rag.models.families import FAMILIES, Family, Positions
from hcache_rag.models.hooks import inputs_of, outputs_of
from hcache_rag.models.loading import load_config, load_model
from hcache_rag.models.projecting import Projection, in_heads
from hcache_rag.models.taps import KEY, QUERY, VALUE
from hcache_rag.models.tensors import bit_words, element_dtype, tensor_of, torch_dtype

__all__ = [
    "COMPUTE_DTYPES",
    "FAMILIES",
    "KEY",
    "PAYS_FROM",
    "QUERY",
    "VALUE",
    "CapturedLayer",
    "Family",
    "ModelAdapter",
    "Positions",
    "Projection",
    "bfloat16_speedup",
    "bit_words",
    "device_named",
    "dtype_named",
    "element_dtype",
    "in_heads",
    "inputs_of",
    "load_config",
    "load_model",
    "outputs_of",
    "spec_of",
    "tensor_of",
    "torch_dtype",
    "why_not_in",
    "why_refused",
]
