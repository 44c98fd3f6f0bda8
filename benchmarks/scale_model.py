"""This processor as a scale model of another machine: models, stores and one timed restore."""

from __future__ import annotations

import statistics
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hcache_rag import StateStore, codec
from hcache_rag.buffers import BufferPool
from hcache_rag.choice import Prompt
from hcache_rag.compose import Composition, RestoredSpan
from hcache_rag.executor import Execution, ValueReader, open_restoring, span_sizes
from hcache_rag.layout import LayerFormat, Representation, StateLayout
from hcache_rag.measure import drop_page_cache, measure, measuring_composition, noise
from hcache_rag.models import ModelAdapter
from hcache_rag.plan import Conditions, RestorePlan, plan_restore
from hcache_rag.prefixes import Prefixes
from hcache_rag.presets import A100_7B_FLOPS, GB, TERA
from hcache_rag.schedule import ChunkUse, Piece, schedule
from hcache_rag.staging import chunk_tensors
from hcache_rag.state import StateKey, StateRecord, child_key, token_array
from hcache_rag.timeline import COMPUTING, READING, Timeline

HIDDEN, KV, NONE = Representation.HIDDEN, Representation.KV, Representation.NONE
ROOT = b"\0" * 16
FRESH_TOKENS = 16

MODELS: dict[str, dict[str, Any]] = {
    "mha-1024": {"hidden_size": 1024, "heads": 16, "kv_heads": 16, "layers": 16, "mlp": 2752},
    "mha-2048": {"hidden_size": 2048, "heads": 16, "kv_heads": 16, "layers": 8, "mlp": 5504},
    "smollm2": {"hidden_size": 576, "heads": 9, "kv_heads": 3, "layers": 30, "mlp": 1536},
    "gqa-896": {"hidden_size": 896, "heads": 14, "kv_heads": 2, "layers": 24, "mlp": 4864},
}
"""Shapes: Llama-2's at two widths, SmolLM2-135M's, Qwen2.5-0.5B's."""

REGIMES = {
    "a100-4ssd": 26 * GB / A100_7B_FLOPS,
    "a100-1ssd": 6.9 * GB / A100_7B_FLOPS,
    "h100-pcie5": 55 * GB / (600 * TERA),
    "network": 1.25 * GB / A100_7B_FLOPS,
}
"""Bytes a second for each operation a second of the projection, for a model of width 4,096."""
SCALED_WIDTH = 4096
AS_THEY_ARE = ("warm", "cold")


@dataclass(frozen=True)
class Paced:
    """A store whose values arrive at a given rate."""

    store: StateStore
    bytes_per_s: float

    @contextmanager
    def reading(self, keys: Collection[StateKey] = ()) -> Iterator[ValueReader]:
        with self.store.reading(keys) as reader:
            yield PacedReader(reader, self.bytes_per_s)


class PacedReader:
    """Gives a value when a device of this rate would have it.

    The device reads ahead by as much as two values, as kernels and drives do: a reader that asks a
    little late finds it at work.
    """

    def __init__(self, reader: ValueReader, bytes_per_s: float) -> None:
        self._reader, self._bytes_per_s = reader, bytes_per_s
        self._free_at_s = 0.0

    def expect(self, first: Mapping[StateKey, tuple[int, int]]) -> None:
        self._reader.expect(first)

    def value(self, key: StateKey, layer: int, chunk: int) -> memoryview:
        value = self._reader.value(key, layer, chunk)
        takes_s = len(value) / self._bytes_per_s
        ahead_s = 2 * takes_s if self._free_at_s else 0.0
        begins_s = max(self._free_at_s, time.perf_counter() - ahead_s)
        self._free_at_s = begins_s + takes_s
        time.sleep(max(0.0, self._free_at_s - time.perf_counter()))
        return value


@dataclass
class Documents:
    """Documents of one length, and their states in one layout in a store of their own."""

    layout: StateLayout
    composition: Composition
    folder: Path
    store: StateStore

    @classmethod
    def make(
        cls, adapter: ModelAdapter, folder: Path, layout: StateLayout, prompt: Prompt
    ) -> Documents:
        store, spans, position = StateStore.open(folder), [], 0
        for number in range(prompt.documents):
            ids = token_array([1 + (number + i) % 900 for i in range(prompt.document_tokens)])
            key = child_key(ROOT, ids)
            record = StateRecord(key, ROOT, ROOT, ids, str(number), layout, 0.0)
            store.put(record, values(adapter, record))
            spans.append(RestoredSpan(record, len(ids), position, is_exact=not number))
            position += len(ids)
        all_ids = [int(i) for span in spans for i in span.record.token_ids]
        ids = token_array(all_ids + [7] * FRESH_TOKENS)
        fresh = torch.arange(position, position + FRESH_TOKENS).numpy()
        return cls(layout, Composition(ids, tuple(spans), fresh), folder, store)

    def forget(self) -> None:
        """Make the next read cold."""
        self.store.close()
        drop_page_cache(self.folder / "data.mdb")
        self.store = StateStore.open(self.folder)


