"""Documents that had no state are read when nobody waits; and states are read ahead."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import FixedRetriever
from tiny import SHAPES, byte_tokenizer, tiny_model

from hcache_rag import GenerationOptions, HCacheEngine, Provenance, StateStore, StoreFullError
from hcache_rag.errors import UnsupportedModelError
from hcache_rag.indexing import Indexer
from hcache_rag.llama_index import HCacheLLM, HCacheRetriever
from hcache_rag.measure import drop_page_cache
from hcache_rag.missed import MAX_WAITING
from hcache_rag.models import KEY
from hcache_rag.store.states import StoreReader
from hcache_rag.texts import TextSet

TEXTS = [f"Document {n} tells of planet number {n * 7} and of its moons." for n in range(4)]
HEAD = "Read:\n\n"
PROMPT = HEAD + "\n\n".join(TEXTS[:2]) + "\n\nWhat?"
TIMEOUT_S = 60

pytestmark = pytest.mark.usefixtures("one_thread")


def engine_on(store: StateStore | Path, **options: Any) -> HCacheEngine:
    given = {"preamble": HEAD, "store_missed": True, **options}
    engine = HCacheEngine(tiny_model(SHAPES[1]), byte_tokenizer(), store, **given)
    engine.announce(TEXTS)
    return engine


@pytest.fixture
def engine(store: StateStore) -> Iterator[HCacheEngine]:
    with engine_on(store) as made:
        yield made


def ask(engine: HCacheEngine, prompt: str = PROMPT, **options: Any) -> Provenance:
    short = GenerationOptions(max_new_tokens=2)
    return engine.generate(prompt, options=short, **options).provenance


def stored(engine: HCacheEngine) -> set[str]:
    return {record.text for record in engine.store.records() if not record.is_preamble}


def test_what_was_missed_is_stored_afterwards(engine: HCacheEngine) -> None:
    first = ask(engine, PROMPT)
    assert (first.documents_missed, first.documents_queued) == (2, 2)
    engine.flush()
    assert stored(engine) == set(TEXTS[:2])
    second = ask(engine, PROMPT)
    assert (second.documents_restored, second.documents_missed, second.documents_queued) == (
        2,
        0,
        0,
    )


def test_it_is_the_state_that_precompute_stores(engine: HCacheEngine, tmp_path: Path) -> None:
    ask(engine, PROMPT)
    engine.flush()
    other = HCacheEngine(engine.adapter.model, engine.tokenizer, tmp_path / "o", preamble=HEAD)
    with other:
        other.precompute(TEXTS[:1])
        [theirs], [ours] = other.store.find(TEXTS[0]), engine.store.find(TEXTS[0])
        assert theirs.key == ours.key
        with other.store.reading() as expected, engine.store.reading() as found:
            for layer in range(len(ours.layout.layers)):
                assert found.value(ours.key, layer, 0) == expected.value(theirs.key, layer, 0)


@pytest.mark.parametrize("case", ["off", "read-only", "nobody said that they are documents"])
def test_nothing_is_stored_where_it_should_not_be(tmp_path: Path, case: str) -> None:
    StateStore.open(tmp_path).close()
    with (
        StateStore.open(tmp_path, read_only=case == "read-only") as store,
        engine_on(store, store_missed=case != "off") as engine,
    ):
        if "nobody" in case:
            engine._announced = TextSet()
            engine.bound = engine._bind(engine.adapter)
        assert ask(engine).documents_queued == 0
        engine.flush()
        assert stored(engine) == set()


def test_what_a_changed_model_has_read_is_not_kept(
    engine: HCacheEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody trains it on while it reads."""
    precompute = Indexer.precompute

    def trained(*arguments: Any) -> Any:
        report = precompute(*arguments)
        with torch.no_grad():
            engine.adapter.tap(0, KEY).module.weight.add_(1.0)  # type: ignore[operator]
        return report

    monkeypatch.setattr(Indexer, "precompute", trained)
    ask(engine, HEAD + TEXTS[0] + "\n\nWhat?")
    engine.flush()
    assert stored(engine) == set()


