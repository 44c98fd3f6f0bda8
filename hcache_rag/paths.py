"""Exact paths: beginnings of prompts that were read before, conversations above all.

A path is a row of states, each computed right after the one before it. They keep K and V as the
model had them, in a namespace that belongs to the documents', and are found by their text: in the
order of texts, the children of a state stand behind one another, since its key is put before
theirs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hcache_kernels import reference
from hcache_rag.errors import HCacheError, MissingStateError, StoreError
from hcache_rag.forks import ForkedLock
from hcache_rag.joining import in_front, last_ones
from hcache_rag.layout import LayerFormat, Representation, StateLayout
from hcache_rag.models import CapturedLayer, ModelAdapter
from hcache_rag.profile import ModelCosts
from hcache_rag.prompt import Tokenizer
from hcache_rag.state import StateKey, StateRecord, TokenIds, child_key, token_array
from hcache_rag.store import PATHS, NewState, StateStore, StoreReader
from hcache_rag.texts import longest_match
from hcache_rag.values import state_values

logger = logging.getLogger("hcache_rag")

MAX_BYTES = 1 << 30
"""That paths take on disk, if nothing else is said; those that save least time go first."""
MIN_TOKENS = 16
"""Fewer are not worth a state."""


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """A state of a path that a prompt goes along: how many of its tokens, and of the prompt's
    characters. Only the last one of a path may be left before its end.
    """

    record: StateRecord
    num_tokens: int
    num_chars: int


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """What a model has read, as it stood in its cache.

    Args:
        parent: the key of the path that it was read after.
        token_ids: (T,).
        text: of these tokens.
        first: the position of the first one.
        keys, values: after RoPE, (L, G, T, D) each; its own memory.
        is_approximate: see `StateRecord`.
    """

    parent: StateKey
    token_ids: TokenIds
    text: str
    first: int
    keys: Tensor
    values: Tensor
    is_approximate: bool


class Paths:
    """The stored paths of one model and tokenizer. Thread-safe.

    Args:
        store: of the documents; the paths' namespace is made when the first one is kept.
        root: the root of the state tree.
        max_bytes: that all paths may take; with 0 there are none.
        is_usable: whether a state may be restored.
        costs: of the model on this machine, where they are known.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        store: StateStore,
        tokenizer: Tokenizer,
        root: StateKey,
        *,
        max_bytes: int = MAX_BYTES,
        is_usable: Callable[[StateRecord], bool] = lambda _record: True,
        costs: ModelCosts | None = None,
    ) -> None:
        if max_bytes < 0:
            raise ValueError(f"paths cannot take {max_bytes} bytes")
        self._adapter = adapter
        self._documents = store
        self._tokenizer = tokenizer
        self._root = root
        self._max_bytes = max_bytes
        self._is_usable = is_usable
        self._costs = costs
        spec = adapter.spec
        fmt = LayerFormat(Representation.KV, spec.dtype)
        self.layout = StateLayout.of(spec, [fmt] * spec.num_layers)
        self._store: StateStore | None = None
        self._lock = ForkedLock()
        self._is_limited = self._is_closed = False

    @property
    def is_on(self) -> bool:
        """Whether there may be any."""
        return self._max_bytes > 0

    @property
    def store(self) -> StateStore | None:
        """Where paths are kept; None where none was kept yet."""
        if self._store is None and self.is_on and not self._is_closed:
            with suppress(StoreError):  # then nothing is found
                if self._documents.has_beside(PATHS):
                    return self._opened(self._documents.beside(PATHS))
        return self._store

    def _opened(self, store: StateStore) -> StateStore:
        """The store that is used from now on; another one may have been opened meanwhile."""
        with self._lock:
            if self._store is None and not self._is_closed:
                self._store = store
                return store
            its = self._store
        store.close()
        if its is None:
            raise StoreError(f"the store {self._documents.path} is closed")
        return its

    def walk(self, prompt: str, *, add_bos: bool) -> list[Step]:
        """The longest path that a prompt begins with."""
        if self.store is None:
            return []
        first = self._tokenizer.first(prompt, add_bos=add_bos)
        rest, path, steps = first + prompt, self._root, list[Step]()
        while (step := self._step(path, rest)) is not None:
            # What `add_bos` puts in front is no part of the prompt.
            num_chars = step.num_chars - (0 if steps else len(first))
            steps.append(Step(step.record, step.num_tokens, num_chars))
            rest, path = rest[step.num_chars :], step.record.key
            if step.num_tokens < step.record.num_tokens:
                break
        return steps if sum(step.num_chars for step in steps) > 0 else []

    def _step(self, path: StateKey, rest: str) -> Step | None:
        """The state after `path` that begins `rest` for longest."""
        store = self.store
        if store is None or not rest:
            return None
        name = _name(path, "")
        try:
            with store.looking() as view:
                match = longest_match(view, name + rest, 0)
            if match is None or match.end <= len(name):
                return None
            records = store.find(match.text)
        except StoreError as error:
            logger.warning("%s; no earlier conversation is looked for", error)
            return None
        chars, text = match.end - len(name), match.text[len(name) :]
        for record in records:
            if record.root != self._root or record.parent != path or not self._is_usable(record):
                continue
            if chars == len(text):
                return Step(record, record.num_tokens, chars)
            if not self._tokenizer.is_literal:
                continue
            tokens = self._tokenizer.tokens_within(record.token_ids, rest[:chars])
            if tokens:
                its = self._tokenizer.text(record.token_ids[:tokens].tolist())
                return Step(record, tokens, len(its))
        return None

    def keep(self, snapshot: Snapshot, path: Sequence[StateRecord] = ()) -> StateRecord | None:
        """Store what was read; None, and a line in the log, where that does not go.

        Args:
            path: the states that it was read after; where they are many, the last ones are stored
                with it as one.
        """
        its = self.store
        joined = last_ones(path, len(snapshot.token_ids), is_approximate=snapshot.is_approximate)
        record = self._record(snapshot, joined)
        there = its.record(record.key) if its is not None else None
        if there is not None and (snapshot.is_approximate or not there.is_approximate):
            return there
        captured = captured_layers(self._adapter, snapshot)
        if joined and its is not None:
            try:
                with its.reading([r.key for r in joined]) as reader:
                    captured = in_front(reader, joined, captured, self._adapter.spec)
            except HCacheError as error:
                logger.info("a conversation's states are not joined: %s", error)
                record = self._record(snapshot)
        values = list(state_values(self._adapter, record, captured, 0))
        layers = self._adapter.spec.num_layers
        saved_s = self._costs.read_s(record.num_tokens, layers) if self._costs else None
        try:
            self._made().put_all([NewState(record, values, saved_s)])
        except HCacheError as error:
            logger.warning("a conversation's state is not kept: %s", error)
            self._forget_deleted()
            return None
        return record

    def _record(self, snapshot: Snapshot, joined: Sequence[StateRecord] = ()) -> StateRecord:
        """Of a snapshot, with the states right before it."""
        parent = joined[0].parent if joined else snapshot.parent
        token_ids = np.concatenate([*(r.token_ids for r in joined), snapshot.token_ids])
        text = "".join(r.text[len(_name(r.parent, "")) :] for r in joined) + snapshot.text
        return StateRecord(
            child_key(parent, token_ids),
            parent,
            self._root,
            token_ids,
            _name(parent, text),
            self.layout,
            time.time(),
            is_approximate=snapshot.is_approximate,
        )

    def drop(self, record: StateRecord) -> None:
        """Delete a state that cannot be used."""
        store = self.store
        if store is None:
            return
        store.count_use(damaged=1)
        if not store.read_only:
            try:
                store.delete(record.key, unless_changed=record)
            except StoreError as failure:
                logger.warning("it could not be dropped: %s", failure)

    def count_use(self, keys: Iterable[StateKey]) -> None:
        """States were restored."""
        used, store = list(keys), self.store
        if used and store is not None:
            store.count_use(used)

    def _made(self) -> StateStore:
        """Where paths are kept, from now on with the limit that was asked for."""
        store = self._store
        if store is None or not self._is_limited:
            limited = self._documents.beside(PATHS, namespace_max_bytes=self._max_bytes)
            store = self._opened(limited)
            self._is_limited = True
        return store

    def _forget_deleted(self) -> None:
        """Where somebody has deleted the namespace, let the next path make it anew."""
        with suppress(StoreError):
            if not self._documents.has_beside(PATHS):
                self._take_store()

    def _take_store(self) -> None:
        with self._lock:
            store, self._store, self._is_limited = self._store, None, False
        if store is not None:
            store.close()

    def close(self) -> None:
        """Close the paths' namespace; nothing is found or kept any more."""
        self._is_closed = True
        self._take_store()


