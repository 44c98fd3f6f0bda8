"""Stored arrays as what restoring works on: where they lie if it can be, else in scratch memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from hcache_kernels import dequantise_keys_into, dequantise_rows_into, dequantise_values_into
from hcache_rag.buffers import Buffers
from hcache_rag.codec import Words
from hcache_rag.layout import GROUP_CHANNELS, LayerFormat, Representation
from hcache_rag.models import tensor_of, torch_dtype
from hcache_rag.schedule import Piece

Chunk: TypeAlias = tuple[Tensor, ...]
"""A chunk's parts, in the order of `LayerFormat.parts`, cut to the tokens that are used."""


def chunk_tensors(fmt: LayerFormat, arrays: Sequence[Words], tokens: int) -> Chunk:
    """The first `tokens` tokens of a decoded chunk; nothing is copied.

    Runs on the reading lane, so that the model need not wait for it.
    """
    is_kv = fmt.representation is Representation.KV
    element = torch.int8 if fmt.is_quantised else torch_dtype(fmt.dtype)
    numbers, scales = (2, arrays[2:]) if is_kv else (1, arrays[1:])
    parts = [tensor_of(array, element) for array in arrays[:numbers]]
    parts += [tensor_of(array, torch.float32) for array in scales]
    if is_kv:  # all but K's scales have tokens in their second dimension
        return tuple(p if index == 2 else p[:, :tokens] for index, p in enumerate(parts))
    return tuple(p if index == 3 else p[:tokens] for index, p in enumerate(parts))


def stage_kv(piece: Piece, chunks: Sequence[Chunk], values: Tensor, buffers: Buffers) -> Tensor:
    """Write V of a piece to `values` (G, r, D); return K before RoPE (G, r, D)."""
    if len(chunks) == 1 and chunks[0][0].dtype == values.dtype:
        stored_keys, stored_values = chunks[0]
        values.copy_(stored_values)
        return stored_keys
    staged = buffers.scratch("keys", *values.shape[:2], chunks[0][0].shape[-1])
    for use, (stored_keys, stored_values, *scales) in zip(piece.chunks, chunks, strict=True):
        at = slice(use.row - piece.start, use.row - piece.start + use.tokens)
        if scales:
            key_scales, value_scales = scales
            dequantise_keys_into(stored_keys, key_scales, staged[:, at])
            dequantise_values_into(stored_values, value_scales, values[:, at])
        else:
            staged[:, at].copy_(stored_keys)
            values[:, at].copy_(stored_values)
    return staged


def stage_rows(
    piece: Piece, chunks: Sequence[Chunk], buffers: Buffers, *, is_scaled: bool
) -> tuple[Tensor, Tensor]:
    """Hidden rows (r, E) of a piece, and their row scales (r,).

    Args:
        is_scaled: rows that have one quantising scale each are multiplied by it; otherwise they
            are left as integers, and the row scale is the product of both.
    """
    stored_rows, row_scales = chunks[0][:2]
    if len(chunks) == 1 and stored_rows.dtype == buffers.keys.dtype:
        return stored_rows, row_scales
    num_rows = piece.stop - piece.start
    staged = buffers.scratch("rows", num_rows, stored_rows.shape[-1])
    scale = torch.empty(num_rows)
    for use, (stored_rows, row_scales, *quant) in zip(piece.chunks, chunks, strict=True):
        at = slice(use.row - piece.start, use.row - piece.start + use.tokens)
        scale[at] = row_scales
        if quant and quant[0].dim() == 2:
            dequantise_rows_into(stored_rows, quant[0], GROUP_CHANNELS, staged[at])
            continue
        staged[at].copy_(stored_rows)
        if len(quant) == 2:
            staged[at].mul_(quant[1])
        if quant and is_scaled:
            staged[at].mul_(quant[0].unsqueeze(-1))
        elif quant:
            scale[at].mul_(quant[0])
    return staged, scale