class Gate:
    """Holds the background thread where it reads a document, until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered, self.go = threading.Event(), threading.Event()
        self.attempts: list[str] = []
        precompute = Indexer.precompute

        def held(its: Indexer, texts: Any, *arguments: Any) -> Any:
            if threading.current_thread().name.startswith("hcache-missed"):
                self.attempts += texts
                self.entered.set()
                assert self.go.wait(TIMEOUT_S)
            return precompute(its, texts, *arguments)

        monkeypatch.setattr(Indexer, "precompute", held)


def test_a_model_in_training_mode_keeps_nothing(
    engine: HCacheEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """Its dropout would be kept in states."""
    caplog.set_level("INFO")
    engine.adapter.model.train()
    try:
        with pytest.raises(UnsupportedModelError, match=r"training mode.*call model\.eval\(\)"):
            engine.precompute(TEXTS)
        assert ask(engine, PROMPT, remember=True).documents_missed == 2
        engine.flush()
    finally:
        engine.adapter.model.train(False)
    assert "training mode" in caplog.text
    assert list(engine.store.records()) == []
    assert engine.paths.store is None
    assert engine.precompute(TEXTS).stored == len(TEXTS)


def test_a_request_interrupts_what_is_being_read(
    engine: HCacheEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the next layer; nothing of it is stored, and it is read after the request."""
    gate = Gate(monkeypatch)
    ask(engine, PROMPT)
    assert gate.entered.wait(TIMEOUT_S)
    done: list[set[str]] = []

    def on_text(_text: str) -> None:
        gate.go.set()
        if not done:
            waiting = engine._missed
            while waiting._is_reading:  # it ends, or the test's timeout does
                threading.Event().wait(0.001)
            done.append(stored(engine))

    ask(engine, PROMPT, on_text=on_text)
    assert done == [set()]
    engine.flush()
    assert stored(engine) == set(TEXTS[:2])
    assert gate.attempts == [TEXTS[0], TEXTS[0], TEXTS[1]]


