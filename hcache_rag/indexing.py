"""Reading documents once: capture in batches, encode, store. One transaction per document."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass

from transformers import DynamicCache

from hcache_rag.choice import LayoutChoice
from hcache_rag.continuing import Beginning, beginning_of, cache_with, continued_values
from hcache_rag.errors import StateError, StoreError, StoreFullError, UnsupportedModelError
from hcache_rag.forks import ForkedLock
from hcache_rag.layout import StateLayout
from hcache_rag.models import ModelAdapter
from hcache_rag.prefixes import Prefixes
from hcache_rag.profile import ModelCosts
from hcache_rag.prompt import Tokenizer
from hcache_rag.sequences import (
    BATCH_TOKENS,
    CHAIN_TOKENS,
    PendingState,
    TokenRow,
    alone,
    batches,
    chained,
)
from hcache_rag.state import StateKey, StateRecord
from hcache_rag.store import NewState, StateStore
from hcache_rag.values import state_values

logger = logging.getLogger("hcache_rag")

SEPARATOR = "\n\n"
"""What stands between documents that are read one behind another, as it does in prompts."""


@dataclass(frozen=True, slots=True)
class PrecomputeReport:
    """What a call of `HCacheEngine.precompute` did.

    Args:
        stored, reused: documents whose state was computed now, and whose state was there already.
        skipped: documents without a state and why, as (first words, reason).
        stored_tokens, stored_bytes: of the states computed now.
        continued, continued_tokens: documents among the stored that begin as a stored one, and
            their tokens that were not read again.
        seconds: wall time.
    """

    stored: int = 0
    reused: int = 0
    skipped: tuple[tuple[str, str], ...] = ()
    stored_tokens: int = 0
    stored_bytes: int = 0
    seconds: float = 0.0
    continued: int = 0
    continued_tokens: int = 0


@dataclass(frozen=True, slots=True)
class UnitReport:
    """What a call of `Indexer.precompute_unit` did.

    Args:
        done: of these, what was computed now, and what was there already.
        tokens, num_bytes: of all states of the unit.
    """

    done: PrecomputeReport
    tokens: int
    num_bytes: int


@dataclass(slots=True)
class _Sums:
    """Of what has been stored so far."""

    tokens: int = 0
    num_bytes: int = 0
    continued: int = 0
    continued_tokens: int = 0


class Indexer:
    """Stores the states of texts, each after one preamble. Thread-safe.

    Args:
        choice: what states keep, and why.
        root: of the model's state tree.
        preamble: the state that prompts begin with; its key is `root` where it has no tokens.
        is_chained: texts are read one behind another, see `hcache_rag.sequences`.
        is_kept: whether a state that is stored already in some layout will do.
        costs: of the model on this machine, where they are known.
        batch_tokens: that are read at once, padding included.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        store: StateStore,
        tokenizer: Tokenizer,
        prefixes: Prefixes,
        choice: LayoutChoice,
        root: StateKey,
        preamble: PendingState,
        is_chained: bool = False,
        is_kept: Callable[[StateLayout], bool] = lambda _layout: True,
        costs: ModelCosts | None = None,
        batch_tokens: int = BATCH_TOKENS,
    ) -> None:
        self._adapter = adapter
        self._store = store
        self._tokenizer = tokenizer
        self._prefixes = prefixes
        self._choice = choice
        self._root = root
        self._preamble = preamble
        self._is_chained = is_chained
        self._is_kept = is_kept
        self._costs = costs
        self._batch_tokens = batch_tokens
        self._one_at_a_time = ForkedLock()

    def precompute(
        self,
        texts: Iterable[str],
        on_stored: Callable[[StateRecord], None],
        on_progress: Callable[[int, int], None] | None = None,
    ) -> PrecomputeReport:
        """See `HCacheEngine.precompute`; `on_stored` is told of each state that is stored."""
        if isinstance(texts, str):
            raise TypeError("texts are a list of strings, not one string")
        started = time.perf_counter()
        with self._one_at_a_time:
            pending, reused, skipped = self._pending(texts)
            total, done = reused + len(pending), reused
            sums = _Sums()
            if on_progress:
                on_progress(done, total)
            try:
                if pending:
                    self._begin(on_stored)
                for records in self._store_all(pending, sums):
                    for record in records:
                        on_stored(record)
                    done += len(records)
                    if on_progress:
                        on_progress(done, total)
            finally:
                if pending:
                    self._store.sync()
        seconds = time.perf_counter() - started
        return PrecomputeReport(
            len(pending),
            reused,
            tuple(skipped),
            sums.tokens,
            sums.num_bytes,
            seconds,
            sums.continued,
            sums.continued_tokens,
        )

    def precompute_unit(
        self,
        texts: Iterable[str],
        on_stored: Callable[[StateRecord], None] = lambda _record: None,
    ) -> UnitReport:
        """Store texts as a unit of work: what is computed depends on these texts alone.

        Unlike `precompute`, a state is not continued from another one, and texts whose states are
        there are read again with those that are not: what stands together in a batch decides the
        last bits. So a unit that was killed and begun again ends as if it had not been.
        """
        started = time.perf_counter()
        with self._one_at_a_time:
            wanted, skipped = self._readable(texts)
            reused, sums = 0, _Sums()
            for batch in batches(self._rows(wanted), self._batch_tokens):
                states = [state for row in batch for _, state in row.states]
                missing = {state.key for state in states if not self._has(state.key)}
                reused += len(states) - len(missing)
                if missing:
                    self._begin(on_stored)
                    records, num_bytes = self._store_batch(batch, self._preamble.key, only=missing)
                    sums.tokens += sum(record.num_tokens for record in records)
                    sums.num_bytes += num_bytes
                    for record in records:
                        on_stored(record)
            self._store.sync()
        seconds = time.perf_counter() - started
        done = PrecomputeReport(
            len(wanted) - reused, reused, tuple(skipped), sums.tokens, sums.num_bytes, seconds
        )
        lengths = [len(state.token_ids) for state in wanted]
        return UnitReport(done, sum(lengths), sum(map(self._state_bytes, lengths)))

    def _state_bytes(self, num_tokens: int) -> int:
        """Of all values of a state."""
        layout, spec = self._choice.layout, self._adapter.spec
        whole, rest = divmod(num_tokens, layout.chunk_tokens)
        chunks = [layout.chunk_tokens] * whole + [rest] * (rest > 0)
        return sum(
            count * sum(fmt.value_bytes(spec, tokens) for tokens in chunks)
            for fmt, count in layout.runs
        )

    def unit_id(self, texts: Iterable[str]) -> str:
        """A digest of a unit's texts, in their order, and of what would be kept of them."""
        digest = hashlib.blake2b(self._preamble.key, digest_size=16)
        digest.update(f"{self._choice.layout} {self._is_chained} {self._batch_tokens}".encode())
        for text in texts:
            encoded = text.strip().encode("utf-8", "surrogatepass")
            digest.update(hashlib.blake2b(encoded, digest_size=16).digest())
        return digest.hexdigest()

    def _store_all(
        self, pending: Sequence[PendingState], sums: _Sums
    ) -> Iterator[list[StateRecord]]:
        """Store states, those first that go on from a stored one; the records of each batch."""
        left = []
        for state in pending:
            record = None if self._is_chained else self._continue(state, sums)
            if record is None:
                left.append(state)
            else:
                yield [record]
        for batch in batches(self._rows(left), self._batch_tokens):
            records, num_bytes = self._store_batch(batch, self._preamble.key)
            sums.tokens += sum(record.num_tokens for record in records)
            sums.num_bytes += num_bytes
            yield records

    def _rows(self, pending: Sequence[PendingState]) -> list[TokenRow]:
        """What is read at once."""
        if not self._is_chained:
            return [alone(state) for state in pending]
        separator = self._tokenizer.gap(SEPARATOR)
        return list(chained(pending, separator, min(CHAIN_TOKENS, self._room)))

    @property
    def _room(self) -> int:
        """Tokens of the window behind the preamble."""
        return self._adapter.spec.window_tokens - len(self._preamble.token_ids)

    def _continue(self, state: PendingState, sums: _Sums) -> StateRecord | None:
        """Store a state that begins as a stored one; None where there is none such."""
        layout, parent = self._choice.layout, state.parent
        try:
            found = beginning_of(self._store, parent, layout, state.text, state.token_ids)
            if found is None:
                return None
            record, num_bytes = self._store_continued(state, found)
        except StoreFullError:
            raise
        except (StateError, StoreError) as error:
            logger.warning("%s; the document is read as a whole", error)
            return None
        sums.tokens += record.num_tokens
        sums.num_bytes += num_bytes
        sums.continued += 1
        sums.continued_tokens += found.num_tokens
        return record

    def _store_continued(self, state: PendingState, found: Beginning) -> tuple[StateRecord, int]:
        after = cache_with(self._adapter, self._store, self._prefixes, found)
        layout, parent = self._choice.layout, state.parent
        rest = state.token_ids[found.num_tokens :].tolist()
        captured = self._adapter.capture([rest], [f.representation for f in layout.layers], after)
        record = StateRecord(
            state.key, parent, self._root, state.token_ids, state.text, layout, time.time()
        )
        values = continued_values(self._adapter, self._store, found, record, captured)
        saved_s = _saved_s(self._adapter, self._costs, record)
        return record, self._store.put_all([NewState(record, values, saved_s)])

    def _pending(
        self, texts: Iterable[str]
    ) -> tuple[list[PendingState], int, list[tuple[str, str]]]:
        wanted, skipped = self._readable(texts)
        has = self._has_text if self._is_chained else lambda state: self._has(state.key)
        pending = [state for state in wanted if not has(state)]
        return pending, len(wanted) - len(pending), skipped

    def _readable(self, texts: Iterable[str]) -> tuple[list[PendingState], list[tuple[str, str]]]:
        """The texts that can have a state, each once, and the others."""
        wanted: dict[StateKey, PendingState] = {}
        skipped: list[tuple[str, str]] = []
        room = self._room
        for number, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"texts are strings, but texts[{number}] is {type(text).__name__}")
            stripped = text.strip()
            state = PendingState(self._preamble.key, self._tokenizer.document(stripped), stripped)
            if not len(state.token_ids):
                skipped.append((stripped[:40], "empty"))
            elif len(state.token_ids) > room:
                reason = f"{len(state.token_ids)} tokens, but the window has room for {room}"
                skipped.append((stripped[:40], reason))
            else:
                wanted.setdefault(state.key, state)
        return list(wanted.values()), skipped

    def states_of(self, text: str) -> list[StateRecord]:
        """The states of a text that `precompute` would not read anew: made with these options.

        Where there is none such, those that this model has at all.
        """
        known = [r for r in self._store.find(text.strip()) if r.root == self._root]
        parent = self._preamble.key
        kept = [r for r in known if self._is_kept(r.layout)]
        kept = [r for r in kept if (r.parent != parent) == self._is_chained] or kept
        return kept or known

    def _has_text(self, state: PendingState) -> bool:
        """Whether a text has a state that was read behind others, whichever these were."""
        return any(
            record.root == self._root and record.parent != state.parent
            for record in self._store.find(state.text)
            if self._is_kept(record.layout)
        )

    def _has(self, key: StateKey) -> bool:
        record = self._store.record(key)
        return record is not None and self._is_kept(record.layout)

    def _begin(self, on_stored: Callable[[StateRecord], None]) -> None:
        """Say in the store what will be kept, and store the preamble."""
        if self._adapter.is_training:
            raise UnsupportedModelError(
                f"{self._adapter.spec.name} is in training mode: its dropout would be kept in "
                "states; call model.eval() first"
            )
        choice = self._choice
        name = self._adapter.spec.name
        self._store.name_model(self._root, name, str(choice.layout), choice.reason)
        preamble = self._preamble
        if len(preamble.token_ids) and not self._has(preamble.key):
            (record,), _ = self._store_batch([alone(preamble)], self._root, is_preamble=True)
            on_stored(record)

    def _store_batch(
        self,
        batch: Sequence[TokenRow],
        after: StateKey,
        *,
        is_preamble: bool = False,
        only: Container[StateKey] | None = None,
    ) -> tuple[list[StateRecord], int]:
        return store_batch(
            self._adapter,
            self._store,
            batch,
            self._choice.layout,
            self._root,
            self._prefixes.cache(after),
            is_preamble=is_preamble,
            costs=self._costs,
            only=only,
        )


