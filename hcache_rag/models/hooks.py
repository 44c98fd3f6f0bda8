"""Looking into a forward pass, on one's own thread: others may share the model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class EnoughLayersError(Exception):
    """A forward pass has come to the first layer that nobody asked for."""


@contextmanager
def outputs_of(module: nn.Module, take: Callable[[Tensor], None]) -> Iterator[None]:
    """Pass a module's outputs to `take`, on this thread only."""
    owner = threading.get_ident()

    def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
        if threading.get_ident() == owner:
            take(output)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def inputs_of(module: nn.Module, take: Callable[[Tensor], None]) -> Iterator[None]:
    """Pass a module's first argument to `take`, on this thread only."""
    owner = threading.get_ident()

    def hook(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() == owner:
            take(args[0] if args else kwargs["hidden_states"])

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
