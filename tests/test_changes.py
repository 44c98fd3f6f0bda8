"""Documents that change in a retriever's own index: what is found, what is stored, and kills."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import faiss
import pytest
from fakes import FixedRetriever, WordEmbedding
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import Document
from test_retriever import texts_of

from hcache_rag import SourceError, StateStore, StoreFullError
from hcache_rag.llama_index import HCacheLLM, HCacheRetriever
from hcache_rag.llama_index.folder import collect_garbage
from hcache_rag.llama_index.persisted import IndexFolder, load_index
from hcache_rag.store import states as states_module

TEXTS = {
    "mercury": "Mercury is the smallest planet and the closest one to the Sun.",
    "venus": "Venus is the hottest planet because of its thick atmosphere.",
    "earth": "Earth is the only planet known to have life and liquid oceans.",
    "mars": "Mars is a cold desert planet with the tallest volcano of all.",
}
LONG = " ".join(f"In storm {n} of Jupiter the wind was strong." for n in range(12))
"""More than a node."""

NewLLM = Callable[..., HCacheLLM]

pytestmark = pytest.mark.usefixtures("one_thread")


def document(name: str, text: str | None = None, **metadata: Any) -> Document:
    return Document(
        text=TEXTS[name] if text is None else text,
        id_=name,
        metadata=metadata,
        excluded_llm_metadata_keys=list(metadata),
        excluded_embed_metadata_keys=list(metadata),
    )


def documents() -> list[Document]:
    return [document(name) for name in TEXTS]


def made(new_llm: NewLLM, folder: Path | None, **options: Any) -> HCacheRetriever:
    options = {"embed_model": WordEmbedding(), "similarity_top_k": 99, **options}
    return HCacheRetriever.from_documents(documents(), llm=new_llm(), persist_dir=folder, **options)


def opened(new_llm: NewLLM, folder: Path, **options: Any) -> HCacheRetriever:
    options = {"embed_model": WordEmbedding(), "similarity_top_k": 99, **options}
    return HCacheRetriever.from_persist_dir(folder, llm=new_llm(), **options)


def found(retriever: HCacheRetriever) -> set[str]:
    return set(texts_of(retriever.retrieve("Which planet is it?")))


def stored(retriever: HCacheRetriever) -> set[str]:
    store = retriever._llm.engine.store
    return {record.text for record in store.records() if not record.is_preamble}


def assert_holds(retriever: HCacheRetriever, texts: Sequence[str]) -> None:
    """These texts are found, and just these have states."""
    assert found(retriever) == stored(retriever) == set(texts)


@pytest.fixture(params=["in memory", "persisted", "persisted, opened again"])
def retriever(
    request: pytest.FixtureRequest, new_llm: NewLLM, tmp_path: Path
) -> Iterator[HCacheRetriever]:
    """And whatever was done to it, the folder holds in the end."""
    folder = tmp_path / "kept" if request.param != "in memory" else None
    its = made(new_llm, folder)
    if "opened" in request.param and folder is not None:
        its._llm.close()
        its = opened(new_llm, folder)
    yield its
    if folder is not None:
        its._llm.close()
        again = opened(new_llm, folder)
        assert {n.node_id for n in again.nodes} == {n.node_id for n in its.nodes}
        assert found(again) == found(its)


def test_what_is_inserted_is_found_and_has_a_state(retriever: HCacheRetriever) -> None:
    retriever.insert(document("pluto", "Pluto is far out."))
    assert_holds(retriever, [*TEXTS.values(), "Pluto is far out."])
    assert retriever.report is not None
    assert retriever.report.stored == 1
    with pytest.raises(ValueError, match="'pluto' is in the index; update or refresh it"):
        retriever.insert(document("pluto", "Pluto again."))
    assert_holds(retriever, [*TEXTS.values(), "Pluto is far out."])


def test_what_is_deleted_is_gone_with_its_states(retriever: HCacheRetriever) -> None:
    assert retriever.delete("venus")
    assert not retriever.delete("venus")
    assert not retriever.delete("never there")
    assert_holds(retriever, [text for name, text in TEXTS.items() if name != "venus"])


def test_what_is_updated_takes_the_place_of_the_old(retriever: HCacheRetriever) -> None:
    retriever.update(document("mars", "Mars is red."))
    retriever.update(document("new", "Somebody new."))
    texts = {**TEXTS, "mars": "Mars is red.", "new": "Somebody new."}
    assert_holds(retriever, list(texts.values()))
    retriever.update(document("mars", ""))
    assert found(retriever) - {""} == set(texts.values()) - {"Mars is red."}


def test_a_text_of_two_documents_has_a_state_until_both_are_gone(
    retriever: HCacheRetriever,
) -> None:
    retriever.insert(document("twin", TEXTS["earth"]))
    retriever.delete("earth")
    assert_holds(retriever, list(TEXTS.values()))
    retriever.update(document("twin", "Another one."))
    texts = {**TEXTS, "earth": "Another one."}
    assert_holds(retriever, list(texts.values()))


def test_refresh_says_what_has_changed_and_reads_no_more(retriever: HCacheRetriever) -> None:
    given = [
        document("mercury"),
        document("venus", "Venus has clouds."),
        document("earth", colour="blue"),
        document("pluto", "Pluto is far out."),
    ]
    assert retriever.refresh(given) == [False, True, True, True]
    assert retriever.report is not None
    assert (retriever.report.stored, retriever.report.reused) == (2, 1)
    texts = {**TEXTS, "venus": "Venus has clouds.", "pluto": "Pluto is far out."}
    assert_holds(retriever, list(texts.values()))
    assert retriever.refresh(given) == [False] * 4
    [earth] = [n for n in retriever.nodes if n.ref_doc_id == "earth"]
    assert earth.metadata == {"colour": "blue"}


def test_refresh_agrees_with_llama_index_s_own(new_llm: NewLLM) -> None:
    from llama_index.core import VectorStoreIndex

    ours = made(new_llm, None)
    theirs = VectorStoreIndex.from_documents(documents(), embed_model=WordEmbedding())
    rounds = [
        documents(),
        [document("mars", "Mars is red."), document("venus")],
        [document("mars", "Mars is red.", page=1), document("x", "Some x.")],
        [document("x", "Some x."), document("mars")],
    ]
    for given in rounds:
        assert ours.refresh(given) == theirs.refresh_ref_docs(given)
        texts = {node.get_content() for node in theirs.docstore.docs.values()}
        assert found(ours) == texts


def test_a_changed_document_is_read_from_its_first_change_on(new_llm: NewLLM) -> None:
    """And the nodes of it that are as before are not even embedded."""
    embedding = WordEmbedding()
    retriever = HCacheRetriever.from_documents(
        documents(),
        llm=new_llm(storage_dtype="float32"),
        embed_model=embedding,
        transformations=[SentenceSplitter(chunk_size=200, chunk_overlap=0, tokenizer=list)],
    )
    retriever.insert(document("jupiter", LONG))
    before, embedding.embedded[:] = len(retriever.nodes), []
    retriever.update(document("jupiter", LONG + "And more of it."))
    report = retriever.report
    assert report is not None
    assert (report.stored, report.continued) == (1, 1)
    assert 0 < report.continued_tokens < report.stored_tokens
    assert len(embedding.embedded) == 1
    assert len(retriever.nodes) == before
    assert len(stored(retriever)) == before


def test_what_cannot_be_stored_leaves_everything_as_it_was(
    retriever: HCacheRetriever, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> int:
        raise StoreFullError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(StateStore, "put_all", full)
        with pytest.raises(StoreFullError):
            retriever.update(document("mars", "Mars is red."))
        with pytest.raises(StoreFullError):
            retriever.refresh([document("mars", "Mars is red."), document("x", "Some x.")])
    assert_holds(retriever, list(TEXTS.values()))


def test_a_wrapped_retriever_s_documents_are_changed_elsewhere(new_llm: NewLLM) -> None:
    retriever = HCacheRetriever.wrap(FixedRetriever(list(TEXTS.values())), new_llm())
    with pytest.raises(TypeError, match="wraps a FixedRetriever"):
        retriever.delete("mars")


def test_searching_while_documents_change_finds_whole_documents(new_llm: NewLLM) -> None:
    retriever = made(new_llm, None)
    errors: list[BaseException] = []
    done = threading.Event()

    def search() -> None:
        try:
            while not done.is_set():
                names = [s.node.ref_doc_id for s in retriever.retrieve("Which planet?")]
                assert len(names) == len(set(names))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=search)
    thread.start()
    for turn in range(10):
        retriever.update(document("mars", f"Mars in its turn {turn}."))
        retriever.refresh([document("mars"), document("x", f"x {turn}")])
    done.set()
    thread.join(timeout=60)
    assert not thread.is_alive()
    assert errors == []


# --- the folder -----------------------------------------------------------------------------------


def test_a_small_change_does_not_write_everything_anew(new_llm: NewLLM, tmp_path: Path) -> None:
    retriever = made(new_llm, tmp_path)
    [generation] = tmp_path.glob("vectors-*")
    before = {p.name: p.stat().st_mtime_ns for p in generation.iterdir()}
    retriever.delete("venus")
    retriever.insert(document("pluto", "Pluto is far out."))
    assert list(tmp_path.glob("vectors-*")) == [generation]
    after = {p.name: p.stat().st_mtime_ns for p in generation.iterdir()}
    assert [name for name in before if before[name] != after[name]] == ["changes.jsonl"]


def test_many_changes_are_put_together(
    new_llm: NewLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hcache_rag.llama_index.persisted._LEAST_BYTES", 1 << 12)
    retriever = made(new_llm, tmp_path)
    [first] = tmp_path.glob("vectors-*")
    for turn in range(20):
        retriever.update(document("mars", f"Mars in its turn {turn}."))
    [last] = tmp_path.glob("vectors-*")
    assert last != first
    assert found(opened(new_llm, tmp_path)) == found(retriever)


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_the_kind_of_index_is_kept_and_deletes_as_well(
    new_llm: NewLLM, tmp_path: Path, kind: Any
) -> None:
    retriever = made(new_llm, tmp_path, index=kind)
    assert retriever._index.nearest.is_graph == (kind == "hnsw")
    retriever.delete("venus")
    again = opened(new_llm, tmp_path, index=kind)
    assert again._index.nearest.is_graph == (kind == "hnsw")
    assert_holds(again, [text for name, text in TEXTS.items() if name != "venus"])


def first_format(folder: Path) -> None:
    """What the release before wrote: rows in order, a bare flat index, nothing else."""
    index = load_index(folder)
    [generation] = folder.glob("vectors-*")
    lines = [json.loads(line) for line in (generation / "nodes.jsonl").read_text().splitlines()]
    for line in lines:
        del line["number"]
    (generation / "nodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (generation / "changes.jsonl").unlink()
    flat = faiss.IndexFlatIP(index.embeddings().shape[1])
    flat.add(index.embeddings())
    faiss.write_index(flat, str(generation / "vectors.faiss"))
    manifest = json.loads((folder / "hcache-rag.json").read_text())
    (folder / "hcache-rag.json").write_text(json.dumps({**manifest, "format": 1}))


def test_a_folder_of_the_first_format_is_opened_and_changed(
    new_llm: NewLLM, tmp_path: Path
) -> None:
    before = made(new_llm, tmp_path).retrieve("Which planet is a cold desert?")
    first_format(tmp_path)
    retriever = opened(new_llm, tmp_path)
    again = retriever.retrieve("Which planet is a cold desert?")
    assert [(s.node_id, s.score) for s in again] == [(s.node_id, s.score) for s in before]
    retriever.delete("mars")
    retriever.insert(document("pluto", "Pluto is far out."))
    texts = {**TEXTS, "mars": "Pluto is far out."}
    assert_holds(opened(new_llm, tmp_path), list(texts.values()))


@pytest.mark.parametrize("what", ["half a line", "a line of nothing"])
def test_a_change_that_was_not_written_to_its_end_has_not_happened(
    new_llm: NewLLM, tmp_path: Path, what: str
) -> None:
    made(new_llm, tmp_path).delete("venus")
    [path] = tmp_path.glob("vectors-*/changes.jsonl")
    whole = path.read_bytes()
    path.write_bytes(whole + (whole[:40] if what == "half a line" else b"\0" * 40 + b"\n"))
    retriever = opened(new_llm, tmp_path)
    assert found(retriever) == {text for name, text in TEXTS.items() if name != "venus"}
    retriever.delete("mars")
    assert path.read_bytes().startswith(whole)
    assert found(opened(new_llm, tmp_path)) == {TEXTS["mercury"], TEXTS["earth"]}


def test_a_change_that_is_damaged_is_an_error_that_names_the_folder(
    new_llm: NewLLM, tmp_path: Path
) -> None:
    retriever = made(new_llm, tmp_path)
    retriever.delete("venus")
    retriever.delete("mars")
    [path] = tmp_path.glob("vectors-*/changes.jsonl")
    data = bytearray(path.read_bytes())
    data[30] ^= 1
    path.write_bytes(data)
    with pytest.raises(SourceError, match=r"change 1 in changes\.jsonl is damaged") as raised:
        opened(new_llm, tmp_path)
    assert str(tmp_path) in str(raised.value)


def test_two_that_change_one_folder_do_not_lose_each_other(new_llm: NewLLM, tmp_path: Path) -> None:
    first = made(new_llm, tmp_path)
    second = HCacheRetriever.from_persist_dir(
        tmp_path, llm=first._llm, embed_model=WordEmbedding(), similarity_top_k=99
    )
    first.delete("venus")
    second.insert(document("pluto", "Pluto is far out."))
    third = [document(name) for name in ("earth", "mars")]
    HCacheRetriever.from_documents(
        third, llm=first._llm, embed_model=WordEmbedding(), persist_dir=tmp_path
    )
    first.update(document("mars", "Mars is red."))
    expected = {TEXTS["earth"], "Mars is red."}
    assert found(first) == expected
    second.delete("never there")
    assert found(opened(new_llm, tmp_path)) == expected


# --- kills ----------------------------------------------------------------------------------------


def in_a_child(work: Callable[[], None]) -> int:
    """The signal that ended a forked process, or 0; what it raises is 256 more."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 256 * os.WEXITSTATUS(status)


