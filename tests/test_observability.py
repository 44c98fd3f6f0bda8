"""What operators see: LlamaIndex's events and spans, OpenTelemetry, Prometheus, and silence."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import Recorder, WordEmbedding
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import Document, TextNode
from llama_index_instrumentation import get_dispatcher
from llama_index_instrumentation.span_handlers import SimpleSpanHandler

from hcache_rag import StateStore
from hcache_rag.llama_index import (
    HCacheLLM,
    HCachePrecompute,
    HCacheRetriever,
    StateEvictEvent,
    StatePrecomputeEndEvent,
    StatePrecomputeStartEvent,
    StateRestoreEvent,
)

TEXTS = [
    "Mercury is the smallest planet and the closest one to the Sun.",
    "Venus is the hottest planet because of its thick atmosphere.",
    "Mars is a cold desert planet with the tallest volcano of all.",
]
QUESTION = "Which planet is a cold desert?"

NewLLM = Callable[..., HCacheLLM]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    root, its = get_dispatcher(), Recorder()
    root.add_event_handler(its)
    yield its
    root.event_handlers.remove(its)


def documents() -> list[Document]:
    return [Document(text=text, id_=f"d{i}") for i, text in enumerate(TEXTS)]


def test_precompute_says_what_it_does(new_llm: NewLLM, recorder: Recorder) -> None:
    step = HCachePrecompute(new_llm())
    step([TextNode(text=text) for text in (*TEXTS, "")])
    start, end = recorder.events
    assert isinstance(start, StatePrecomputeStartEvent)
    assert isinstance(end, StatePrecomputeEndEvent)
    assert start.documents == 3
    assert (end.stored, end.reused, end.skipped) == (3, 0, 0)
    assert step.report is not None
    assert (end.stored_bytes, end.seconds) == (step.report.stored_bytes, step.report.seconds)
    assert start.span_id == end.span_id
    assert str(start.span_id).startswith("precompute-")


def test_states_that_have_to_go_are_said(
    new_llm: NewLLM, recorder: Recorder, tmp_path: Path
) -> None:
    with StateStore.open(tmp_path, namespace_max_bytes=1 << 20) as store:
        llm = new_llm(store=store, storage_dtype="float32")
        texts = [f"{n} " + "A long text about one planet. " * 20 for n in range(12)]
        for text in texts:
            HCachePrecompute(llm)([TextNode(text=text)])
        events = [e for e in recorder.events if isinstance(e, StateEvictEvent)]
        counted = store.counters()
    assert 0 < sum(event.evicted for event in events) == counted.evictions
    assert sum(event.evicted_bytes for event in events) == counted.evicted_bytes


def spans_of(handler: SimpleSpanHandler) -> dict[str, str]:
    """The name of each span's parent, by the span's own."""
    names = {span.id_: span.id_.partition("-")[0] for span in handler.completed_spans}
    return {
        names[span.id_]: names.get(span.parent_id or "", "") for span in handler.completed_spans
    }


@pytest.fixture
def spans() -> Iterator[SimpleSpanHandler]:
    root, handler = get_dispatcher(), SimpleSpanHandler()
    root.add_span_handler(handler)
    yield handler
    root.span_handlers.remove(handler)


def test_what_is_done_is_in_spans(new_llm: NewLLM, spans: SimpleSpanHandler) -> None:
    llm = new_llm()
    retriever = HCacheRetriever.from_documents(documents(), llm=llm, embed_model=WordEmbedding())
    retriever.refresh([Document(text="Mars is red.", id_="d2")])
    retriever.delete("d1")
    RetrieverQueryEngine.from_args(retriever, llm=llm).query(QUESTION)
    found = spans_of(spans)
    assert found["precompute"] == "HCacheRetriever.refresh"
    assert found["restore"] in ("HCacheLLM.chat", "HCacheLLM.complete")
    assert "HCacheRetriever.delete" in found
    assert "HCacheRetriever._retrieve" in found


@pytest.fixture(scope="module")
def exporter() -> Iterator[Any]:
    """LlamaIndex's own way to OpenTelemetry; nothing of this library knows of it."""
    pytest.importorskip("llama_index.observability.otel", reason="the extra otel is not installed")
    from llama_index.observability.otel import LlamaIndexOpenTelemetry
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    its, root = InMemorySpanExporter(), get_dispatcher()
    handlers, span_handlers = list(root.event_handlers), list(root.span_handlers)
    LlamaIndexOpenTelemetry(span_exporter=its, span_processor="simple").start_registering()
    yield its
    root.event_handlers[:], root.span_handlers[:] = handlers, span_handlers


