"""Indexing in shards: whoever does it, however often it is killed, the bytes are the same."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import SHAPES, byte_tokenizer, tiny_model

from hcache_rag import HCacheEngine, StateStore, StoreError
from hcache_rag.corpus import Document
from hcache_rag.offline import TOO_LONG, Progress, index_shard, index_shards
from hcache_rag.state import StateRecord
from hcache_rag.store.manifest import Manifest
from hcache_rag.store.placement import Placement
from hcache_rag.worth import Worth, measure_worth

pytestmark = pytest.mark.usefixtures("one_thread")

SHARDS, UNIT = 3, 4
TEXTS = [
    f"Document {number} " + "says more than the one before it. " * (number % 7)
    for number in range(31)
]


@pytest.fixture(scope="module")
def engine() -> Iterator[HCacheEngine]:
    with StateStore.in_memory() as store:
        # Batches of 700 tokens: a unit has several.
        yield HCacheEngine(tiny_model(SHAPES[1]), byte_tokenizer(), store, preamble="Read this: ")


def manifest_in(folder: Path) -> Manifest:
    return Manifest.create(folder, SHARDS, UNIT)


def index(folder: Path, engine: HCacheEngine, shards: Iterable[int], texts: Any = TEXTS) -> Any:
    return index_shards(texts, list(shards), manifest_in(folder), engine, batch_tokens=700)


State = tuple[dict[str, object], list[bytes]]


def states(folder: Path) -> dict[tuple[str, bytes], State]:
    """Every byte of every state by shard and key, but for when it was made."""
    found = {}
    for shard in Manifest.open(folder).shards:
        if not (shard.folder / "data.mdb").is_file():
            continue
        with StateStore.open(shard.folder, read_only=True) as store:
            for record in store.records():
                found[shard.name, record.key] = (_fields(record), _values(store, record))
    return found


def _fields(record: StateRecord) -> dict[str, object]:
    return {"bytes": replace(record, created_s=0.0).to_bytes()}


def _values(store: StateStore, record: StateRecord) -> list[bytes]:
    with store.reading() as reader:
        return [
            bytes(reader.value(record.key, layer, chunk))
            for layer in range(len(record.layout.layers))
            for chunk in range(record.layout.num_chunks(record.num_tokens))
        ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, engine: HCacheEngine) -> Path:
    """All shards, by one worker in one pass."""
    folder = tmp_path_factory.mktemp("whole")
    index(folder, engine, range(SHARDS))
    return folder


def test_every_document_has_a_state_in_its_shard(whole: Path, engine: HCacheEngine) -> None:
    """And the states are those that an engine keeps of the same texts, key by key."""
    placement = Placement([shard.name for shard in Manifest.open(whole).shards])
    documents = states(whole)
    with StateStore.in_memory() as store:
        other = HCacheEngine(
            engine.adapter.model, engine.tokenizer, store, preamble=engine.preamble
        )
        other.precompute(TEXTS)
        expected = {
            (placement.place(record.text), record.key)
            for record in store.records()
            if not record.is_preamble
        }
        preambles = {record.key for record in store.records() if record.is_preamble}
    assert {(name, key) for name, key in documents if key not in preambles} == expected
    assert len(expected) == len(TEXTS)


def test_a_sharded_state_restores_what_reading_gives(whole: Path, engine: HCacheEngine) -> None:
    """Reference path: no states. Our path: a shard's. The same answer, all of it restored."""
    text = TEXTS[5].strip()
    name = Placement([s.name for s in Manifest.open(whole).shards]).place(text)
    prompt = f"{engine.preamble}{text}\n\nWhat?"
    with StateStore.open(whole / name, read_only=True) as store:
        restoring = HCacheEngine(
            engine.adapter.model, engine.tokenizer, store, preamble=engine.preamble
        )
        restored = restoring.generate(prompt)
    assert restored.provenance.restored_tokens == len(engine.preamble) + len(text)
    assert restored.text == engine.generate(prompt).text


ORDERS: dict[str, Callable[[Path, HCacheEngine], object]] = {
    "shard-by-shard": lambda folder, engine: [index(folder, engine, [n]) for n in range(SHARDS)],
    "backwards": lambda folder, engine: [index(folder, engine, [n]) for n in (2, 1, 0)],
    "two-workers": lambda folder, engine: [
        index(folder, engine, [0, 2]),
        index(folder, engine, [1]),
    ],
    "twice": lambda folder, engine: [index(folder, engine, range(SHARDS)) for _ in range(2)],
    "one-document-first": lambda folder, engine: [
        index(folder, engine, range(SHARDS), TEXTS[:1]),
        index(folder, engine, range(SHARDS)),
    ],
}


@pytest.mark.parametrize("order", ORDERS)
def test_whoever_does_it_the_bytes_are_the_same(
    order: str, whole: Path, engine: HCacheEngine, tmp_path: Path
) -> None:
    """Every byte of every state but the time it was made."""
    ORDERS[order](tmp_path, engine)
    if order != "one-document-first":  # there, that one was in a batch of its own
        assert states(tmp_path) == states(whole)
    else:
        assert states(tmp_path).keys() == states(whole).keys()


