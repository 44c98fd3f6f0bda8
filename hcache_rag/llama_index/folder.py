"""A folder of files to a persisted index with states, and questions to it: the command line's work.

The persisted folder holds the index (`hcache-rag.json`, `vectors-*`), the states (`states/`) and
the choice of model (`model.json`), so that a question needs no more than the folder's name.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llama_index.core.base.response.schema import StreamingResponse
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import BaseNode, Document
from llama_index_instrumentation import get_dispatcher
from llama_index_instrumentation.base import BaseEvent
from llama_index_instrumentation.event_handlers import BaseEventHandler

from hcache_rag.bundled import cache_folder
from hcache_rag.errors import SourceError, StoreError, StoreOpenError
from hcache_rag.indexing import PrecomputeReport
from hcache_rag.llama_index.events import StateRestoreEvent
from hcache_rag.llama_index.llm import HCacheLLM
from hcache_rag.llama_index.model_choice import STATES, ModelChoice, has_index
from hcache_rag.llama_index.persisted import load_index, read_manifest
from hcache_rag.llama_index.retriever import HCacheRetriever
from hcache_rag.llama_index.text import file_of, llm_text, source_of
from hcache_rag.measure import find_profile, measure
from hcache_rag.models import ModelAdapter
from hcache_rag.profile import PROFILE_NAME, HardwareProfile
from hcache_rag.sources import FolderContents
from hcache_rag.state import StateKey
from hcache_rag.store import Salvaged, StateStore
from hcache_rag.store.manifest import Manifest, manifest_at

logger = logging.getLogger("hcache_rag")


def documents_of(contents: FolderContents) -> list[Document]:
    """One LlamaIndex document per file. Its path is metadata that no model reads."""
    return [
        Document(
            text=file.text,
            id_=file.path,
            metadata={"file": file.path},
            excluded_llm_metadata_keys=["file"],
            excluded_embed_metadata_keys=["file"],
        )
        for file in contents.files
    ]


def index_folder(
    contents: FolderContents,
    persist_dir: Path,
    choice: ModelChoice,
    *,
    device: str = "auto",
    shards: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    on_measure: Callable[[str], None] | None = None,
) -> tuple[PrecomputeReport, HCacheLLM]:
    """Index a folder's files into `persist_dir`; what is there already is not read again.

    Args:
        device: where the model computes, see `HCacheLLM`.
        shards: that new states are kept in, instead of one file.
        on_measure: told what is being timed while the machine is measured, which is done, shortly,
            where the states have no profile of it; None leaves it unmeasured.

    Raises:
        StoreOpenError: the states are kept in another number of files already.
    """
    if choice.dtype == "auto" and has_index(persist_dir):
        choice = replace(choice, dtype=ModelChoice.of(persist_dir).dtype)
    llm = choice.load(None, device=device)
    with ExitStack() as on_failure:
        on_failure.callback(llm.close)
        if shards is not None:
            _make_shards(persist_dir / STATES, shards)
        if on_measure is not None:
            _ensure_profile(llm.adapter, persist_dir / STATES, on_measure)
        retriever = HCacheRetriever.from_documents(
            documents_of(contents), llm=llm, persist_dir=persist_dir, on_progress=on_progress
        )
        on_failure.pop_all()
    return retriever.report or PrecomputeReport(), llm


def _make_shards(states: Path, count: int) -> None:
    try:
        Manifest.create(states, count)
    except ValueError as error:
        raise StoreOpenError(str(error)) from error


def _ensure_profile(adapter: ModelAdapter, states: Path, on_step: Callable[[str], None]) -> None:
    StateStore.open(states).close()  # a folder that cannot hold states is found out first
    if find_profile(states, adapter.device) is None:
        measure(adapter, states, quick=True, on_step=on_step).save(states / PROFILE_NAME)


def measure_machine(
    persist_dir: Path,
    model: str | None,
    dtype: str,
    *,
    quick: bool,
    device: str = "auto",
    on_step: Callable[[str], None],
) -> tuple[HardwareProfile, Path]:
    """Measure this machine for a model, by default that of the index in `persist_dir`.

    The profile is kept beside the states, and as this machine's newest in the user's cache folder.

    Returns:
        The profile, and its path beside the states.
    """
    is_index = model is None and has_index(persist_dir)
    choice = ModelChoice.of(persist_dir) if is_index else ModelChoice(model, dtype)
    llm = choice.load(None, device=device)
    states = persist_dir / STATES
    StateStore.open(states).close()
    found = measure(llm.adapter, states, quick=quick, on_step=on_step)
    beside, newest = profile_paths(persist_dir)
    found.save(beside)
    try:
        newest.parent.mkdir(parents=True, exist_ok=True)
        found.save(newest)
    except OSError as error:
        logger.warning("%s is not kept: %s", newest, error.strerror)
    return found, beside


def profile_paths(persist_dir: Path) -> tuple[Path, Path]:
    """Where `measure_machine` keeps a profile: beside the states, and in the cache folder."""
    return persist_dir / STATES / PROFILE_NAME, cache_folder() / PROFILE_NAME


@dataclass(frozen=True, slots=True)
class Answer:
    """An answered question.

    Args:
        text: the answer.
        sources: file names of the passages that it was given, best first.
        first_text_s: seconds from the question to the first text.
        seconds: to the last.
        provenance: of the last prompt, see `hcache_rag.Provenance.to_dict`.
        num_prompts: so many it took; where the passages do not fit into one, an answer is refined.
    """

    text: str
    sources: tuple[str, ...]
    first_text_s: float
    seconds: float
    provenance: dict[str, Any]
    num_prompts: int = 1


def ask(
    persist_dir: Path,
    llm: HCacheLLM,
    question: str,
    *,
    top_k: int = 4,
    on_text: Callable[[str], None] | None = None,
) -> Answer:
    """Answer a question from an index through an ordinary streaming query engine.

    Raises:
        SourceError: there is no index, or the question is empty.
    """
    if not question.strip():
        raise SourceError("the question is empty")
    retriever = HCacheRetriever.from_persist_dir(persist_dir, llm=llm, similarity_top_k=top_k)
    engine = RetrieverQueryEngine.from_args(retriever, llm=llm, streaming=True)
    return answer(engine, question, on_text=on_text)


def answer(engine: Any, question: str, *, on_text: Callable[[str], None] | None = None) -> Answer:
    """Ask any streaming LlamaIndex query engine, and time it."""
    started = time.perf_counter()
    first_text_s = 0.0
    pieces: list[str] = []
    with collecting_restores() as restores:
        response = engine.query(question)
        stream = (
            response.response_gen if isinstance(response, StreamingResponse) else [str(response)]
        )
        for piece in stream or []:
            if piece and not pieces:
                first_text_s = time.perf_counter() - started
            if piece:
                pieces.append(piece)
                if on_text:
                    on_text(piece)
    names = dict.fromkeys(file_of(scored.node) for scored in response.source_nodes)
    return Answer(
        "".join(pieces).strip(),
        tuple(names),
        first_text_s,
        time.perf_counter() - started,
        restores[-1] if restores else {},
        len(restores),
    )


class _Collector(BaseEventHandler):
    found: list[dict[str, Any]] = []  # noqa: RUF012 - pydantic copies it for every instance

    @classmethod
    def class_name(cls) -> str:
        return "hcache_rag.RestoreCollector"

    def handle(self, event: BaseEvent, **_: Any) -> None:
        if isinstance(event, StateRestoreEvent):
            self.found.append(event.provenance)


@contextmanager
def collecting_restores() -> Iterator[list[dict[str, Any]]]:
    """The provenance of every call that ends inside the block, in order."""
    root, collector = get_dispatcher(), _Collector()
    root.add_event_handler(collector)
    try:
        yield collector.found
    finally:
        root.event_handlers.remove(collector)


def open_states(persist_dir: str | os.PathLike[str], *, read_only: bool = True) -> StateStore:
    """The state store of a persisted folder, or the folder's own where it is one.

    Raises:
        SourceError: there are neither states nor an index in the folder.
        StoreOpenError: its states cannot be opened.
    """
    return StateStore.open(_states_of(Path(persist_dir).expanduser()), read_only=read_only)


def _states_of(folder: Path) -> Path:
    for states in (folder / STATES, folder):
        if (states / "data.mdb").is_file() or manifest_at(states):
            return states
    read_manifest(folder)
    return folder / STATES


def salvage_states(persist_dir: Path) -> Salvaged:
    """Save what is whole of a folder's states where they cannot be opened."""
    return StateStore.salvage(_states_of(persist_dir))


