"""OpenMP's threads: kept by the thread that computes, given back by the one that waits.

torch's CPU kernels run on GNU OpenMP, which keeps a pool of threads for every thread that has ever
computed. Once all pools together hold more threads than there are processors, none of them spins
any more while it waits for its next piece of work (libgomp's `gomp_throttled_spin_count`), so that
each operation pays for waking its threads. A model that decodes token by token is made of small
operations: with one idle pool beside it, it takes one and a half times as long.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

_OMP_PAUSE_SOFT = 1


def give_back_threads() -> None:
    """End the OpenMP threads that the calling thread keeps for later.

    Its next parallel operation starts them anew, which takes some 0.1 ms. Settings such as
    `torch.set_num_threads` stay. Nothing happens where torch runs on another OpenMP.
    """
    pause = _omp_pause_resource_all()
    if pause is not None:
        pause(_OMP_PAUSE_SOFT)


@contextmanager
def lent_threads() -> Iterator[None]:
    """Compute inside the block; the OpenMP threads are given back at its end."""
    try:
        yield
    finally:
        give_back_threads()


@cache
def _omp_pause_resource_all() -> Callable[[int], int] | None:
    """OpenMP 5.0's function of that name in the libgomp that torch has loaded, if it has."""
    if sys.platform != "linux":
        return None
    for library in Path(torch.__file__).with_name("lib").glob("libgomp*.so*"):
        try:
            loaded = ctypes.CDLL(str(library), mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
            pause: Callable[[int], int] = loaded.omp_pause_resource_all
            return pause
        except (OSError, AttributeError):
            continue
    return None
