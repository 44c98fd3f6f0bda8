"""Checks the kernels against float64: on a GPU, or in Triton's interpreter.

    python -m hcache_kernels.check               on a GPU
    python -m hcache_kernels.check --interpret   on the CPU, slowly

Every output lies in memory that is full of NaN and fenced by it: what a kernel must write is
finite afterwards and near enough, and nothing else has changed. What one kernel leaves for another
lies in NaN, too.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from hcache_kernels import fused_reference as twins
from hcache_kernels import quant
from hcache_kernels.cases import CASES, Case, cache_size, target_in
from hcache_kernels.fused import no_eight_bit_floats, why_not
from hcache_kernels.problems import EPS, ROUNDING, Problem, dtype_of, problem_of


@dataclass(frozen=True)
class Result:
    """What came of a case.

    Args:
        label: its name.
        error: the largest one, as a part of what is allowed; more than 1 is too much.
        complaint: what is wrong, empty if nothing is.
        seconds: of the launch, the first one with compiling.
    """

    label: str
    error: float
    complaint: str
    seconds: float


def check_case(case: Case, place: torch.device) -> Result:
    """Run one case on a device (the CPU, if kernels are interpreted)."""
    problem = problem_of(case)
    dtype = dtype_of(case.cache)
    memory = [torch.full((cache_size(case),), torch.nan, dtype=dtype).to(place) for _ in range(2)]
    slots = problem.slots.to(place) if problem.slots is not None else None
    its = (problem.stored, problem.projection, problem.rotation)
    stored, projection, rotation = (_moved(part, place) for part in its)
    target = target_in(case, memory, slots)
    reason = why_not(stored, projection, rotation, target)
    if reason is not None:
        return Result(case.label, 0.0, reason, 0.0)
    from hcache_kernels import launch

    began = time.perf_counter()
    launches = launch.launches(stored, projection, rotation, target)
    for launched in launches:
        for between in (launched.arguments.get(name) for name in ("plain_ptr", "square_ptr")):
            if between is not None:
                between.fill_(torch.nan)
    for launched in launches:
        launched.run()
    found = [side.cpu() for side in memory]
    return judged(case, problem, found, time.perf_counter() - began)


def judged(case: Case, problem: Problem, found: Sequence[Tensor], seconds: float = 0.0) -> Result:
    """Compare the whole of the cache's memory with what it should be."""
    wanted, allowed = (
        [torch.full_like(side, torch.nan, dtype=torch.float64) for side in found] for _ in "12"
    )
    target_in(case, wanted, problem.slots).write(*problem.exact)
    target_in(case, allowed, problem.slots).write(*problem.slack)
    worst = 0.0
    for side, have, want, may in zip("KV", found, wanted, allowed, strict=True):
        written = ~want.isnan()
        if not have[~written].isnan().all():
            return Result(case.label, worst, f"{side}: something else was written", seconds)
        if not have[written].isfinite().all():
            return Result(case.label, worst, f"{side}: something was not written", seconds)
        error = (have.double() - want).abs()[written] / may[written]
        worst = max(worst, float(error.max()))
    complaint = f"{worst:.2f} of the allowed error" if worst > 1 else ""
    return Result(case.label, worst, complaint, seconds)


def _moved(value: Any, place: torch.device) -> Any:
    """A dataclass of tensors, on a device."""
    if value is None:
        return None
    changes: dict[str, Any] = {}
    for field in fields(value):
        part = getattr(value, field.name)
        if isinstance(part, Tensor):
            changes[field.name] = part.to(place)
        elif is_dataclass(part):
            changes[field.name] = _moved(part, place)
    return replace(value, **changes)


def check_rows(place: torch.device) -> Iterator[Result]:
    """Quantising, its inverse, and the norms' statistics, against their twins."""
    from hcache_kernels import launch, reference

    source = torch.Generator().manual_seed(1)
    for tokens, width, group in ((5, 128, None), (3, 100, 64), (1, 64, 64), (7, 72, None)):
        rows = torch.randn(tokens, width, generator=source)
        rows[0, :3] = torch.tensor([0.5, -1.5, 2.5]) / 127
        rows[-1] = 0
        for dtype, kept in product((torch.float32, torch.bfloat16), quant.LARGEST):
            label = f"quantise {tokens}x{width} {group or 'row'} {dtype} {kept}"
            reason = no_eight_bit_floats(kept, place)
            if reason is not None:
                yield Result(label, 0.0, reason, 0.0)
                continue
            began = time.perf_counter()
            stored = rows.to(dtype).to(place)
            numbers, scales = (t.cpu() for t in launch.quantise_rows(stored, group, kept))
            theirs, their_scales = quant.quantise_rows(rows.to(dtype), group, kept)
            step = (numbers.view(torch.int8).int() - theirs.view(torch.int8).int()).abs().max()
            error = float((scales - their_scales).abs().max() / their_scales.max() / 2**-22)
            apart = "other numbers" if step > (place.type == "cuda") or error > 1 else ""
            yield Result(label, error, apart, time.perf_counter() - began)

            out = torch.full((tokens, width), torch.nan, dtype=dtype, device=place)
            launch.dequantise_rows_into(numbers.to(place), scales.to(place), group, out)
            wide = scales if group else scales.unsqueeze(-1)
            exact = reference.dequantise_rows(numbers, wide, group or width)
            slack = exact.abs() * ROUNDING[dtype] + 1e-9
            error = float(((out.cpu().double() - exact).abs() / slack).max())
            yield _result(f"de{label}", error)
    for tokens, width in ((3, 128), (2, 100)):
        rows = torch.randn(tokens, width, generator=source) + 1
        for is_centred in (False, True):
            found = launch.row_statistics(rows.to(place), EPS, is_centred=is_centred)
            exact_sides = twins.row_statistics(rows.double(), EPS, is_centred=is_centred)
            error = max(
                float((ours.cpu() - theirs).abs().max() / theirs.abs().max() / 2**-20)
                for ours, theirs in zip(found, exact_sides, strict=True)
                if ours is not None
            )
            yield _result(f"statistics {tokens}x{width} {is_centred}", error)


def _result(label: str, error: float) -> Result:
    complaint = "" if error <= 1 else f"{error:.2f} of the allowed error"
    return Result(label, error, complaint, 0.0)


def check_all(place: torch.device) -> Iterator[Result]:
    """Every case, then the smaller kernels."""
    for case in CASES:
        yield check_case(case, place)
    yield from check_rows(place)


def main() -> int:
    """Check everything; one line of JSON for each result. 1 if anything is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--interpret", action="store_true", help="in Triton's interpreter")
    options = parser.parse_args()
    if options.interpret:
        from hcache_kernels.interpreter import interpret

        interpret()
    failed = 0
    for result in check_all(torch.device("cpu" if options.interpret else "cuda")):
        sys.stdout.write(json.dumps(asdict(result)) + "\n")
        failed += bool(result.complaint)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