@pytest.mark.parametrize("streaming", [False, True])
def test_open_telemetry_gets_the_restore_with_its_numbers(
    new_llm: NewLLM, exporter: Any, *, streaming: bool
) -> None:
    exporter.clear()
    llm = new_llm()
    retriever = HCacheRetriever.from_documents(documents(), llm=llm, embed_model=WordEmbedding())
    engine = RetrieverQueryEngine.from_args(retriever, llm=llm, streaming=streaming)
    assert str(engine.query(QUESTION))
    spans = exporter.get_finished_spans()
    found = {span.name.partition("-")[0]: span for span in spans}
    [event] = [e for e in found["restore"].events if e.name == "StateRestoreEvent"]
    told = str(dict(event.attributes))
    names = "exact_tokens relocated_tokens repaired_tokens missed_tokens bytes_read first_token"
    for name in (*names.split(), "reading", "plan"):
        assert name in told
    assert "StatePrecomputeEndEvent" in {e.name for e in found["precompute"].events}
    if not streaming:  # else LlamaIndex has ended the spans around it by then
        names_by_id = {span.context.span_id: span.name for span in spans}
        assert names_by_id[found["restore"].parent.span_id].startswith("HCacheLLM.")


def test_a_restore_event_is_in_the_span_of_its_restore(new_llm: NewLLM, recorder: Recorder) -> None:
    """Also where the answer is computed on another thread, behind LlamaIndex's own spans."""
    llm = new_llm()
    llm.complete("Hello")
    list(llm.stream_complete("Hello"))
    events = [event for event in recorder.events if isinstance(event, StateRestoreEvent)]
    assert len(events) == 2
    assert all(str(event.span_id).startswith("restore-") for event in events)


def samples(registry: Any) -> dict[tuple[str, ...], float]:
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in registry.collect()
        for sample in family.samples
    }


def test_prometheus_sees_what_the_store_and_the_engine_count(new_llm: NewLLM) -> None:
    prometheus = pytest.importorskip("prometheus_client", reason="no extra metrics")
    from hcache_rag.metrics import register

    llm, registry = new_llm(store_missed=False), prometheus.CollectorRegistry()
    collector = register(llm.engine, registry)
    assert samples(registry)["hcache_store_documents",] == 0
    llm.engine.precompute(TEXTS[:2])
    llm.engine.announce(TEXTS)
    answer = llm.complete(llm.preamble + "\n\n".join(TEXTS) + "\n\nWhat?")
    spent = answer.additional_kwargs["hcache"]
    found = samples(registry)
    stats = llm.engine.store.stats()
    assert found["hcache_store_documents",] == stats.documents == 2
    assert found["hcache_store_states_bytes",] == stats.state_bytes
    assert found["hcache_store_file_bytes",] == stats.file_bytes
    assert found["hcache_store_asked_documents_total", "hit"] == 2
    assert found["hcache_store_asked_documents_total", "miss"] == 1
    assert found["hcache_prompts_total",] == 1
    for source in ("exact", "relocated", "repaired", "fresh", "missed"):
        assert found["hcache_prompt_tokens_total", source] == spent[f"{source}_tokens"]
    assert found["hcache_documents_total", "missed"] == 1
    assert found["hcache_read_bytes_total",] == spent["bytes_read"]
    assert found["hcache_stage_seconds_total", "match"] == spent["seconds"]["match"]
    text = prometheus.generate_latest(registry).decode()
    assert "hcache_store_documents 2.0" in text
    registry.unregister(collector)
    assert samples(registry) == {}


def test_prometheus_sees_a_store_alone_and_a_closed_one_as_nothing(store: StateStore) -> None:
    prometheus = pytest.importorskip("prometheus_client", reason="no extra metrics")
    from hcache_rag.metrics import register

    registry = prometheus.CollectorRegistry()
    register(store, registry)
    assert samples(registry)["hcache_store_evicted_documents_total",] == 0
    store.close()
    assert samples(registry) == {}


def test_the_library_says_nothing_unless_it_is_asked_to() -> None:
    """No line on standard error where a program has set up no logging."""
    script = (
        "import hcache_rag, logging\n"
        "logging.getLogger('hcache_rag').warning('a warning')\n"
        "logging.basicConfig()\n"
        "logging.getLogger('hcache_rag').warning('it was asked')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("", "WARNING:hcache_rag:it was asked\n")
    assert logging.getLogger("hcache_rag").propagate is not False
