"""`hcache-rag gpu-selftest`: does a GPU restore what the CPU restores, and how fast is it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from hcache_rag.cli.console import JsonOption, out, print_json, quiet_transformers, reported, say
from hcache_rag.cli.doctor import Check
from hcache_rag.errors import HCacheError

if TYPE_CHECKING:
    from hcache_rag.provenance import Generation

NO_GPU = "torch sees no CUDA device here"
_TIMEOUT_S = 300
_PASSAGES = (
    "The harbour of Saltmere has a red lighthouse that was built in 1862. It is 31 metres tall.",
    "The library of Saltmere opens at nine in the morning and closes at six in the evening.",
    "The mayor of Saltmere keeps bees on the roof of the town hall, and sells their honey.",
)
_PREAMBLE = "Read this and answer the question.\n"
_PROMPT = _PREAMBLE + "\n".join(_PASSAGES) + "\nQuestion: How tall is the lighthouse?\nAnswer:"


@reported
def gpu_selftest(as_json: JsonOption = False) -> None:
    """Check the GPU path: kernels, answers against the CPU's, times. About a minute."""
    with quiet_transformers():
        checks = list(examine_gpu())
    healthy = all(check.ok for check in checks)
    if as_json:
        print_json({"healthy": healthy, "checks": [asdict(check) for check in checks]})
    else:
        for check in checks:
            say(out, f"{'ok' if check.ok else 'FAILED':7}", "green" if check.ok else "red",
                f"{check.name}: {check.detail}")  # fmt: skip
    if not healthy:
        raise typer.Exit(1)


def examine_gpu() -> Iterator[Check]:
    """All checks; none of them raises."""
    import torch

    has_gpu = torch.cuda.is_available()
    yield _versions()
    yield Check("device", has_gpu, _device() if has_gpu else NO_GPU)
    yield _guarded("kernels", _kernels if has_gpu else _interpreted)
    if not has_gpu:
        return
    for dtype in ("float32", "bfloat16"):
        yield _guarded(f"answers, {dtype}", partial(_answers, dtype))
    yield _guarded("times", _times)
    yield Check(
        "next", True, "compute-sanitizer python -m hcache_kernels.check looks for bad accesses"
    )


def _guarded(name: str, check: Callable[[], str]) -> Check:
    try:
        return Check(name, True, check())
    except (HCacheError, OSError, ValueError, RuntimeError) as error:
        return Check(name, False, str(error))


def _versions() -> Check:
    found = []
    for package in ("hcache-rag", "torch", "triton", "transformers"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"no {package}")
    return Check("versions", True, ", ".join(found))


def _device() -> str:
    import torch

    facts = torch.cuda.get_device_properties(0)
    return (
        f"{facts.name}, compute capability {facts.major}.{facts.minor}, "
        f"{facts.total_memory / 2**30:.0f} GiB, {facts.multi_processor_count} multiprocessors, "
        f"CUDA {torch.version.cuda}"
    )


def _judged(results: list[dict[str, Any]], where: str) -> str:
    """The kernels' results in a line.

    Raises:
        RuntimeError: some are wrong.
    """
    wrong = [f"{r['label']}: {r['complaint']}" for r in results if r["complaint"]]
    if wrong or not results:
        raise RuntimeError(f"{len(wrong)} of {len(results)} are wrong {where}: {'; '.join(wrong)}")
    worst = max(results, key=lambda result: float(result["error"]))
    return (
        f"{len(results)} of {len(results)} are near float64 {where}; "
        f"the worst, {worst['label']}, has {worst['error']:.2f} of the allowed error"
    )


def _kernels() -> str:
    import torch

    from hcache_kernels.fused import NO_TRITON, has_triton

    if not has_triton():
        return f"{NO_TRITON}; torch restores instead"
    from hcache_kernels.check import check_all

    place = torch.device("cuda")
    # What a GPU cannot do is left to torch, and no mistake.
    results = [asdict(result) for result in check_all(place)]
    left = [r for r in results if "has no eight-bit floats" in r["complaint"]]
    line = _judged([r for r in results if r not in left], "on the GPU")
    return f"{line}; {len(left)} left to torch" if left else line


def _interpreted() -> str:
    from hcache_kernels.fused import NO_TRITON, has_triton

    if not has_triton():
        return f"not checked: {NO_TRITON}"
    import hcache_kernels

    root = str(Path(hcache_kernels.__file__).parent.parent)
    paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-m", "hcache_kernels.check", "--interpret"],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
        timeout=_TIMEOUT_S,
    )
    if done.stderr and not done.stdout:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    results = [json.loads(line) for line in done.stdout.splitlines()]
    return _judged(results, "in Triton's interpreter")


def _answers(dtype: str) -> str:
    """The CPU stores; the CPU and the GPU restore.

    Raises:
        RuntimeError: they answer differently in float32, or nothing was restored.
    """
    from hcache_kernels.fused import fallbacks

    fallbacks.clear()
    told = []
    with tempfile.TemporaryDirectory(prefix="hcache-rag-") as folder:
        for representation in ("hidden", "kv"):
            store = Path(folder) / representation
            cpu, gpu = (_answer(store, representation, dtype, p) for p in ("cpu", "cuda"))
            if not gpu.provenance.restored_tokens:
                raise RuntimeError(f"{representation}: nothing was restored")
            same = cpu.token_ids == gpu.token_ids
            if dtype == "float32" and not same:
                raise RuntimeError(f"{representation}: CPU {cpu.text!r}, GPU {gpu.text!r}")
            told.append(
                f"{representation}: {gpu.provenance.restored_tokens} of "
                f"{gpu.provenance.prompt_tokens} tokens restored, "
                f"{'same' if same else 'another'} answer"
            )
    by_torch = ", ".join(f"{reason} ({count} times)" for reason, count in fallbacks.items())
    return "; ".join(told) + (f"; by torch: {by_torch}" if by_torch else "; by our kernels")


def _answer(store: Path, representation: str, dtype: str, place: str) -> Generation:
    from hcache_rag import GenerationOptions, HCacheEngine
    from hcache_rag.bundled import default_model_path
    from hcache_rag.models import load_model

    model, tokenizer = load_model(str(default_model_path()), dtype=dtype, device=place)
    options = GenerationOptions(max_new_tokens=8, temperature=0)
    with HCacheEngine(
        model,
        tokenizer,
        store,
        preamble=_PREAMBLE,
        representation=representation,
        fidelity="none",
        profile=None,
        paths_max_bytes=0,
    ) as engine:
        engine.precompute(_PASSAGES)
        return engine.generate(_PROMPT, options=options)


def _times() -> str:
    import torch

    from hcache_kernels.fused import NO_TRITON, has_triton

    if not has_triton():
        return f"not measured: {NO_TRITON}"
    from hcache_kernels.roofline import WORKS, bound_here
    from hcache_kernels.timing import timed

    place, lines = torch.device("cuda"), []
    for work in WORKS[:3]:
        found, allowed = timed(work, place), bound_here(work, place)
        rate = found.host_bytes / found.copy_s
        line = (
            f"{work.model}, {work.stored}, {work.tokens} tokens of a layer: "
            f"kernel {1e6 * found.kernel_s:.0f} µs, torch {1e6 * found.torch_s:.0f} µs, "
            f"copy {1e6 * found.copy_s:.0f} µs ({rate / 1e9:.1f} GB/s)"
        )
        if allowed is not None:
            line += f", kernel's bound {1e6 * allowed.kernel_s:.0f} µs"
        lines.append(line)
    return "\n        ".join(lines)
