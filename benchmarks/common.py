"""What every benchmark needs: the machine in a few facts, medians with spread, targets, output."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Target:
    """One target of the project, judged on this run."""

    name: str
    value: float
    target: str
    holds: bool


def at_least(name: str, value: float, bound: float) -> Target:
    return Target(name, round(value, 3), f">= {bound}", value >= bound)


def at_most(name: str, value: float, bound: float) -> Target:
    return Target(name, round(value, 3), f"<= {bound}", value <= bound)


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with the two options that every benchmark takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="fewer repeats, under 50 s")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    return parser


def summary(samples: Sequence[float]) -> dict[str, float]:
    """Median, p95 and extremes, in the samples' unit."""
    ordered = sorted(samples)
    p95 = ordered[min(len(ordered) - 1, round(0.95 * (len(ordered) - 1)))]
    return {
        "p50": statistics.median(ordered),
        "p95": p95,
        "min": ordered[0],
        "max": ordered[-1],
        "n": len(ordered),
    }


def ratio_of_pairs(above: Sequence[float], below: Sequence[float]) -> float:
    """Median of the ratios of samples that were taken next to each other."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def machine() -> dict[str, Any]:
    """Where and on what this ran."""
    import torch
    import transformers

    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "load_1min": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": _commit(),
    }


def quiet_transformers() -> None:
    """Keep transformers' bars and notices out of the output."""
    from transformers.utils import logging

    transformers_logging: Any = logging
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def finish(
    rows: Sequence[dict[str, Any]], targets: Sequence[Target], facts: dict[str, Any], as_json: bool
) -> None:
    """Print the verdicts, and as the last line the JSON object where it was asked for."""
    for target in targets:
        verdict = "holds " if target.holds else "MISSED"
        print(f"  {verdict} {target.name}: {target.value} (target {target.target})")
    about = ", ".join(f"{key} {value}" for key, value in facts.items())
    print(f"machine: {about}")
    if as_json:
        result = {
            "rows": list(rows),
            "machine": facts,
            "targets": [asdict(target) for target in targets],
        }
        print(json.dumps(result))


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
