"""Machines and models that one does not have: figures of data sheets, papers and measurements.

Every preset says where its numbers come from. Rates of processors are what their restoring
reaches, not their peaks.
"""

from __future__ import annotations

from hcache_rag.errors import ProfileError
from hcache_rag.profile import HardwareProfile, Rates, ReadRate
from hcache_rag.spec import ModelSpec

GB = 1e9
TERA = 1e12

# HCache (EuroSys 2025) says that restoring Llama-2-7B from hidden states alone balances on an
# A100 at about 24 GB/s: F = 24 GB/s * 2 * d_kv = 197 TFLOP/s. For Llama-2-13B it says 21 GB/s:
# 215 TFLOP/s. 197 is 0.63 of the A100's 312 TFLOP/s; other processors get the same share of theirs.
A100_7B_FLOPS = 197 * TERA
A100_13B_FLOPS = 215 * TERA
_OF_PEAK = A100_7B_FLOPS / (312 * TERA)
# Attention kernels reach about 3/4 of a GEMM's rate on long contexts (an assumption).
_ATTENTION = 0.76


def _gpu(projection_flops_per_s: float, memory_bytes_per_s: float, gpus: int = 1) -> Rates:
    return Rates(
        projection_flops_per_s=projection_flops_per_s * gpus,
        layer_flops_per_s=projection_flops_per_s * gpus,
        attention_flops_per_s=_ATTENTION * projection_flops_per_s * gpus,
        memory_bytes_per_s=memory_bytes_per_s * gpus,
    )


def _profile(
    name: str,
    source: str,
    rates: Rates,
    read_bytes_per_s: float,
    *,
    per_request_s: float = 0.0,
    warm_bytes_per_s: float | None = None,
) -> HardwareProfile:
    cold = ReadRate(read_bytes_per_s, per_request_s)
    warm = ReadRate(
        warm_bytes_per_s or read_bytes_per_s, 0.0 if warm_bytes_per_s else per_request_s
    )
    return HardwareProfile(name, source, cold, warm, rates)


_A100 = _gpu(A100_7B_FLOPS, 1.3e12)
_SENSITIVITY = "HCache's sensitivity study: peak fp16 rate times 0.63, states in host memory"

_HARDWARE = [
    _profile(
        "a100-4ssd",
        "HCache's testbed: A100-40G SXM4, 4 PM9A3 drives of 6.9 GB/s behind PCIe 4, 26 GB/s; "
        "rate from the 24 GB/s at which Llama-2-7B balances",
        _A100,
        26 * GB,
        warm_bytes_per_s=26 * GB,
    ),
    _profile(
        "a100-1ssd",
        "HCache's testbed with one PM9A3 drive: 6.9 GB/s",
        _A100,
        6.9 * GB,
        warm_bytes_per_s=26 * GB,
    ),
    _profile("a100-dram", f"{_SENSITIVITY}: 312 TFLOP/s, 32 GB/s", _A100, 32 * GB),
    _profile(
        "a30-dram",
        f"{_SENSITIVITY}: 165 TFLOP/s, 32 GB/s",
        _gpu(_OF_PEAK * 165 * TERA, 0.8e12),
        32 * GB,
    ),
    _profile(
        "4090-dram",
        f"{_SENSITIVITY}: 330 TFLOP/s, 32 GB/s",
        _gpu(_OF_PEAK * 330 * TERA, 0.9e12),
        32 * GB,
    ),
    _profile(
        "l20-dram",
        f"{_SENSITIVITY}: 120 TFLOP/s, 32 GB/s",
        _gpu(_OF_PEAK * 120 * TERA, 0.75e12),
        32 * GB,
    ),
    _profile(
        "h800-dram",
        f"{_SENSITIVITY}: 990 TFLOP/s, 64 GB/s",
        _gpu(_OF_PEAK * 990 * TERA, 2.6e12),
        64 * GB,
    ),
    _profile(
        "h100-pcie5",
        "H100 with PCIe 5: 55 GB/s as measured by py-kvcache (arXiv 2609.11744); 600 TFLOP/s, "
        "about 60 % of the data sheet's peak (an assumption)",
        _gpu(600 * TERA, 2.6e12),
        55 * GB,
    ),
    _profile(
        "a100-network",
        "A100, states behind a 10 Gbit/s network: 1.25 GB/s, 1 ms a request (an assumption)",
        _A100,
        1.25 * GB,
        per_request_s=1e-3,
        warm_bytes_per_s=26 * GB,
    ),
    _profile(
        "laptop",
        "a recent laptop: 8 cores at about 300 GFLOP/s in float32, one NVMe drive of 3 GB/s "
        "(assumptions)",
        Rates(0.3e12, 0.25e12, 0.1e12, 40 * GB),
        3 * GB,
        per_request_s=1e-4,
        warm_bytes_per_s=8 * GB,
    ),
    _profile(
        "2-core-vm",
        "2 cores of an AMD EPYC virtual machine in float32, where this library was measured: "
        "`benchmarks/bench_restore.py`, 2026-11-25",
        Rates(0.14e12, 0.115e12, 0.055e12, 6 * GB),
        1.6 * GB,
        warm_bytes_per_s=10 * GB,
    ),
]

HARDWARE = {profile.name: profile for profile in _HARDWARE}
"""Machines by name."""


def _model(
    name: str,
    family: str,
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    mlp: int,
    *,
    head_dim: int | None = None,
    window: int = 4096,
    dtype: str = "bfloat16",
    matrices: int = 3,
) -> ModelSpec:
    width = head_dim or hidden // heads
    return ModelSpec(
        name, family, layers, hidden, heads, kv_heads, width, window, dtype, mlp, matrices
    )


_MODELS = [
    # The configurations that the models' authors published.
    _model("llama-2-7b", "llama", 32, 4096, 32, 32, 11008, dtype="float16"),
    _model("llama-2-13b", "llama", 40, 5120, 40, 40, 13824, dtype="float16"),
    _model("llama-3-8b", "llama", 32, 4096, 32, 8, 14336, window=8192),
    _model("llama-3-70b", "llama", 80, 8192, 64, 8, 28672, window=8192),
    _model("mistral-7b", "mistral", 32, 4096, 32, 8, 14336, window=32768),
    _model("qwen2.5-0.5b", "qwen2", 24, 896, 14, 2, 4864, window=32768),
    _model("qwen2.5-7b", "qwen2", 28, 3584, 28, 4, 18944, window=32768),
    _model("gemma-2-9b", "gemma2", 42, 3584, 16, 8, 14336, head_dim=256, window=8192),
    _model("opt-30b", "opt", 48, 7168, 56, 56, 28672, window=2048, dtype="float16", matrices=2),
    _model("smollm2-135m", "llama", 30, 576, 9, 3, 1536, window=8192, dtype="float32"),
]

MODELS = {spec.name: spec for spec in _MODELS}
"""Models by name."""


def hardware(name: str) -> HardwareProfile:
    """The preset called `name`.

    Raises:
        ProfileError: there is none.
    """
    if name not in HARDWARE:
        raise ProfileError(f"no hardware is called {name!r}; known: {', '.join(HARDWARE)}")
    return HARDWARE[name]