class Shelf:
    """Documents and paths to be read from together, see `hcache_rag.executor.Readable`.

    Args:
        records: of the states that are paths'.
    """

    def __init__(
        self, documents: StateStore, paths: StateStore, records: Iterable[StateRecord]
    ) -> None:
        self._documents = documents
        self._paths = paths
        self._records = list(records)
        self._keys = {record.key for record in self._records}

    @contextmanager
    def reading(self, keys: Collection[StateKey] = ()) -> Iterator[_Either]:
        """A view of both.

        Raises:
            MissingStateError: another state has taken the place of a path's.
        """
        others = [key for key in keys if key not in self._keys]
        with (
            self._documents.reading(others) as documents,
            self._paths.reading(self._keys) as paths,
        ):
            for record in self._records:
                found = paths.record(record.key)
                if found is None or found.to_bytes() != record.to_bytes():
                    raise MissingStateError(record.key, "another state has taken its place")
            yield _Either(documents, paths, self._keys)


class _Either:
    def __init__(
        self, documents: StoreReader, paths: StoreReader, keys: Collection[StateKey]
    ) -> None:
        self._documents = documents
        self._paths = paths
        self._keys = keys

    def expect(self, first: Mapping[StateKey, tuple[int, int]]) -> None:
        """See `StoreReader.expect`."""
        others = {key: place for key, place in first.items() if key not in self._keys}
        self._documents.expect(others)

    def value(self, key: StateKey, layer: int, chunk: int) -> memoryview:
        """See `StoreReader.value`."""
        reader = self._paths if key in self._keys else self._documents
        return reader.value(key, layer, chunk)


