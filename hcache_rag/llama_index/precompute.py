"""`HCachePrecompute`: an ingestion step that lets the model read every node once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal

from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.schema import BaseNode, TransformComponent
from tqdm import tqdm

from hcache_rag.errors import HCacheError
from hcache_rag.indexing import PrecomputeReport
from hcache_rag.llama_index.llm import HCacheLLM
from hcache_rag.llama_index.text import llm_texts

logger = logging.getLogger("hcache_rag")


class HCachePrecompute(TransformComponent):
    """Stores the states of the nodes that pass through, and passes them on unchanged.

    Put it behind the splitter and behind every metadata extractor, which change the text that the
    model reads. A pipeline's cache skips transforms whose fields are unchanged; the store's id is
    one of the fields here, so that a new store is filled.

    Args:
        llm: the LLM that will answer.
        show_progress: show a progress bar.
        on_error: "warn" (the default) logs what goes wrong and passes the nodes on: the answer
            will be right without a state, only slower; "raise" lets it out.
    """

    show_progress: bool = Field(default=False, description="Show a progress bar.")
    on_error: Literal["warn", "raise"] = Field(default="warn", description="What an error does.")
    store_id: str = Field(default="", description="Which store is filled.")
    root: str = Field(default="", description="Which model and tokenizer the states are of.")

    _llm: HCacheLLM = PrivateAttr()
    _report: PrecomputeReport | None = PrivateAttr(default=None)

    def __init__(self, llm: HCacheLLM, **kwargs: Any) -> None:
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
            self._report = precompute(self._llm, nodes, show_progress=self.show_progress)
        except (HCacheError, OSError) as error:
            if self.on_error == "raise":
                raise
            logger.warning("the states of %d nodes were not stored: %s", len(nodes), error)
        return nodes


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
    if on_progress is not None:
        return llm.engine.precompute(llm_texts(nodes), on_progress=on_progress)
    with tqdm(desc="Reading documents", unit="doc", disable=not show_progress) as bar:

        def advance(done: int, total: int) -> None:
            if bar.total != total:
                bar.reset(total)
                bar.initial = done
            bar.n = done
            bar.refresh()

        return llm.engine.precompute(llm_texts(nodes), on_progress=advance)
