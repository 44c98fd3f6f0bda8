"""A model in memory with the store of its states: what an LLM and its copies share."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hcache_rag.bound import Fidelity
from hcache_rag.bundled import MODEL_NAME, default_model_path
from hcache_rag.choice import layout_asked_for
from hcache_rag.engine import HCacheEngine
from hcache_rag.errors import StoreError
from hcache_rag.forks import ForkedLock
from hcache_rag.layout import StateLayout
from hcache_rag.line import Line
from hcache_rag.models import ModelAdapter, load_model
from hcache_rag.profile import HardwareProfile
from hcache_rag.prompt import Tokenization
from hcache_rag.store import StateStore


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model in memory.

    Args:
        name: what a person calls it.
        path: where it was loaded from; None where it was not loaded here.
        device: what was asked for when it was loaded.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    path: str | None
    device: str = "auto"


def load(
    model_name: str | os.PathLike[str] | None,
    model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    dtype: str,
    device: str,
) -> Loaded:
    """A model that was given, or one from a folder, by default the bundled one.

    Raises:
        ModelNotFoundError: there is no model in `model_name`.
        ValueError: too much was given, or too little.
    """
    if (model is None) != (tokenizer is None):
        raise ValueError("give both of model= and tokenizer=, or neither")
    if model is None or tokenizer is None:
        path = str(default_model_path() if model_name is None else model_name)
        name = MODEL_NAME if model_name is None else path
        return Loaded(*load_model(path, dtype=dtype, device=device), name, path, device)
    if model_name is not None:
        raise ValueError("give either model_name or model= and tokenizer=, not both")
    return Loaded(model, tokenizer, str(model.config.name_or_path or model.config.model_type), None)


@dataclass(frozen=True, slots=True)
class Keeping:
    """How states are kept; see `HCacheEngine`."""

    representation: str | Sequence[str] | StateLayout
    storage_dtype: str | None
    profile: HardwareProfile | Literal["auto"] | None
    reference_mode: bool


@dataclass(frozen=True, slots=True)
class Reading:
    """How prompts are read; see `HCacheEngine`. Copies of an LLM may differ in it."""

    fidelity: Fidelity
    context_at_index: Literal["none", "documents"]
    tokenization: Tokenization
    keep_recurring: bool
    store_missed: bool
    add_bos: bool


class Resident:
    """A model, its store, and an engine for each way to read prompts. Thread-safe.

    Args:
        store: an open store, which stays the caller's, or a folder; None makes a temporary one at
            the first use.

    Raises:
        UnsupportedModelError: the model cannot be restored on.
        ValueError: states cannot be kept so.
        StoreOpenError: `store` is a path that cannot hold a store.
    """

    def __init__(
        self,
        loaded: Loaded,
        store: StateStore | str | os.PathLike[str] | None,
        keeping: Keeping,
    ) -> None:
        self.loaded = loaded
        self.adapter = ModelAdapter(loaded.model, loaded.name)
        self.keeping = keeping
        layout_asked_for(  # refuses at once
            self.adapter.spec,
            keeping.representation,
            keeping.storage_dtype,
            is_known=self.adapter.is_known,
        )
        self.line = Line()
        self._lock = ForkedLock()
        self._is_closed = False
        self._engines: dict[Reading, HCacheEngine] = {}
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._owns_store = not isinstance(store, StateStore)
        self._store: StateStore | None = None
        if store is not None:
            self._store = store if isinstance(store, StateStore) else _open(store)

    def __deepcopy__(self, _memo: object) -> Resident:
        """Itself: one model, one store."""
        return self

    @property
    def store(self) -> StateStore | None:
        """The store that was named, by the caller or by a retriever."""
        return self._store if self._temporary is None else None

    def engine(self, reading: Reading, preamble: Callable[[], str]) -> HCacheEngine:
        """The engine that reads so; it, and a store behind it, are made where there is none.

        Args:
            preamble: gives the text that an engine which is made reads documents after.

        Raises:
            StoreError: there is none, and this is closed.
        """
        with self._lock:
            engine = self._engines.get(reading)
            if engine is None:
                self._refuse_closed()
                if self._store is None:
                    self._temporary = tempfile.TemporaryDirectory(prefix="hcache-rag-")
                    self._store = StateStore.open(self._temporary.name)
                engine = self._engines[reading] = self._made(self._store, reading, preamble())
            return engine

    def use_store(
        self, path: str | os.PathLike[str], reading: Reading, preamble: Callable[[], str]
    ) -> None:
        """Keep states in the folder `path` from now on.

        Raises:
            ValueError: there is another store already.
            StoreError: this is closed.
        """
        with self._lock:
            self._refuse_closed()
            if self.store is not None:
                raise ValueError(f"this LLM already keeps its states in {self.store.path}")
            store = _open(path)
            try:
                engine = self._made(store, reading, preamble())
            except BaseException:
                store.close()
                raise
            self._close_engines()
            self._close_temporary()
            self._store, self._engines = store, {reading: engine}

    def elsewhere(self) -> tuple[str | None, dict[str, Any]]:
        """The model's folder (None for the bundled one), and other arguments, to make the same in
        another process.

        Raises:
            TypeError: that does not go.
        """
        if self.loaded.path is None:
            raise TypeError(
                "an HCacheLLM around a loaded model is not passed on to another process; "
                "make it with model_name, which is loaded there"
            )
        name = None if self.loaded.name == MODEL_NAME else self.loaded.path
        store = self.store
        its = {field.name: getattr(self.keeping, field.name) for field in fields(self.keeping)}
        its["device"] = self.loaded.device
        its["store"] = str(store.path) if store is not None and self._owns_store else store
        return name, its

    def close(self) -> None:
        """Close the engines, and the store unless the caller brought it open."""
        with self._lock:
            self._is_closed = True
            self._close_engines()
            if self._store is not None and self._owns_store:
                self._store.close()
            self._close_temporary()

    def _refuse_closed(self) -> None:
        if self._is_closed:
            raise StoreError(f"this LLM ({self.loaded.name}) is closed, and so is its store")

    def _made(self, store: StateStore, reading: Reading, preamble: str) -> HCacheEngine:
        return HCacheEngine(
            self.loaded.model,
            self.loaded.tokenizer,
            store,
            preamble=preamble,
            add_bos=reading.add_bos,
            representation=self.keeping.representation,
            storage_dtype=self.keeping.storage_dtype,
            profile=self.keeping.profile,
            fidelity=reading.fidelity,
            keep_recurring=reading.keep_recurring,
            store_missed=reading.store_missed,
            context_at_index=reading.context_at_index,
            tokenization=reading.tokenization,
            reference_mode=self.keeping.reference_mode,
            name=self.loaded.name,
        )

    def _close_engines(self) -> None:
        for engine in self._engines.values():
            engine.close()

    def _close_temporary(self) -> None:
        if self._temporary is not None:
            if self._store is not None:
                self._store.close()
            self._temporary.cleanup()
            self._temporary = None


def _open(path: str | os.PathLike[str]) -> StateStore:
    """The store in a folder; one that cannot be written is read."""
    folder = Path(path).expanduser()
    return StateStore.open(folder, read_only=folder.is_dir() and not os.access(folder, os.W_OK))
