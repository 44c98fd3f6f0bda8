"""The error tree. Everything this library raises on purpose is an `HCacheError`.

    HCacheError
    ├── ModelError
    │   ├── ModelNotFoundError       a path or name that holds no model
    │   └── UnsupportedModelError    a model family (or feature) that cannot be restored
    ├── PromptTooLongError           more tokens than the model's window (also a ValueError)
    ├── ProfileError                 a hardware profile that cannot be read, written or found
    ├── SourceError                  a folder of documents that cannot be indexed
    ├── StoreError
    │   ├── StoreOpenError           the path cannot hold, or does not hold, a state store
    │   │   └── DamagedStoreError    its file is damaged: LMDB could not read it safely
    │   ├── StoreBusyError           somebody else writes, and one was not to wait
    │   ├── StoreMovedError          another file took its place; a store opens that by itself
    │   └── StoreFullError           the file or the disk has no room for another state
    └── StateError                   one stored state cannot be used; never reaches a question:
        ├── DamagedStateError        the engine recomputes the span, counts it and warns
        ├── MissingStateError
        └── UnreachableStateError    it is behind a network, and does not come now

Bad arguments raise `ValueError` or `TypeError` at once, with the numbers that disagree.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


class HCacheError(Exception):
    """Base class of every error that the library raises on purpose."""


class ModelError(HCacheError):
    """A language model cannot be used."""


class ModelNotFoundError(ModelError):
    """A path or name holds no model that transformers can load."""


class UnsupportedModelError(ModelError):
    """The model's family, or one of its features, cannot be captured and restored."""


class PromptTooLongError(HCacheError, ValueError):
    """A prompt and the tokens asked for do not fit into the model's window.

    Args:
        prompt_tokens: tokens of the prompt.
        max_new_tokens: tokens that were asked for.
        window_tokens: what the model takes.
    """

    def __init__(self, prompt_tokens: int, max_new_tokens: int, window_tokens: int) -> None:
        self.prompt_tokens = prompt_tokens
        self.max_new_tokens = max_new_tokens
        self.window_tokens = window_tokens
        super().__init__(
            f"the prompt has {prompt_tokens} tokens and {max_new_tokens} more were asked for, "
            f"but the model's window is {window_tokens} tokens"
        )


class ProfileError(HCacheError):
    """A hardware profile cannot be read, written or found."""


class SourceError(HCacheError):
    """A folder of documents cannot be indexed."""


class StoreError(HCacheError):
    """The state store cannot do what was asked."""


class StoreOpenError(StoreError):
    """The path cannot hold, or does not hold, a state store."""


class DamagedStoreError(StoreOpenError):
    """The store's file is damaged where LMDB keeps its own numbers, or is no store's file at all.

    Args:
        path: the store's folder.
        problems: what is wrong.
    """

    def __init__(self, path: Path, problems: Sequence[str]) -> None:
        self.path = path
        self.problems = tuple(problems)
        super().__init__(
            f"{path} is not a state store, or is damaged: {problems[0]}; `hcache-rag verify "
            f"--repair` or StateStore.salvage saves what is whole"
        )

    def __reduce__(self) -> tuple[type, tuple[Path, tuple[str, ...]]]:
        return type(self), (self.path, self.problems)


class StoreBusyError(StoreError):
    """Another thread or process writes to the store, for longer than was to be waited."""


class StoreFullError(StoreError):
    """The store's file or disk has no room; what was stored before is unharmed."""


class StoreMovedError(StoreError):
    """Another file has taken the place of an open one."""


class StateError(HCacheError):
    """One stored state cannot be used. The engine recomputes it and never lets this out.

    Args:
        key: the state's key.
        reason: what is wrong with it.
    """

    def __init__(self, key: bytes, reason: str) -> None:
        self.key = key
        self.reason = reason
        super().__init__(f"state {key.hex()}: {reason}")


class DamagedStateError(StateError):
    """A stored value is not what was written, or not what its record says."""


class MissingStateError(StateError):
    """A state, or a part of one, is not in the store."""


class UnreachableStateError(StateError):
    """A state is in a remote shard, and could not be fetched now; later it may be."""