@pytest.mark.parametrize("after", range(6))
def test_a_killed_worker_is_run_again_and_ends_with_the_same_bytes(
    after: int, whole: Path, engine: HCacheEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL at the n-th transaction, before it is committed or right after it."""
    put_all = StateStore.put_all
    calls: list[None] = []

    def killing(self: StateStore, new: Any) -> int:
        calls.append(None)
        if len(calls) == after // 2 + 2 and after % 2:
            os.kill(os.getpid(), signal.SIGKILL)
        stored = put_all(self, new)
        if len(calls) == after // 2 + 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return stored

    child = os.fork()
    if not child:
        monkeypatch.setattr(StateStore, "put_all", killing)
        with suppress(BaseException):
            index(tmp_path, engine, range(SHARDS))
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    report = index(tmp_path, engine, range(SHARDS))
    assert report.documents == len(TEXTS)
    assert states(tmp_path) == states(whole)
    assert index(tmp_path, engine, range(SHARDS)).new_units == 0


def test_a_unit_that_was_committed_is_not_opened_again(
    whole: Path, engine: HCacheEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the store nor the model is asked."""

    def nothing(*_: object, **__: object) -> None:
        raise AssertionError("it was opened")

    monkeypatch.setattr(StateStore, "open", nothing)
    report = index(whole, engine, range(SHARDS))
    assert (report.new_documents, report.new_units, report.new_tokens) == (0, 0, 0)
    assert report.documents == len(TEXTS)


def test_a_report_counts_what_is_stored(whole: Path, engine: HCacheEngine) -> None:
    """Documents, tokens and bytes as the shards hold them."""
    report = index(whole, engine, range(SHARDS))
    records = {key: state for (_, key), state in states(whole).items()}
    tokens = num_bytes = 0
    for shard in Manifest.open(whole).shards:
        with StateStore.open(shard.folder, read_only=True) as store:
            for record in store.records():
                if not record.is_preamble:
                    tokens += record.num_tokens
                    num_bytes += sum(map(len, records[record.key][1]))
    assert (report.tokens, report.num_bytes) == (tokens, num_bytes)
    assert report.work_s > 0


def test_what_cannot_be_stored_is_counted_by_reason(engine: HCacheEngine, tmp_path: Path) -> None:
    long = "x" * (engine.adapter.spec.window_tokens + 1)
    report = index(tmp_path, engine, range(SHARDS), [*TEXTS[:3], "  ", long])
    assert report.documents == 3
    assert report.skipped == {"empty": 1, TOO_LONG: 1}


def test_the_same_document_twice_is_stored_once(engine: HCacheEngine, tmp_path: Path) -> None:
    """In one unit, and in another one."""
    index(tmp_path, engine, range(SHARDS), [*TEXTS, *TEXTS[:9], TEXTS[3], f"  {TEXTS[3]} "])
    held = [key for _, key in states(tmp_path)]
    preambles = sum(
        (tmp_path / s.name / "data.mdb").is_file() for s in manifest_in(tmp_path).shards
    )
    assert len(held) == len(TEXTS) + preambles


def test_new_documents_cost_their_own_batches(engine: HCacheEngine, tmp_path: Path) -> None:
    """What a unit had already stays as it is."""
    index(tmp_path, engine, range(SHARDS))
    before = states(tmp_path)
    report = index(tmp_path, engine, range(SHARDS), ["A new one comes first.", *TEXTS])
    assert report.new_documents == 1
    assert {key: states(tmp_path)[key] for key in before} == before


def test_progress_says_how_fast_and_how_long(engine: HCacheEngine, tmp_path: Path) -> None:
    told: list[Progress] = []
    index_shard(
        [Document(str(n), text) for n, text in enumerate(TEXTS)],
        "shard-00001",
        manifest_in(tmp_path),
        engine,
        on_progress=told.append,
        total=12,
    )
    assert [p.documents for p in told] == sorted(p.documents for p in told)
    assert all(p.tokens_per_s > 0 for p in told)
    last = told[-1]
    assert last.left_s == pytest.approx(last.seconds / last.documents * max(0, 12 - last.documents))
    assert replace(last, total=None).left_s is None


def test_a_published_shard_takes_nothing_new(engine: HCacheEngine, tmp_path: Path) -> None:
    """The job says so; what is in it already is no reason to complain."""
    index(tmp_path, engine, range(SHARDS))
    for shard in manifest_in(tmp_path).shards:
        shard.publish()
    assert index(tmp_path, engine, range(SHARDS)).new_units == 0
    with pytest.raises(StoreError, match="is published"):
        index(tmp_path, engine, range(SHARDS), [*TEXTS, "One more."])


def test_worth_is_what_indexing_costs_over_what_a_use_saves() -> None:
    worth = Worth(index_s=3.0, fresh_s=2.5, restored_s=0.5, price_per_hour=7.2)
    assert worth.break_even_uses == 1.5
    assert worth.cost(500) == pytest.approx(1.0)
    assert replace(worth, restored_s=2.5).break_even_uses is None
    assert replace(worth, price_per_hour=None).cost(1) is None


def test_worth_is_measured_on_the_states(whole: Path, engine: HCacheEngine) -> None:
    """Both ways are timed, and nothing is written."""
    with StateStore.open(whole / "shard-00000", read_only=True) as store:
        texts: Sequence[str] = [r.text for r in store.records() if not r.is_preamble][:2]
        worth = measure_worth(engine, store, texts, index_s=1.0)
    assert worth.fresh_s > 0
    assert worth.restored_s > 0
    assert not list(engine.store.records())
