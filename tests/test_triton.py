"""The kernels without a GPU: their numbers in Triton's interpreter, and their code for three GPUs.

Skipped where Triton is not installed. The interpreter and the compiler exclude each other in one
process, so that the interpreter has one of its own.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hcache_kernels import check, fused
from hcache_kernels.cases import CASES, FENCE, Case, cache_size, target_in
from hcache_kernels.operands import (
    CacheSlots,
    KeyNorm,
    Projection,
    Rotation,
    StoredKV,
    StoredRows,
)
from hcache_kernels.problems import problem_of
from hcache_kernels.quant import FP8
from hcache_kernels.tiles import ROWS_OF_A_TILE, tiles_of

ROOT = Path(__file__).parent.parent
CAPABILITIES = (80, 90, 100)

needs_triton = pytest.mark.skipif(not fused.has_triton(), reason="Triton is not installed")


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, Any]]:
    """What the interpreter made of every case."""
    done = subprocess.run(
        [sys.executable, "-m", "hcache_kernels.check", "--interpret"],
        env={**os.environ, "PYTHONPATH": str(ROOT / "kernels"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines, done.stderr
    return {line["label"]: line for line in lines}


@needs_triton
@pytest.mark.parametrize("case", CASES, ids=[case.label for case in CASES])
def test_a_kernel_is_near_float64(case: Case, interpreted: dict[str, Any]) -> None:
    """Everything it must write, within its rounding, and not a byte beside it."""
    assert interpreted[case.label]["complaint"] == ""


@needs_triton
def test_the_smaller_kernels_are_their_twins(interpreted: dict[str, Any]) -> None:
    """Quantising to the very integers, back again, and the statistics of both norms."""
    others = {label: found for label, found in interpreted.items() if label not in LABELS}
    assert len(others) == 36
    assert [found for found in others.values() if found["complaint"]] == []


LABELS = {case.label for case in CASES}


def test_the_check_finds_what_is_wrong() -> None:
    """A row that is missing, one too many, one that is off: each is a complaint."""
    case = CASES[0]
    problem = problem_of(case)
    right = [torch.full((cache_size(case),), torch.nan) for _ in range(2)]
    target_in(case, right, None).write(*problem.exact)

    def complaint(change: Any) -> str:
        found = [side.clone() for side in right]
        change(target_in(case, found, None), found)
        return check.judged(case, problem, found).complaint

    assert complaint(lambda target, memory: None) == ""
    assert "not written" in complaint(lambda target, _: target.keys[1, 3].fill_(torch.nan))
    assert "else" in complaint(lambda _, memory: memory[1][FENCE - 1].fill_(0))
    assert "else" in complaint(lambda target, memory: memory[0][FENCE + 64].fill_(0))
    assert "allowed" in complaint(lambda target, _: target.values[0, 5, 7].mul_(1.001))
    assert "allowed" in complaint(lambda target, _: target.keys.copy_(target.keys.flip(-1)))


# --- which kernel, and when none --------------------------------------------------------------


def test_tiles_lie_in_one_chunk_where_chunks_matter() -> None:
    """Every row in one tile, in order."""
    chunks = [(0, 130), (130, 20), (150, 200)]
    for crosses in (False, True):
        tiles = tiles_of(chunks, crosses_chunks=crosses)
        rows = [first + i for first, count, _ in tiles for i in range(count)]
        assert rows == list(range(350))
        assert max(count for _, count, _ in tiles) <= ROWS_OF_A_TILE
    assert tiles_of(chunks, crosses_chunks=True)[-1] == [256, 94, 0]
    owners = [chunk for _, count, chunk in tiles_of(chunks, crosses_chunks=False)]
    assert owners == [0, 0, 1, 2, 2]


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


BF16 = torch.bfloat16


def norm_of(kind: str, heads: int, head_dim: int) -> KeyNorm:
    """Of K, on no device: "rms", "layer" with a bias, or over all heads, "rows"."""
    gain = meta(heads, head_dim, dtype=BF16)
    is_centred = kind == "layer"
    return KeyNorm(gain, gain if is_centred else None, 1e-6, is_centred, kind == "rows")


def rows_problem(
    stored: torch.dtype = BF16,
    *,
    tokens: int = 1024,
    width: int = 4096,
    heads: int = 8,
    head_dim: int = 128,
    rotary: int | None = None,
    is_interleaved: bool = False,
    norm: str = "",
    group_channels: int = 0,
    has_everything: bool = False,
    weights: torch.dtype = BF16,
) -> Any:
    """Layer inputs on no device; with everything: channel scales, shifts, biases, a LayerNorm of
    K's heads, pages."""
    is_quantised = stored not in (BF16, torch.float16, torch.float32)
    rows = StoredRows(
        meta(tokens, width, dtype=stored),
        meta(tokens),
        meta(tokens // 128, 3, dtype=torch.int32),
        meta(tokens) if is_quantised else None,
    )
    if group_channels:
        scales = meta(tokens, width // group_channels)
        rows = replace(rows, quant_scales=scales, group_channels=group_channels)
    projection = Projection(meta(2 * heads * head_dim, width, dtype=weights))
    if norm:
        projection = replace(projection, key_norm=norm_of(norm, heads, head_dim))
    angles = meta(tokens, head_dim if rotary is None else rotary, dtype=BF16)
    rotation = Rotation(angles, angles, is_interleaved)
    shape = (heads, 8192, head_dim)
    target = CacheSlots.contiguous(meta(*shape, dtype=BF16), meta(*shape, dtype=BF16))
    if has_everything:
        outputs = meta(2 * heads * head_dim)
        rows = replace(rows, channel_scales=meta(8, width), shift=meta(tokens))
        projection = replace(
            projection,
            bias=outputs.to(BF16),
            column_sums=outputs,
            key_norm=norm_of("layer", heads, head_dim),
        )
        page = meta(99, 16, heads, head_dim, dtype=BF16)
        slots = meta(tokens, dtype=torch.int64)
        target = CacheSlots.paged(page, page, slots, heads_first=False)
    return rows, projection, rotation, target


def kv_problem(stored: torch.dtype) -> Any:
    """Eight-bit K and V with their scales, on no device."""
    _, _, rotation, target = rows_problem()
    side, tiles = meta(8, 1024, 128, dtype=stored), meta(8, 3, dtype=torch.int32)
    return StoredKV(side, side, tiles, meta(8, 8, 128), meta(8, 1024)), None, rotation, target


def test_what_a_kernel_cannot_do_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what it can do is not."""
    monkeypatch.setattr(fused, "has_triton", lambda: True)
    rows, projection, rotation, target = rows_problem()
    assert fused.why_not(rows, projection, rotation, target) is None
    assert fused.why_not(*rows_problem(torch.int8, has_everything=True)) is None
    assert fused.why_not(*rows_problem(norm="rows")) is None

    def reason(**changes: Any) -> str:
        return fused.why_not(*rows_problem(**changes)) or ""

    assert "float32" in reason(weights=torch.float32)
    assert "registers" in reason(head_dim=320)
    assert "rotated" in reason(rotary=256)
    assert "odd" in reason(rotary=3)
    turned = replace(projection, weight=projection.weight.t().contiguous().t())
    assert "neighbours" in (fused.why_not(rows, turned, rotation, target) or "")
    side = meta(8, 256, 128).transpose(1, 2)
    gaps = StoredKV(side, side, rows.tiles)
    assert "neighbours" in (fused.why_not(gaps, None, rotation, target) or "")
    wider = replace(target, values=meta(8, 8192, 192, dtype=BF16))
    assert "one shape" in (fused.why_not(rows, projection, rotation, wider) or "")
    queries_too = replace(projection, weight=meta(6144, 4096, dtype=BF16))
    assert "6144 projected" in (fused.why_not(rows, queries_too, rotation, target) or "")
    norm = replace(norm_of("rows", 8, 128), is_centred=True)
    centred = replace(projection, key_norm=norm)
    assert "over all heads" in (fused.why_not(rows, centred, rotation, target) or "")
    monkeypatch.setattr(fused, "has_triton", lambda: False)
    assert "not installed" in (fused.why_not(rows, projection, rotation, target) or "")


def test_what_falls_back_is_counted_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """By its reason."""
    fused.fallbacks.clear()
    with caplog.at_level("WARNING", logger="hcache_rag"):
        assert not any(fused.takes_kernels("made up") for _ in range(3))
        assert fused.takes_kernels(None)
    assert fused.fallbacks == {"made up": 3}
    assert [record.message.count("made up") for record in caplog.records] == [1]
    fused.fallbacks.clear()


# --- compiled ---------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def _compiled_here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing compiled is left behind, or found."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def built_for(capability: int, problem: Any) -> list[Any]:
    """A problem's kernels, compiled."""
    from hcache_kernels import aot, launch

    return [aot.compiled(its, capability) for its in launch.launches(*problem)]


def assert_good(built: Any, *, narrow_loads: int = 0, narrow_stores: int = 0) -> None:
    """No spills, nothing beyond the chip, and 16 bytes at once.

    Args:
        narrow_loads: copies to shared memory of less than 16 bytes that are right.
        narrow_stores: stores of less than 16 bytes that are right.
    """
    from hcache_kernels import aot

    assert built.stack_bytes == 0
    assert built.spills == 0
    assert built.registers <= 255
    assert built.shared_bytes <= aot.SHARED_BYTES[built.capability]
    assert built.narrow("STG") <= narrow_stores
    assert built.narrow("LDGSTS") <= narrow_loads
    assert built.count("LDGSTS", "LDG") > built.narrow("LDGSTS") + built.narrow("LDG")


def assert_on_tensor_cores(built: Any) -> None:
    """Products are those of the chip's own instruction."""
    from hcache_kernels import aot

    assert built.count(aot.TENSOR_CORES[built.capability])


@needs_triton
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("norm", ["", "rms", "layer"])
def test_rows_are_projected_by_tensor_cores(norm: str, capability: int) -> None:
    """Hidden states in bfloat16, also with a norm of K's heads: it stays in registers."""
    (built,) = built_for(capability, rows_problem(norm=norm))
    assert_good(built)
    assert_on_tensor_cores(built)


@needs_triton
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_a_norm_over_all_heads_takes_two_kernels(capability: int) -> None:
    """The first writes one number beside each row of a head: what its squares add up to."""
    projecting, norming = built_for(capability, rows_problem(norm="rows"))
    assert_good(projecting, narrow_stores=1)
    assert_on_tensor_cores(projecting)
    assert_good(norming)


@needs_triton
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_quantised_rows_with_everything_do_not_spill(capability: int) -> None:
    """Integers, scales of rows and channels, LayerNorm, biases, a LayerNorm of K's heads, pages.

    On compute capability 9.0 the integers go to registers, eight at once; channels' scales are
    four bytes for each thread.
    """
    (built,) = built_for(capability, rows_problem(torch.int8, has_everything=True))
    assert_good(built, narrow_loads=16 if capability == 90 else 4)
    assert_on_tensor_cores(built)


@needs_triton
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    "options",
    [
        {"stored": torch.float16, "weights": torch.float16},
        {"stored": torch.int8},
        {"stored": torch.int8, "group_channels": 64},
        {"stored": FP8},
    ],
    ids=["fp16", "int8", "int8-g64", "fp8"],
)
def test_every_stored_form_is_projected_by_tensor_cores(
    options: dict[str, Any], capability: int
) -> None:
    """Bytes are read eight at once on 9.0; a group's scale is four bytes for each thread."""
    if capability == 80 and options["stored"] == FP8:
        with pytest.raises(Exception, match="fp8e4nv"):  # as `why_not` says of an A100
            built_for(capability, rows_problem(**options))
        return
    (built,) = built_for(capability, rows_problem(**options))
    of_bytes = 12 if capability == 90 and options["stored"].itemsize == 1 else 0
    of_scales = 4 if "group_channels" in options else 0
    assert_good(built, narrow_loads=of_bytes + of_scales)
    assert_on_tensor_cores(built)


@needs_triton
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_smaller_kernels_move_sixteen_bytes_at_once(
    capability: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for what there is one of for a row, or for a group."""
    from hcache_kernels import aot, launch

    launched: list[Any] = []
    monkeypatch.setattr(launch.Launch, "run", lambda its: launched.append(its))
    rows = meta(1024, 4096, dtype=BF16)
    dtypes = [torch.int8] if capability == 80 else [torch.int8, FP8]
    for group, dtype in itertools.product((None, 64), dtypes):
        numbers, scales = launch.quantise_rows(rows, group, dtype)
        launch.dequantise_rows_into(numbers, scales, group, rows)
    for is_centred in (False, True):
        launch.row_statistics(rows, 1e-6, is_centred=is_centred)
    assert len(launched) == 4 * len(dtypes) + 2
    for its in launched:
        assert_good(aot.compiled(its, capability), narrow_stores=2)


@needs_triton
@pytest.mark.parametrize(
    ("stored", "capability"),
    [*((torch.int8, its) for its in CAPABILITIES), (FP8, 90), (FP8, 100)],
)
def test_stored_kv_is_moved_sixteen_bytes_at_once(stored: torch.dtype, capability: int) -> None:
    """Eight-bit numbers with their scales."""
    assert_good(*built_for(capability, kv_problem(stored)))


@needs_triton
@pytest.mark.parametrize(
    "options",
    [
        {"rotary": 32},
        {"rotary": 0},
        {"is_interleaved": True, "rotary": 64, "head_dim": 64},
        {"head_dim": 256},
        {"head_dim": 256, "norm": "rms"},
        {"head_dim": 80, "width": 2560, "rotary": 32, "norm": "layer"},
    ],
    ids=["partial", "no RoPE", "interleaved", "head of 256", "Gemma 3", "head of 80"],
)
def test_other_shapes_compile_as_well(options: dict[str, Any]) -> None:
    """For an H100."""
    (built,) = built_for(90, rows_problem(**options))
    assert_good(built)
    assert_on_tensor_cores(built)


@needs_triton
def test_an_a100_has_no_eight_bit_floats() -> None:
    """What `why_not` says of it is what the compiler says."""
    with pytest.raises(Exception, match="fp8e4nv"):
        built_for(80, kv_problem(FP8))


@needs_triton
def test_a_spill_would_be_seen() -> None:
    """With half the threads a tile does not fit into registers."""
    from hcache_kernels import aot

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aot, "WARPS", 4)
        patch.setattr(aot, "_compiled", aot._compiled.__wrapped__)
        (built,) = built_for(80, rows_problem())
    with pytest.raises(AssertionError):
        assert_good(built)


@needs_triton
def test_the_table_of_the_docs_is_what_the_command_prints() -> None:
    """`python -m hcache_kernels.roofline`."""
    from hcache_kernels import roofline

    text = (ROOT / "docs" / "gpu.md").read_text()
    assert "python -m hcache_kernels.roofline" in text
    assert "\n".join(roofline.table()) in text
