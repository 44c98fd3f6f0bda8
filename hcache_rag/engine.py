"""`HCacheEngine`: the facade. Index texts once, answer prompts with their states restored."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hcache_rag.account import Served, misses, provenance_of
from hcache_rag.buffers import BufferPool
from hcache_rag.cache import RestoringCache
from hcache_rag.catalogue import Catalogue
from hcache_rag.choice import (
    LEAST_TIME,
    LayoutChoice,
    Objective,
    choose_layout,
    fixed_layout,
    storage_dtypes,
)
from hcache_rag.compose import Composition, compose
from hcache_rag.device import DEVICES
from hcache_rag.errors import (
    PromptTooLongError,
    StateError,
    StoreError,
    UnreachableStateError,
    UnsupportedModelError,
)
from hcache_rag.executor import Readable, open_restoring, span_sizes
from hcache_rag.generation import GenerationOptions, decode
from hcache_rag.identity import tokenizer_fingerprint
from hcache_rag.indexing import Indexer, PrecomputeReport
from hcache_rag.keeper import Keeper
from hcache_rag.lanes import Cancelled
from hcache_rag.layout import Representation, StateLayout
from hcache_rag.measure import find_profile
from hcache_rag.missed import MissedReader
from hcache_rag.models import ModelAdapter
from hcache_rag.openmp import give_back_threads, lent_threads
from hcache_rag.paths import MAX_BYTES, Paths, Shelf
from hcache_rag.planner import Planner
from hcache_rag.prefetch import Prefetcher
from hcache_rag.prefixes import Prefixes
from hcache_rag.profile import HardwareProfile
from hcache_rag.prompt import Tokenization, Tokenizer
from hcache_rag.provenance import Generation, Provenance
from hcache_rag.repair import begin_repair, recommended, repair_share
from hcache_rag.resolved import Resolved, ResolvedPiece, beginning_only, exact_ones
from hcache_rag.schedule import Rows
from hcache_rag.sequences import BATCH_TOKENS, PendingState
from hcache_rag.state import StateRecord, TokenIds, root_key
from hcache_rag.store import StateStore
from hcache_rag.store.models import UNKNOWN, StoredModel
from hcache_rag.streaming import GenerationStream
from hcache_rag.texts import TextSet

logger = logging.getLogger("hcache_rag")

Fidelity = Literal["auto", "exact", "high", "balanced", "fast", "none"] | float


@dataclass(frozen=True, slots=True)
class _Request:
    """A prompt to answer, and what becomes known of it on the way."""

    resolved: Resolved
    options: GenerationOptions
    on_text: Callable[[str], None] | None
    cancelled: threading.Event
    started: float
    seconds: dict[str, float]
    warnings: list[str]
    keeper: Keeper | None


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
            "float16", "int8", for hidden states also "int8-g64" and "int8-smooth". None is the
            library's choice by measured loss, eight-bit integers; with fidelity="exact" it is the
            model's own dtype.
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
        UnsupportedModelError: this model, tokenizer or device cannot be restored on.
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
        self._is_auto = fidelity == "auto"
        self._set_fidelity(recommended(None) if fidelity == "auto" else fidelity)
        self.adapter = ModelAdapter(model, name)
        if self.adapter.device.type not in DEVICES:
            raise UnsupportedModelError(
                f"the model is on {self.adapter.device}; states are restored on "
                + " and ".join(DEVICES)
            )
        self.tokenizer = tokenizer
        self._tokens = Tokenizer(tokenizer, tokenization)
        if profile == "auto":
            folder = store.path if isinstance(store, StateStore) else store
            profile = find_profile(folder, self.adapter.device)
        self.choice = self._choose(representation, storage_dtype, profile, objective)
        if context_at_index == "documents" and self.choice.layout.num_none:
            raise ValueError(
                "layers that keep nothing are computed again after what a document was read "
                'after: that is not kept with context_at_index="documents"'
            )
        self._is_asked_for = representation != "auto" or storage_dtype is not None
        self.reference_mode = reference_mode
        self.add_bos = add_bos
        self.preamble = preamble
        self.context_at_index = context_at_index
        self._paths_max_bytes = paths_max_bytes
        self._keep_recurring = keep_recurring
        self._profile = profile
        self._owns_store = not isinstance(store, StateStore)
        self.store = store if isinstance(store, StateStore) else StateStore.open(store)
        self.planner = Planner(self.adapter.spec, profile)
        self._buffers = BufferPool(self.adapter)
        self._announced = TextSet()
        self._stores_missed = store_missed and not self.store.read_only
        self._missed = MissedReader(self._read_missed, lambda: self.adapter.layers)
        self._prefetcher = Prefetcher(self.store, self._state_for)
        self.served = Served()
        """What was answered since the engine was made."""
        self._serving = threading.Lock()
        self._warned: set[str] = set()
        self._rebinding = threading.Lock()
        try:
            self._bind()
            self._warn_if_foreign()
        except BaseException:
            self._close_store()
            raise
        give_back_threads()  # the model has been loaded here; requests may come from elsewhere

    def _bind(self) -> None:
        """Find, and store, the states of the model as it is now."""
        self.root = root_key(self.adapter.fingerprint, tokenizer_fingerprint(self.tokenizer))
        self._prefixes = Prefixes(self.adapter, self.store, self.root)
        preamble_ids = self._tokens.preamble(self.preamble, add_bos=self.add_bos)
        self._parent = self._prefixes.add(self.root, preamble_ids)
        if self._is_auto:
            known = self.store.models().get(self.root, UNKNOWN)
            self._set_fidelity(recommended(known.fidelity_with(self.measured_with(known))))
        self._catalogue = Catalogue(
            self.store, self._tokens, self.root, self._parent, self._announced
        )
        self._costs = (
            self._profile.costs_of(self.adapter.spec) if self._profile is not None else None
        )
        self.paths = Paths(
            self.adapter,
            self.store,
            self._tokens,
            self.root,
            max_bytes=self._paths_max_bytes,
            is_usable=lambda record: self._why_not(record) is None,
            costs=self._costs,
        )
        self._keeper = Keeper(
            self.adapter,
            self.paths,
            self._tokens,
            self.root,
            recurring=self._keep_recurring and not self.store.read_only,
        )
        self._indexer = self._indexer_into(self.store, self._prefixes, BATCH_TOKENS)

    def _indexer_into(self, store: StateStore, prefixes: Prefixes, batch_tokens: int) -> Indexer:
        preamble_ids = self._tokens.preamble(self.preamble, add_bos=self.add_bos)
        return Indexer(
            self.adapter,
            store,
            self._tokens,
            prefixes,
            self.choice,
            self.root,
            PendingState(self.root, preamble_ids, self.preamble),
            is_chained=self.context_at_index == "documents",
            is_kept=self._is_kept,
            costs=self._costs,
            batch_tokens=batch_tokens,
        )

    def indexer(self, store: StateStore, *, batch_tokens: int = BATCH_TOKENS) -> Indexer:
        """What reads texts as this engine does, and keeps their states in another store.

        Args:
            batch_tokens: that are read at once, padding included.
        """
        self._follow_model()
        return self._indexer_into(store, self._prefixes, batch_tokens)

    def measured_with(self, model: StoredModel) -> str:
        """What a fidelity that is measured now holds for: other states may need another one.

        Args:
            model: what the store that they are in knows of this model.
        """
        layout = model.layout or str(self.choice.layout)
        return f"{layout}; context: {self.context_at_index}; after: {self._parent.hex()}"

    def _set_fidelity(self, fidelity: str | float) -> None:
        self.repair_share = repair_share(fidelity)
        self.fidelity = fidelity

    def _follow_model(self) -> None:
        """Weights may have been written, or adapters switched, since the last request."""
        if self.adapter.is_changed:
            with self._rebinding:
                if self.adapter.is_changed:
                    self.adapter = ModelAdapter(self.adapter.model, self.adapter.spec.name)
                    self._keeper.close()
                    self._bind()

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
        """
        with self._missed.paused():
            self._follow_model()
            return self._indexer.precompute(texts, self._stored, on_progress)

    @lent_threads()
    def _read_missed(self, text: str) -> None:
        self._follow_model()
        adapter = self.adapter
        self._indexer.precompute([text], self._stored)
        if adapter.is_changed:  # meanwhile: what it has read may be another model's
            for record in self._indexer.states_of(text):
                self.store.delete(record.key)

    def _stored(self, record: StateRecord) -> None:
        """A state is in the store."""
        self._catalogue.mark_stored(record.key)
        self._warned.discard(record.text)

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

    def _state_for(self, text: str) -> StateRecord | None:
        """The state that a document is most likely restored from."""
        records = self._catalogue.states(text.strip())
        return next((r for r in records if self._why_not(r) is None), None)

    def states_of(self, text: str) -> list[StateRecord]:
        """The states of a text that `precompute` keeps, as the engine is set now."""
        return self._indexer.states_of(text)

    def count_tokens(self, prompt: str) -> int:
        """Tokens of a prompt as it would be read."""
        return sum(len(piece.token_ids) for piece in self._resolve(prompt, None).pieces)

    def prompt_tokens(self, prompt: str) -> TokenIds:
        """The token ids (N,) of a prompt as it would be read."""
        return self._compose(self._resolve(prompt, None).pieces).token_ids

    def document_tokens(self, text: str) -> TokenIds:
        """The token ids (T,) that a document's state is kept for."""
        return self._tokens.document(text)

    def plan(self, prompt: str, *, add_bos: bool | None = None) -> Provenance:
        """What would be restored and read for a prompt, without doing it."""
        pieces = self._resolve(prompt, add_bos).pieces
        composition = self._compose(pieces)
        plan, _ = self.planner.plan(
            span_sizes(composition, self._prefixes), len(composition.fresh_positions)
        )
        return provenance_of(composition, pieces, {}, None, [], fidelity=self.fidelity, plan=plan)

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
        started = time.perf_counter()
        options = options or GenerationOptions()
        cancelled = cancelled or threading.Event()
        resolved = self._resolve(prompt, add_bos)
        keeper = self._keeper if remember and self.paths.is_on else None
        seconds = {"match": time.perf_counter() - started}
        request = _Request(resolved, options, on_text, cancelled, started, seconds, [], keeper)
        with self._missed.paused():
            return self._answer(request)

    def _answer(self, request: _Request) -> Generation:
        """Answer a request; a state that cannot be used is dropped, and all is begun anew."""
        resolved = request.resolved
        while True:
            composing = time.perf_counter()
            composition = self._compose(resolved.pieces)
            request.seconds["compose"] = time.perf_counter() - composing
            try:
                return self._run(composition, request)
            except StateError as error:
                resolved.pieces = self._without(resolved.pieces, error, request.warnings)

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
        pieces = self._resolve(prompt, None).pieces
        composition = self._compose(pieces)
        _, work = self.planner.plan(
            span_sizes(composition, self._prefixes), len(composition.fresh_positions)
        )
        with (
            self._missed.paused(),
            self._buffers.borrow(len(composition.token_ids) + room_tokens) as buffers,
            open_restoring(
                self.adapter,
                composition,
                buffers,
                self._shelf(pieces),
                work=work,
                prefixes=self._prefixes,
                reference_mode=self.reference_mode,
            ) as (cache, execution),
        ):
            execution.recompute()
            yield composition, cache

    def flush(self) -> None:
        """Wait until everything that is to be remembered, or was missed, is stored."""
        self._keeper.flush()
        self._missed.flush()
        self._prefetcher.flush()

    def close(self) -> None:
        """Write what is to be remembered; close the store, if the engine opened it.

        Documents that were missed and are not read yet are forgotten.
        """
        self._prefetcher.close()
        self._missed.close()
        self._keeper.close()
        self._close_store()

    def _close_store(self) -> None:
        if self._owns_store:
            self.store.close()

    def __enter__(self) -> HCacheEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _choose(
        self,
        representation: str | Sequence[str] | StateLayout,
        storage_dtype: str | None,
        profile: HardwareProfile | None,
        objective: Objective,
    ) -> LayoutChoice:
        spec = self.adapter.spec
        if storage_dtype is None and self.fidelity == "exact":
            storage_dtype = spec.dtype
        if isinstance(representation, StateLayout):
            if len(representation.layers) != spec.num_layers:
                raise ValueError(
                    f"a layout of {len(representation.layers)} layers for a model of "
                    f"{spec.num_layers}"
                )
            choice = LayoutChoice(representation, "given by the caller")
        elif representation != "auto" or not self.adapter.is_known:
            asked = representation if representation != "auto" else "kv"
            choice = fixed_layout(spec, asked, storage_dtype)
        else:
            hidden, kv = storage_dtypes(spec, storage_dtype)
            return choose_layout(spec, profile, objective, hidden_dtype=hidden, kv_dtype=kv)
        formats = {fmt.representation for fmt, _ in choice.layout.runs}
        if Representation.HIDDEN in formats and not self.adapter.is_known:
            raise ValueError(
                f"nothing is known about models of family {spec.family!r}, so that no K and V can "
                "be made of their hidden states: keep K and V"
            )
        return choice

    def _is_kept(self, layout: StateLayout) -> bool:
        """Whether a stored state in this layout need not be stored anew."""
        if self._is_asked_for:
            return layout == self.choice.layout
        return self.fidelity != "exact" or layout.is_lossless(self.adapter.spec.dtype)

    def _resolve(self, prompt: str, add_bos: bool | None) -> Resolved:
        self._follow_model()
        bos = self.add_bos if add_bos is None else add_bos
        walked = self._keeper.walk(prompt, add_bos=bos)
        found = self._catalogue.resolve(prompt, add_bos=bos, walked=walked)
        found.pieces = exact_ones([self._usable(piece) for piece in found.pieces], self.root)
        if not self.adapter.is_movable:
            why_not = self.adapter.why_not_movable
            found.pieces = beginning_only(found.pieces, self.root, why_not)
        return found

    def _shelf(self, pieces: Sequence[ResolvedPiece]) -> Readable:
        """Where the states of some pieces are read from."""
        records = [p.record for p in pieces if p.is_path and p.record is not None]
        paths = self.paths.store
        return Shelf(self.store, paths, records) if records and paths is not None else self.store

    def _usable(self, piece: ResolvedPiece) -> ResolvedPiece:
        """The piece, without states that cannot be used as the engine is set."""
        if piece.record is None:
            return piece
        misses = {record: self._why_not(record) for record in (piece.record, *piece.others)}
        usable = [record for record, miss in misses.items() if miss is None]
        if not usable:
            return replace(piece, record=None, others=(), miss=misses[piece.record])
        return replace(piece, record=usable[0], others=tuple(usable[1:]))

    def _why_not(self, record: StateRecord) -> str | None:
        """Why a state cannot be used as the engine is set; None if it can."""
        if self.fidelity == "exact" and not record.layout.is_lossless(self.adapter.spec.dtype):
            return f"kept as {record.layout}, which is not exact; see storage_dtype"
        if self.fidelity == "exact" and record.is_approximate:
            return "it goes on from something that was restored with a loss"
        if record.layout.num_none and record.parent not in self._prefixes:
            return "some layers are not kept, and what it was computed after is not known"
        return None

    def _compose(self, pieces: Sequence[ResolvedPiece]) -> Composition:
        has_preamble = self._parent != self.root and not self._catalogue.is_damaged(self._parent)
        preamble = self.store.record(self._parent) if has_preamble else None
        if preamble is not None:
            preamble = self._usable(ResolvedPiece(preamble.token_ids, None, preamble)).record
        return compose(
            [(piece.token_ids, piece.record) for piece in pieces],
            self.root,
            preamble,
            exact_only=self.fidelity == "exact",
            beginning_only=not self.adapter.is_movable,
        )

    def _run(self, composition: Composition, request: _Request) -> Generation:
        options, cancelled, seconds = request.options, request.cancelled, request.seconds
        pieces = request.resolved.pieces
        num_tokens, window = len(composition.token_ids), self.adapter.spec.window_tokens
        if not num_tokens:
            raise ValueError("the prompt is empty")
        if num_tokens >= window:
            raise PromptTooLongError(num_tokens, options.max_new_tokens, window)
        max_new_tokens = min(options.max_new_tokens, window - num_tokens)

        def emit(text: str) -> None:
            if "first_token" not in seconds:
                seconds["first_token"] = time.perf_counter() - request.started
            if text and request.on_text:
                request.on_text(text)

        sizes = span_sizes(composition, self._prefixes)
        will_repair = bool(self.repair_share) and composition.num_restored > composition.num_exact
        # What is read again looks at everything, and what is remembered is kept as a whole.
        unseen = self._unseen(composition) if not (will_repair or request.keeper) else ()
        plan, work = self.planner.plan(sizes, len(composition.fresh_positions), unseen)
        repaired = 0
        with (
            self._buffers.borrow(num_tokens + max_new_tokens) as buffers,
            open_restoring(
                self.adapter,
                composition,
                buffers,
                self._shelf(pieces),
                work=work,
                prefixes=self._prefixes,
                reference_mode=self.reference_mode,
                is_cancelled=cancelled.is_set,
            ) as (cache, execution),
        ):
            try:
                execution.recompute()
                if will_repair:
                    repaired = begin_repair(self.adapter, cache, self.repair_share)
                text, token_ids, reason = decode(
                    self.adapter.model,
                    self.tokenizer,
                    composition.token_ids,
                    cache,
                    options,
                    max_new_tokens,
                    emit,
                    cancelled,
                )
                # The keeper of the model as it was: what has changed since is not kept.
                if request.keeper is self._keeper and reason != "cancelled":
                    request.keeper.remember(request.resolved, cache, text, token_ids)
            except Cancelled:
                text, token_ids, reason = "", (), "cancelled"
        timeline = execution.timeline
        if reason != "cancelled":
            on_host = self.adapter.device.type == "cpu"
            self.planner.observe(timeline, plan, sees_computing=on_host)
        provenance = provenance_of(
            composition,
            pieces,
            seconds,
            timeline,
            request.warnings,
            repaired=repaired,
            fidelity=self.fidelity,
            plan=plan,
            queued=self._read_later(pieces),
        )
        with self._serving:
            self.served = self.served.plus(provenance)
        self._count_use(pieces)
        is_relocated = composition.num_restored > composition.num_exact
        if self.paths.is_on and (is_relocated or self.fidelity == "exact"):
            self._keeper.count(request.resolved, composition.num_exact)
        self._warn_of(pieces)
        return Generation(text, token_ids, reason, provenance, timeline)

    def _unseen(self, composition: Composition) -> tuple[Rows, ...]:
        """Restored rows of every layer that no fresh token has in its window."""
        windows = self.adapter.windows
        rows = {w: composition.unseen_rows(w) for w in set(windows) if w is not None}
        if not any(rows.values()):
            return ()
        return tuple(() if window is None else rows[window] for window in windows)

    def _read_later(self, pieces: Sequence[ResolvedPiece]) -> int:
        """Have missed documents read afterwards; how many will be."""
        if not self._stores_missed:
            return 0
        return self._missed.add(p.document for p in pieces if p.document and p.record is None)

    def _count_use(self, pieces: Sequence[ResolvedPiece]) -> None:
        documents = [piece for piece in pieces if piece.document is not None]
        missed = [piece for piece in documents if piece.record is None]
        self.store.count_use(
            [piece.record.key for piece in documents if piece.record is not None],
            misses=len(missed),
            hit_tokens=sum(len(p.token_ids) for p in documents if p.record is not None),
            missed_tokens=sum(len(p.token_ids) for p in missed),
        )
        self.paths.count_use(p.record.key for p in pieces if p.is_path and p.record is not None)

    def _warn_of(self, pieces: Sequence[ResolvedPiece]) -> None:
        """Log why documents have no usable state, once for each of them."""
        for note in misses([p for p in pieces if p.document not in self._warned]):
            logger.warning(note)
        self._warned.update(p.document for p in pieces if p.document and p.record is None)

    def _without(
        self, pieces: Sequence[ResolvedPiece], error: StateError, warnings: list[str]
    ) -> list[ResolvedPiece]:
        """The same pieces, with the state that failed dropped from them and from the store."""
        what = "is left" if isinstance(error, UnreachableStateError) else "was dropped"
        message = f"{error}; it {what} and its tokens are read afresh"
        warnings.append(message)
        logger.warning(message)
        used = next((p for p in pieces if p.record and p.record.key == error.key), None)
        record = used.record if used is not None else None
        if record is not None and used is not None and used.is_path:
            self.paths.drop(record)
        else:
            self._drop(error, record)
        return [
            ResolvedPiece(p.token_ids, p.document, None)  # its warning has been given
            if p.record is not None and p.record.key == error.key
            else p
            for p in pieces
        ]

    def _drop(self, error: StateError, used: StateRecord | None) -> None:
        """Drop a document's state that failed, unless another one is there by now."""
        if isinstance(error, UnreachableStateError):
            return  # it is as it was, and may be reached the next time
        record = self.store.record(error.key)
        text = record.text if record is not None else ""
        self._catalogue.mark_damaged(error.key, text, f"damaged state ({error.reason})")
        self.store.count_use(damaged=1)
        if not self.store.read_only:
            try:
                self.store.delete(error.key, unless_changed=used)
            except StoreError as failure:
                logger.warning("it could not be dropped: %s", failure)

    def _warn_if_foreign(self) -> None:
        num_foreign = self._catalogue.num_foreign()
        if num_foreign:
            logger.warning(
                "%s holds %d documents whose states were made by another model or tokenizer; "
                "they cannot be used by %s",
                self.store.path,
                num_foreign,
                self.adapter.spec.name,
            )
