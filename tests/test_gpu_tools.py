"""`hcache-rag gpu-selftest` and the GPU's benchmark where there is no GPU; what they compute."""

from __future__ import annotations

import json
from typing import Any

import bench_gpu
import pytest
import torch
from commands import Run

from hcache_kernels import fused
from hcache_rag.cli import selftest

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")


def result(label: str, error: float, complaint: str = "") -> dict[str, Any]:
    return {"label": label, "error": error, "complaint": complaint}


def test_without_a_gpu_the_selftest_says_so(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """And ends as `doctor` does where something fails; kernels are interpreted."""
    monkeypatch.setattr(selftest, "_interpreted", lambda: "all near float64")
    outcome = run("gpu-selftest")
    assert outcome.code == 1
    assert "torch sees no CUDA device here" in outcome.out
    assert "kernels: all near float64" in outcome.out
    outcome = run("gpu-selftest", "--json")
    found = json.loads(outcome.out)
    assert outcome.code == 1
    assert not found["healthy"]
    assert {c["name"]: c["ok"] for c in found["checks"]} == {
        "versions": True,
        "device": False,
        "kernels": True,
    }


def test_without_triton_the_selftest_says_that_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not needed, and no failure."""
    monkeypatch.setattr(fused, "has_triton", lambda: False)
    checks = {check.name: check for check in selftest.examine_gpu()}
    assert checks["kernels"].ok
    assert "Triton is not installed" in checks["kernels"].detail


def test_a_wrong_kernel_is_a_failure() -> None:
    """With its name, and what is wrong with it."""
    good = [result("plain", 0.2), result("int8", 0.9)]
    assert "the worst, int8, has 0.90" in selftest._judged(good, "here")
    with pytest.raises(RuntimeError, match="1 of 3 are wrong here: fp16: twice"):
        selftest._judged([*good, result("fp16", 2.0, "twice")], "here")
    with pytest.raises(RuntimeError, match="0 of 0"):
        selftest._judged([], "here")


def test_without_a_gpu_the_benchmark_ends_with_an_empty_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says so, and is no failure."""
    monkeypatch.setattr("sys.argv", ["bench_gpu.py", "--quick", "--json"])
    bench_gpu.main()
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first == "there is no CUDA device here: nothing was measured"
    assert json.loads(last)["rows"] == []


def test_overlap_is_the_time_that_both_are_under_way() -> None:
    """Of intervals in any order, that touch or lie in each other."""
    copies = bench_gpu.union([(5.0, 6.0), (0.0, 2.0), (1.0, 3.0), (1.5, 1.6)])
    assert copies == [(0.0, 3.0), (5.0, 6.0)]
    kernels = bench_gpu.union([(2.0, 5.5), (7.0, 8.0)])
    both = bench_gpu.crossing(copies, kernels)
    assert both == [(2.0, 3.0), (5.0, 5.5)]
    assert bench_gpu.length(both) == 1.5
