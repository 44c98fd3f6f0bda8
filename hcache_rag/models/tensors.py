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


def element_dtype(storage_dtype: str) -> torch.dtype:
    """The torch dtype of the elements of states that are kept in a storage dtype."""
    if storage_dtype == "float8_e4m3":
        return torch.float8_e4m3fn
    return torch.int8 if storage_dtype.startswith("int8") else torch_dtype(storage_dtype)


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
    """A CPU tensor's memory as the words that are stored, of the same width; shape kept."""
    word = {4: torch.uint32, 2: torch.uint16, 1: torch.int8}[tensor.element_size()]
    return tensor.view(word).numpy()
