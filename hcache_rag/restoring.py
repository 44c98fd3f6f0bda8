"""Turns stored pieces into K and V in their slots: by a kernel, one product, or as the model does.

On the CPU, and for what no kernel of ours can do, restoring hidden states is one product with the
folded projection. In the reference mode it is the model's own norm and projections, in
transformers' order of operations.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hcache_kernels import fused, operands, project_kv, reference, rope_into
from hcache_rag.buffers import Buffers
from hcache_rag.layout import Representation
from hcache_rag.models import ModelAdapter
from hcache_rag.schedule import Piece
from hcache_rag.staging import Chunk, StagedPiece, stage_kv, stage_rows


class Restorer:
    """Restores the pieces of one request.

    Args:
        adapter: the model.
        buffers: where K and V go.
        positions: of the restored rows, (T,), on the model's device.
        reference_mode: restore hidden states by the model's own modules.
    """

    def __init__(
        self, adapter: ModelAdapter, buffers: Buffers, positions: Tensor, *, reference_mode: bool
    ) -> None:
        self._adapter = adapter
        self._buffers = buffers
        self._reference_mode = reference_mode
        self._cos_sin = adapter.all_position_embeddings(positions)
        self._is_interleaved = adapter.family.is_interleaved

    def targets(self, layer: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """K and V (G, r, D) of some rows of a layer."""
        rows = slice(start, stop)
        return self._buffers.keys[layer, 0, :, rows], self._buffers.values[layer, 0, :, rows]

    def write(self, layer: int, start: int, keys: Tensor, values: Tensor) -> None:
        """Write K before RoPE, and V, (G, r, D) each, to a layer's rows from `start` on."""
        stop = start + keys.shape[1]
        keys_out, values_out = self.targets(layer, start, stop)
        self._rope_into(keys, self._rotation(layer, start, stop), keys_out)
        values_out.copy_(values)

    @torch.no_grad()
    def restore_staged(self, layer: int, piece: Piece, staged: StagedPiece) -> None:
        """What `restore` does, from a device's memory; by a kernel, where there is one for it."""
        if self._reference_mode or not self._restored_by_kernel(layer, piece, staged):
            self.restore(layer, piece, staged.chunks)

    def _restored_by_kernel(self, layer: int, piece: Piece, staged: StagedPiece) -> bool:
        keys, values = self.targets(layer, piece.start, piece.stop)
        projection = None
        if piece.fmt.representation is Representation.HIDDEN:
            if self._adapter.rows_norms[layer][1] is not None:
                return keys.is_cuda and fused.takes_kernels("V goes through a norm of its own")
            folded, norm = self._adapter.projections[layer], self._adapter.key_norms[layer]
            projection = operands.Projection(folded.weight.t(), folded.bias, key_norm=norm)
        return fused.restore(
            staged.stored(piece.fmt),
            projection,
            self._rotation(layer, piece.start, piece.stop),
            operands.CacheSlots.contiguous(keys, values),
        )

    def restore(self, layer: int, piece: Piece, chunks: Sequence[Chunk]) -> None:
        """Turn what is stored of a piece, chunk by chunk, into K and V in their slots."""
        keys, values = self.targets(layer, piece.start, piece.stop)
        rotation = self._rotation(layer, piece.start, piece.stop)
        if piece.fmt.representation is Representation.KV:
            self._rope_into(stage_kv(piece, chunks, values, self._buffers), rotation, keys)
            return
        is_scaled = self._reference_mode
        rows, scale = stage_rows(piece, chunks, self._buffers, is_scaled=is_scaled)
        if self._reference_mode:
            plain, projected = self._adapter.project(layer, rows)
            self._rope_into(plain, rotation, keys)
            values.copy_(projected)
            return
        projection, spec = self._adapter.projections[layer], self._adapter.spec
        key_norm, value_norm = self._adapter.rows_norms[layer]
        project_kv(
            rows,
            scale,
            projection.weight,
            projection.bias,
            rotation.cos,
            rotation.sin,
            keys,
            values,
            self._buffers.scratch("projected", len(rows), spec.kv_width + spec.value_width),
            is_interleaved=rotation.is_interleaved,
            key_norm=key_norm,
            value_norm=value_norm,
        )

    def _rope_into(self, keys: Tensor, rotation: operands.Rotation, out: Tensor) -> None:
        turned = rotation.is_interleaved
        if self._reference_mode:
            out.copy_(reference.rope(keys, rotation.cos, rotation.sin, is_interleaved=turned))
        else:
            rope_into(keys, rotation.cos, rotation.sin, out, is_interleaved=turned)

    def _rotation(self, layer: int, start: int, stop: int) -> operands.Rotation:
        cos, sin = self._cos_sin[self._adapter.rope_kinds[layer]]
        return operands.Rotation(cos[start:stop], sin[start:stop], self._is_interleaved)
