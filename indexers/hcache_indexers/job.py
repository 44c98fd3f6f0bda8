"""An indexing job as every driver has it: which documents, which model, which shards.

A job is small and can be sent anywhere; each worker loads the model from it once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from llama_index.core.schema import BaseNode

from hcache_rag.corpus import Corpus, Document, OnSkip
from hcache_rag.engine import HCacheEngine
from hcache_rag.llama_index import HCacheLLM
from hcache_rag.llama_index.text import llm_text
from hcache_rag.measure import find_profile
from hcache_rag.models import device_named
from hcache_rag.offline import OnProgress, ShardReport, index_shards
from hcache_rag.sequences import BATCH_TOKENS
from hcache_rag.store import StateStore
from hcache_rag.store.manifest import UNIT_DOCUMENTS, Manifest
from hcache_rag.worth import Worth, measure_worth

DEFAULT_SHARDS = 16


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be indexed, and how.

    Args:
        source: a folder, or a file of JSON lines or Parquet.
        states: the folder of the shards.
        model: a folder with a transformers model; None is the bundled one.
        dtype: what it is loaded as.
        text_column: of JSON lines and Parquet.
        shards: how many there are; more workers than that are of no use.
        unit_documents: documents of a unit of work: what a lost worker costs at most.
        batch_tokens: that the model reads at once.
        device: where it computes, see `HCacheLLM`.
    """

    source: Path
    states: Path
    model: str | None = None
    dtype: str = "float32"
    text_column: str = "text"
    shards: int = DEFAULT_SHARDS
    unit_documents: int = UNIT_DOCUMENTS
    batch_tokens: int = BATCH_TOKENS
    device: str = "auto"

    def corpus(self) -> Corpus:
        """The documents.

        Raises:
            SourceError: there is no such file or folder.
        """
        return Corpus(self.source.expanduser(), self.text_column)

    def manifest(self) -> Manifest:
        """The job's shards, made if nobody has made them yet.

        Raises:
            StoreOpenError, ValueError: see `Manifest.create`.
        """
        return Manifest.create(self.states, self.shards, self.unit_documents)

    @contextmanager
    def engine(self) -> Iterator[HCacheEngine]:
        """The model, ready to read documents as prompts of the default template hold them.

        Raises:
            ModelNotFoundError, UnsupportedModelError: see there.
        """
        with StateStore.in_memory() as nowhere:
            profile = find_profile(self.states, device_named(self.device))
            llm = HCacheLLM(
                self.model, dtype=self.dtype, device=self.device, store=nowhere, profile=profile
            )
            try:
                yield llm.engine
            finally:
                llm.close()

    def run(
        self,
        engine: HCacheEngine,
        shards: Sequence[int],
        *,
        on_progress: OnProgress | None = None,
        on_skip: OnSkip = lambda _name, _reason: None,
        total: int | None = None,
    ) -> ShardReport:
        """Index some shards, by their numbers.

        What holds no text belongs to no shard: it is told, and counted, with shard 0.
        """
        skipped: Counter[str] = Counter()

        def skip(name: str, reason: str) -> None:
            if 0 in shards:
                skipped[reason] += 1
                on_skip(name, reason)

        report = index_shards(
            self.corpus().documents(skip),
            shards,
            self.manifest(),
            engine,
            batch_tokens=self.batch_tokens,
            on_progress=on_progress,
            total=total,
        )
        return report.plus(ShardReport(skipped=dict(skipped)))

    def worth(
        self, engine: HCacheEngine, report: ShardReport, price_per_hour: float | None = None
    ) -> Worth | None:
        """What indexing costs and saves, measured with two documents; None without any."""
        for shard in self.manifest().shards:
            if not shard.is_remote and (shard.folder / "data.mdb").is_file():
                with StateStore.open(shard.folder, read_only=True) as store:
                    found = (record for record in store.records() if not record.is_preamble)
                    texts = [record.text for record in islice(found, 2)]
                    if texts and report.documents:
                        index_s = report.work_s / report.documents
                        return measure_worth(engine, store, texts, index_s, price_per_hour)
        return None


def node_documents(nodes: Iterable[BaseNode]) -> Iterator[Document]:
    """LlamaIndex documents or nodes, with the text that prompts will hold."""
    for node in nodes:
        yield Document(node.node_id, llm_text(node))
