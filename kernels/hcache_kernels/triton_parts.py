"""What the kernels of restoring are made of: pairs of a head's columns, their RoPE, tiles, slots.

Columns of a head are taken in the order of RoPE's pairs: first the first elements of all pairs,
then the second ones; columns that are not rotated are pairs too, which are turned by nothing. Where
pairs are neighbours (interleaved), the order is the natural one.
"""

import triton
import triton.language as tl


@triton.jit
def columns(n, D: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The head's columns at places `n` of 2 * HALF (HALF may be padded), and which exist."""
    if INTERLEAVED:
        column, exists = n, n < D
    else:
        pair, side = n % HALF, n // HALF
        if R == D:
            column = pair + side * (D // 2)
        else:
            turned = pair + side * (R // 2)
            rest = pair + R // 2 + side * ((D - R) // 2)
            column = tl.where(pair < R // 2, turned, rest)
        exists = pair < D // 2
    return column, exists


@triton.jit
def split(x, BM: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The first and the second elements of all pairs of (BM, 2 * HALF)."""
    if INTERLEAVED:
        first, second = tl.split(tl.reshape(x, (BM, HALF, 2)))
    else:
        first, second = tl.split(tl.permute(tl.reshape(x, (BM, 2, HALF)), (0, 2, 1)))
    return first, second


@triton.jit
def pair_columns(D: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
                 ALIGNED: tl.constexpr):  # fmt: skip
    """The columns of the first and the second elements of all pairs (HALF,), and which exist."""
    pair = tl.arange(0, HALF)
    if INTERLEAVED:
        one, exists = columns(2 * pair, D, R, HALF, INTERLEAVED)
        two = one + 1
    else:
        one, exists = columns(pair, D, R, HALF, INTERLEAVED)
        two, _ = columns(pair + HALF, D, R, HALF, INTERLEAVED)
        if ALIGNED and R != D:  # the compiler does not see it through the two cases
            one = tl.max_contiguous(tl.multiple_of(one, 8), 8)
            two = tl.max_contiguous(tl.multiple_of(two, 8), 8)
    return one, two, exists


@triton.jit
def scale_pairs(first, second, scale, gain_ptr, bias_ptr, D: tl.constexpr, R: tl.constexpr,
                HALF: tl.constexpr, INTERLEAVED: tl.constexpr):  # fmt: skip
    """Rows times a scale each, then times a gain of each column, plus its bias: a norm's end."""
    one, two, exists = pair_columns(D, R, HALF, INTERLEAVED, False)
    first = first * scale[:, None]
    second = second * scale[:, None]
    first *= tl.load(gain_ptr + one, mask=exists, other=0.0).to(tl.float32)[None, :]
    second *= tl.load(gain_ptr + two, mask=exists, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        first += tl.load(bias_ptr + one, mask=exists, other=0.0).to(tl.float32)[None, :]
        second += tl.load(bias_ptr + two, mask=exists, other=0.0).to(tl.float32)[None, :]
    return first, second


@triton.jit
def squares_of(first, second):
    """The sum of a head's squares, (BM,)."""
    return tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)


@triton.jit
def norm_pairs(first, second, gain_ptr, bias_ptr, eps, CENTRED: tl.constexpr, D: tl.constexpr,
               R: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):  # fmt: skip
    """RMSNorm, or where CENTRED LayerNorm, over a head's columns."""
    if CENTRED:
        _, _, exists = pair_columns(D, R, HALF, INTERLEAVED, False)
        mean = (tl.sum(first, axis=1) + tl.sum(second, axis=1)) / D
        first = tl.where(exists[None, :], first - mean[:, None], 0.0)
        second = tl.where(exists[None, :], second - mean[:, None], 0.0)
    scale = tl.rsqrt(squares_of(first, second) / D + eps)
    return scale_pairs(first, second, scale, gain_ptr, bias_ptr, D, R, HALF, INTERLEAVED)


@triton.jit
def turn(first, second, cos_ptr, sin_ptr, m, is_row, stride_cos, BM: tl.constexpr,
         R: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):  # fmt: skip
    """RoPE of pairs (BM, HALF). Both elements of a pair have the same angle in the tables."""
    n = tl.arange(0, 2 * HALF) if INTERLEAVED else tl.arange(0, HALF)
    at = m[:, None].to(tl.int64) * stride_cos + n[None, :]
    is_turned = is_row[:, None] & (n < (R if INTERLEAVED else R // 2))[None, :]
    cos = tl.load(cos_ptr + at, mask=is_turned, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + at, mask=is_turned, other=0.0).to(tl.float32)
    if INTERLEAVED:
        cos, _ = split(cos, BM, HALF, INTERLEAVED)
        sin, _ = split(sin, BM, HALF, INTERLEAVED)
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def load_pairs(ptr, row_at, is_row, scale_at, D: tl.constexpr, R: tl.constexpr,
               HALF: tl.constexpr, INTERLEAVED: tl.constexpr, ALIGNED: tl.constexpr,
               BM: tl.constexpr):  # fmt: skip
    """A head's columns of some rows in float32, as pairs; times a scale of each column."""
    if INTERLEAVED:
        n = tl.arange(0, 2 * HALF)
        mask = is_row[:, None] & (n < D)[None, :]
        whole = tl.load(ptr + row_at[:, None] + n[None, :], mask=mask, other=0.0).to(tl.float32)
        if scale_at is not None:
            whole = whole * tl.load(scale_at + n, mask=n < D, other=0.0)[None, :]
        first, second = split(whole, BM, HALF, True)
    else:
        one, two, exists = pair_columns(D, R, HALF, INTERLEAVED, ALIGNED)
        mask = is_row[:, None] & exists[None, :]
        first = tl.load(ptr + row_at[:, None] + one[None, :], mask=mask, other=0.0).to(tl.float32)
        second = tl.load(ptr + row_at[:, None] + two[None, :], mask=mask, other=0.0).to(tl.float32)
        if scale_at is not None:
            first = first * tl.load(scale_at + one, mask=exists, other=0.0)[None, :]
            second = second * tl.load(scale_at + two, mask=exists, other=0.0)[None, :]
    return first, second


@triton.jit
def store_pairs(first, second, out_ptr, base, is_kept, BM: tl.constexpr, D: tl.constexpr,
                R: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
                ALIGNED: tl.constexpr):  # fmt: skip
    """Write a head's columns (BM, HALF) twice to rows that begin at `base`."""
    dtype = out_ptr.dtype.element_ty
    if INTERLEAVED:
        n = tl.arange(0, 2 * HALF)
        whole = tl.reshape(tl.join(first, second), (BM, 2 * HALF))
        mask = is_kept[:, None] & (n < D)[None, :]
        tl.store(out_ptr + base[:, None] + n[None, :], whole.to(dtype), mask=mask)
    else:
        one, two, exists = pair_columns(D, R, HALF, INTERLEAVED, ALIGNED)
        mask = is_kept[:, None] & exists[None, :]
        tl.store(out_ptr + base[:, None] + one[None, :], first.to(dtype), mask=mask)
        tl.store(out_ptr + base[:, None] + two[None, :], second.to(dtype), mask=mask)


@triton.jit
def rows_of_tile(tile_ptr, PARTS: tl.constexpr, BM: tl.constexpr):
    """The rows of a program, which of them exist, and their chunk: a part of a tile."""
    tile, begin = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS * BM
    first = tl.load(tile_ptr + 3 * tile)
    count = tl.load(tile_ptr + 3 * tile + 1)
    chunk = tl.load(tile_ptr + 3 * tile + 2)
    at = begin + tl.arange(0, BM)
    return first + at, at < count, chunk


@triton.jit
def places(slot_ptr, m, is_row, stride_block, stride_token, PAGE: tl.constexpr):
    """Where rows begin in the cache, and which are kept: a slot below zero is none."""
    if slot_ptr is None:
        slot = m.to(tl.int64)
    else:
        slot = tl.load(slot_ptr + m, mask=is_row, other=-1)
    is_kept = is_row & (slot >= 0)
    if PAGE == 0:
        base = slot * stride_token
    else:
        base = (slot // PAGE) * stride_block + (slot % PAGE) * stride_token
    return base, is_kept
