"""Stored words and tensors: the same memory, seen in two ways."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch
from torch import Tensor


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype called `name`."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"unknown dtype {name!r}")
    return dtype


def tensor_of(words: np.ndarray[Any, Any], dtype: torch.dtype) -> Tensor:
    """An array's memory as a tensor of elements of the same width; nothing is copied.

    The array may be read-only: the tensor must not be written then. It keeps the array alive, but
    not the transaction of a store that the array is a view into.
    """
    address = words.__array_interface__["data"][0]
    if address % dtype.itemsize:  # LMDB puts small values anywhere
        words = words.copy()
        return torch.from_numpy(words).view(dtype)
    memory: Any = (ctypes.c_char * words.nbytes).from_address(address)
    memory.owner = words  # the tensor keeps the memory, and so what it is a part of
    return torch.frombuffer(memory, dtype=dtype).view(words.shape)


def bit_words(tensor: Tensor) -> np.ndarray[Any, Any]:
    """A CPU tensor's memory as unsigned integers of the same width, shape kept."""
    word = {4: torch.uint32, 2: torch.uint16}[tensor.element_size()]
    return tensor.view(word).numpy()
