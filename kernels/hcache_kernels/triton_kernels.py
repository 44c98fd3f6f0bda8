"""The kernels in Triton. Launched by `hcache_kernels.launch`; imported only where Triton is.

Two rules keep them right in Triton's interpreter too, which knows no bfloat16: arithmetic is in
float32 alone, and bfloat16 occurs only in loads, stores and as an operand of `tl.dot`.

Columns of a head are taken in the order of RoPE's pairs: first the first elements of all pairs,
then the second ones; columns that are not rotated are pairs too, which are turned by nothing. Where
pairs are neighbours (interleaved), the order is the natural one.
"""

import triton
import triton.language as tl


@triton.jit
def _columns(n, D: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
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
def _split(x, BM: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The first and the second elements of all pairs of (BM, 2 * HALF)."""
    if INTERLEAVED:
        first, second = tl.split(tl.reshape(x, (BM, HALF, 2)))
    else:
        first, second = tl.split(tl.permute(tl.reshape(x, (BM, 2, HALF)), (0, 2, 1)))
    return first, second


@triton.jit
def _norm_pairs(first, second, gain_ptr, eps, D: tl.constexpr, R: tl.constexpr,
                HALF: tl.constexpr, INTERLEAVED: tl.constexpr):  # fmt: skip
    """RMSNorm over a head's columns."""
    square = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
    scale = tl.rsqrt(square / D + eps)
    pair = tl.arange(0, HALF)
    if INTERLEAVED:
        one, exists = _columns(2 * pair, D, R, HALF, INTERLEAVED)
        two = one + 1
    else:
        one, exists = _columns(pair, D, R, HALF, INTERLEAVED)
        two, _ = _columns(pair + HALF, D, R, HALF, INTERLEAVED)
    gain_one = tl.load(gain_ptr + one, mask=exists, other=0.0).to(tl.float32)
    gain_two = tl.load(gain_ptr + two, mask=exists, other=0.0).to(tl.float32)
    return first * scale[:, None] * gain_one[None, :], second * scale[:, None] * gain_two[None, :]


@triton.jit
def _turn(first, second, cos_ptr, sin_ptr, m, is_row, stride_cos, BM: tl.constexpr,
          R: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):  # fmt: skip
    """RoPE of pairs (BM, HALF). Both elements of a pair have the same angle in the tables."""
    n = tl.arange(0, 2 * HALF) if INTERLEAVED else tl.arange(0, HALF)
    at = m[:, None].to(tl.int64) * stride_cos + n[None, :]
    is_turned = is_row[:, None] & (n < (R if INTERLEAVED else R // 2))[None, :]
    cos = tl.load(cos_ptr + at, mask=is_turned, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + at, mask=is_turned, other=0.0).to(tl.float32)
    if INTERLEAVED:
        cos, _ = _split(cos, BM, HALF, INTERLEAVED)
        sin, _ = _split(sin, BM, HALF, INTERLEAVED)
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _store_pairs(first, second, out_ptr, base, is_kept, BM: tl.constexpr, D: tl.constexpr,
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
        pair = tl.arange(0, HALF)
        one, exists = _columns(pair, D, R, HALF, False)
        two, _ = _columns(pair + HALF, D, R, HALF, False)
        if ALIGNED and R != D:  # the compiler does not see it through the two cases
            one = tl.max_contiguous(tl.multiple_of(one, 8), 8)
            two = tl.max_contiguous(tl.multiple_of(two, 8), 8)
        mask = is_kept[:, None] & exists[None, :]
        tl.store(out_ptr + base[:, None] + one[None, :], first.to(dtype), mask=mask)
        tl.store(out_ptr + base[:, None] + two[None, :], second.to(dtype), mask=mask)


@triton.jit
def _rows(tile_ptr, PARTS: tl.constexpr, BM: tl.constexpr):
    """The rows of a program, which of them exist, and their chunk: a part of a tile."""
    tile, begin = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS * BM
    first = tl.load(tile_ptr + 3 * tile)
    count = tl.load(tile_ptr + 3 * tile + 1)
    chunk = tl.load(tile_ptr + 3 * tile + 2)
    at = begin + tl.arange(0, BM)
    return first + at, at < count, chunk


@triton.jit
def _places(slot_ptr, m, is_row, stride_block, stride_token, PAGE: tl.constexpr):
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


@triton.jit(do_not_specialize=["G"])
def restore_rows_kernel(
    rows_ptr, scale_ptr, quant_ptr, channel_ptr, shift_ptr, tile_ptr,
    weight_ptr, bias_ptr, sums_ptr, gain_ptr, cos_ptr, sin_ptr, slot_ptr, key_ptr, value_ptr,
    E, stride_row, stride_quant, stride_weight, stride_cos,
    stride_block, stride_token, stride_head, eps, G,
    D: tl.constexpr, R: tl.constexpr, PAGE: tl.constexpr,
    GROUP: tl.constexpr, EVEN: tl.constexpr, INTERLEAVED: tl.constexpr, ALIGNED: tl.constexpr,
    HALF: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Layer inputs to K and V in the cache: some rows, one head of K or of V.

    Grid: (tiles * PARTS, 2 * G). `GROUP` is the channels of a quantising group, 0 where there are
    none; BK equals it.
    """
    part = tl.program_id(1)
    m, is_row, chunk = _rows(tile_ptr, PARTS, BM)
    k = tl.arange(0, BK)
    column, exists = _columns(tl.arange(0, 2 * HALF), D, R, HALF, INTERLEAVED)
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
    first, second = _split(acc, BM, HALF, INTERLEAVED)
    base, is_kept = _places(slot_ptr, m, is_row, stride_block, stride_token, PAGE)
    if part < G:
        if gain_ptr is not None:
            first, second = _norm_pairs(first, second, gain_ptr, eps, D, R, HALF, INTERLEAVED)
        first, second = _turn(
            first, second, cos_ptr, sin_ptr, m, is_row, stride_cos, BM, R, HALF, INTERLEAVED
        )
        base += part * stride_head
        _store_pairs(first, second, key_ptr, base, is_kept, BM, D, R, HALF, INTERLEAVED, ALIGNED)
    else:
        base += (part - G) * stride_head
        _store_pairs(first, second, value_ptr, base, is_kept, BM, D, R, HALF, INTERLEAVED, ALIGNED)


@triton.jit
def _load_pairs(ptr, row_at, is_row, scale_at, D: tl.constexpr, R: tl.constexpr,
                HALF: tl.constexpr, INTERLEAVED: tl.constexpr, ALIGNED: tl.constexpr,
                BM: tl.constexpr):  # fmt: skip
    """A head's columns of some rows in float32, as pairs; times a scale of each column."""
    if INTERLEAVED:
        n = tl.arange(0, 2 * HALF)
        mask = is_row[:, None] & (n < D)[None, :]
        whole = tl.load(ptr + row_at[:, None] + n[None, :], mask=mask, other=0.0).to(tl.float32)
        if scale_at is not None:
            whole = whole * tl.load(scale_at + n, mask=n < D, other=0.0)[None, :]
        first, second = _split(whole, BM, HALF, True)
    else:
        pair = tl.arange(0, HALF)
        one, exists = _columns(pair, D, R, HALF, False)
        two, _ = _columns(pair + HALF, D, R, HALF, False)
        if ALIGNED and R != D:
            one = tl.max_contiguous(tl.multiple_of(one, 8), 8)
            two = tl.max_contiguous(tl.multiple_of(two, 8), 8)
        mask = is_row[:, None] & exists[None, :]
        first = tl.load(ptr + row_at[:, None] + one[None, :], mask=mask, other=0.0).to(tl.float32)
        second = tl.load(ptr + row_at[:, None] + two[None, :], mask=mask, other=0.0).to(tl.float32)
        if scale_at is not None:
            first = first * tl.load(scale_at + one, mask=exists, other=0.0)[None, :]
            second = second * tl.load(scale_at + two, mask=exists, other=0.0)[None, :]
    return first, second


@triton.jit(do_not_specialize=["G"])
def restore_kv_kernel(
    keys_ptr, values_ptr, key_scale_ptr, value_scale_ptr, tile_ptr, gain_ptr, cos_ptr, sin_ptr,
    slot_ptr, key_ptr, value_ptr, T, stride_cos, stride_block, stride_token, stride_head, eps, G,
    D: tl.constexpr, R: tl.constexpr, PAGE: tl.constexpr,
    INTERLEAVED: tl.constexpr, ALIGNED: tl.constexpr, HALF: tl.constexpr,
    PARTS: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Stored K before RoPE, and V, (G, T, D) each, to the cache: some rows of one head.

    Grid: (tiles * PARTS, 2 * G). K has a scale of each channel, chunk by chunk, V of each token.
    """
    part = tl.program_id(1)
    m, is_row, chunk = _rows(tile_ptr, PARTS, BM)
    head = part % G
    row_at = (head.to(tl.int64) * T + m) * D
    base, is_kept = _places(slot_ptr, m, is_row, stride_block, stride_token, PAGE)
    base += head * stride_head
    if part < G:
        scale_at = None
        if key_scale_ptr is not None:
            scale_at = key_scale_ptr + (chunk * G + head).to(tl.int64) * D
        first, second = _load_pairs(
            keys_ptr, row_at, is_row, scale_at, D, R, HALF, INTERLEAVED, ALIGNED, BM
        )
        if gain_ptr is not None:
            first, second = _norm_pairs(first, second, gain_ptr, eps, D, R, HALF, INTERLEAVED)
        first, second = _turn(
            first, second, cos_ptr, sin_ptr, m, is_row, stride_cos, BM, R, HALF, INTERLEAVED
        )
        _store_pairs(first, second, key_ptr, base, is_kept, BM, D, R, HALF, INTERLEAVED, ALIGNED)
    else:
        first, second = _load_pairs(
            values_ptr, row_at, is_row, None, D, R, HALF, INTERLEAVED, ALIGNED, BM
        )
        if value_scale_ptr is not None:
            scale = tl.load(value_scale_ptr + head * T + m, mask=is_row, other=0.0)
            first, second = first * scale[:, None], second * scale[:, None]
        _store_pairs(first, second, value_ptr, base, is_kept, BM, D, R, HALF, INTERLEAVED, ALIGNED)


@triton.jit
def quantise_rows_kernel(
    rows_ptr, out_ptr, quant_ptr, E, stride_row, groups, GROUP: tl.constexpr, LARGEST: tl.constexpr
):  # fmt: skip
    """Numbers (T, E) to integers, or eight-bit floats, and scales (T, groups).

    Grid: (T, groups). Rounded to the nearest, even where two are as near: adding and subtracting
    1.5 * 2^23 leaves no fraction.
    """
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = group * GROUP + tl.arange(0, GROUP)
    inside = column < E
    x = tl.load(rows_ptr + row * stride_row + column, mask=inside, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(x), axis=0)
    is_number = tl.min((x == x).to(tl.int32), axis=0) == 1
    scale = tl.where(largest == 0.0, 1.0, tl.div_rn(largest, LARGEST))
    scale = tl.where(is_number, scale, float("nan"))
    steps = tl.div_rn(x, tl.broadcast_to(scale, x.shape))
    steps = tl.where(tl.abs(steps) <= LARGEST * 1.01, steps, 0.0)
    if out_ptr.dtype.element_ty == tl.int8:
        steps = (steps + 12582912.0) - 12582912.0
    steps = tl.minimum(tl.maximum(steps, -LARGEST), LARGEST)
    tl.store(out_ptr + row * E + column, steps.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(quant_ptr + row * groups + group, scale)


@triton.jit
def dequantise_rows_kernel(
    rows_ptr, quant_ptr, out_ptr, E, groups, stride_out, GROUP: tl.constexpr
):  # fmt: skip
    """The inverse of `quantise_rows_kernel`. Grid: (T, groups)."""
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = group * GROUP + tl.arange(0, GROUP)
    inside = column < E
    x = tl.load(rows_ptr + row * E + column, mask=inside, other=0.0).to(tl.float32)
    x = x * tl.load(quant_ptr + row * groups + group)
    tl.store(out_ptr + row * stride_out + column, x.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def row_statistics_kernel(
    rows_ptr, scale_ptr, shift_ptr, E, stride_row, eps, CENTRED: tl.constexpr, BE: tl.constexpr
):  # fmt: skip
    """`1 / rms`, or `1 / std` and `-mean / std`, of every row (T, E). Grid: (T,)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BE)
    inside = column < E
    x = tl.load(rows_ptr + row * stride_row + column, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=0) / E if CENTRED else 0.0
    apart = tl.where(inside, x - mean, 0.0)
    scale = tl.rsqrt(tl.sum(apart * apart, axis=0) / E + eps)
    tl.store(scale_ptr + row, scale)
    if CENTRED:
        tl.store(shift_ptr + row, -mean * scale)
