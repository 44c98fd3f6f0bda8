"""The kernels of restoring in Triton. Launched by `hcache_kernels.launch`; imported only where
Triton is.

Two rules keep them right in Triton's interpreter too, which knows no bfloat16: arithmetic is in
float32 alone, and bfloat16 occurs only in loads, stores and as an operand of `tl.dot`.
"""

import triton
import triton.language as tl

from hcache_kernels.triton_parts import (
    columns,
    load_pairs,
    norm_pairs,
    places,
    rows_of_tile,
    scale_pairs,
    split,
    squares_of,
    store_pairs,
    turn,
)


@triton.jit(do_not_specialize=["G"])
def restore_rows_kernel(
    rows_ptr, scale_ptr, quant_ptr, channel_ptr, shift_ptr, tile_ptr,
    weight_ptr, bias_ptr, sums_ptr, gain_ptr, gain_bias_ptr, plain_ptr, square_ptr,
    cos_ptr, sin_ptr, slot_ptr, key_ptr, value_ptr,
    T, E, stride_row, stride_quant, stride_weight, stride_cos,
    stride_block, stride_token, stride_head, eps, G,
    D: tl.constexpr, R: tl.constexpr, PAGE: tl.constexpr,
    GROUP: tl.constexpr, EVEN: tl.constexpr, CENTRED: tl.constexpr,
    INTERLEAVED: tl.constexpr, ALIGNED: tl.constexpr,
    HALF: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Layer inputs to K and V in the cache: some rows, one head of K or of V.

    Grid: (tiles * PARTS, 2 * G). `GROUP` is the channels of a quantising group, 0 where there are
    none; BK equals it.

    Where K's norm is over all heads, no program can end it: `plain_ptr` gets K in front of its norm
    (G, T, D), and `square_ptr` what each head adds to a row's sum of squares (G, T). The other
    kernel goes on from there.
    """
    part = tl.program_id(1)
    m, is_row, chunk = rows_of_tile(tile_ptr, PARTS, BM)
    k = tl.arange(0, BK)
    column, exists = columns(tl.arange(0, 2 * HALF), D, R, HALF, INTERLEAVED)
    output = part * D + column
    rows_at = rows_ptr + m[:, None].to(tl.int64) * stride_row + k[None, :]
    weight_at = weight_ptr + output[None, :].to(tl.int64) * stride_weight + k[:, None]
    acc = tl.zeros((BM, 2 * HALF), dtype=tl.float32)
    for begin in range(0, E, BK):
        if EVEN:
            rows = tl.load(rows_at, mask=is_row[:, None], other=0.0)
            if D == 2 * HALF:
                weight = tl.load(weight_at)
            else:
                weight = tl.load(weight_at, mask=exists[None, :], other=0.0)
        else:
            inside = begin + k < E
            rows = tl.load(rows_at, mask=is_row[:, None] & inside[None, :], other=0.0)
            weight = tl.load(weight_at, mask=exists[None, :] & inside[:, None], other=0.0)
        if GROUP != 0:
            group_at = quant_ptr + m.to(tl.int64) * stride_quant + begin // GROUP
            rows = rows.to(tl.float32) * tl.load(group_at, mask=is_row, other=0.0)[:, None]
        if channel_ptr is not None:
            channel_at = channel_ptr + chunk.to(tl.int64) * E + begin + k
            if EVEN:
                channel = tl.load(channel_at)
            else:
                channel = tl.load(channel_at, mask=begin + k < E, other=0.0)
            rows = rows.to(tl.float32) * channel[None, :]
        if rows.dtype != weight.dtype:
            rows = rows.to(tl.float32).to(weight.dtype)
        acc = tl.dot(rows, weight, acc)
        rows_at += BK
        weight_at += BK
    scale = tl.load(scale_ptr + m, mask=is_row, other=0.0)
    if quant_ptr is not None and GROUP == 0:
        scale = scale * tl.load(quant_ptr + m, mask=is_row, other=0.0)
    acc = acc * scale[:, None]
    if shift_ptr is not None:
        sums = tl.load(sums_ptr + output, mask=exists, other=0.0).to(tl.float32)
        acc += tl.load(shift_ptr + m, mask=is_row, other=0.0)[:, None] * sums[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + output, mask=exists, other=0.0).to(tl.float32)[None, :]
    first, second = split(acc, BM, HALF, INTERLEAVED)
    base, is_kept = places(slot_ptr, m, is_row, stride_block, stride_token, PAGE)
    if part >= G:
        base += (part - G) * stride_head
        store_pairs(first, second, value_ptr, base, is_kept, BM, D, R, HALF, INTERLEAVED, ALIGNED)
    elif square_ptr is not None:
        row = part.to(tl.int64) * T + m
        tl.store(square_ptr + row, squares_of(first, second), mask=is_row)
        store_pairs(first, second, plain_ptr, row * D, is_row, BM, D, R, HALF, INTERLEAVED, ALIGNED)
    else:
        if gain_ptr is not None:
            bias_at = None
            if gain_bias_ptr is not None:
                bias_at = gain_bias_ptr + part * D
            first, second = norm_pairs(
                first, second, gain_ptr + part * D, bias_at, eps, CENTRED, D, R, HALF, INTERLEAVED
            )
        first, second = turn(
            first, second, cos_ptr, sin_ptr, m, is_row, stride_cos, BM, R, HALF, INTERLEAVED
        )
        base += part * stride_head
        store_pairs(first, second, key_ptr, base, is_kept, BM, D, R, HALF, INTERLEAVED, ALIGNED)


@triton.jit(do_not_specialize=["G"])
def restore_kv_kernel(
    keys_ptr, values_ptr, key_scale_ptr, value_scale_ptr, tile_ptr, gain_ptr, square_ptr,
    cos_ptr, sin_ptr, slot_ptr, key_ptr, value_ptr,
    T, stride_cos, stride_block, stride_token, stride_head, eps, G,
    D: tl.constexpr, R: tl.constexpr, PAGE: tl.constexpr,
    INTERLEAVED: tl.constexpr, ALIGNED: tl.constexpr, HALF: tl.constexpr,
    PARTS: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """K before RoPE, and V, (G, T, D) each, to the cache: some rows of one head.

    Grid: (tiles * PARTS, 2 * G); G for K alone. K has a scale of each channel, chunk by chunk, V of
    each token. With `square_ptr`, K is in front of an RMSNorm over all heads, see
    `restore_rows_kernel`.
    """
    part = tl.program_id(1)
    m, is_row, chunk = rows_of_tile(tile_ptr, PARTS, BM)
    head = part % G
    row_at = (head.to(tl.int64) * T + m) * D
    base, is_kept = places(slot_ptr, m, is_row, stride_block, stride_token, PAGE)
    base += head * stride_head
    if part < G:
        scale_at = None
        if key_scale_ptr is not None:
            scale_at = key_scale_ptr + (chunk * G + head).to(tl.int64) * D
        first, second = load_pairs(
            keys_ptr, row_at, is_row, scale_at, D, R, HALF, INTERLEAVED, ALIGNED, BM
        )
        if square_ptr is not None:
            squares = tl.zeros((BM,), dtype=tl.float32)
            for other in range(G):
                squares += tl.load(square_ptr + other * T + m, mask=is_row, other=0.0)
            scale = tl.rsqrt(squares / (G * D) + eps)
            first, second = scale_pairs(
                first, second, scale, gain_ptr + head * D, None, D, R, HALF, INTERLEAVED
            )
        first, second = turn(
            first, second, cos_ptr, sin_ptr, m, is_row, stride_cos, BM, R, HALF, INTERLEAVED
        )
        store_pairs(first, second, key_ptr, base, is_kept, BM, D, R, HALF, INTERLEAVED, ALIGNED)
    else:
        first, second = load_pairs(
            values_ptr, row_at, is_row, None, D, R, HALF, INTERLEAVED, ALIGNED, BM
        )
        if value_scale_ptr is not None:
            scale = tl.load(value_scale_ptr + head * T + m, mask=is_row, other=0.0)
            first, second = first * scale[:, None], second * scale[:, None]
        store_pairs(first, second, value_ptr, base, is_kept, BM, D, R, HALF, INTERLEAVED, ALIGNED)
