"""Which model an index was made with, kept in its folder, so that its name is all one needs."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hcache_rag.bundled import MODEL_NAME
from hcache_rag.errors import SourceError
from hcache_rag.llama_index.llm import HCacheLLM
from hcache_rag.llama_index.persisted import MANIFEST, read_manifest

STATES = "states"
"""The folder of states in an index's folder."""
_MODEL = "model.json"


@dataclass(frozen=True, slots=True)
class ModelChoice:
    """Which model an index was made with.

    Args:
        model: a folder; None is the bundled model.
        dtype: what it is loaded as; "auto" becomes that of the index that is there, or what pays.
        representation: what its states keep.
        storage_dtype: what they are stored in; None is the library's choice.
        context_at_index: what documents are read after, see `HCacheLLM`.
    """

    model: str | None = None
    dtype: str = "float32"
    representation: str = "auto"
    storage_dtype: str | None = None
    context_at_index: str = "none"

    def load(self, persist_dir: Path | None, **options: Any) -> HCacheLLM:
        """The LLM with its states in `persist_dir`, or with no store yet.

        With fidelity="exact", documents are read after the preamble alone.

        Raises:
            ModelNotFoundError, UnsupportedModelError, StoreOpenError: see there.
        """
        is_exact = options.get("fidelity") == "exact"
        return HCacheLLM(
            self.model,
            dtype=self.dtype,
            representation=self.representation,
            storage_dtype=self.storage_dtype,
            context_at_index="none" if is_exact else self.context_at_index,  # type: ignore[arg-type]
            store=persist_dir / STATES if persist_dir is not None else None,
            **options,
        )

    @classmethod
    def of_llm(cls, llm: HCacheLLM) -> ModelChoice | None:
        """What loads an LLM's model again; None where no folder has it, or no name its states."""
        name = None if llm.model_name == MODEL_NAME else llm.model_name
        representation = llm.keeping.representation
        if not isinstance(representation, str) or (name is not None and not os.path.isdir(name)):
            return None
        return cls(
            name and os.path.abspath(name),
            llm.dtype,
            representation,
            llm.keeping.storage_dtype,
            llm.context_at_index,
        )

    @classmethod
    def of(cls, persist_dir: Path) -> ModelChoice:
        """The choice that the folder remembers.

        Raises:
            SourceError: the folder holds no index, or none that can be read, or does not say which
                model it was made with.
        """
        read_manifest(persist_dir)
        try:
            return cls(**json.loads((persist_dir / _MODEL).read_text()))
        except FileNotFoundError:
            raise SourceError(
                f"{persist_dir} does not say which model its index was made with: it was made by a "
                "program, with a model that no folder holds; ask it from there, or make it anew "
                "with `hcache-rag index`"
            ) from None
        except (OSError, ValueError, TypeError) as error:
            raise SourceError(f"{persist_dir / _MODEL} cannot be read: {error}") from error


def remember_model(llm: HCacheLLM, persist_dir: Path) -> None:
    """Let a folder remember which model its index was made with, as far as that can be said."""
    choice = ModelChoice.of_llm(llm)
    if choice is None:
        (persist_dir / _MODEL).unlink(missing_ok=True)
    else:
        (persist_dir / _MODEL).write_text(json.dumps(asdict(choice), indent=1) + "\n")


def has_index(persist_dir: Path) -> bool:
    """Whether a folder holds an index that was finished."""
    return (persist_dir / MANIFEST).is_file()


def context_of(persist_dir: Path) -> str:
    """What the documents of an index are read after; "none" where there is no index."""
    try:
        return ModelChoice.of(persist_dir).context_at_index
    except SourceError:
        return "none"
