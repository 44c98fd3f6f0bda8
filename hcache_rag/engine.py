"""`HCacheEngine`: the facade. Index texts once, answer prompts with their states restored."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from hcache_rag.account import misses, provenance_of
from hcache_rag.buffers import BufferPool
from hcache_rag.catalogue import Catalogue, ResolvedPiece
from hcache_rag.compose import Composition, compose
from hcache_rag.errors import PromptTooLongError, StateError, UnsupportedModelError
from hcache_rag.executor import open_restoring
from hcache_rag.generation import GenerationOptions, decode
from hcache_rag.indexing import PendingState, PrecomputeReport, batches, store_batch
from hcache_rag.models import ModelAdapter, tokenizer_fingerprint
from hcache_rag.plan import choose_layout
from hcache_rag.prompt import Tokenization, Tokenizer
from hcache_rag.provenance import Generation, Provenance
from hcache_rag.repair import FIDELITY_SHARES, begin_repair
from hcache_rag.state import StateKey, TokenIds, child_key, root_key
from hcache_rag.store import StateStore
from hcache_rag.streaming import GenerationStream

logger = logging.getLogger("hcache_rag")

Fidelity = Literal["exact", "high", "balanced", "fast", "none"] | float


class HCacheEngine:
    """A model that remembers what it has read.

    Args:
        model: a transformers causal language model of a supported family, on the CPU.
        tokenizer: its fast tokenizer.
        store: where states are kept: a `StateStore`, or a folder to open one in.
        preamble: the fixed text in front of the first document. States are computed after it.
        add_bos: whether prompts begin with the tokenizer's own first token.
        representation: what states stored from now on keep: "auto", "hidden", "kv", or one of the
            latter two per layer.
        fidelity: how close to full prefill an answer is. "exact" restores only documents whose
            state was computed after the very tokens in front of them. The others restore every
            document, and of the relocated ones' tokens repair a share: "high" 30 %, "balanced"
            15 %, "fast" 5 %, "none" 0, or a number from 0 to 1.
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
        representation: str | Sequence[str] = "auto",
        fidelity: Fidelity = "balanced",
        tokenization: Tokenization = "segmented",
        reference_mode: bool = False,
        name: str | None = None,
    ) -> None:
        self.fidelity = fidelity
        self.repair_share = _repair_share(fidelity)
        self.adapter = ModelAdapter(model, name)
        if self.adapter.device.type != "cpu":
            raise UnsupportedModelError(
                f"the model is on {self.adapter.device}; this release restores on the CPU only"
            )
        self.tokenizer = tokenizer
        self._tokens = Tokenizer(tokenizer, tokenization)
        self.choice = choose_layout(self.adapter.spec, representation)
        self.root = root_key(self.adapter.fingerprint, tokenizer_fingerprint(tokenizer))
        self.reference_mode = reference_mode
        self.add_bos = add_bos
        self.preamble = preamble
        self._preamble_ids = self._tokens.preamble(preamble, add_bos=add_bos)
        self._parent = (
            child_key(self.root, self._preamble_ids) if len(self._preamble_ids) else self.root
        )
        self._owns_store = not isinstance(store, StateStore)
        self.store = store if isinstance(store, StateStore) else StateStore.open(store)
        self._catalogue = Catalogue(self.store, self._tokens, self.root, self._parent)
        self._buffers = BufferPool(self.adapter)
        self._indexing = threading.Lock()
        self._damaged: set[StateKey] = set()
        self._warned: set[str] = set()
        self._preamble_cache: DynamicCache | None = None
        self._warn_if_foreign()

    def precompute(
        self,
        texts: Iterable[str],
        *,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> PrecomputeReport:
        """Read texts once and keep their states; what is already stored is not read again.

        Args:
            on_progress: called with (documents done, documents to do), also before the first.

        Raises:
            StoreFullError: no room; what was stored before stays.
        """
        started = time.perf_counter()
        with self._indexing:
            pending, reused, skipped = self._pending(texts)
            total, done = reused + len(pending), reused
            stored_tokens = stored_bytes = 0
            if on_progress:
                on_progress(done, total)
            try:
                if pending:
                    self.store.name_model(
                        self.root,
                        self.adapter.spec.name,
                        str(self.choice.layout),
                        self.choice.reason,
                    )
                    self._store_preamble()
                for batch in batches(pending):
                    records, num_bytes = store_batch(
                        self.adapter,
                        self.store,
                        batch,
                        self.choice.layout,
                        self.root,
                        self._parent,
                        self._after_preamble(),
                    )
                    for record in records:
                        self._catalogue.add(record)
                        self._warned.discard(record.text)
                    stored_tokens += sum(record.num_tokens for record in records)
                    stored_bytes += num_bytes
                    done += len(records)
                    if on_progress:
                        on_progress(done, total)
            finally:
                if pending:
                    self.store.sync()
        seconds = time.perf_counter() - started
        return PrecomputeReport(
            len(pending), reused, tuple(skipped), stored_tokens, stored_bytes, seconds
        )

    def announce(self, texts: Iterable[str]) -> None:
        """Say that these texts are documents, so that a missing state is noticed and counted."""
        self._catalogue.announce(texts)

    def count_tokens(self, prompt: str) -> int:
        """Tokens of a prompt as it would be read."""
        return sum(len(piece.token_ids) for piece in self._resolve(prompt, None))

    def document_tokens(self, text: str) -> TokenIds:
        """The token ids (T,) that a document's state is kept for."""
        return self._tokens.document(text)

    def plan(self, prompt: str, *, add_bos: bool | None = None) -> Provenance:
        """What would be restored and read for a prompt, without doing it."""
        pieces = self._resolve(prompt, add_bos)
        return provenance_of(self._compose(pieces), pieces, {}, None, [])

    def generate(
        self,
        prompt: str,
        *,
        options: GenerationOptions | None = None,
        add_bos: bool | None = None,
        on_text: Callable[[str], None] | None = None,
        cancelled: threading.Event | None = None,
    ) -> Generation:
        """Answer a prompt, restoring the documents in it that have a state.

        Args:
            options: how to decode.
            add_bos: overrides the engine's for this prompt.
            on_text: called with each new piece of text as soon as its token is known.
            cancelled: set it from elsewhere to end after the token that is being computed.

        Raises:
            PromptTooLongError: the prompt fills the model's window.
            ValueError: an empty prompt.
        """
        started = time.perf_counter()
        options = options or GenerationOptions()
        cancelled = cancelled or threading.Event()
        pieces = self._resolve(prompt, add_bos)
        seconds = {"match": time.perf_counter() - started}
        warnings: list[str] = []
        while True:
            composing = time.perf_counter()
            composition = self._compose(pieces)
            seconds["compose"] = time.perf_counter() - composing
            try:
                return self._run(
                    composition, pieces, options, on_text, cancelled, started, seconds, warnings
                )
            except StateError as error:
                pieces = self._without(pieces, error, warnings)

    def stream(
        self,
        prompt: str,
        *,
        options: GenerationOptions | None = None,
        add_bos: bool | None = None,
    ) -> GenerationStream:
        """Answer a prompt piece by piece; closing the stream stops the computation."""
        return GenerationStream(
            lambda on_text, cancelled: self.generate(
                prompt, options=options, add_bos=add_bos, on_text=on_text, cancelled=cancelled
            )
        )

    def close(self) -> None:
        """Close the store, if the engine opened it."""
        if self._owns_store:
            self.store.close()

    def __enter__(self) -> HCacheEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _resolve(self, prompt: str, add_bos: bool | None) -> list[ResolvedPiece]:
        bos = self.add_bos if add_bos is None else add_bos
        return self._catalogue.resolve(prompt, add_bos=bos)

    def _compose(self, pieces: Sequence[ResolvedPiece]) -> Composition:
        has_preamble = self._parent not in (self.root, *self._damaged)
        preamble = self.store.record(self._parent) if has_preamble else None
        return compose(
            [(piece.token_ids, piece.record) for piece in pieces],
            self.root,
            preamble,
            exact_only=self.fidelity == "exact",
        )

    def _run(
        self,
        composition: Composition,
        pieces: Sequence[ResolvedPiece],
        options: GenerationOptions,
        on_text: Callable[[str], None] | None,
        cancelled: threading.Event,
        started: float,
        seconds: dict[str, float],
        warnings: list[str],
    ) -> Generation:
        num_tokens, window = len(composition.token_ids), self.adapter.spec.window_tokens
        if not num_tokens:
            raise ValueError("the prompt is empty")
        if num_tokens >= window:
            raise PromptTooLongError(num_tokens, options.max_new_tokens, window)
        max_new_tokens = min(options.max_new_tokens, window - num_tokens)

        def emit(text: str) -> None:
            if "first_token" not in seconds:
                seconds["first_token"] = time.perf_counter() - started
            if text and on_text:
                on_text(text)

        with (
            self._buffers.borrow(num_tokens + max_new_tokens) as buffers,
            open_restoring(
                self.adapter,
                composition,
                buffers,
                self.store,
                reference_mode=self.reference_mode,
            ) as cache,
        ):
            repaired = 0
            if self.repair_share and composition.num_restored > composition.num_exact:
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
        provenance = provenance_of(composition, pieces, seconds, cache.times, warnings, repaired)
        self._warn_of(pieces)
        return Generation(text, token_ids, reason, provenance)

    def _warn_of(self, pieces: Sequence[ResolvedPiece]) -> None:
        """Log why documents have no usable state, once for each of them."""
        for note in misses([p for p in pieces if p.document not in self._warned]):
            logger.warning(note)
        self._warned.update(p.document for p in pieces if p.document and p.record is None)

    def _without(
        self, pieces: Sequence[ResolvedPiece], error: StateError, warnings: list[str]
    ) -> list[ResolvedPiece]:
        """The same pieces, with the state that failed dropped from them and from the store."""
        message = f"{error}; it was dropped and its tokens are read afresh"
        warnings.append(message)
        logger.warning(message)
        self._damaged.add(error.key)
        record = self.store.record(error.key)
        if record is not None:
            self._catalogue.mark_damaged(record, f"damaged state ({error.reason})")
        if not self.store.read_only:
            self.store.delete(error.key)
        return [
            ResolvedPiece(p.token_ids, p.document, None)  # its warning has been given
            if p.record is not None and p.record.key == error.key
            else p
            for p in pieces
        ]

    def _pending(
        self, texts: Iterable[str]
    ) -> tuple[list[PendingState], int, list[tuple[str, str]]]:
        pending: dict[bytes, PendingState] = {}
        reused: set[bytes] = set()
        skipped: list[tuple[str, str]] = []
        room = self.adapter.spec.window_tokens - len(self._preamble_ids)
        for text in texts:
            stripped = text.strip()
            token_ids = self._tokens.document(stripped)
            key = child_key(self._parent, token_ids)
            if not len(token_ids):
                skipped.append((stripped[:40], "empty"))
            elif len(token_ids) > room:
                reason = f"{len(token_ids)} tokens, but the window has room for {room}"
                skipped.append((stripped[:40], reason))
            elif key in pending or key in reused:
                continue
            elif self.store.record(key) is not None:
                reused.add(key)
            else:
                pending[key] = PendingState(key, token_ids, stripped)
        return list(pending.values()), len(reused), skipped

    def _store_preamble(self) -> None:
        if self._parent == self.root or self.store.record(self._parent) is not None:
            return
        self._damaged.discard(self._parent)
        state = PendingState(self._parent, self._preamble_ids, self.preamble)
        store_batch(
            self.adapter,
            self.store,
            [state],
            self.choice.layout,
            self.root,
            self.root,
            self.adapter.prefill([]),
            is_preamble=True,
        )

    def _after_preamble(self) -> DynamicCache:
        if self._preamble_cache is None:
            self._preamble_cache = self.adapter.prefill(self._preamble_ids.tolist())
        return self._preamble_cache

    def _warn_if_foreign(self) -> None:
        if self._catalogue.num_foreign:
            logger.warning(
                "%s holds %d documents whose states were made by another model or tokenizer; "
                "they cannot be used by %s",
                self.store.path,
                self._catalogue.num_foreign,
                self.adapter.spec.name,
            )


def _repair_share(fidelity: Fidelity) -> float:
    if fidelity == "exact":
        return 0.0
    if isinstance(fidelity, str):
        if fidelity not in FIDELITY_SHARES:
            known = ", ".join(["exact", *FIDELITY_SHARES])
            raise ValueError(f"fidelity is a number or one of {known}, not {fidelity!r}")
        return FIDELITY_SHARES[fidelity]
    if isinstance(fidelity, bool) or not 0 <= fidelity <= 1:
        raise ValueError(f"fidelity is a share from 0 to 1, not {fidelity!r}")
    return float(fidelity)
