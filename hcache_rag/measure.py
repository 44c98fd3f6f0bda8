"""Measures this machine, for one model and one place of storage, as a `HardwareProfile`.

What is timed is what restoring does: the store's own reading with verification, the executor's own
pieces, the model's own layers. Every figure is a median over a few sizes, and fitted.
"""

from __future__ import annotations

import logging
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch

from hcache_rag import codec
from hcache_rag.buffers import Buffers
from hcache_rag.cache import RestoringCache
from hcache_rag.compose import Composition, RestoredSpan
from hcache_rag.device import synchronise
from hcache_rag.errors import ProfileError
from hcache_rag.executor import Execution
from hcache_rag.layout import HEADER_BYTES, STORAGE_DTYPES, LayerFormat, Representation, StateLayout
from hcache_rag.models import ModelAdapter
from hcache_rag.plan import SpanSize, plan_restore
from hcache_rag.profile import (
    PROFILE_NAME,
    HardwareProfile,
    ModelCosts,
    Rates,
    ReadRate,
    SuffixCost,
    TokenCost,
)
from hcache_rag.schedule import ChunkUse, Piece, schedule
from hcache_rag.spec import DTYPE_BYTES
from hcache_rag.staging import Chunk, PieceMemory, StagedPiece, chunk_tensors
from hcache_rag.state import StateRecord, child_key, token_array
from hcache_rag.store import StateStore

logger = logging.getLogger("hcache_rag")

HIDDEN, KV = Representation.HIDDEN, Representation.KV
BUDGET_S = 1.0
"""After so many seconds a figure is not repeated a third time."""
REQUEST_BYTES = (1 << 16, 1 << 18, 1 << 20, 1 << 22)
"""Sizes of stored values whose reading is timed."""


CPU = torch.device("cpu")


def machine_name(place: torch.device = CPU) -> str:
    """This machine and what the model computes with, as a profile is called."""
    name = f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return name if place.type != "cuda" else f"{name}, {torch.cuda.get_device_name(place)}"


def find_profile(
    folder: str | os.PathLike[str], place: torch.device = CPU
) -> HardwareProfile | None:
    """The profile that was measured on this machine for the states in `folder`, if there is one.

    Args:
        folder: where the states are.
        place: where the model computes.
    """
    path = Path(folder).expanduser() / PROFILE_NAME
    if not path.is_file():
        return None
    try:
        found = HardwareProfile.load(path)
    except ProfileError as error:
        logger.warning("%s; requests are not planned by it", error)
        return None
    if found.name != machine_name(place):
        logger.info("%s was measured on %s, not on this machine", path, found.name)
        return None
    return found


def measure(
    adapter: ModelAdapter,
    folder: str | os.PathLike[str],
    *,
    quick: bool = False,
    max_tokens: int | None = None,
    on_step: Callable[[str], None] = lambda _: None,
) -> HardwareProfile:
    """Time reading and computing; some 15 seconds for a small model, with `quick` some 5.

    Args:
        adapter: the model.
        folder: where states are, or will be, stored; a store of some 100 MB is made there and
            removed again.
        quick: fewer and smaller samples.
        max_tokens: the longest document that is timed, by default 2,048, with `quick` 1,024.
        on_step: told what is being measured.

    Raises:
        StoreError: the folder cannot hold a store.
    """
    on_step("reading from the store")
    reads = _reading(adapter, Path(folder), quick)
    samples: dict[str, list[list[float]]] = {
        f"{name}_read (bytes, s)": [list(sample) for sample in found]
        for name, found in reads.items()
    }
    compute = _Computing(adapter, quick, max_tokens)
    fitted: dict[Representation, dict[str, TokenCost]] = {}
    for representation in (HIDDEN, KV):
        fitted[representation] = {}
        if representation is HIDDEN and not adapter.is_known:
            continue  # nothing can be made of them
        for dtype in _dtypes(adapter, representation):
            on_step(f"restoring {representation} from {dtype}")
            found = compute.restoring(LayerFormat(representation, dtype))
            samples[f"restore {representation} {dtype} (tokens, s)"] = [list(s) for s in found]
            fitted[representation][dtype] = TokenCost.fit(found, degree=1)
    on_step("a layer's forward pass")
    layers = compute.layers()
    samples["layer (tokens, s)"] = [list(sample) for sample in layers]
    on_step("fresh tokens behind a context")
    suffixes = compute.suffixes()
    samples["suffix (tokens, context, s)"] = [list(sample) for sample in suffixes]
    costs = ModelCosts(fitted[HIDDEN], fitted[KV], TokenCost.fit(layers), SuffixCost.fit(suffixes))
    now = datetime.now(timezone.utc).date().isoformat()
    return HardwareProfile(
        name=machine_name(adapter.device),
        source=f"measured on {now} with {adapter.spec.name}",
        cold=ReadRate.fit(reads["cold"]),
        warm=ReadRate.fit(reads["warm"]),
        rates=_rates(adapter, costs),
        model=adapter.spec,
        costs=costs,
        samples=samples,
    )


