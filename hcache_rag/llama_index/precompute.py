"""`HCachePrecompute`: an ingestion step that lets the model read every node once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal

from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.schema import BaseNode, TransformComponent
from llama_index_instrumentation import get_dispatcher
from tqdm import tqdm

from hcache_rag.errors import HCacheError
from hcache_rag.indexing import PrecomputeReport
from hcache_rag.llama_index.arguments import expect, refuse_unknown
from hcache_rag.llama_index.elsewhere import Elsewhere
from hcache_rag.llama_index.events import report_precompute, report_start, reporting_evictions
from hcache_rag.llama_index.llm import HCacheLLM
from hcache_rag.llama_index.owning import claim
from hcache_rag.llama_index.text import llm_texts

logger = logging.getLogger("hcache_rag")
_dispatcher = get_dispatcher(__name__)


class HCachePrecompute(TransformComponent):
    """Stores the states of the nodes that pass through, and passes them on unchanged.

    Put it behind the splitter and behind every metadata extractor, which change the text that the
    model reads. A pipeline's cache skips transforms whose fields are unchanged; the store's id is
    one of the fields here, so that a new store is filled. What is stored already is not read again.

    With `num_workers`, each worker opens model and store by their folders and computes on one
    thread; that takes their memory, and no less time than one process with all threads. A model or
    store that is in memory only cannot be opened there, which is an error as any other.

    Args:
        llm: the LLM that will answer.
        show_progress: show a progress bar.
        on_error: "warn" (the default) logs what goes wrong and passes the nodes on: the answer
            will be right without a state, only slower, and no document is lost in a pipeline that
            has deleted its old version already; "raise" lets it out.
    """

    show_progress: bool = Field(default=False, description="Show a progress bar.")
    on_error: Literal["warn", "raise"] = Field(default="warn", description="What an error does.")
    store_id: str = Field(default="", description="Which store is filled.")
    root: str = Field(default="", description="Which model and tokenizer the states are of.")

    _llm: HCacheLLM | Elsewhere | HCacheError = PrivateAttr()
    _report: PrecomputeReport | None = PrivateAttr(default=None)

    def __init__(self, llm: HCacheLLM, **kwargs: Any) -> None:
        expect("llm", llm, HCacheLLM)
        refuse_unknown(kwargs, type(self).model_fields)
        engine = llm.engine
        fields = {"store_id": engine.store.store_id, "root": engine.root.hex(), **kwargs}
        super().__init__(**fields)
        self._llm = llm

    @classmethod
    def class_name(cls) -> str:
        """The stable name in serialised forms."""
        return "HCachePrecompute"

    @property
    def report(self) -> PrecomputeReport | None:
        """What the last call stored."""
        return self._report

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Store the states of `nodes`."""
        try:
            llm = self._opened()
            self._report = precompute(llm, nodes, show_progress=self.show_progress)
            claim(llm, nodes)
        except Exception as error:
            if self.on_error == "raise":
                raise
            logger.warning("the states of %d nodes were not stored: %s", len(nodes), error)
        return nodes

    async def acall(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """The same on another thread; the event loop goes on."""
        return await asyncio.to_thread(self.__call__, nodes, **kwargs)

    def _opened(self) -> HCacheLLM:
        if isinstance(self._llm, HCacheError):
            raise self._llm
        return self._llm.open() if isinstance(self._llm, Elsewhere) else self._llm

    def __reduce__(self) -> tuple[Callable[..., HCachePrecompute], tuple[Any, ...]]:
        """Passing it to a worker never fails: a pipeline may have deleted documents by then."""
        named: Elsewhere | HCacheError
        try:
            named = Elsewhere.of(self._llm) if isinstance(self._llm, HCacheLLM) else self._llm
        except HCacheError as error:
            named = error
        return _passed_on, (self.model_dump(exclude={"class_name"}), named)


def _passed_on(fields: dict[str, Any], named: Elsewhere | HCacheError) -> HCachePrecompute:
    fields.pop("class_name", None)
    step = HCachePrecompute.model_construct(**fields)
    step._llm = named
    return step


@_dispatcher.span
def precompute(
    llm: HCacheLLM,
    nodes: Sequence[BaseNode],
    *,
    show_progress: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> PrecomputeReport:
    """Store the states of nodes, with a progress bar that starts at what is stored already.

    Args:
        on_progress: called with (documents done, documents to do) instead of showing a bar.
    """
    texts = llm_texts(nodes)
    report_start(len(texts))
    with reporting_evictions(llm.engine.store):
        report = _with_progress(llm, texts, show_progress, on_progress)
    report_precompute(report)
    return report


def _with_progress(
    llm: HCacheLLM,
    texts: Sequence[str],
    show_progress: bool,
    on_progress: Callable[[int, int], None] | None,
) -> PrecomputeReport:
    if on_progress is not None:
        return llm.engine.precompute(texts, on_progress=on_progress)
    with tqdm(desc="Reading documents", unit="doc", disable=not show_progress) as bar:

        def advance(done: int, total: int) -> None:
            if bar.total != total:
                bar.reset(total)
                bar.initial = done
            bar.n = done
            bar.refresh()

        return llm.engine.precompute(texts, on_progress=advance)
