"""An index in a folder that several change or open at once, that cannot be written, or that is
given embeddings which make no sense.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import WordEmbedding
from llama_index.core.schema import Document, TextNode
from test_changes import (
    TEXTS,
    assert_holds,
    document,
    documents,
    found,
    in_a_child,
    made,
    opened,
    stored,
)

from hcache_rag.errors import SourceError, StoreError
from hcache_rag.llama_index import HCacheLLM, HCacheRetriever, persisted
from hcache_rag.llama_index import precompute as precompute_module
from hcache_rag.llama_index import retriever as module
from hcache_rag.llama_index.nearest import Nearest, normalised
from hcache_rag.llama_index.persisted import IndexFolder, load_index
from hcache_rag.llama_index.vectors import Change, DimensionsError, VectorIndex

NewLLM = Callable[..., HCacheLLM]
TIMEOUT_S = 60

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def retriever(new_llm: NewLLM, tmp_path: Path) -> HCacheRetriever:
    return made(new_llm, tmp_path / "kept")


def beside(retriever: HCacheRetriever) -> HCacheRetriever:
    """Another one on the same folder, as another process has it."""
    return HCacheRetriever.from_persist_dir(
        folder_of(retriever), llm=retriever._llm, embed_model=WordEmbedding(), similarity_top_k=99
    )


def folder_of(retriever: HCacheRetriever) -> Path:
    assert retriever._folder is not None
    return retriever._folder.path


# --- a folder that cannot be written --------------------------------------------------------------


def no_space(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


CHANGES: dict[str, Callable[[HCacheRetriever], object]] = {
    "insert": lambda r: r.insert(document("pluto", "Pluto is far out.")),
    "update": lambda r: r.update(document("mars", "Mars is red.")),
    "delete": lambda r: r.delete("mars"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_cannot_be_written_has_not_happened(
    retriever: HCacheRetriever, new_llm: NewLLM, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    folder = folder_of(retriever)
    [path] = folder.glob("vectors-*/changes.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        with pytest.raises(SourceError, match="cannot be written: No space left") as raised:
            CHANGES[change](retriever)
    assert str(folder) in str(raised.value)
    assert path.read_bytes() == b""
    assert found(retriever) == set(TEXTS.values())
    assert set(TEXTS.values()) <= stored(retriever)
    retriever.update(document("x", "Some x."))
    assert found(retriever) == {*TEXTS.values(), "Some x."}
    retriever._llm.close()
    assert found(opened(new_llm, folder)) == {*TEXTS.values(), "Some x."}


def test_a_change_is_there_though_the_folder_cannot_be_written_anew(
    retriever: HCacheRetriever,
    new_llm: NewLLM,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = folder_of(retriever)
    monkeypatch.setattr(persisted, "_LEAST_BYTES", 0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", no_space)
        for turn in range(3):
            retriever.update(document("mars", f"Mars in its turn {turn}."))
    assert "cannot be written: No space left" in caplog.text
    assert len(list(folder.glob("vectors-*"))) == 1  # what was begun takes no room
    expected = {*TEXTS.values(), "Mars in its turn 2."} - {TEXTS["mars"]}
    assert found(retriever) == expected
    retriever._llm.close()
    assert found(opened(new_llm, folder)) == expected


def test_indexing_that_cannot_be_written_leaves_what_was_there(
    retriever: HCacheRetriever, new_llm: NewLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(retriever)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", no_space)
        with pytest.raises(SourceError, match="cannot be written"):
            HCacheRetriever.from_documents(
                documents()[:1],
                llm=retriever._llm,
                embed_model=WordEmbedding(),
                persist_dir=folder,
            )
    assert len(list(folder.glob("vectors-*"))) == 1
    retriever._llm.close()
    assert found(opened(new_llm, folder)) == set(TEXTS.values())


def test_a_folder_that_is_gone_is_an_error_that_names_it(
    retriever: HCacheRetriever, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(retriever)
    monkeypatch.setattr(module, "precompute", lambda *_, **__: None)
    for path in folder.iterdir():
        path.rename(folder.parent / f"away-{path.name}")
    with pytest.raises(SourceError, match="holds no index") as raised:
        retriever.delete("mars")
    assert str(folder) in str(raised.value)


# --- several at once ------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["claim", "settle", "disown"])
def test_nobody_else_changes_the_folder_until_the_states_have_followed(
    retriever: HCacheRetriever, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Or else the states of who was last could be deleted by who was first."""
    fcntl = pytest.importorskip("fcntl")
    original, is_taken = getattr(module, step), []

    def looking(*arguments: Any, **options: Any) -> None:
        with (folder_of(retriever) / ".lock").open("wb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                is_taken.append(False)
            except BlockingIOError:
                is_taken.append(True)
        original(*arguments, **options)

    monkeypatch.setattr(module, step, looking)
    for change in CHANGES.values():
        change(retriever)
    again = [document("earth"), document("venus")]
    HCacheRetriever.from_documents(
        again, llm=retriever._llm, embed_model=WordEmbedding(), persist_dir=folder_of(retriever)
    )
    assert len(is_taken) >= 4
    assert all(is_taken)


@pytest.mark.parametrize("where", ["in memory", "persisted"])
def test_threads_that_change_one_index_do_not_lose_each_other(
    new_llm: NewLLM, tmp_path: Path, where: str
) -> None:
    retriever = made(new_llm, tmp_path if where == "persisted" else None)
    errors: list[BaseException] = []

    def change(number: int) -> None:
        try:
            for turn in range(6):
                retriever.update(document("mars", f"Mars is seen by {number} in turn {turn}."))
                retriever.refresh([document("venus", f"Venus {turn}."), document(f"new-{number}")])
                retriever.delete("earth")
        except BaseException as error:
            errors.append(error)

    TEXTS.update({f"new-{n}": f"A new one of number {n}." for n in range(3)})
    try:
        threads = [threading.Thread(target=change, args=(n,)) for n in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(TIMEOUT_S)
        assert not any(thread.is_alive() for thread in threads)
    finally:
        new = [TEXTS.pop(f"new-{n}") for n in range(3)]
    assert errors == []
    assert sorted(str(n.ref_doc_id) for n in retriever.nodes) == sorted(
        ["mars", "mercury", "venus", "new-0", "new-1", "new-2"]
    )
    assert {*new, TEXTS["mercury"]} < found(retriever)
    assert_holds(retriever, list(found(retriever)))


def test_what_another_process_has_inserted_cannot_be_inserted(retriever: HCacheRetriever) -> None:
    other = beside(retriever)
    other.insert(document("pluto", "Pluto is far out."))
    with pytest.raises(ValueError, match="'pluto' is in the index"):
        retriever.insert(document("pluto", "Pluto is a dog."))
    assert found(retriever) == {*TEXTS.values(), "Pluto is far out."}


def test_a_state_that_goes_with_another_document_meanwhile_is_made_again(
    retriever: HCacheRetriever, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its text was read, or rather found, and then the only document with it was deleted."""
    precompute, other = precompute_module.precompute, beside(retriever)

    def interrupted(*arguments: Any, **options: Any) -> Any:
        report = precompute(*arguments, **options)
        monkeypatch.setattr(module, "precompute", precompute)
        assert other.delete("mars")
        return report

    monkeypatch.setattr(module, "precompute", interrupted)
    retriever.insert(document("the same", TEXTS["mars"]))
    assert_holds(retriever, list(TEXTS.values()))


def test_a_folder_of_another_embedding_meanwhile_is_not_changed(
    retriever: HCacheRetriever,
) -> None:
    HCacheRetriever.from_documents(
        documents(),
        llm=retriever._llm,
        embed_model=WordEmbedding("other words"),
        persist_dir=folder_of(retriever),
    )
    with pytest.raises(SourceError, match="made with the embedding 'other words', not with"):
        retriever.update(document("mars", "Mars is red."))
    assert {node.ref_doc_id for node in load_index(folder_of(retriever)).nodes} == set(TEXTS)


@pytest.mark.parametrize("moment", ["before the vectors", "before the changes"])
def test_an_index_that_is_written_anew_while_it_is_read_is_read_again(
    retriever: HCacheRetriever, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    retriever.delete("mars")
    index, folder = retriever._index, folder_of(retriever)
    where: Any = Nearest if moment == "before the vectors" else IndexFolder
    name = "read" if where is Nearest else "_apply_changes"
    original = getattr(where, name)

    def written_anew(*arguments: Any) -> Any:
        monkeypatch.setattr(where, name, original)
        retriever.update(document("earth", "Earth has one moon."))
        with retriever._folder.turn():  # type: ignore[union-attr]
            retriever._folder.save(index)  # type: ignore[union-attr]
        if where is Nearest:
            return original(*arguments)
        return IndexFolder._apply_changes(*arguments)

    monkeypatch.setattr(where, name, written_anew)
    texts = {node.get_content() for node in load_index(folder).nodes}
    assert texts == {TEXTS["mercury"], TEXTS["venus"], "Earth has one moon."}


def test_a_line_that_was_read_but_not_kept_is_forgotten(retriever: HCacheRetriever) -> None:
    other = beside(retriever)
    retriever.delete("mars")
    with other._turn():
        pass
    assert found(other) == set(TEXTS.values()) - {TEXTS["mars"]}
    [path] = folder_of(retriever).glob("vectors-*/changes.jsonl")
    path.write_bytes(b"")  # as whoever wrote it did when the disk refused it
    other.update(document("venus", "Venus is hot."))
    expected = {*TEXTS.values(), "Venus is hot."} - {TEXTS["venus"]}
    assert found(other) == expected
    assert {n.get_content() for n in load_index(folder_of(retriever)).nodes} == expected


# --- forks ----------------------------------------------------------------------------------------


def in_time(work: Callable[[], object]) -> int:
    """How a forked process ended that does some work."""

    def limited() -> None:
        signal.alarm(TIMEOUT_S)
        work()

    return in_a_child(limited)


def test_a_fork_does_not_keep_a_folder_that_another_thread_was_changing(
    retriever: HCacheRetriever,
) -> None:
    entered, go = threading.Event(), threading.Event()

    def changing() -> None:
        with retriever._turn():
            entered.set()
            go.wait(TIMEOUT_S)

    thread = threading.Thread(target=changing)
    thread.start()
    assert entered.wait(TIMEOUT_S)
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(TIMEOUT_S)
        os.close(writing)
        os.read(reading, 1)  # until the parent has changed something
        retriever.delete("mars")
        os._exit(0)
    go.set()
    thread.join(TIMEOUT_S)
    done = threading.Event()

    def parent() -> None:
        retriever.delete("venus")
        done.set()

    threading.Thread(target=parent, daemon=True).start()
    is_free = done.wait(TIMEOUT_S)
    os.close(writing)
    ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert is_free
    assert ended == 0
    os.close(reading)
    nodes = load_index(folder_of(retriever)).nodes
    assert {node.ref_doc_id for node in nodes} == {"mercury", "earth"}


@pytest.mark.parametrize("lock", ["indexer", "texts", "buffers", "planner", "resident", "index"])
def test_a_fork_waits_for_no_thread_that_is_not_there(
    retriever: HCacheRetriever, lock: str
) -> None:
    llm = retriever._llm
    engine = llm.engine
    locks: dict[str, Any] = {
        "indexer": engine.bound.indexer._one_at_a_time,
        "texts": engine._announced._lock,
        "buffers": engine.answering.buffers._lock,
        "planner": engine.planner._lock,
        "resident": llm._resident._lock,
        "index": retriever._index._lock,
    }

    def work() -> None:
        retriever.insert(document("pluto", "Pluto is far out."))
        llm.complete(TEXTS["mars"] + "\n\nWhat?")
        assert len(retriever.retrieve("Which planet?")) == len(TEXTS) + 1

    with locks[lock]:
        assert in_time(work) == 0


# --- embeddings -----------------------------------------------------------------------------------


class Odd(WordEmbedding):
    """Embeds texts that say so as it is told."""

    def __init__(self, odd: Callable[[list[float]], list[float]]) -> None:
        super().__init__()
        object.__setattr__(self, "_odd", odd)

    def _get_text_embedding(self, text: str) -> list[float]:
        vector = super()._get_text_embedding(text)
        return self._odd(vector) if "odd" in text else vector  # type: ignore[attr-defined]

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)


ODD: dict[str, tuple[Callable[[list[float]], list[float]], str]] = {
    "not a number": (lambda v: [float("nan"), *v[1:]], "1 of an embedding's 32 numbers are not"),
    "infinite": (lambda v: [float("-inf"), *v[1:]], "1 of an embedding's 32 numbers are not"),
    "shorter": (lambda v: v[:16], "16 (and 32 dim|dimensions, those in the index 32)"),
    "nothing": (lambda _v: [], r"has shape \(0,\)"),
}


@pytest.mark.parametrize("where", ["in memory", "persisted"])
@pytest.mark.parametrize("what", ODD)
def test_embeddings_that_make_no_sense_are_refused(
    new_llm: NewLLM, tmp_path: Path, what: str, where: str
) -> None:
    odd, message = ODD[what]
    folder = tmp_path if where == "persisted" else None
    retriever = made(new_llm, folder, embed_model=Odd(odd))
    with pytest.raises(ValueError, match=message):
        retriever.update(document("mars", "This is odd."))
    with pytest.raises(ValueError, match=message):
        retriever.refresh([document("x", "A new one."), document("y", "An odd one.")])
    with pytest.raises(ValueError, match=message):
        retriever.retrieve("Is that odd?")
    assert_holds(retriever, list(TEXTS.values()))
    retriever.delete("mars")
    assert_holds(retriever, [text for name, text in TEXTS.items() if name != "mars"])


def test_embeddings_of_two_widths_are_refused(new_llm: NewLLM) -> None:
    both = [Document(text="A text."), Document(text="An odd one.")]
    with pytest.raises(DimensionsError, match="16 and 32 dimensions"):
        HCacheRetriever.from_documents(both, llm=new_llm(), embed_model=Odd(lambda v: v[:16]))


def test_an_index_of_another_width_is_embedded_anew(new_llm: NewLLM, tmp_path: Path) -> None:
    """As where an embedding of the same name was asked for fewer dimensions."""
    made(new_llm, tmp_path)._llm.close()
    narrow = Odd(lambda v: v[:16])
    odd = [Document(text=f"{text} That is odd.", id_=name) for name, text in TEXTS.items()]
    retriever = HCacheRetriever.from_documents(
        [*odd, Document(text="odd", id_="another")],
        llm=new_llm(),
        embed_model=narrow,
        persist_dir=tmp_path,
    )
    assert load_index(tmp_path).nearest.dimensions == 16
    assert len(retriever.retrieve("odd?")) == 4


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1.0, 1e30, 1e300])
def test_the_length_of_an_embedding_does_not_matter(scale: float) -> None:
    vector = np.random.default_rng(0).normal(size=32)
    expected = vector / np.sqrt(np.sum(vector**2))
    np.testing.assert_allclose(normalised(list(scale * vector)), expected, rtol=1e-6)


def test_zero_stays_zero() -> None:
    assert not normalised([0.0] * 4).any()


def test_all_vectors_may_be_replaced_by_others_of_another_width() -> None:
    index = VectorIndex("words")
    first = [TextNode(id_="a", text="a"), TextNode(id_="b", text="b")]
    index.apply(Change((), first, np.eye(2, 4, dtype=np.float32)))
    with pytest.raises(DimensionsError, match="8 dimensions, those in the index 4"):
        index.apply(Change((), first[:1], np.eye(1, 8, dtype=np.float32)))
    assert len(index) == 2
    index.apply(Change(("a", "b"), first, np.eye(2, 8, dtype=np.float32)))
    assert index.embeddings().shape == (2, 8)


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_an_index_is_opened_as_the_kind_that_is_asked_for(
    new_llm: NewLLM, tmp_path: Path, kind: Any
) -> None:
    other: Any = "flat" if kind == "hnsw" else "hnsw"
    made(new_llm, tmp_path, index=other)._llm.close()
    retriever = opened(new_llm, tmp_path, index=kind)
    assert retriever._index.nearest.is_graph == (kind == "hnsw")
    retriever.delete("mars")
    assert_holds(retriever, [text for name, text in TEXTS.items() if name != "mars"])


# --- a closed LLM ---------------------------------------------------------------------------------


def test_a_closed_llm_makes_no_store(
    new_llm: NewLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    llm = new_llm()
    llm.close()
    with pytest.raises(StoreError, match=r"this LLM \(.*\) is closed"):
        llm.complete("What?")
    with pytest.raises(StoreError, match="is closed"):
        llm.use_store(tmp_path / "kept")
    assert list((tmp_path / "temporary").iterdir()) == []