def drop_page_cache(path: Path) -> None:
    """Ask the system to forget a file that no process has mapped; does nothing where it cannot."""
    if not hasattr(os, "posix_fadvise"):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _reading(
    adapter: ModelAdapter, folder: Path, quick: bool
) -> dict[str, list[tuple[float, float]]]:
    """(bytes, seconds) of reading and verifying one value, by size, cold and warm."""
    found: dict[str, list[tuple[float, float]]] = {"cold": [], "warm": []}
    total = (16 << 20) if quick else (64 << 20)
    folder.mkdir(parents=True, exist_ok=True)
    for size in REQUEST_BYTES:
        with tempfile.TemporaryDirectory(prefix=".profile-", dir=folder) as place:
            shape, keys = _write_values(adapter, Path(place), size, max(4, total // size))
            for name in found:
                if name == "cold":
                    drop_page_cache(Path(place) / "data.mdb")
                with StateStore.open(place, read_only=True) as store:
                    seconds = list(_read_values(store, shape, keys, adapter.device))
                found[name].append((HEADER_BYTES + shape.payload_bytes, statistics.fmean(seconds)))
    return found


def _write_values(
    adapter: ModelAdapter, place: Path, size: int, count: int
) -> tuple[codec.ChunkShape, list[bytes]]:
    spec = adapter.spec
    fmt = LayerFormat(KV, spec.dtype)
    tokens = max(1, size // fmt.num_bytes(spec, 1))
    shape = codec.ChunkShape(fmt, min(tokens, 65535), spec)
    layout = StateLayout((fmt,), shape.tokens)
    noise = np.random.default_rng(0).bytes(shape.payload_bytes)
    arrays = shape.arrays(bytearray(noise))
    keys = []
    with StateStore.open(place) as store:
        for number in range(count):
            ids = token_array([number])
            key = child_key(b"\0" * 16, ids)
            record = StateRecord(key, b"\0" * 16, b"\0" * 16, ids, "", layout, 0.0)
            store.put(record, [(0, 0, codec.encode(shape, key, 0, 0, arrays))])
            keys.append(key)
    return shape, keys


def _read_values(
    store: StateStore, shape: codec.ChunkShape, keys: Sequence[bytes], place: torch.device
) -> Iterator[float]:
    bring = _bringing(place, shape.payload_bytes)
    with store.reading() as reader:
        for key in keys:
            started = time.perf_counter()
            value = reader.value(key, 0, 0)
            codec.decode(shape, key, 0, 0, value)
            bring(value[HEADER_BYTES:])
            yield time.perf_counter() - started


def _bringing(place: torch.device, num_bytes: int) -> Callable[[memoryview], object]:
    """What brings a payload to a device, as the reading lane does; on the CPU nothing."""
    if place.type == "cpu":
        return lambda _payload: None
    pinned = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def bring(payload: memoryview) -> object:
        np.copyto(pinned.numpy(), np.frombuffer(payload, dtype=np.uint8))
        return pinned.to(place)

    return bring


FRESH_TOKENS = (1, 16, 64)
"""So many are timed behind a context."""


class _Computing:
    """Times the model's part, on buffers that are used again and again as in earnest."""

    def __init__(self, adapter: ModelAdapter, quick: bool, max_tokens: int | None) -> None:
        self.adapter = adapter
        self.repeats = 3 if quick else 5
        longest = min(max_tokens or (1024 if quick else 2048), adapter.spec.window_tokens)
        sizes = (64, 256, 1024, 4096) if quick else (64, 256, 512, 1024, 2048, 4096, 8192)
        self.tokens = [n for n in sizes if n < longest] + [longest]
        self.context = min(longest, max(1, adapter.spec.window_tokens - FRESH_TOKENS[-1]))
        self.buffers = Buffers(adapter, longest + FRESH_TOKENS[-1])
        self.buffers.keys.normal_()
        self.buffers.values.normal_()

    def restoring(self, fmt: LayerFormat) -> list[tuple[float, float]]:
        """(tokens, seconds) of restoring one piece."""
        spec, found = self.adapter.spec, []
        for tokens in (n for n in self.tokens if n <= 1024):
            with self._execution(tokens, fmt) as execution:
                arrays = noise(codec.ChunkShape(fmt, tokens, spec))  # lives as long as the chunk
                chunk = chunk_tensors(fmt, arrays, tokens)
                piece = Piece(fmt, (ChunkUse(0, 0, tokens, 0),))
                staged = self._staged(piece, chunk)
                layers = iter(range(10**6))

                def restore(
                    execution: Execution = execution,
                    piece: Piece = piece,
                    chunk: Chunk = chunk,
                    staged: StagedPiece | None = staged,
                    layers: Iterator[int] = layers,
                ) -> None:
                    layer = next(layers) % spec.num_layers
                    if staged is None:
                        execution.restorer.restore(layer, piece, [chunk])
                    else:
                        execution.restorer.restore_staged(layer, piece, staged)

                found.append((float(tokens), self._seconds(restore)))
        return found

    def _staged(self, piece: Piece, chunk: Chunk) -> StagedPiece | None:
        """The piece on the model's device; None where that is the CPU."""
        if self.adapter.device.type == "cpu":
            return None
        place = PieceMemory(self.adapter.spec, piece)
        memory = torch.empty(place.num_bytes, dtype=torch.uint8)
        place.fill(memory, [chunk])
        return place.views(memory.to(self.adapter.device))

    def layers(self) -> list[tuple[float, float]]:
        """(tokens, seconds) of one layer that reads a document from scratch."""
        spec, found = self.adapter.spec, []
        prefix = self.adapter.prefill([])
        for tokens in self.tokens:
            count = min(4 if tokens <= 256 else 2, spec.num_layers)
            if not self.adapter.is_known:
                count = spec.num_layers  # it cannot be stopped
            ids = [1 + i % 100 for i in range(tokens)]

            def read(ids: list[int] = ids, count: int = count) -> None:
                self.adapter.read_batch([ids], prefix, num_layers=count)

            found.append((float(tokens), self._seconds(read) / count))
        return found

    @torch.no_grad()
    def suffixes(self) -> list[tuple[float, float, float]]:
        """(tokens, context, seconds) of one layer over fresh tokens behind a restored context."""
        found, window = [], self.adapter.spec.window_tokens
        for context in (min(64, self.context), self.context):
            for tokens in (n for n in FRESH_TOKENS if n == 1 or context + n <= window):
                composition = measuring_composition(
                    context, tokens, _layout(self.adapter.spec.num_layers)
                )

                def forward(composition: Composition = composition) -> None:
                    cache = RestoringCache(
                        self.adapter, composition, self.buffers, lambda _layer: None
                    )
                    inputs = cache.pass_inputs()
                    self.adapter.decoder(**inputs, past_key_values=cache, use_cache=True)

                seconds = self._seconds(forward) / self.adapter.spec.num_layers
                found.append((float(tokens), float(context), seconds))
        return found

    @contextmanager
    def _execution(self, tokens: int, fmt: LayerFormat) -> Iterator[Execution]:
        spec = self.adapter.spec
        layout = StateLayout((fmt,) * spec.num_layers, tokens)
        sizes = [SpanSize(tokens, layout)]
        work = schedule(spec, sizes, plan_restore(spec, sizes, None))
        yield Execution(self.adapter, measuring_composition(tokens, 1, layout), work, self.buffers)

    def _seconds(self, call: Callable[[], None]) -> float:
        call()
        samples: list[float] = []
        while len(samples) < self.repeats and (len(samples) < 2 or sum(samples) < BUDGET_S):
            synchronise(self.adapter.device)
            started = time.perf_counter()
            call()
            synchronise(self.adapter.device)
            samples.append(time.perf_counter() - started)
        return statistics.median(samples)


def _layout(num_layers: int) -> StateLayout:
    return StateLayout((LayerFormat(KV, "float32"),) * num_layers)


def measuring_composition(restored: int, fresh: int, layout: StateLayout) -> Composition:
    """One span right at the beginning, and fresh tokens behind it."""
    ids = token_array([1 + i % 100 for i in range(restored + fresh)])
    key = child_key(b"\0" * 16, ids[:restored])
    record = StateRecord(key, b"\0" * 16, b"\0" * 16, ids[:restored], "", layout, 0.0)
    span = RestoredSpan(record, restored, 0, is_exact=True)
    return Composition(ids, (span,), np.arange(restored, restored + fresh))


def noise(shape: codec.ChunkShape) -> tuple[codec.Words, ...]:
    """The arrays of a chunk with numbers of ordinary size: denormal ones would be slow."""
    source = np.random.default_rng(0)
    arrays = []
    for array in shape.arrays(bytearray(shape.payload_bytes)):
        numbers = source.normal(size=array.shape).astype(np.float32)
        if array.dtype == np.int8:
            array[...] = source.integers(0, 127, array.shape)  # as floats they are numbers too
        elif array.dtype == np.float32:
            array[...] = np.abs(numbers) + 0.1
        elif array.dtype == np.uint32:
            array[...] = numbers.view(np.uint32)
        elif shape.fmt.dtype == "float16":
            array[...] = numbers.astype(np.float16).view(np.uint16)
        else:
            array[...] = numbers.view(np.uint32) >> 16
        arrays.append(array)
    return tuple(arrays)


def _dtypes(adapter: ModelAdapter, representation: Representation) -> list[str]:
    """The model's own dtype, bfloat16, and those of eight bits."""
    plain = {adapter.spec.dtype, "bfloat16"}
    return [d for d in STORAGE_DTYPES[representation] if d in plain or d not in DTYPE_BYTES]


def _rates(adapter: ModelAdapter, costs: ModelCosts) -> Rates:
    """The processor in general, from what it did for this model."""
    spec = adapter.spec
    at = 512
    weights_bytes = spec.layer_flops / 2 * spec.dtype_bytes
    pair_s = 2 * costs.layer.per_square_s
    layer_flops_per_s = spec.layer_flops / max(costs.layer(1024) / 1024 - 512 * pair_s, 1e-12)
    project = costs.project.get(spec.dtype)
    project_s = project(at) if project else spec.projection_flops * at / layer_flops_per_s
    return Rates(
        projection_flops_per_s=spec.projection_flops * at / project_s,
        layer_flops_per_s=layer_flops_per_s,
        attention_flops_per_s=spec.attention_flops / pair_s if pair_s else layer_flops_per_s,
        memory_bytes_per_s=weights_bytes / costs.suffix(1, 64),
    )


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