def killed_at(step: int) -> None:
    """From now on, this process ends at the nth thing that changes a file, in its middle or after.

    Writes of the index are cut in half; of the store, whole transactions are the steps.
    """
    left = step

    def count() -> bool:
        nonlocal left
        left -= 1
        return left == 0

    def stopping(function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            result = function(*arguments, **options)
            if count():
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    def half_written(self: IndexFolder, change: Any) -> None:
        if count():
            path = self.path / str(self._generation) / "changes.jsonl"
            with path.open("ab") as lines:
                lines.write(b"0123456789abcdef {")
            os.kill(os.getpid(), signal.SIGKILL)
        append(self, change)

    append = IndexFolder._append
    IndexFolder._append = half_written  # type: ignore[method-assign]
    os.fsync, os.replace, shutil.rmtree = map(stopping, (os.fsync, os.replace, shutil.rmtree))
    states_module.StateStore.put_all = stopping(StateStore.put_all)  # type: ignore[method-assign]
    states_module.StateStore.assign_all = stopping(  # type: ignore[method-assign]
        StateStore.assign_all
    )
    states_module.StateStore.delete_owner = stopping(  # type: ignore[method-assign]
        StateStore.delete_owner
    )


def changing(retriever: HCacheRetriever) -> None:
    retriever.refresh([document("mars", "Mars is red."), document("pluto", "Pluto is far out.")])


def deleting(retriever: HCacheRetriever) -> None:
    retriever.delete("mars")


def indexing(retriever: HCacheRetriever) -> None:
    HCacheRetriever.from_documents(
        [document("venus"), document("pluto", "Pluto is far out.")],
        llm=retriever._llm,
        embed_model=WordEmbedding(),
        persist_dir=retriever._folder.path,  # type: ignore[union-attr]
    )


RED = (set(TEXTS.values()) - {TEXTS["mars"]}) | {"Mars is red.", "Pluto is far out."}
AFTER: dict[Callable[[HCacheRetriever], None], set[str]] = {
    changing: RED,
    deleting: set(TEXTS.values()) - {TEXTS["mars"]},
    indexing: {TEXTS["venus"], "Pluto is far out."},
}


@pytest.mark.parametrize("work", AFTER, ids=lambda work: str(work.__name__))
def test_a_kill_at_any_moment_leaves_the_old_index_or_the_new_one(
    new_llm: NewLLM, tmp_path: Path, work: Callable[[HCacheRetriever], None]
) -> None:
    """And what it leaves of states that no node has is freed by gc."""
    made(new_llm, tmp_path / "kept")._llm.close()
    old, new = set(TEXTS.values()), AFTER[work]
    seen = []
    for step in range(1, 40):
        folder = tmp_path / f"copy-{step}"
        shutil.copytree(tmp_path / "kept", folder)

        def child(folder: Path = folder, step: int = step) -> None:
            retriever = opened(new_llm, folder)
            killed_at(step)
            work(retriever)

        ended = in_a_child(child)
        assert ended in (0, signal.SIGKILL)
        retriever = opened(new_llm, folder)
        texts = found(retriever)
        assert texts in (old, new)
        assert texts <= stored(retriever)  # whenever it is ended, every node has its states
        retriever._llm.close()
        collect_garbage(folder)
        assert_holds(opened(new_llm, folder), list(texts))
        if not ended:
            break
        seen.append(texts == new)
    assert not ended
    assert texts == new
    assert seen == sorted(seen)  # once it is there, it stays
    assert {False, True} <= set(seen)


# --- other options --------------------------------------------------------------------------------


def test_indexing_with_other_options_replaces_the_states(new_llm: NewLLM, tmp_path: Path) -> None:
    made(new_llm, tmp_path)._llm.close()
    llm = new_llm(context_at_index="documents")
    retriever = HCacheRetriever.from_documents(
        documents(), llm=llm, embed_model=WordEmbedding(), persist_dir=tmp_path
    )
    store = llm.engine.store
    records = [record for record in store.records() if not record.is_preamble]
    preamble = [record for record in store.records() if record.is_preamble]
    assert sorted(record.text for record in records) == sorted(TEXTS.values())
    assert {record.parent for record in records}.isdisjoint({p.key for p in preamble})
    retriever._llm.close()
    again = made(new_llm, tmp_path)
    records = [r for r in again._llm.engine.store.records() if not r.is_preamble]
    assert sorted(record.text for record in records) == sorted(TEXTS.values())
    assert {record.parent for record in records} == {p.key for p in preamble}


def test_gc_frees_the_states_of_other_options(new_llm: NewLLM, tmp_path: Path) -> None:
    """Where somebody was killed before the old ones were dropped."""
    retriever = made(new_llm, tmp_path)
    llm = new_llm(context_at_index="documents", store=retriever._llm.engine.store)
    llm.engine.precompute(TEXTS.values())
    assert llm.engine.store.stats().documents == 2 * len(TEXTS)
    retriever._llm.close()
    assert collect_garbage(tmp_path).deleted == len(TEXTS)
    assert_holds(opened(new_llm, tmp_path), list(TEXTS.values()))
