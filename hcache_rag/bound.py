"""A model as it is now, with the states that it can use.

An engine makes another one when the model's weights have changed; who has begun with one ends with
it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from hcache_rag.account import misses
from hcache_rag.catalogue import Catalogue
from hcache_rag.choice import LayoutChoice
from hcache_rag.compose import Composition, compose
from hcache_rag.errors import StateError, StoreError, UnreachableStateError
from hcache_rag.executor import Readable
from hcache_rag.indexing import Indexer
from hcache_rag.keeper import Keeper
from hcache_rag.layout import StateLayout
from hcache_rag.models import ModelAdapter
from hcache_rag.paths import Paths, Shelf
from hcache_rag.prefixes import Prefixes
from hcache_rag.profile import HardwareProfile
from hcache_rag.prompt import Tokenizer
from hcache_rag.repair import recommended, repair_share
from hcache_rag.resolved import Resolved, ResolvedPiece, beginning_only, exact_ones
from hcache_rag.sequences import BATCH_TOKENS, PendingState
from hcache_rag.state import StateRecord, root_key
from hcache_rag.store import StateStore
from hcache_rag.store.models import UNKNOWN, StoredModel
from hcache_rag.texts import TextSet

logger = logging.getLogger("hcache_rag")

Fidelity = Literal["auto", "exact", "high", "balanced", "fast", "none"] | float


@dataclass(frozen=True, slots=True)
class Settings:
    """How states are made, kept and used, whatever the weights are; see `HCacheEngine`.

    Args:
        is_asked_for: the layout was: states in another one are computed anew.
    """

    preamble: str
    add_bos: bool
    fidelity: Fidelity
    context_at_index: Literal["none", "documents"]
    choice: LayoutChoice
    is_asked_for: bool
    profile: HardwareProfile | None
    paths_max_bytes: int
    keep_recurring: bool


class Bound:
    """A model with what a store holds for it.

    Args:
        adapter: the model, unchanged since this was made.
        tokens: its tokenizer.
        announced: texts that are documents whether or not they have a state.

    Attributes:
        root, parent: the keys that its states, and those of its documents, go on from.
        fidelity, repair_share: where "auto" was asked for, as the store recommends.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        tokens: Tokenizer,
        store: StateStore,
        settings: Settings,
        announced: TextSet,
    ) -> None:
        self.adapter = adapter
        self.tokens = tokens
        self.store = store
        self.settings = settings
        self.root = root_key(adapter.fingerprint, tokens.fingerprint)
        self.prefixes = Prefixes(adapter, store, self.root)
        self._preamble_ids = tokens.preamble(settings.preamble, add_bos=settings.add_bos)
        self.parent = self.prefixes.add(self.root, self._preamble_ids)
        self.fidelity: str | float = settings.fidelity
        if settings.fidelity == "auto":
            known = store.models().get(self.root, UNKNOWN)
            self.fidelity = recommended(known.fidelity_with(self.measured_with(known)))
        self.repair_share = repair_share(self.fidelity)
        self.catalogue = Catalogue(store, tokens, self.root, self.parent, announced)
        profile = settings.profile
        self._costs = profile.costs_of(adapter.spec) if profile is not None else None
        self.paths = Paths(
            adapter,
            store,
            tokens,
            self.root,
            max_bytes=settings.paths_max_bytes,
            is_usable=lambda record: self.why_not(record) is None,
            costs=self._costs,
        )
        keeps_recurring = settings.keep_recurring and not store.read_only
        self.keeper = Keeper(adapter, self.paths, tokens, self.root, recurring=keeps_recurring)
        self.indexer = self.indexer_into(store)
        self._warned: set[str] = set()

    def indexer_into(self, store: StateStore, batch_tokens: int = BATCH_TOKENS) -> Indexer:
        """What reads texts for these states, and keeps theirs in a store."""
        settings = self.settings
        return Indexer(
            self.adapter,
            store,
            self.tokens,
            self.prefixes,
            settings.choice,
            self.root,
            PendingState(self.root, self._preamble_ids, settings.preamble),
            is_chained=settings.context_at_index == "documents",
            is_kept=self._is_kept,
            costs=self._costs,
            batch_tokens=batch_tokens,
        )

    def _is_kept(self, layout: StateLayout) -> bool:
        """Whether a stored state in this layout need not be stored anew."""
        if self.settings.is_asked_for:
            return layout == self.settings.choice.layout
        return self.fidelity != "exact" or layout.is_lossless(self.adapter.spec.dtype)

    def measured_with(self, model: StoredModel) -> str:
        """See `HCacheEngine.measured_with`."""
        settings = self.settings
        layout = model.layout or str(settings.choice.layout)
        return f"{layout}; context: {settings.context_at_index}; after: {self.parent.hex()}"

    # A prompt, its states, and where they are read from.

    def resolve(self, prompt: str, add_bos: bool | None = None) -> Resolved:
        """A prompt in pieces, each with the state that it can be restored from.

        Args:
            add_bos: instead of the settings'.
        """
        bos = self.settings.add_bos if add_bos is None else add_bos
        walked = self.keeper.walk(prompt, add_bos=bos)
        found = self.catalogue.resolve(prompt, add_bos=bos, walked=walked)
        found.pieces = exact_ones([self._usable(piece) for piece in found.pieces], self.root)
        if not self.adapter.is_movable:
            why_not = self.adapter.why_not_movable
            found.pieces = beginning_only(found.pieces, self.root, why_not)
        return found

    def _usable(self, piece: ResolvedPiece) -> ResolvedPiece:
        """The piece, without states that cannot be used."""
        if piece.record is None:
            return piece
        missing = {record: self.why_not(record) for record in (piece.record, *piece.others)}
        usable = [record for record, miss in missing.items() if miss is None]
        if not usable:
            return replace(piece, record=None, others=(), miss=missing[piece.record])
        return replace(piece, record=usable[0], others=tuple(usable[1:]))

    def why_not(self, record: StateRecord) -> str | None:
        """Why a state cannot be used; None if it can."""
        if self.fidelity == "exact" and not record.layout.is_lossless(self.adapter.spec.dtype):
            return f"kept as {record.layout}, which is not exact; see storage_dtype"
        if self.fidelity == "exact" and record.is_approximate:
            return "it goes on from something that was restored with a loss"
        if record.layout.num_none and record.parent not in self.prefixes:
            return "some layers are not kept, and what it was computed after is not known"
        try:
            self.store.read_rate(record.key)
        except UnreachableStateError as error:
            return error.reason
        return None

    def state_for(self, text: str) -> StateRecord | None:
        """The state that a document is most likely restored from."""
        records = self.catalogue.states(text.strip())
        return next((record for record in records if self.why_not(record) is None), None)

    def compose(self, pieces: Sequence[ResolvedPiece]) -> Composition:
        """What of a prompt's pieces is restored, where, and what is read."""
        has_preamble = self.parent != self.root and not self.catalogue.is_damaged(self.parent)
        preamble = self.store.record(self.parent) if has_preamble else None
        if preamble is not None:
            preamble = self._usable(ResolvedPiece(preamble.token_ids, None, preamble)).record
        return compose(
            [(piece.token_ids, piece.record) for piece in pieces],
            self.root,
            preamble,
            exact_only=self.fidelity == "exact",
            beginning_only=not self.adapter.is_movable,
        )

    def shelf(self, pieces: Sequence[ResolvedPiece]) -> Readable:
        """Where the states of some pieces are read from."""
        records = [p.record for p in pieces if p.is_path and p.record is not None]
        paths = self.paths.store
        return Shelf(self.store, paths, records) if records and paths is not None else self.store

    # What happened to them.

    def mark_stored(self, record: StateRecord) -> None:
        """A state is in the store."""
        self.catalogue.mark_stored(record.key)
        self._warned.discard(record.text)

    def count_use(self, pieces: Sequence[ResolvedPiece]) -> None:
        """A prompt was answered from these pieces."""
        documents = [piece for piece in pieces if piece.document is not None]
        missed = [piece for piece in documents if piece.record is None]
        self.store.count_use(
            [piece.record.key for piece in documents if piece.record is not None],
            misses=len(missed),
            hit_tokens=sum(len(p.token_ids) for p in documents if p.record is not None),
            missed_tokens=sum(len(p.token_ids) for p in missed),
        )
        self.paths.count_use(p.record.key for p in pieces if p.is_path and p.record is not None)

    def warn_of(self, pieces: Iterable[ResolvedPiece]) -> None:
        """Log why documents have no usable state, once for each of them."""
        new = [piece for piece in pieces if piece.document not in self._warned]
        for note in misses(new):
            logger.warning(note)
        self._warned.update(p.document for p in new if p.document and p.record is None)

    def warn_if_foreign(self) -> None:
        """Log how many documents another model or tokenizer has read."""
        num_foreign = self.catalogue.num_foreign()
        if num_foreign:
            logger.warning(
                "%s holds %d documents whose states were made by another model or tokenizer; "
                "they cannot be used by %s",
                self.store.path,
                num_foreign,
                self.adapter.spec.name,
            )

    def without(
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
        self.catalogue.mark_damaged(error.key, text, f"damaged state ({error.reason})")
        self.store.count_use(damaged=1)
        if not self.store.read_only:
            try:
                self.store.delete(error.key, unless_changed=used)
            except StoreError as failure:
                logger.warning("it could not be dropped: %s", failure)
