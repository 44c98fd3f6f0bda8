"""Stored arrays as what restoring works on: where they lie if it can be, else in scratch memory.

A device needs them in memory of its own: `PieceMemory` says where the chunks of a piece lie there,
side by side, so that one copy brings them and one kernel can go through all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from hcache_kernels import (
    copy_numbers,
    dequantise_keys_into,
    dequantise_rows_into,
    dequantise_values_into,
)
from hcache_kernels.operands import StoredKV, StoredRows
from hcache_kernels.tiles import tiles_of
from hcache_rag.buffers import Buffers
from hcache_rag.codec import Words
from hcache_rag.layout import GROUP_CHANNELS, LayerFormat, Part, Representation
from hcache_rag.models import element_dtype, tensor_of
from hcache_rag.schedule import Piece
from hcache_rag.spec import ModelSpec

Chunk: TypeAlias = tuple[Tensor, ...]
"""A chunk's parts, in the order of `LayerFormat.parts`, cut to the tokens that are used."""

_ALIGNMENT = 64
"""Bytes that every array begins at a multiple of: kernels read 16 of them at once."""
_TOKEN_DIM = {"keys": 1, "values": 1, "value_scales": 1, "key_scales": None, "channel_scales": None}
"""The dimension of a part that counts tokens, else the first; None where a chunk has one for all
of its tokens."""


def chunk_tensors(fmt: LayerFormat, arrays: Sequence[Words], tokens: int) -> Chunk:
    """The first `tokens` tokens of a decoded chunk; nothing is copied.

    Runs on the reading lane, so that the model need not wait for it.
    """
    is_kv = fmt.representation is Representation.KV
    element = element_dtype(fmt.dtype)
    numbers, scales = (2, arrays[2:]) if is_kv else (1, arrays[1:])
    parts = [tensor_of(array, element) for array in arrays[:numbers]]
    parts += [tensor_of(array, torch.float32) for array in scales]
    if is_kv:  # all but K's scales have tokens in their second dimension
        return tuple(p if index == 2 else p[:, :tokens] for index, p in enumerate(parts))
    return tuple(p if index == 3 else p[:tokens] for index, p in enumerate(parts))


@dataclass(frozen=True, slots=True)
class StagedPiece:
    """A piece's arrays in one stretch of memory.

    Args:
        parts: those of all its chunks side by side in the order of `LayerFormat.parts`: along
            the tokens, or where a chunk has one for all of its tokens, along a new first dimension.
        chunks: the same memory, chunk by chunk.
        tiles: (tiles, 3) int32, see `hcache_kernels.tiles`.
    """

    parts: tuple[Tensor, ...]
    chunks: tuple[Chunk, ...]
    tiles: Tensor

    def stored(self, fmt: LayerFormat) -> StoredRows | StoredKV:
        """The arrays as the kernels take them."""
        if fmt.representation is Representation.KV:
            keys, values, *scales = self.parts
            return StoredKV(keys, values, self.tiles, *scales)
        rows, row_scales, *scales = self.parts
        return StoredRows(
            rows,
            row_scales,
            self.tiles,
            quant_scales=scales[0] if scales else None,
            channel_scales=scales[1] if len(scales) > 1 else None,
            group_channels=GROUP_CHANNELS if fmt.dtype == "int8-g64" else 0,
        )


class PieceMemory:
    """Where the arrays of a piece's chunks lie in one stretch of memory.

    Args:
        spec: the model's numbers.
        piece: the piece.
    """

    def __init__(self, spec: ModelSpec, piece: Piece) -> None:
        self.piece = piece
        self._places: list[tuple[torch.dtype, tuple[int, ...], int | None, int]] = []
        rows, self.num_bytes = piece.stop - piece.start, 0
        starts = [(use.row - piece.start, use.tokens) for use in piece.chunks]
        parts = piece.fmt.parts(spec, rows)
        crosses_chunks = all(_TOKEN_DIM.get(part.name, 0) is not None for part in parts)
        self._tiles = torch.tensor(
            tiles_of(starts, crosses_chunks=crosses_chunks), dtype=torch.int32
        )
        for part in parts:
            dim = _TOKEN_DIM.get(part.name, 0)
            shape = part.shape if dim is not None else (len(piece.chunks), *part.shape)
            dtype = _element(piece.fmt, part)
            self._places.append((dtype, shape, dim, self.num_bytes))
            self._add(math.prod(shape) * dtype.itemsize)
        self._tiles_begin = self.num_bytes
        self._add(self._tiles.nbytes)

    def _add(self, num_bytes: int) -> None:
        self.num_bytes += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT

    def views(self, memory: Tensor) -> StagedPiece:
        """The arrays in some memory (at least num_bytes,) uint8."""
        parts = tuple(
            memory[begin : begin + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
            for dtype, shape, _, begin in self._places
        )
        tiles = memory[self._tiles_begin : self._tiles_begin + self._tiles.nbytes]
        tiles = tiles.view(torch.int32).view(self._tiles.shape)
        return StagedPiece(parts, tuple(self._chunks(parts)), tiles)

    def fill(self, memory: Tensor, chunks: Sequence[Chunk]) -> None:
        """Copy the chunks of the piece to where they belong."""
        views = self.views(memory)
        views.tiles.copy_(self._tiles)
        for targets, sources in zip(views.chunks, chunks, strict=True):
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source)

    def _chunks(self, parts: Sequence[Tensor]) -> Iterator[Chunk]:
        for index, use in enumerate(self.piece.chunks):
            first = use.row - self.piece.start
            yield tuple(
                part[index] if dim is None else part.narrow(dim, first, use.tokens)
                for part, (_, _, dim, _) in zip(parts, self._places, strict=True)
            )


def _element(fmt: LayerFormat, part: Part) -> torch.dtype:
    if part.name.endswith("_scales"):
        return torch.float32
    return element_dtype(fmt.dtype)


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
            are left as they are, and the row scale is the product of both.
    """
    stored_rows, row_scales = chunks[0][:2]
    if len(chunks) == 1 and stored_rows.dtype == buffers.keys.dtype:
        return stored_rows, row_scales
    num_rows = piece.stop - piece.start
    staged = buffers.scratch("rows", num_rows, stored_rows.shape[-1])
    scale = torch.empty(num_rows, device=staged.device)
    for use, (stored_rows, row_scales, *quant) in zip(piece.chunks, chunks, strict=True):
        at = slice(use.row - piece.start, use.row - piece.start + use.tokens)
        scale[at] = row_scales
        if quant and quant[0].dim() == 2:
            dequantise_rows_into(stored_rows, quant[0], GROUP_CHANNELS, staged[at])
            continue
        copy_numbers(stored_rows, staged[at])
        if len(quant) == 2:
            staged[at].mul_(quant[1])
        if quant and is_scaled:
            staged[at].mul_(quant[0].unsqueeze(-1))
        elif quant:
            scale[at].mul_(quant[0])
    return staged, scale
