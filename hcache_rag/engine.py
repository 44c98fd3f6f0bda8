"""`HCacheEngine`: the facade. Index texts once, answer prompts with their states restored."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hcache_rag.account import Served, provenance_of
from hcache_rag.answering import Answering, Request
from hcache_rag.bound import Bound, Fidelity, Settings
from hcache_rag.buffers import BufferPool
from hcache_rag.cache import RestoringCache
from hcache_rag.choice import (
    LEAST_TIME,
    Objective,
    layout_asked_for,
)
from hcache_rag.compose import Composition
from hcache_rag.device import DEVICES
from hcache_rag.errors import UnreachableStateError, UnsupportedModelError
from hcache_rag.forks import ForkedLock
from hcache_rag.generation import GenerationOptions
from hcache_rag.indexing import Indexer, PrecomputeReport
from hcache_rag.layout import StateLayout
from hcache_rag.measure import find_profile
from hcache_rag.missed import MissedReader
from hcache_rag.models import ModelAdapter, why_not_in
from hcache_rag.openmp import give_back_threads, lent_threads
from hcache_rag.paths import MAX_BYTES, Paths
from hcache_rag.planner import Planner
from hcache_rag.prefetch import Prefetcher
from hcache_rag.profile import HardwareProfile
from hcache_rag.prompt import Tokenization, Tokenizer
from hcache_rag.provenance import Generation, Provenance
from hcache_rag.repair import check_fidelity
from hcache_rag.resolved import ResolvedPiece
from hcache_rag.sequences import BATCH_TOKENS
from hcache_rag.state import StateKey, StateRecord, TokenIds
from hcache_rag.store import StateStore
from hcache_rag.store.models import StoredModel
from hcache_rag.streaming import GenerationStream
from hcache_rag.texts import TextSet

logger = logging.getLogger("hcache_rag")


class HCacheEngine:
    """A model that remembers what it has read.

    Args:
        model: a transformers causal language model, on the CPU or on one CUDA device. States of
            models with learned positions, with ALiBi, or of a family that nothing is known about,
            are used only behind the very tokens that they were computed behind.
        tokenizer: its fast tokenizer.
        store: where states are kept: a `StateStore`, or a folder to open one in.
        preamble: the fixed text in front of the first document. States are computed after it.
        add_bos: whether prompts begin with the tokenizer's own first token.
        representation: what states stored from now on keep: "auto", "hidden", "kv", one of the
            latter two (or, for first layers, "none") per layer, or a whole layout.
        storage_dtype: what hidden states and K and V are stored in: "float32", "bfloat16",
            "float16", "float8_e4m3", "int8", for hidden states also "int8-g64" and "int8-smooth".
            None is the library's choice by measured loss, eight-bit integers; with
            fidelity="exact" it is the model's own dtype.
        profile: the machine, as `hcache_rag.measure` or `hcache_rag.presets` describe it; "auto"
            is the one that `hcache-rag profile` keeps beside the states. With it,
            representation="auto" keeps what restores in least time, and each request is planned by
            what reading and computing take now. Without one, the form of fewest bytes is kept, and
            everything that is stored is read.
        objective: what "auto" chooses for, if there is a profile.
        fidelity: how close to full prefill an answer is. "exact" restores only documents whose
            state was computed after the very tokens in front of them and keeps every bit. The
            others restore every document, and of the relocated ones' tokens repair a share: "high"
            30 %, "balanced" 15 %, "fast" 5 %, "none" 0, or a number from 0 to 1. "auto" is what the
            store recommends for this model (`hcache-rag fidelity --write`), or else "balanced";
            the attribute `fidelity` says which.
        context_at_index: what `precompute` reads before a document besides the preamble: "none",
            or "documents": those before it in the same call. A document that has seen others is
            nearer to what it is behind others in a prompt, and needs less repair; but it is not
            exact behind the preamble alone.
        paths_max_bytes: the most that exact paths may take in the store: conversations (see
            `generate`), and rows of documents that recur. 0 keeps and uses none.
        keep_recurring: read a row of documents that was asked for three times as a whole, in the
            background, and keep it: from then on it is exact, and answers may be other ones, those
            of full prefill.
        store_missed: read announced documents that had no state in a prompt afterwards, in the
            background, whenever no prompt is being answered, and keep their states. The model then
            computes while its owner may not expect it.
        tokenization: "segmented" or "strict", see `hcache_rag.prompt.Tokenizer`.
        reference_mode: restore in transformers' own order of operations, slower.
        name: what a person calls the model.

    Raises:
        UnsupportedModelError: this model, tokenizer, dtype or device cannot be restored on.
        StoreOpenError: `store` is a path that cannot hold a store.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        store: StateStore | str | os.PathLike[str],
        *,
        preamble: str = "",
        add_bos: bool = True,
        representation: str | Sequence[str] | StateLayout = "auto",
        storage_dtype: str | None = None,
        profile: HardwareProfile | Literal["auto"] | None = "auto",
        objective: Objective = LEAST_TIME,
        fidelity: Fidelity = "auto",
        context_at_index: Literal["none", "documents"] = "none",
        paths_max_bytes: int = MAX_BYTES,
        keep_recurring: bool = True,
        store_missed: bool = False,
        tokenization: Tokenization = "segmented",
        reference_mode: bool = False,
        name: str | None = None,
    ) -> None:
        if context_at_index not in ("none", "documents"):
            raise ValueError(f"context_at_index is 'none' or 'documents', not {context_at_index!r}")
        if context_at_index == "documents" and fidelity == "exact":
            raise ValueError(
                'documents that are read behind others are not exact, but fidelity is "exact"'
            )
        check_fidelity(fidelity)
        if not hasattr(model, "config"):
            raise TypeError(
                f"model must be a loaded transformers model, not {type(model).__name__}; "
                "hcache_rag.models.load_model(folder) gives one and its tokenizer"
            )
        adapter = ModelAdapter(model, name)
        if adapter.device.type not in DEVICES:
            raise UnsupportedModelError(
                f"the model is on {adapter.device}; states are restored on " + " and ".join(DEVICES)
            )
        does_not_go = why_not_in(adapter.dtype, adapter.device)
        if does_not_go is not None:
            raise UnsupportedModelError(does_not_go)
        self.tokenizer = tokenizer
        self._tokens = Tokenizer(tokenizer, tokenization)
        if profile == "auto":
            folder = store.path if isinstance(store, StateStore) else store
            profile = find_profile(folder, adapter.device)
        is_asked_for = representation != "auto" or storage_dtype is not None
        if storage_dtype is None and fidelity == "exact":
            storage_dtype = adapter.spec.dtype
        self.choice = layout_asked_for(
            adapter.spec,
            representation,
            storage_dtype,
            profile,
            objective,
            is_known=adapter.is_known,
        )
        if context_at_index == "documents" and self.choice.layout.num_none:
            raise ValueError(
                "layers that keep nothing are computed again after what a document was read "
                'after: that is not kept with context_at_index="documents"'
            )
        self._settings = Settings(
            preamble=preamble,
            add_bos=add_bos,
            fidelity=fidelity,
            context_at_index=context_at_index,
            choice=self.choice,
            is_asked_for=is_asked_for,
            profile=profile,
            paths_max_bytes=paths_max_bytes,
            keep_recurring=keep_recurring,
        )
        self._owns_store = not isinstance(store, StateStore)
        self.store = store if isinstance(store, StateStore) else StateStore.open(store)
        self.planner = Planner(adapter.spec, profile)
        self.answering = Answering(
            tokenizer,
            self.planner,
            BufferPool(adapter),
            reference_mode=reference_mode,
            read_later=self._read_later,
        )
        self._announced = TextSet()
        self._stores_missed = store_missed and not self.store.read_only
        self._missed = MissedReader(self._read_missed, lambda: self.adapter.layers)
        self._prefetcher = Prefetcher(self.store, lambda text: self.bound.state_for(text))
        self.served = Served()
        """What was answered since the engine was made."""
        self._serving = ForkedLock()
        self._rebinding = ForkedLock()
        try:
            self.bound = self._bind(adapter)
            """The model as it is now, with its states."""
            self.bound.warn_if_foreign()
        except BaseException:
            self._close_store()
            raise
        give_back_threads()  # the model has been loaded here; requests may come from elsewhere

    def _bind(self, adapter: ModelAdapter) -> Bound:
        return Bound(adapter, self._tokens, self.store, self._settings, self._announced)

    def _current(self) -> Bound:
        """What is bound; weights may have been written, or adapters switched, since last time."""
        if self.bound.adapter.is_changed:
            with self._rebinding:
                if self.bound.adapter.is_changed:
                    before = self.bound
                    before.keeper.close()
                    model, name = before.adapter.model, before.adapter.spec.name
                    self.bound = self._bind(ModelAdapter(model, name))
        return self.bound

    @property
    def adapter(self) -> ModelAdapter:
        """The model as capturing and restoring see it."""
        return self.bound.adapter

    @property
    def root(self) -> StateKey:
        """The root of the state tree for this model and tokenizer."""
        return self.bound.root

    @property
    def paths(self) -> Paths:
        """The exact paths of this model."""
        return self.bound.paths

    @property
    def fidelity(self) -> str | float:
        """The dial's position, or a share; never "auto"."""
        return self.bound.fidelity

    @property
    def repair_share(self) -> float:
        """The share of relocated tokens that is repaired."""
        return self.bound.repair_share

    @property
    def preamble(self) -> str:
        """The text that documents are read after."""
        return self._settings.preamble

    @property
    def add_bos(self) -> bool:
        """Whether prompts begin with the tokenizer's own first token, if nothing else is said."""
        return self._settings.add_bos

    @property
    def context_at_index(self) -> Literal["none", "documents"]:
        """What else they are read after."""
        return self._settings.context_at_index

    def indexer(self, store: StateStore, *, batch_tokens: int = BATCH_TOKENS) -> Indexer:
        """What reads texts as this engine does, and keeps their states in another store.

        Args:
            batch_tokens: that are read at once, padding included.
        """
        return self._current().indexer_into(store, batch_tokens)

    def measured_with(self, model: StoredModel) -> str:
        """What a fidelity that is measured now holds for: other states may need another one.

        Args:
            model: what the store that they are in knows of this model.
        """
        return self.bound.measured_with(model)

    @lent_threads()
    def precompute(
        self,
        texts: Iterable[str],
        *,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> PrecomputeReport:
        """Read texts once and keep their states; what is already stored is not read again.

        A state that is kept in another form than was asked for (`representation`, `storage_dtype`,
        `fidelity="exact"`) is computed anew.

        Args:
            on_progress: called with (documents done, documents to do), also before the first.

        Raises:
            StoreFullError: no room; what was stored before stays.
            UnsupportedModelError: the model is in training mode, and something is to be read.
        """
        with self._missed.paused():
            bound = self._current()
            return bound.indexer.precompute(texts, bound.mark_stored, on_progress)

    @lent_threads()
    def _read_missed(self, text: str) -> None:
        bound = self._current()
        bound.indexer.precompute([text], bound.mark_stored)
        if bound.adapter.is_changed:  # meanwhile: what it has read may be another model's
            for record in bound.indexer.states_of(text):
                self.store.delete(record.key)

    def announce(self, texts: Iterable[str]) -> None:
        """Say that these texts are documents, which may be asked for soon.

        A missing state is noticed and counted then, and one in a remote shard is on its way.
        """
        known = list(texts)
        self._announced.add(known)
        self.store.prefetch(known)

    def prefetch(self, texts: Iterable[str]) -> None:
        """Begin to read the states of these documents into memory: a prompt will hold them."""
        self._prefetcher.start(texts)

    def states_of(self, text: str) -> list[StateRecord]:
        """The states of a text that `precompute` keeps, as the engine is set now."""
        return self.bound.indexer.states_of(text)

    def count_tokens(self, prompt: str) -> int:
        """Tokens of a prompt as it would be read."""
        return sum(len(piece.token_ids) for piece in self._current().resolve(prompt).pieces)

    def prompt_tokens(self, prompt: str) -> TokenIds:
        """The token ids (N,) of a prompt as it would be read."""
        bound = self._current()
        return bound.compose(bound.resolve(prompt).pieces).token_ids

    def document_tokens(self, text: str) -> TokenIds:
        """The token ids (T,) that a document's state is kept for."""
        return self._tokens.document(text)

    def plan(self, prompt: str, *, add_bos: bool | None = None) -> Provenance:
        """What would be restored and read for a prompt, without doing it."""
        bound = self._current()
        pieces, warnings = bound.resolve(prompt, add_bos).pieces, list[str]()
        while True:
            composition = bound.compose(pieces)
            try:
                _, plan, _ = self.answering.plan(bound, composition)
            except UnreachableStateError as error:
                pieces = bound.without(pieces, error, warnings)
            else:
                return provenance_of(
                    composition, pieces, {}, None, warnings, fidelity=bound.fidelity, plan=plan
                )

    @lent_threads()
    def generate(
        self,
        prompt: str,
        *,
        options: GenerationOptions | None = None,
        add_bos: bool | None = None,
        remember: bool = False,
        on_text: Callable[[str], None] | None = None,
        cancelled: threading.Event | None = None,
    ) -> Generation:
        """Answer a prompt, restoring what of it was read before.

        That is the longest stored path that it begins with, and behind it the documents that have a
        state.

        Args:
            options: how to decode.
            add_bos: overrides the engine's for this prompt.
            remember: keep the prompt and its answer as a path, in the background: a prompt that
                goes on from there, the next turn of a conversation, restores all of it.
            on_text: called with each new piece of text as soon as its token is known.
            cancelled: set it from elsewhere to end after the token that is being computed.

        Raises:
            PromptTooLongError: the prompt fills the model's window.
            ValueError: an empty prompt.
        """
        if not isinstance(prompt, str):
            raise TypeError(f"prompt must be one string, not {type(prompt).__name__}")
        started = time.perf_counter()
        bound = self._current()
        resolved = bound.resolve(prompt, add_bos)
        request = Request(
            bound,
            resolved,
            options or GenerationOptions(),
            started,
            {"match": time.perf_counter() - started},
            remember,
            on_text,
            cancelled or threading.Event(),
        )
        with self._missed.paused():
            answer = self.answering.answer(request)
        with self._serving:
            self.served = self.served.plus(answer.provenance)
        return answer

    def stream(
        self,
        prompt: str,
        *,
        options: GenerationOptions | None = None,
        add_bos: bool | None = None,
        remember: bool = False,
    ) -> GenerationStream:
        """Answer a prompt piece by piece; closing the stream stops the computation."""
        return GenerationStream(
            lambda on_text, cancelled, _end_turn: self.generate(
                prompt,
                options=options,
                add_bos=add_bos,
                remember=remember,
                on_text=on_text,
                cancelled=cancelled,
            )
        )

    @contextmanager
    def restoring(
        self, prompt: str, *, room_tokens: int = 0
    ) -> Iterator[tuple[Composition, RestoringCache]]:
        """A transformers cache on which the model's first forward pass reads what is fresh.

        For those who call the model themselves: pass it `composition.token_ids` and the cache.
        Nothing is repaired. The cache is valid inside the block.

        Args:
            room_tokens: that may follow the prompt.

        Raises:
            StateError: from recomputing, or from the pass, a state that cannot be used.
        """
        bound = self._current()
        pieces = bound.resolve(prompt).pieces
        composition = bound.compose(pieces)
        _, _, work = self.answering.plan(bound, composition)
        with (
            self._missed.paused(),
            self.answering.restoring(bound, composition, pieces, work, room_tokens) as (
                cache,
                execution,
            ),
        ):
            execution.recompute()
            yield composition, cache

    def flush(self) -> None:
        """Wait until everything that is to be remembered, or was missed, is stored."""
        self.bound.keeper.flush()
        self._missed.flush()
        self._prefetcher.flush()

    def close(self) -> None:
        """Write what is to be remembered; close the store, if the engine opened it.

        Documents that were missed and are not read yet are forgotten.
        """
        self._prefetcher.close()
        self._missed.close()
        self.bound.keeper.close()
        self._close_store()

    def _close_store(self) -> None:
        if self._owns_store:
            self.store.close()

    def __enter__(self) -> HCacheEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_later(self, pieces: Sequence[ResolvedPiece]) -> int:
        """Have missed documents read afterwards; how many will be."""
        if not self._stores_missed:
            return 0
        return self._missed.add(p.document for p in pieces if p.document and p.record is None)