def test_closing_leaves_what_is_being_read(
    store: StateStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    engine = engine_on(store)
    ask(engine, PROMPT)
    assert gate.entered.wait(TIMEOUT_S)
    closing = threading.Thread(target=engine.close)
    closing.start()
    gate.go.set()
    closing.join(TIMEOUT_S)
    assert not closing.is_alive()
    assert stored(engine) == set()


def test_so_many_wait_and_no_more(engine: HCacheEngine) -> None:
    texts = [f"Text {n} of a great many of them." for n in range(MAX_WAITING + 5)]
    with engine._missed.paused():
        assert engine._missed.add(texts[:3]) == 3
        assert engine._missed.add(texts) == MAX_WAITING
    engine.flush()
    assert stored(engine) == set(texts[:MAX_WAITING])


def test_what_cannot_be_stored_is_let_be(
    engine: HCacheEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> int:
        raise StoreFullError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(StateStore, "put_all", full)
        ask(engine, PROMPT)
        engine.flush()
    assert stored(engine) == set()
    assert ask(engine, PROMPT).documents_queued == 2
    engine.flush()
    assert stored(engine) == set(TEXTS[:2])


def test_an_error_that_nobody_foresaw_ends_no_more_than_one_document(
    engine: HCacheEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    read, wrong = engine._missed._read, [RuntimeError("out of memory")]

    def sometimes(text: str) -> None:
        if wrong:
            raise wrong.pop()
        read(text)

    monkeypatch.setattr(engine._missed, "_read", sometimes)
    ask(engine, PROMPT)
    engine.flush()
    assert stored(engine) == {TEXTS[1]}
    assert "out of memory" in caplog.text
    assert ask(engine, PROMPT).documents_queued == 1
    engine.flush()
    assert stored(engine) == set(TEXTS[:2])


def test_a_fork_reads_what_it_has_missed_itself(engine: HCacheEngine) -> None:
    ask(engine, HEAD + TEXTS[0] + "\n\nWhat?")
    engine.flush()
    pid = os.fork()
    if pid == 0:
        try:
            torch.set_num_threads(1)
            ask(engine, HEAD + TEXTS[1] + "\n\nWhat?")
            engine.flush()
            os._exit(0 if stored(engine) == set(TEXTS[:2]) else 1)
        except BaseException:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_what_was_served_is_summed_up(engine: HCacheEngine) -> None:
    answers = [ask(engine, PROMPT)]
    engine.flush()
    answers.append(ask(engine, PROMPT))
    served = engine.served
    assert served.prompts == 2
    for name in ("exact_tokens", "fresh_tokens", "missed_tokens", "documents_queued", "bytes_read"):
        assert getattr(served, name) == sum(getattr(answer, name) for answer in answers)
    total = sum(answer.seconds["match"] for answer in answers)
    assert served.seconds["match"] == pytest.approx(total)


# --- reading ahead --------------------------------------------------------------------------------


class Loads:
    """What the store is asked to bring into memory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[bytes, int]] = []
        load = StoreReader.load

        def noting(its: StoreReader, key: bytes, layer: int, chunk: int) -> int:
            self.seen.append((key, layer))
            return load(its, key, layer, chunk)

        monkeypatch.setattr(StoreReader, "load", noting)


def test_retrieving_reads_the_states_ahead_layer_by_layer(
    new_llm: Callable[..., HCacheLLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = new_llm()
    llm.engine.precompute(TEXTS[:3])
    loads = Loads(monkeypatch)
    HCacheRetriever.wrap(FixedRetriever(TEXTS[1:]), llm, prefetch=False).retrieve("Which?")
    llm.engine.flush()
    assert loads.seen == []
    HCacheRetriever.wrap(FixedRetriever(TEXTS[1:]), llm).retrieve("Which?")
    llm.engine.flush()
    keys = [llm.engine.store.find(text)[0].key for text in TEXTS[1:3]]
    layers = range(llm.engine.adapter.spec.num_layers)
    assert loads.seen == [(key, layer) for layer in layers for key in keys]
    assert not list(llm.engine.store._live.pins)


def test_a_new_question_ends_reading_for_the_last_one(
    engine: HCacheEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.precompute(TEXTS)
    loads, load = Loads(monkeypatch), StoreReader.load

    def asked_meanwhile(its: StoreReader, key: bytes, layer: int, chunk: int) -> int:
        if len(loads.seen) == 1:
            engine.prefetch([TEXTS[3]])
        return load(its, key, layer, chunk)

    monkeypatch.setattr(StoreReader, "load", asked_meanwhile)
    engine.prefetch(TEXTS[:2])
    engine.flush()
    engine.flush()
    [last] = engine.store.find(TEXTS[3])
    assert [key for key, _ in loads.seen[2:]] == [last.key] * engine.adapter.spec.num_layers


def test_reading_ahead_does_not_go_beyond_its_bound(
    engine: HCacheEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.precompute(TEXTS)
    loads = Loads(monkeypatch)
    monkeypatch.setattr("hcache_rag.prefetch.MAX_BYTES", 1)
    engine.prefetch(TEXTS)
    engine.flush()
    assert len(loads.seen) == 1


def test_reading_ahead_of_a_closed_store_harms_nobody(engine: HCacheEngine) -> None:
    engine.precompute(TEXTS)
    engine.store.close()
    engine.prefetch(TEXTS)
    engine.flush()


def resident_pages(path: Path) -> int:
    """Pages of a file that the system has in memory."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        pages = mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ)
        found = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        address = np.frombuffer(pages, np.uint8).ctypes.data
        ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), found)
        return sum(each & 1 for each in found)


def test_reading_ahead_brings_the_pages_into_memory(tmp_path: Path) -> None:
    model, tokenizer, path = tiny_model(SHAPES[0]), byte_tokenizer(), tmp_path / "data.mdb"
    text = "A long text about one planet. " * 60
    options: Any = {"storage_dtype": "float32", "representation": "kv"}
    with HCacheEngine(model, tokenizer, tmp_path, **options) as engine:
        num_bytes = engine.precompute([text]).stored_bytes
    with HCacheEngine(model, tokenizer, tmp_path, **options) as engine:
        drop_page_cache(path)  # but for what opening has mapped
        before = resident_pages(path)
        if before * mmap.PAGESIZE > num_bytes / 2:
            pytest.skip("this file system keeps its pages")
        engine.prefetch([text])
        engine.flush()
        gained = (resident_pages(path) - before) * mmap.PAGESIZE
    assert gained > num_bytes / 2
