"""Threads that wait keep no OpenMP threads: counted in the kernel's list of this process."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import SHAPES, Shape, byte_tokenizer, tiny_model

from hcache_rag import GenerationOptions, HCacheEngine
from hcache_rag.executor import Execution
from hcache_rag.openmp import give_back_threads, lent_threads
from hcache_rag.provenance import Generation, Provenance
from hcache_rag.streaming import GenerationStream

WIDE = Shape("wide", hidden_size=128, heads=4, kv_heads=4, head_dim=32)
"""Wide enough for torch to compute on all its threads."""
TASKS = Path("/proc/self/task")
PATIENCE_S = 60.0
"""An ended thread is in the kernel's list for a moment; this long is a failure."""

if not TASKS.is_dir() or not list(Path(torch.__file__).with_name("lib").glob("libgomp*")):
    pytest.skip("torch does not run on GNU OpenMP here", allow_module_level=True)


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def tasks() -> set[str]:
    return set(os.listdir(TASKS))


def compute() -> set[str]:
    """Make the calling thread keep an OpenMP pool; the pool's tasks."""
    give_back_threads()
    before = tasks()
    torch.ones(1 << 20).add_(1.0)
    return tasks() - before


def end(pool: set[str]) -> bool:
    """Whether all tasks of a pool end soon."""
    deadline = time.monotonic() + PATIENCE_S
    while pool & tasks():
        if time.monotonic() > deadline:
            return False
    return True


def test_threads_are_kept_until_they_are_given_back() -> None:
    pool = compute()
    assert len(pool) == 1
    torch.ones(1 << 20).add_(1.0)
    assert pool <= tasks()
    give_back_threads()
    assert end(pool)


def test_giving_back_changes_neither_settings_nor_results() -> None:
    x = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
    expected = x @ x
    give_back_threads()
    give_back_threads()  # nothing is left to give
    assert torch.get_num_threads() == 2
    assert torch.equal(x @ x, expected)


def test_only_the_calling_thread_s_pool_ends() -> None:
    pool = compute()
    others: list[set[str]] = []

    def other() -> None:
        others.append(compute())
        give_back_threads()

    thread = threading.Thread(target=other)
    thread.start()
    thread.join(PATIENCE_S)
    assert end(others[0])
    assert pool <= tasks()


@pytest.mark.parametrize("error", [None, KeyError("x")])
def test_a_block_gives_back_also_when_it_fails(error: Exception | None) -> None:
    pools: list[set[str]] = []

    @lent_threads()
    def work() -> None:
        pools.append(compute())
        if error is not None:
            raise error

    for _ in range(2):  # a decorated function can be called again
        if error is None:
            work()
        else:
            with pytest.raises(KeyError):
                work()
    assert all(end(pool) for pool in pools)


def stream_of(run: Callable[[], None]) -> GenerationStream:
    """A stream of three pieces; `run` is called on its thread before each."""

    def generate(on_text: Callable[[str], None], *_: object) -> Generation:
        for piece in "abc":
            run()
            on_text(piece)
        return Generation("abc", (1, 2, 3), "length", Provenance(0, 0, 0, 0))

    return GenerationStream(generate)


def test_who_waits_for_a_stream_has_given_its_threads_back() -> None:
    pools = [compute()]
    gone: list[bool] = []
    stream = stream_of(lambda: gone.append(end(pools[-1])))
    for piece in stream:
        assert piece
        pools.append(compute())  # as a consumer may, between pieces
    assert gone[0]
    assert end(pools[0])


def test_who_makes_a_stream_that_another_thread_reads_has_given_its_threads_back() -> None:
    pool = compute()
    gone: list[bool] = []
    stream = stream_of(lambda: gone.append(end(pool)))
    reader = threading.Thread(target=stream.read)
    reader.start()
    reader.join(3 * PATIENCE_S)
    assert gone == [True] * 3


def test_an_engine_keeps_no_threads_between_its_calls(tmp_path: Path) -> None:
    pools = [compute()]
    with HCacheEngine(tiny_model(SHAPES[0]), byte_tokenizer(), tmp_path / "states") as engine:
        assert end(pools[-1])
        engine.precompute(["A text to be read."], on_progress=lambda *_: pools.append(compute()))
        assert len(pools) > 1
        assert end(pools[-1])
        engine.generate(
            "A text to be read. Is it?",
            options=GenerationOptions(max_new_tokens=2, extra={"min_new_tokens": 2}),
            on_text=lambda _: pools.append(compute()),
        )
        assert end(pools[-1])


def test_a_restore_runs_on_torch_s_threads_and_one_that_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted where the model computes, and where the lane reads, in every step of both."""
    seen: list[set[str]] = []
    give_back_threads()
    before = tasks()

    def count(*_: object) -> None:
        seen.append(tasks() - before)

    read_chunk = Execution._read_chunk

    def read(*args: Any) -> Any:
        count()
        return read_chunk(*args)

    monkeypatch.setattr(Execution, "_read_chunk", read)
    text = "A text to be read. " * 100
    with HCacheEngine(tiny_model(WIDE), byte_tokenizer(), tmp_path / "states") as engine:
        engine.precompute([text])
        end(tasks() - before)  # what reading it has used
        for layer in engine.adapter.layers:
            layer.register_forward_pre_hook(count)
        answer = engine.generate(f"{text}\nIs it?", options=GenerationOptions(max_new_tokens=3))
        assert answer.provenance.restored_tokens > 1000
    torch_s = torch.get_num_threads() - 1  # beside the thread that calls
    most = max(seen, key=len)
    assert torch_s <= len(most) <= torch_s + 1, most


def test_a_torch_on_another_openmp_is_left_alone() -> None:
    code = (
        "import sys, torch; sys.platform = 'darwin'\n"
        "from hcache_rag.openmp import give_back_threads, _omp_pause_resource_all\n"
        "give_back_threads(); assert _omp_pause_resource_all() is None"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