def store_batch(
    adapter: ModelAdapter,
    store: StateStore,
    batch: Sequence[TokenRow],
    layout: StateLayout,
    root: StateKey,
    after: DynamicCache,
    *,
    is_preamble: bool = False,
    costs: ModelCosts | None = None,
    only: Container[StateKey] | None = None,
) -> tuple[list[StateRecord], int]:
    """Read a batch after a prefix, and store the states in it.

    Args:
        after: the KV cache of the prefix.
        costs: what reading a document again would cost, by which states are kept or let go.
        only: the states that are stored, if not all are.

    Returns:
        The records, and the bytes of all values.
    """
    token_ids = [row.token_ids.tolist() for row in batch]
    captured = adapter.capture(token_ids, [f.representation for f in layout.layers], after)
    new = []
    for number, row in enumerate(batch):
        for begin, state in row.states:
            if only is not None and state.key not in only:
                continue
            record = StateRecord(
                state.key,
                state.parent,
                root,
                state.token_ids,
                state.text,
                layout,
                time.time(),
                is_preamble,
            )
            values = list(state_values(adapter, record, captured, number, begin))
            new.append(NewState(record, values, _saved_s(adapter, costs, record)))
    return [state.record for state in new], _put(store, new)


def _saved_s(adapter: ModelAdapter, costs: ModelCosts | None, record: StateRecord) -> float | None:
    """What reading a document again would take, where that is known."""
    return costs.read_s(record.num_tokens, adapter.spec.num_layers) if costs else None


def _put(store: StateStore, new: Sequence[NewState]) -> int:
    """Store a batch at once, or, where there is no room for that, one state after another."""
    try:
        return store.put_all(new)
    except StoreFullError:
        if len(new) == 1:
            raise
        return sum(store.put_all([state]) for state in new)