def _name(parent: StateKey, text: str) -> str:
    """What a state of a path is found by."""
    return f"{parent.hex()}\n{text}"


def captured_layers(adapter: ModelAdapter, snapshot: Snapshot) -> list[CapturedLayer]:
    """K before RoPE, and V, of a snapshot, as `ModelAdapter.capture` gives them."""
    length = len(snapshot.token_ids)
    positions = torch.arange(snapshot.first, snapshot.first + length, device=adapter.device)
    cos_sin = adapter.all_position_embeddings(positions)
    is_interleaved = adapter.family.is_interleaved
    layers = []
    for kind, keys, values in zip(adapter.rope_kinds, snapshot.keys, snapshot.values, strict=True):
        plain = reference.rope_undone(keys, *cos_sin[kind], is_interleaved=is_interleaved)
        layers.append(CapturedLayer(*(_rows(side) for side in (plain.to(keys.dtype), values))))
    return layers


def _rows(side: Tensor) -> Tensor:
    """(G, T, D) as (1, T, G * D)."""
    return side.transpose(0, 1).flatten(1).unsqueeze(0)


def said(tokenizer: Tokenizer, answer: str, token_ids: Sequence[int]) -> tuple[int, str]:
    """How many first tokens of an answer say a beginning of its text, and that beginning.

    The others are control tokens, blanks at the end, or were cut off with a stop string.
    """
    count = tokenizer.tokens_within(token_array(token_ids), answer.rstrip())
    return count, tokenizer.text(token_ids[:count])
