"""The kernels without a GPU: their numbers in Triton's interpreter, and their code for three GPUs.

Skipped where Triton is not installed. The interpreter and the compiler exclude each other in one
process, so that the interpreter has one of its own.
"""

from __future__ import annotations

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

from hcache_kernels import check, fused, fused_reference
from hcache_kernels.fused import CacheSlots, KeyTransform, Projection, StoredKV, StoredRows
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
@pytest.mark.parametrize("case", check.CASES, ids=[case.label for case in check.CASES])
def test_a_kernel_is_near_float64(case: check.Case, interpreted: dict[str, Any]) -> None:
    """Everything it must write, within its rounding, and not a byte beside it."""
    assert interpreted[case.label]["complaint"] == ""


@needs_triton
def test_the_smaller_kernels_are_their_twins(interpreted: dict[str, Any]) -> None:
    """Quantising to the very integers, back again, and the statistics of both norms."""
    others = {label: found for label, found in interpreted.items() if label not in LABELS}
    assert len(others) == 20
    assert [found for found in others.values() if found["complaint"]] == []


LABELS = {case.label for case in check.CASES}


def test_the_check_finds_what_is_wrong() -> None:
    """A row that is missing, one too many, one that is off: each is a complaint."""
    case = check.CASES[0]
    source = torch.Generator().manual_seed(0)
    problem = check._rows_problem(case, source)
    key = check._key_transform(case, source)
    right = [torch.full((check._cache_size(case),), torch.nan) for _ in range(2)]
    target = check._target(case, right, None)
    turned = fused_reference.rope(problem.exact[0], key.cos, key.sin, is_interleaved=False)
    target.write(turned, problem.exact[1])

    def complaint(change: Any) -> str:
        found = [side.clone() for side in right]
        change(check._target(case, found, None), found)
        return check._judged(case, problem, key, None, found, 0.0).complaint

    assert complaint(lambda target, memory: None) == ""
    assert "not written" in complaint(lambda target, _: target.keys[1, 3].fill_(torch.nan))
    assert "else" in complaint(lambda _, memory: memory[1][check.FENCE - 1].fill_(0))
    assert "else" in complaint(lambda target, memory: memory[0][check.FENCE + 64].fill_(0))
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


