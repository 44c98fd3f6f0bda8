"""What the model's layers gave when it read documents, as the values that are stored of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from hcache_kernels import (
    quantise_keys,
    quantise_rows,
    quantise_rows_smoothly,
    quantise_values,
)
from hcache_rag import codec
from hcache_rag.codec import ChunkShape
from hcache_rag.layout import GROUP_CHANNELS, LayerFormat, Representation
from hcache_rag.models import CapturedLayer, ModelAdapter, bit_words, element_dtype, in_heads
from hcache_rag.state import StateRecord


def state_values(
    adapter: ModelAdapter,
    record: StateRecord,
    captured: Sequence[CapturedLayer],
    row: int,
    first: int = 0,
) -> Iterator[tuple[int, int, bytearray]]:
    """(layer, chunk, value) of a state, from token `first` of row `row` of a captured batch."""
    layout, length = record.layout, record.num_tokens
    for layer, (fmt, caught) in enumerate(zip(layout.layers, captured, strict=True)):
        for chunk in range(layout.num_chunks(length)):
            begin = chunk * layout.chunk_tokens
            end = min(begin + layout.chunk_tokens, length)
            tokens = slice(first + begin, first + end)
            arrays = chunk_arrays(adapter, layer, fmt, caught, row, tokens)
            if arrays:
                shape = ChunkShape(fmt, end - begin, adapter.spec)
                yield layer, chunk, codec.encode(shape, record.key, layer, chunk, arrays)


def chunk_arrays(
    adapter: ModelAdapter,
    layer: int,
    fmt: LayerFormat,
    caught: CapturedLayer,
    row: int,
    tokens: slice,
) -> tuple[codec.Words, ...]:
    """Some tokens of a captured document as the arrays that `LayerFormat.parts` names.

    Empty where the layer keeps nothing.
    """
    if caught.first is None:
        return ()
    first, element = caught.first[row, tokens], element_dtype(fmt.dtype)
    if fmt.representation is Representation.HIDDEN:
        scales = adapter.row_scale(layer, first)
        if not fmt.is_quantised:
            return _words(first.to(element), scales)
        if fmt.dtype == "int8-smooth":
            smooth, quant_scales, channel_scales = quantise_rows_smoothly(first)
            return _words(smooth, scales, quant_scales, channel_scales)
        group = GROUP_CHANNELS if fmt.dtype == "int8-g64" else None
        numbers, quant_scales = quantise_rows(first, group, element)
        return _words(numbers, scales, quant_scales)
    if caught.second is None:
        raise ValueError(f"layer {layer} was captured without V")
    heads, sides = adapter.spec.num_kv_heads, (first, caught.second[row, tokens])
    keys, values = (in_heads(side, heads).transpose(0, 1) for side in sides)
    if not fmt.is_quantised:
        return (*_words(keys.to(element)), *_words(values.to(element)))
    (stored_keys, key_scales), (stored_values, value_scales) = (
        quantise_keys(keys, element),
        quantise_values(values, element),
    )
    return (*_words(stored_keys), *_words(stored_values, key_scales, value_scales))


def _words(numbers: Tensor, *scales: Tensor) -> tuple[codec.Words, ...]:
    """Elements as they are stored, and their scales."""
    on_host = (scale.cpu().numpy() for scale in scales)
    return bit_words(numbers.contiguous().cpu()), *on_host
