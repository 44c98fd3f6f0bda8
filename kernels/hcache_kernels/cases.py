"""What the kernels of restoring must do: launches of every kind, in awkward shapes.

`hcache_kernels.problems` makes their inputs, and their answers in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hcache_kernels.operands import CacheSlots

PAGE = 16
FENCE = 64
"""Elements in front of a cache, and behind it, that nobody may touch."""


@dataclass(frozen=True)
class Case:
    """One launch.

    Args:
        label: its name.
        kind: "rows" (layer inputs), or "kv".
        stored: what they are stored in: a dtype, or one of the ways to quantise.
        dtype: of the weights.
        cache: dtype of the cache.
        chunks: tokens of each chunk.
        width, heads, head_dim: E, G, D.
        rotary: elements of a head that are rotated, by default all.
        norm: of K: "rms", "layer" (with a bias), or an RMSNorm over all heads, "rows".
        where: "contiguous", "NHD" or "HND" pages.
    """

    label: str
    kind: str = "rows"
    stored: str = "bfloat16"
    dtype: str = "bfloat16"
    cache: str = "float32"
    chunks: tuple[int, ...] = (64, 37)
    width: int = 128
    heads: int = 2
    head_dim: int = 64
    rotary: int | None = None
    is_interleaved: bool = False
    has_bias: bool = False
    norm: str = ""
    is_layer_norm: bool = False
    where: str = "contiguous"


CASES = (
    Case("plain"),
    Case("one row", chunks=(1,)),
    Case("more rows than a tile", chunks=(130, 70)),
    Case("fp16", stored="float16", dtype="float16", has_bias=True),
    Case("into bf16", cache="bfloat16", has_bias=True),
    Case("into fp16", stored="float16", dtype="float16", cache="float16"),
    Case("stored wider", stored="float32"),
    Case("stored otherwise", stored="float16"),
    Case("int8", stored="int8", has_bias=True),
    Case("int8 fp16", stored="int8", dtype="float16"),
    Case("int8-g64", stored="int8-g64", width=192),
    Case("int8-g64 odd", stored="int8-g64", width=96),
    Case("int8-smooth", stored="int8-smooth", chunks=(128, 30, 64)),
    Case("int8-smooth odd", stored="int8-smooth", width=72, head_dim=20, heads=1),
    Case("fp8", stored="fp8"),
    Case("odd width", width=60, head_dim=12, heads=3, has_bias=True),
    Case("head of 80", head_dim=80, heads=1, rotary=32),
    Case("head of 96", head_dim=96, heads=1),
    Case("head of 128", head_dim=128, heads=2),
    Case("head of 256", head_dim=256, heads=1, chunks=(40,)),
    Case("partial", rotary=16, has_bias=True),
    Case("partial odd", rotary=20),
    Case("interleaved", is_interleaved=True),
    Case("interleaved partial", is_interleaved=True, rotary=32, has_bias=True),
    Case("interleaved odd", is_interleaved=True, head_dim=20, heads=1, rotary=12),
    Case("no RoPE", rotary=0, has_bias=True),
    Case("no RoPE interleaved", rotary=0, is_interleaved=True),
    Case("key norm", norm="rms"),
    Case("key norm interleaved", norm="rms", is_interleaved=True, rotary=16),
    Case("key norm odd", norm="rms", head_dim=20, heads=1),
    Case("key layer norm", norm="layer", is_layer_norm=True, has_bias=True, cache="bfloat16"),
    Case("key layer norm interleaved", norm="layer", is_interleaved=True, heads=3),
    Case("key layer norm odd", norm="layer", head_dim=20, heads=3, rotary=8, stored="int8"),
    Case("key norm over heads", norm="rows", heads=3, chunks=(130, 40)),
    Case("key norm over heads odd", norm="rows", heads=3, head_dim=20, rotary=8, has_bias=True),
    Case("key norm over heads interleaved", norm="rows", is_interleaved=True, stored="int8"),
    Case("key norm over heads pages", norm="rows", where="HND", stored="int8-smooth"),
    Case("layer norm", is_layer_norm=True, has_bias=True),
    Case("layer norm int8", is_layer_norm=True, has_bias=True, stored="int8", rotary=16),
    Case("pages NHD", where="NHD"),
    Case("pages HND", where="HND", stored="int8", cache="bfloat16"),
    Case("pages HND odd", where="HND", head_dim=20, heads=3, rotary=8),
    Case("kv", kind="kv"),
    Case("kv into bf16", kind="kv", cache="bfloat16"),
    Case("kv fp32", kind="kv", stored="float32"),
    Case("kv int8", kind="kv", stored="int8", chunks=(130, 40)),
    Case("kv int8 fp16", kind="kv", stored="int8", cache="float16"),
    Case("kv fp8", kind="kv", stored="fp8", chunks=(130, 40)),
    Case("kv partial", kind="kv", rotary=16, stored="int8"),
    Case("kv interleaved", kind="kv", is_interleaved=True, rotary=32, stored="int8"),
    Case("kv odd", kind="kv", head_dim=20),
    Case("kv no RoPE", kind="kv", rotary=0, stored="int8"),
    Case("kv pages", kind="kv", where="NHD", head_dim=80, stored="int8"),
)
"""What the kernels of restoring must do."""


def _pages(case: Case) -> int:
    return -(-sum(case.chunks) // PAGE) + 2


def cache_size(case: Case) -> int:
    """Elements of K's, or V's, memory, with its fences."""
    tokens = PAGE * _pages(case)
    return 2 * FENCE + tokens * case.heads * case.head_dim


def slots_of(case: Case, source: torch.Generator) -> Tensor | None:
    """Of each row, (T,): pages in a random order, and some rows that are not wanted."""
    if case.where == "contiguous":
        return None
    order = torch.randperm(_pages(case) * PAGE, generator=source)[: sum(case.chunks)]
    order[::5] = -1
    return order


def target_in(case: Case, memory: Sequence[Tensor], slots: Tensor | None) -> CacheSlots:
    """The cache in fenced memory; in one stretch, its rows begin behind three others."""
    inner = [side[FENCE:-FENCE] for side in memory]
    if case.where == "contiguous":
        keys, values = (side.view(case.heads, -1, case.head_dim)[:, 3:] for side in inner)
        return CacheSlots.contiguous(keys, values)
    assert slots is not None
    is_hnd = case.where == "HND"
    shape = (case.heads, PAGE) if is_hnd else (PAGE, case.heads)
    keys, values = (side.view(-1, *shape, case.head_dim) for side in inner)
    return CacheSlots.paged(keys, values, slots, heads_first=is_hnd)