def read_again(persist_dir: Path, texts: Sequence[str] | None = None) -> int:
    """Store the missing states of some texts of an index, or of all, and of its preamble.

    Returns:
        How many texts were read; 0 where there are states and no index.
    """
    if not has_index(persist_dir):
        return 0
    if texts is None:
        texts = [llm_text(node) for node in load_index(persist_dir).nodes]
    llm = ModelChoice.of(persist_dir).load(persist_dir)
    try:
        return llm.engine.precompute(texts).stored
    finally:
        llm.close()


@dataclass(frozen=True, slots=True)
class Collected:
    """What `collect_garbage` has done.

    Args:
        deleted: states.
        freed_bytes: that they took.
        returned_bytes: that the disk was given back; None where that was not asked for, or refused.
        refused: why giving it back was refused, if it was.
    """

    deleted: int
    freed_bytes: int
    returned_bytes: int | None = None
    refused: str | None = None


def collect_garbage(persist_dir: Path, *, compact: bool = False) -> Collected:
    """Delete the states that an index does not need.

    Those are the states of texts that are not in it, and of the others those that do not belong to
    the documents that have the text: they were made with other options. Where there are states and
    no index, as with conversations alone or an index that is not finished, all are needed.

    Args:
        compact: give the disk back what is free then.
    """
    nodes = load_index(persist_dir).nodes if has_index(persist_dir) else None
    with open_states(persist_dir, read_only=False) as states:
        used, on_disk = states.used_bytes(), states.file_bytes()
        deleted = states.gc(_needed(states, nodes)) if nodes is not None else 0
        freed = used - states.used_bytes()
        if not compact:
            return Collected(deleted, freed)
        try:
            return Collected(deleted, freed, on_disk - states.compact())
        except StoreError as error:
            return Collected(deleted, freed, refused=str(error))


def _needed(states: StateStore, nodes: Sequence[BaseNode]) -> set[StateKey]:
    """The states of nodes that belong to their documents; all of a text that has none such."""
    needed = set[StateKey]()
    owned = {source: set(states.keys_of(source)) for source in set(map(source_of, nodes))}
    for node in nodes:
        keys = {record.key for record in states.find(llm_text(node))}
        needed |= keys & owned[source_of(node)] or keys
    return needed
