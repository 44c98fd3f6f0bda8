"""The real thing: skipped where there is no CUDA device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import SHAPES, Shape, byte_tokenizer, tiny_model

from hcache_rag import GenerationOptions, HCacheEngine
from hcache_rag.device.cuda import CudaDevice
from hcache_rag.executor import open_restoring
from hcache_rag.layout import STORAGE_DTYPES, LayerFormat, Representation, StateLayout
from hcache_rag.timeline import READING

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]

FORMATS = [
    LayerFormat(representation, dtype)
    for representation in (Representation.HIDDEN, Representation.KV)
    for dtype in STORAGE_DTYPES[representation]
]
PREAMBLE = "Answer from these.\n\n"
DOCUMENTS = ["The mayor keeps bees on the roof. " * 9, "The library opens at nine.", "Saltmere."]
PROMPT = PREAMBLE + "\n".join(text.strip() for text in DOCUMENTS) + "\nWho keeps bees?"
OPTIONS = GenerationOptions(max_new_tokens=16, temperature=0)


def engine_of(folder: Path, shape: Shape, fmt: LayerFormat, place: str, share: float) -> Any:
    model: Any = tiny_model(shape)
    engine = HCacheEngine(
        model.to(torch.device(place)),
        byte_tokenizer(),
        folder,
        preamble=PREAMBLE,
        representation=StateLayout((fmt,) * shape.layers, 64),
        fidelity=share,
        profile=None,
    )
    engine.precompute(DOCUMENTS)
    return engine


def answers(folder: Path, shape: Shape, fmt: LayerFormat, place: str, share: float) -> Any:
    with engine_of(folder, shape, fmt, place, share) as engine:
        return [engine.generate(PROMPT, options=OPTIONS) for _ in range(3)]


@pytest.fixture(autouse=True)
def _float32_is_float32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("shape", SHAPES, ids=[shape.label for shape in SHAPES])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_a_gpu_restores_as_the_cpu_does(fmt: LayerFormat, shape: Shape, tmp_path: Path) -> None:
    """From the states that the CPU has stored, with repair: the same tokens."""
    expected = answers(tmp_path, shape, fmt, "cpu", 0.15)
    found = answers(tmp_path, shape, fmt, "cuda", 0.15)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.token_ids == theirs.token_ids
        assert ours.provenance.restored_tokens == theirs.provenance.restored_tokens > 0


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_a_gpu_stores_what_the_cpu_can_restore(fmt: LayerFormat, tmp_path: Path) -> None:
    """The other way round."""
    found = answers(tmp_path, SHAPES[0], fmt, "cuda", 0.15)
    expected = answers(tmp_path, SHAPES[0], fmt, "cpu", 0.15)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.token_ids == theirs.token_ids
        assert ours.provenance.restored_tokens == theirs.provenance.restored_tokens > 0


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_nothing_synchronises_while_pieces_are_submitted(
    fmt: LayerFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch itself watches, while nobody but the reading thread gives the device work."""
    launch = CudaDevice.launch
    launched: list[str] = []

    def watched(self: CudaDevice, *args: Any, name: str, **kwargs: Any) -> None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            launch(self, *args, name=name, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        launched.append(name)

    with engine_of(tmp_path, SHAPES[0], fmt, "cuda", 0.0) as engine:
        engine.generate(PROMPT, options=OPTIONS)
        composition = engine.bound.compose(engine.bound.resolve(PROMPT).pieces)
        monkeypatch.setattr(CudaDevice, "launch", watched)
        with (
            engine.answering.buffers.borrow(len(composition.token_ids)) as buffers,
            open_restoring(engine.adapter, composition, buffers, engine.store) as (_, execution),
        ):
            for ticket in execution._tickets:
                if ticket.step.lane == READING:
                    ticket.wait()
    assert set(launched) == {"hcache copy", "hcache restore"}
