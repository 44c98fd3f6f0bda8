"""Faults never cost a wrong answer, a lost document, a crash or a hang: kills, damage, full disks.

Counts are small here; `benchmarks/bench_faults.py` has the full ones. Each driver runs in a process
of its own; the seed and number in a failure's message do the same fault again.
"""

from __future__ import annotations

import random
import string
from functools import cache
from pathlib import Path

import faults
import pytest
from faults import FLIPS, Outcome, drive
from oracle import encode, greedy
from tiny import SHAPES, VOCABULARY, byte_tokenizer, tiny_model
from transformers import PreTrainedModel

from hcache_rag import GenerationOptions, HCacheEngine, StateStore
from hcache_rag.choice import fixed_layout
from hcache_rag.errors import HCacheError
from hcache_rag.layout import LayerFormat, Representation, StateLayout
from hcache_rag.models import ModelAdapter
from hcache_rag.state import StateRecord, child_key, root_key, token_array
from hcache_rag.store import Durability


def done(outcome: Outcome) -> Outcome:
    """Nothing happened that must not."""
    assert not outcome.failures, f"{outcome!r}\n{outcome}"
    return outcome


# --- the store ----------------------------------------------------------------------------------


@pytest.mark.parametrize("durability", ["fsync", "fast"])
def test_a_killed_process_loses_nothing_and_leaves_nothing_half(durability: Durability) -> None:
    """SIGKILL while indexing; the next process goes on where the last one had come to."""
    outcome = done(drive(faults.kills, count=15, seed=1, durability=durability))
    assert outcome.right == 15
    assert outcome.acknowledged > 15


@pytest.mark.parametrize("where", FLIPS)
def test_a_flipped_byte_gives_out_nothing_wrong(where: str) -> None:
    """In LMDB's own pages and anywhere: errors of this library, or misses."""
    assert done(drive(faults.flips, count=60, seed=2, where=where)).count == 60


def test_a_file_without_its_end_gives_out_nothing_wrong() -> None:
    """Cut anywhere, with zeros in place of the end and without."""
    assert done(drive(faults.truncations, count=60, seed=3)).count == 60


def test_pages_that_were_not_written_give_out_nothing_wrong() -> None:
    """One to eight of them are zeros, or as they were before."""
    assert done(drive(faults.torn_writes, count=60, seed=4)).count == 60


def test_a_full_disk_costs_the_write_alone() -> None:
    """Earlier documents stay readable, here and elsewhere; with room again, writing goes on."""
    outcome = done(drive(faults.disk_full, count=15, seed=5))
    assert outcome.refused + outcome.right == 15
    assert outcome.refused > 0


def test_readers_see_whole_documents_while_a_writer_writes() -> None:
    """It puts, replaces, deletes and evicts; they find what they find whole, and meet no error."""
    outcome = done(drive(faults.readers_and_a_writer, seed=6, readers=3, operations=400))
    assert outcome.right >= 100
    assert outcome.notes.pop("evicted") != ["0"]


def test_a_store_that_lies_is_not_believed() -> None:
    """Checksums are right and content is not: misses, or errors of this library."""
    assert done(drive(faults.hostile, count=60, seed=7)).count == 60


@pytest.mark.parametrize("value_bytes", [300, 1000, 6000])
def test_a_store_at_its_limit_goes_on_taking_documents(tmp_path: Path, value_bytes: int) -> None:
    """Whatever the size of their values: each one that comes lets others go."""
    root = root_key("model", "tokenizer")
    layout = StateLayout((LayerFormat(Representation.KV, "float32"),) * 30)
    with StateStore.open(tmp_path / "store", max_bytes=4 << 20, durability="fast") as store:
        for number in range(8_000_000 // (30 * value_bytes)):
            ids = token_array([number, *range(9)])
            key = child_key(root, ids)
            record = StateRecord(key, root, root, ids, f"document {number}", layout, 1.0)
            store.put(record, [(layer, 0, bytes(value_bytes)) for layer in range(30)])
            assert key in store
        assert store.counters().evictions > 0


# --- the engine ---------------------------------------------------------------------------------

TOKENIZER = byte_tokenizer()
SHAPE = SHAPES[2]
PREAMBLE = "Answer from the passages below.\n\n"
DOCUMENT = "".join(random.Random(0).choices(string.ascii_lowercase + " ", k=249)) + "."
PROMPT = f"{PREAMBLE}{DOCUMENT}\n\nQuestion: what is it?\nAnswer:"
PRINTABLE = {"suppress_tokens": list(range(94, VOCABULARY))}


pytestmark = pytest.mark.usefixtures("one_thread")


@cache
def model() -> PreTrainedModel:
    """A model that tests share and leave as it is."""
    return tiny_model(SHAPE)


@cache
def transformers_answer() -> tuple[int, ...]:
    """Transformers' greedy answer with no cache given."""
    return tuple(greedy(model(), encode(TOKENIZER, PROMPT, is_document=False), 24, **PRINTABLE))


def an_engine(store: StateStore, representation: str) -> HCacheEngine:
    """An engine that keeps every bit, in chunks so small that the document has several."""
    spec = ModelAdapter(model()).spec
    layers = fixed_layout(spec, representation, spec.dtype).layout.layers
    layout = StateLayout(layers, 64)
    return HCacheEngine(
        model(), TOKENIZER, store, preamble=PREAMBLE, representation=layout, fidelity="none"
    )


def answer(engine: HCacheEngine) -> tuple[int, ...]:
    """The engine's greedy answer."""
    options = GenerationOptions(max_new_tokens=24, temperature=0.0, extra=PRINTABLE)
    return tuple(engine.generate(PROMPT, options=options).token_ids)


@pytest.mark.parametrize("representation", ["hidden", "kv"])
def test_flipped_bytes_do_not_change_an_answer(representation: str, store: StateStore) -> None:
    """Transformers' `generate` with no cache / the engine's after each of 20 flips: the same."""
    engine = an_engine(store, representation)
    source = random.Random(8)
    for _ in range(20):
        engine.precompute([DOCUMENT])
        with store._writing() as txn:
            rows = dict(txn.scan("chunks", store._rows.prefix))
            key = source.choice(sorted(rows))
            value = bytearray(rows[key])
            value[source.randrange(len(value))] ^= source.randrange(1, 256)
            txn.put("chunks", key, value)
        assert answer(engine) == transformers_answer()
        assert answer(engine) == transformers_answer()
    store.flush_uses()
    assert store.counters().damaged == 20


def test_an_engine_answers_whatever_its_store_says() -> None:
    """Lies about the very document that is asked for: an answer, or an error of this library."""
    lies = faults.lies()
    names = random.Random(9).sample(sorted(lies), 60)
    escaped = []
    for name in names:
        store = StateStore.in_memory()
        an_engine(store, "kv").precompute([DOCUMENT])
        [record] = store.find(DOCUMENT)
        with store._writing() as txn:
            lies[name](txn, store._rows.prefix, record)
        try:
            answer(an_engine(store, "kv"))
        except HCacheError:
            pass
        except Exception as error:
            escaped.append(f"{name}: {type(error).__name__}: {error}")
    assert not escaped, "\n".join(escaped)