def values(adapter: ModelAdapter, record: StateRecord) -> Iterator[tuple[int, int, bytearray]]:
    """A state of random numbers."""
    known: dict[codec.ChunkShape, tuple[codec.Words, ...]] = {}
    step = record.layout.chunk_tokens
    for layer, fmt in enumerate(record.layout.layers):
        if fmt.representation is NONE:
            continue
        for chunk in range(record.layout.num_chunks(record.num_tokens)):
            tokens = min(step, record.num_tokens - chunk * step)
            shape = codec.ChunkShape(fmt, tokens, adapter.spec)
            if shape not in known:
                known[shape] = noise(shape)
            yield layer, chunk, codec.encode(shape, record.key, layer, chunk, known[shape])


@dataclass(frozen=True)
class Run:
    """One restore: from its beginning to the end of the forward pass.

    Args:
        slower: than in the first round; all seconds are divided by it.
    """

    whole_s: float
    timeline: Timeline
    slower: float

    @property
    def seconds(self) -> float:
        return self.whole_s / self.slower

    @property
    def reading_s(self) -> float:
        return self.timeline.busy_s(READING) / self.slower

    @property
    def computing_s(self) -> float:
        return self.timeline.busy_s(COMPUTING) / self.slower

    @property
    def waited_s(self) -> float:
        return self.timeline.waited_s(COMPUTING) / self.slower

    @property
    def fresh_s(self) -> float:
        """Of computing, the pass over fresh tokens."""
        passes = (e for e in self.timeline.events if e.step.verb == "forward")
        return sum(event.end_s - event.start_s for event in passes) / self.slower


class Bench:
    """One model, with its costs measured at the beginning of the run."""

    def __init__(self, name: str, folder: Path, longest: int) -> None:
        self.name, self.folder = name, folder
        self.adapter = ModelAdapter(random_model(MODELS[name]), name)
        self.spec = self.adapter.spec
        self.pool = BufferPool(self.adapter)
        self.profile = measure(self.adapter, folder, quick=True, max_tokens=longest)
        empty = StateStore.open(folder / "empty")
        self.prefixes = Prefixes(self.adapter, empty, ROOT)

    def compute_factor(self) -> float:
        """How much longer the restoring step takes now than when the machine was measured."""
        measured_s = float(self.profile.costs_of(self.spec).project["bfloat16"](1024))
        steps, _ = self.steps(repeats=1)
        return statistics.median(steps) / measured_s

    def steps(self, repeats: int) -> tuple[list[float], list[float]]:
        """Seconds of restoring 1,024 hidden rows, and of its bare GEMM, next to each other."""
        spec, tokens = self.spec, 1024
        fmt = LayerFormat(HIDDEN, "bfloat16")
        layout = StateLayout((fmt,) * spec.num_layers, tokens)
        composition = measuring_composition(tokens, 1, layout)
        sizes = span_sizes(composition, None)
        piece = Piece(fmt, (ChunkUse(0, 0, tokens, 0),))
        arrays = noise(codec.ChunkShape(fmt, tokens, spec))
        chunk = chunk_tensors(fmt, arrays, tokens)
        whole: list[float] = []
        bare: list[float] = []
        with self.pool.borrow(tokens + 1) as buffers:
            work = schedule(spec, sizes, plan_restore(spec, sizes, None))
            execution = Execution(self.adapter, composition, work, buffers)
            rows = torch.randn(tokens, spec.hidden_size)
            out = torch.empty(tokens, 2 * spec.kv_width)
            for layer in [*range(spec.num_layers)] * (1 + repeats):
                started = time.perf_counter()
                execution.restorer.restore(layer, piece, [chunk])
                middle = time.perf_counter()
                torch.mm(rows, self.adapter.projections[layer].weight, out=out)
                whole.append(middle - started)
                bare.append(time.perf_counter() - middle)
        return whole[spec.num_layers :], bare[spec.num_layers :]

    def scaled_bytes_per_s(self, bytes_per_flop: float, compute_factor: float) -> float:
        """The rate that stands to this processor and model as a machine's does to it and Llama.

        Work grows with the square of a model's width and bytes with the width, so a narrower model
        needs more bytes a second for the same ratio of reading to computing.
        """
        cost = self.profile.costs_of(self.spec).project["bfloat16"]
        flops_per_s = self.spec.projection_flops * 1024 / (compute_factor * float(cost(1024)))
        return flops_per_s * bytes_per_flop * SCALED_WIDTH / self.spec.hidden_size

    @torch.no_grad()
    def restore(
        self, documents: Documents, plan: RestorePlan, rate: float | None, slower: float
    ) -> Run:
        """Restore once, reading at `rate` bytes a second, or as fast as it goes."""
        composition = documents.composition
        work = schedule(
            self.spec,
            span_sizes(composition, self.prefixes),
            plan,
            fresh_tokens=FRESH_TOKENS,
            costs=self.profile.costs_of(self.spec),
            now=Conditions(self.profile.cold, plan.compute_factor),
        )
        source = Paced(documents.store, rate) if rate else documents.store
        started = time.perf_counter()
        with (
            self.pool.borrow(len(composition.token_ids)) as buffers,
            open_restoring(
                self.adapter, composition, buffers, source, work=work, prefixes=self.prefixes
            ) as (cache, execution),
        ):
            execution.recompute()
            self.adapter.decoder(**cache.pass_inputs(), past_key_values=cache, use_cache=True)
            ended = time.perf_counter()
        return Run(ended - started, execution.timeline, slower)


def random_model(shape: dict[str, int]) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=1000,
        hidden_size=shape["hidden_size"],
        intermediate_size=shape["mlp"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        max_position_embeddings=32768,
    )
    auto: Any = AutoModelForCausalLM
    return auto.from_config(config).eval()
