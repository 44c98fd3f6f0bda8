"""Where a model computes, and in what: devices and dtypes by their names, and which dtype pays.

Processors that have bfloat16 differ: products are some four times as fast as in float32 on one, and
half as fast on another that says it has the same instructions. So it is measured.
"""

from __future__ import annotations

import time

import torch

from hcache_rag.models.tensors import torch_dtype

COMPUTE_DTYPES = ("float32", "bfloat16", "auto")
"""Names of what a model is loaded as."""
PAYS_FROM = 1.3
"""So many times as fast as float32, and bfloat16's loss of digits is worth it."""

_SHAPE = (512, 1024, 1024)
_ROUNDS = 5


def device_named(name: str | torch.device) -> torch.device:
    """A device of this machine.

    Args:
        name: "cpu", "cuda", "cuda:1", or "auto": the GPU where torch sees one, else the CPU.

    Raises:
        ValueError: there is no such device here; says which there are.
    """
    if str(name) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(name)
    except RuntimeError:
        place = torch.device("meta")
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    is_gpu = place.type == "cuda" and (place.index or 0) < num_gpus
    if place.type != "cpu" and not is_gpu:
        there = ["cpu", *(f"cuda:{index}" for index in range(num_gpus))]
        raise ValueError(f"there is no device {str(name)!r} here, only {', '.join(there)}")
    return place


def dtype_named(name: str, place: torch.device) -> torch.dtype:
    """What a model is to compute in.

    Args:
        name: a dtype, or "auto": bfloat16 where it pays (`pays_bfloat16`), else float32.
        place: where it will compute.

    Raises:
        ValueError: no such dtype, or one that does not go there.
    """
    if name == "auto":
        return torch.bfloat16 if pays_bfloat16(place) else torch.float32
    dtype = torch_dtype(name)
    reason = why_not_in(dtype, place)
    if reason is not None:
        raise ValueError(reason)
    return dtype


def why_not_in(dtype: torch.dtype, place: torch.device) -> str | None:
    """Why a model cannot compute in a dtype at a place; None where it can."""
    if dtype is torch.float16 and place.type == "cpu":
        return (
            "a model does not compute in float16 on a CPU: few processors multiply it fast, and "
            "activations above 65,504 overflow; load it in bfloat16 or float32"
        )
    return None


def pays_bfloat16(place: torch.device) -> bool:
    """Whether computing in bfloat16 is worth its loss of digits; measured on a CPU, some 0.1 s."""
    if place.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bfloat16_speedup() >= PAYS_FROM


def bfloat16_speedup() -> float:
    """How many times as fast as in float32 this CPU multiplies matrices in bfloat16.

    The fastest of a few products each, taken in turns, on torch's threads.
    """
    rows, width, out_width = _SHAPE
    best = dict[torch.dtype, float]()
    pairs = {
        dtype: (torch.ones(rows, width, dtype=dtype), torch.ones(width, out_width, dtype=dtype))
        for dtype in (torch.float32, torch.bfloat16)
    }
    for _ in range(1 + _ROUNDS):  # the first one makes kernels
        for dtype, (left, right) in pairs.items():
            started = time.perf_counter()
            torch.mm(left, right)
            taken = time.perf_counter() - started
            best[dtype] = min(taken, best.get(dtype, taken))
    return best[torch.float32] / best[torch.bfloat16]