def rows_problem(
    stored: torch.dtype = BF16,
    *,
    tokens: int = 1024,
    width: int = 4096,
    heads: int = 8,
    head_dim: int = 128,
    rotary: int = 0,
    is_interleaved: bool = False,
    has_everything: bool = False,
    weights: torch.dtype = BF16,
) -> tuple[StoredRows, Projection, KeyTransform, CacheSlots]:
    """Layer inputs on no device; with everything: channel scales, shifts, biases, a norm, pages."""
    is_quantised = stored not in (BF16, torch.float32)
    rows = StoredRows(
        meta(tokens, width, dtype=stored),
        meta(tokens),
        meta(tokens // 128, 3, dtype=torch.int32),
        meta(tokens) if is_quantised else None,
    )
    projection = Projection(meta(2 * heads * head_dim, width, dtype=weights))
    angles = meta(tokens, rotary or head_dim, dtype=BF16)
    key = KeyTransform(angles, angles, is_interleaved)
    shape = (heads, 8192, head_dim)
    target = CacheSlots.contiguous(meta(*shape, dtype=BF16), meta(*shape, dtype=BF16))
    if has_everything:
        outputs = meta(2 * heads * head_dim)
        rows = replace(rows, channel_scales=meta(8, width), shift=meta(tokens))
        projection = replace(projection, bias=outputs.to(BF16), column_sums=outputs)
        key = replace(key, gain=meta(head_dim, dtype=BF16))
        page = meta(99, 16, heads, head_dim, dtype=BF16)
        slots = meta(tokens, dtype=torch.int64)
        target = CacheSlots.paged(page, page, slots, heads_first=False)
    return rows, projection, key, target


def test_what_a_kernel_cannot_do_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what it can do is not."""
    monkeypatch.setattr(fused, "has_triton", lambda: True)
    rows, projection, key, target = rows_problem()
    assert fused.why_not(rows, projection, key, target) is None
    assert fused.why_not(*rows_problem(torch.int8, has_everything=True)) is None

    def reason(**changes: Any) -> str:
        return fused.why_not(*rows_problem(**changes)) or ""

    assert "float32" in reason(weights=torch.float32)
    assert "registers" in reason(head_dim=320)
    assert "rotated" in reason(rotary=256)
    assert "odd" in reason(rotary=3)
    turned = replace(projection, weight=projection.weight.t().contiguous().t())
    assert "neighbours" in (fused.why_not(rows, turned, key, target) or "")
    side = meta(8, 256, 128).transpose(1, 2)
    gaps = StoredKV(side, side, rows.tiles)
    assert "neighbours" in (fused.why_not(gaps, None, key, target) or "")
    wider = replace(target, values=meta(8, 8192, 192, dtype=BF16))
    assert "one shape" in (fused.why_not(rows, projection, key, wider) or "")
    queries_too = replace(projection, weight=meta(6144, 4096, dtype=BF16))
    assert "6144 projected" in (fused.why_not(rows, queries_too, key, target) or "")
    monkeypatch.setattr(fused, "has_triton", lambda: False)
    assert "not installed" in (fused.why_not(rows, projection, key, target) or "")


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


def assert_good(built: Any, *, narrow_loads: int = 0) -> None:
    """No spills, nothing beyond the chip, and 16 bytes at once.

    Args:
        narrow_loads: copies to shared memory of less than 16 bytes that are right.
    """
    from hcache_kernels import aot

    assert built.stack_bytes == 0
    assert built.spills == 0
    assert built.registers <= 255
    assert built.shared_bytes <= aot.SHARED_BYTES[built.capability]
    assert built.narrow("STG") == 0
    assert built.narrow("LDGSTS") <= narrow_loads
    assert built.count("LDGSTS", "LDG") > built.narrow("LDGSTS") + built.narrow("LDG")


@needs_triton
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_rows_are_projected_by_tensor_cores(capability: int) -> None:
    """Hidden states in bfloat16."""
    from hcache_kernels import aot, launch

    built = aot.compiled(launch.rows_launch(*rows_problem()), capability)
    assert_good(built)
    assert built.count(aot.TENSOR_CORES[capability])


@needs_triton
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_quantised_rows_with_everything_do_not_spill(capability: int) -> None:
    """Integers, scales of rows and channels, LayerNorm, biases, a norm of K, pages.

    On compute capability 9.0 the integers go to registers, eight at once; channels' scales are
    four bytes for each thread.
    """
    from hcache_kernels import aot, launch

    problem = rows_problem(torch.int8, has_everything=True)
    built = aot.compiled(launch.rows_launch(*problem), capability)
    assert_good(built, narrow_loads=16 if capability == 90 else 4)
    assert built.count(aot.TENSOR_CORES[capability])


@needs_triton
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_stored_kv_is_moved_sixteen_bytes_at_once(capability: int) -> None:
    """Integers with their scales."""
    from hcache_kernels import aot, launch

    _, _, key, target = rows_problem()
    side, tiles = meta(8, 1024, 128, dtype=torch.int8), meta(8, 3, dtype=torch.int32)
    stored = StoredKV(side, side, tiles, meta(8, 8, 128), meta(8, 1024))
    assert_good(aot.compiled(launch.kv_launch(stored, key, target), capability))


@needs_triton
@pytest.mark.parametrize(
    "options",
    [
        {"rotary": 32},
        {"is_interleaved": True, "rotary": 64, "head_dim": 64},
        {"head_dim": 256},
        {"head_dim": 80, "width": 2560, "rotary": 32},
        {"stored": torch.float8_e4m3fn},
    ],
    ids=["partial", "interleaved", "head of 256", "head of 80", "fp8"],
)
def test_other_shapes_compile_as_well(options: dict[str, Any]) -> None:
    """For an H100. Bytes are loaded eight at once there."""
    from hcache_kernels import aot, launch

    built = aot.compiled(launch.rows_launch(*rows_problem(**options)), 90)
    assert_good(built, narrow_loads=16 if "stored" in options else 0)
    assert built.count(aot.TENSOR_CORES[90])


@needs_triton
def test_an_a100_has_no_eight_bit_floats() -> None:
    """What `why_not` says of it is what the compiler says."""
    from hcache_kernels import aot, launch

    with pytest.raises(Exception, match="fp8e4nv"):
        aot.compiled(launch.rows_launch(*rows_problem(torch.float8_e4m3fn)), 80)


@needs_triton
def test_a_spill_would_be_seen() -> None:
    """With half the threads a tile does not fit into registers."""
    from hcache_kernels import aot, launch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aot, "WARPS", 4)
        patch.setattr(aot, "_compiled", aot._compiled.__wrapped__)
        built = aot.compiled(launch.rows_launch(*rows_problem()), 80)
    with pytest.raises(AssertionError):
        assert_good(built)


@needs_triton
def test_the_table_of_the_docs_is_what_the_command_prints() -> None:
    """`python -m hcache_kernels.roofline`."""
    from hcache_kernels import roofline

    text = (ROOT / "docs" / "gpu.md").read_text()
    assert "python -m hcache_kernels.roofline" in text
    assert "\n".join(roofline.table()) in text
