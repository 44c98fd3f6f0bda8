"""Runs a driver in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults.outcomes import Outcome

TESTS = Path(__file__).parent.parent


def drive(driver: Callable[..., Outcome], **options: Any) -> Outcome:
    """Run a driver without torch and with one thread."""
    path = os.pathsep.join((str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")))
    single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    done = subprocess.run(
        [sys.executable, "-m", "faults", driver.__name__, json.dumps(options)],
        env=os.environ | single | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{driver.__name__} {options} failed:\n{done.stderr}")
    return Outcome(**json.loads(done.stdout))
