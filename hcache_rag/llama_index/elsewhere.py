"""An LLM that is opened again in another process, where it is named in what is passed there."""

from __future__ import annotations

import multiprocessing
import os
from dataclasses import dataclass
from typing import Any

import torch

from hcache_rag.bundled import MODEL_NAME
from hcache_rag.errors import HCacheError
from hcache_rag.llama_index.llm import HCacheLLM
from hcache_rag.store import StateStore

_opened: dict[tuple[str, str, str], HCacheLLM] = {}
"""By root, and path and namespace of the store: a process opens a model once."""


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """What another process needs to open an LLM for reading documents.

    Args:
        model: a folder; None is the bundled model.
        root: of the model and tokenizer, by which they are known again.
        states: path, namespace and durability of the store.
        options: of `HCacheLLM`.
    """

    model: str | None
    root: str
    states: tuple[str, str, str]
    options: dict[str, Any]

    @classmethod
    def of(cls, llm: HCacheLLM) -> Elsewhere:
        """Of an LLM that can be opened again.

        Raises:
            HCacheError: it cannot: its model is in memory only, or its store is, or has a key.
        """
        engine, keeping = llm.engine, llm.keeping
        try:
            _, store = engine.store.__reduce__()
        except TypeError as error:
            raise HCacheError(f"{error}; {_ADVICE}") from error
        name = None if llm.model_name == MODEL_NAME else llm.model_name
        if name is not None and not os.path.isdir(name):
            raise HCacheError(f"the model {name} was not loaded from a folder; {_ADVICE}")
        options = {
            "dtype": engine.adapter.spec.dtype,
            "device": "cpu",
            "representation": keeping.representation,
            "storage_dtype": keeping.storage_dtype,
            "profile": keeping.profile,
            "fidelity": "exact" if engine.fidelity == "exact" else "none",
            "context_at_index": engine.context_at_index,
            "tokenization": llm.tokenization,
            "is_chat_model": llm.is_chat_model,
            "preamble": engine.preamble,
        }
        return cls(name and os.path.abspath(name), engine.root.hex(), store[:3], options)

    def open(self) -> HCacheLLM:
        """The LLM, opened in this process at the first call.

        Among other workers it computes on one thread.

        Raises:
            HCacheError: the model cannot be opened, or is another one than it was.
        """
        key = (self.root, *self.states[:2])
        if key not in _opened:
            if multiprocessing.parent_process() is not None:
                torch.set_num_threads(1)
            path, namespace, durability = self.states
            options = dict(self.options)
            preamble = options.pop("preamble")
            store = StateStore.open(path, namespace=namespace, durability=durability)  # type: ignore[arg-type]
            llm = HCacheLLM(self.model, store=store, **options)
            if llm.engine.root.hex() != self.root or llm.preamble != preamble:
                store.close()
                raise HCacheError(
                    f"{self.model or MODEL_NAME} is not the model, or has not the template, that "
                    f"is used in the process that named it; {_ADVICE}"
                )
            _opened[key] = llm
        return _opened[key]


_ADVICE = "let the documents be read in the process that has the model: num_workers=None"
