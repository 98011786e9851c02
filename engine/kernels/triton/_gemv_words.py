"""Kernels of one token with weights that are read as words: 16-bit, int8, nibbles, float8.

`width` is words of a row; a program takes C chunks of four words of BN rows an iteration. The
next tile is loaded before the present one is used, and the first before the wait for the kernel
before (see _gemv.py).
"""

from __future__ import annotations

import triton
import triton.language as tl

from engine.kernels.triton._weights import NIBBLE_ZERO
from engine.kernels.triton._words import (
    DIGITS_STEP,
    dot_bytes,
    dot_nibbles,
    finish_row,
    halves,
    leave_rest,
    load_normed,
    load_residual,
    load_words,
    range_of,
    rms_of,
    scale_four,
    split_words,
    step_of,
    sum_digits,
    take_digits,
)


@triton.jit
def _add_halves(words, low, high, sums, dtype: tl.constexpr):
    w_low, w_high = halves(words, dtype)
    return tl.fma(w_high, high, tl.fma(w_low, low, sums))


@triton.jit
def _gemv_halves(
    y, x, codes, norm, residual, outputs, width, eps,
    GATED: tl.constexpr, BN: tl.constexpr, C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """bf16 or fp16 weights, of the token's dtype."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    dtype: tl.constexpr = x.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    inside = row < outputs
    lane = tl.arange(0, C)
    tile = load_words(codes, row, inside, lane, width)  # [C, BN, 4]
    if GATED:
        up_tile = load_words(codes, row + outputs, inside, lane, width)
    x_words = x.to(tl.pointer_type(tl.int32))
    if norm is not None:
        norm_words = norm.to(tl.pointer_type(tl.int32))
    if PDL:
        tl.extra.cuda.gdc_wait()
    added = load_residual(residual, row, inside)
    sums = tl.zeros([C, BN, 4], tl.float32)
    up_sums = tl.zeros([C, BN, 4], tl.float32)
    squares = tl.zeros([C, 1, 4], tl.float32)
    for start in range(0, tl.cdiv(width, 4), C):
        chunk = start + lane
        column = chunk[:, None, None] * 4 + tl.arange(0, 4)[None, None, :]
        here = column < width
        low, high = halves(tl.load(x_words + column, mask=here, other=0), dtype)
        if norm is not None:
            squares = tl.fma(high, high, tl.fma(low, low, squares))
            n_low, n_high = halves(tl.load(norm_words + column, mask=here, other=0), dtype)
            low *= n_low
            high *= n_high
        present = tile
        tile = load_words(codes, row, inside, chunk + C, width)
        sums = _add_halves(present, low, high, sums, dtype)
        if GATED:
            present = up_tile
            up_tile = load_words(codes, row + outputs, inside, chunk + C, width)
            up_sums = _add_halves(present, low, high, up_sums, dtype)
    finish_row(
        y, tl.sum(tl.sum(sums, axis=2), axis=0), tl.sum(tl.sum(up_sums, axis=2), axis=0), None,
        rms_of(squares, width * 2, eps, norm is not None), added, row, inside, outputs, GATED,
    )  # fmt: skip


@triton.jit
def _byte_sums(words, digits, ASSEMBLY: tl.constexpr):
    """Σ code · value of each chunk [C, BN]."""
    front, back = split_words(words)
    sums = dot_bytes(front, digits[0], ASSEMBLY) + dot_bytes(back, digits[1], ASSEMBLY)
    return tl.sum(sums, axis=2).to(tl.float32)


@triton.jit
def _gemv_bytes(
    y, x, codes, scale, norm, residual, outputs, width, eps,
    GATED: tl.constexpr, BN: tl.constexpr, C: tl.constexpr, ASSEMBLY: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """int8 codes with a scale per row."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    LEVELS: tl.constexpr = 2 if x.dtype.element_ty == tl.float32 else 1
    row = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    inside = row < outputs
    lane = tl.arange(0, C)
    tile = load_words(codes, row, inside, lane, width)  # [C, BN, 4]
    if GATED:
        up_tile = load_words(codes, row + outputs, inside, lane, width)
    if PDL:
        tl.extra.cuda.gdc_wait()
    added = load_residual(residual, row, inside)
    sums = tl.zeros([C, BN], tl.float32)
    up_sums = tl.zeros([C, BN], tl.float32)
    squares = tl.zeros([C, 1], tl.float32)
    for start in range(0, tl.cdiv(width, 4), C):
        chunk = start + lane
        front, squares_front = load_normed(x, norm, chunk * 16, False, chunk * 4 < width)
        back, squares_back = load_normed(x, norm, chunk * 16, True, chunk * 4 + 2 < width)
        squares += squares_front + squares_back
        present = tile
        tile = load_words(codes, row, inside, chunk + C, width)
        if GATED:
            up_present = up_tile
            up_tile = load_words(codes, row + outputs, inside, chunk + C, width)
        step = step_of(range_of(front), range_of(back))
        inverse = (1 / step)[:, :, None]
        front, back = scale_four(front, inverse), scale_four(back, inverse)
        for _ in tl.static_range(LEVELS):
            digits = take_digits(front, ASSEMBLY), take_digits(back, ASSEMBLY)
            sums += _byte_sums(present, digits, ASSEMBLY) * step
            if GATED:
                up_sums += _byte_sums(up_present, digits, ASSEMBLY) * step
            if LEVELS > 1:
                front, back = leave_rest(front), leave_rest(back)
                step /= DIGITS_STEP
    finish_row(
        y, tl.sum(sums, axis=0), tl.sum(up_sums, axis=0), scale,
        rms_of(squares, width * 4, eps, norm is not None), added, row, inside, outputs, GATED,
    )  # fmt: skip


@triton.jit
def _load_chunk(x, factor, first, HALF: tl.constexpr, inside):
    """What the low and what the high nibbles meet, eight values at a time, and Σ x² [C, 1]."""
    low_front, squares = load_normed(x, factor, first, False, inside)
    low_back, more = load_normed(x, factor, first, True, inside)
    squares += more
    high_front, more = load_normed(x, factor, first + HALF, False, inside)
    squares += more
    high_back, more = load_normed(x, factor, first + HALF, True, inside)
    return (low_front, low_back), (high_front, high_back), squares + more


@triton.jit
def _first_input(chunk, HALF: tl.constexpr):
    """The input of a chunk's first low nibble; that of its high one is HALF further on."""
    return chunk * 16 // HALF * (2 * HALF) + chunk * 16 % HALF


@triton.jit
def _load_token(
    x, factor, inputs,
    HALF: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr, LEVELS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """x · factor as digits: LEVELS entries (low, high, total, step) for each of PARTS times C
    chunks, and Σ x² [C, 1]."""
    squares = tl.zeros([C, 1], tl.float32)
    entries = ()
    for part in tl.static_range(PARTS):
        first = _first_input(part * C + tl.arange(0, C), HALF)
        low, high, square = _load_chunk(x, factor, first, HALF, first < inputs)
        squares += square
        low_step = step_of(range_of(low[0]), range_of(low[1]))
        high_step = step_of(range_of(high[0]), range_of(high[1]))
        step = tl.maximum(low_step, high_step, tl.PropagateNan.ALL)
        inverse = (1 / step)[:, :, None]
        low = scale_four(low[0], inverse), scale_four(low[1], inverse)
        high = scale_four(high[0], inverse), scale_four(high[1], inverse)
        for _level in tl.static_range(LEVELS):
            low_digits = take_digits(low[0], ASSEMBLY), take_digits(low[1], ASSEMBLY)
            high_digits = take_digits(high[0], ASSEMBLY), take_digits(high[1], ASSEMBLY)
            total = sum_digits(low_digits, ASSEMBLY) + sum_digits(high_digits, ASSEMBLY)
            entries += ((low_digits, high_digits, total, step),)
            if LEVELS > 1:
                low = leave_rest(low[0]), leave_rest(low[1])
                high = leave_rest(high[0]), leave_rest(high[1])
                step /= DIGITS_STEP
    return entries, squares


@triton.jit
def _load_groups(of, row, groups, group, mask):
    """A value of each group, [C, BN]; of None something that nobody reads, which a tuple can hold
    and None it cannot."""
    values = group
    if of is not None:
        values = tl.load(of + row[None, :] * groups + group[:, None], mask=mask, other=0)
    return values


@triton.jit
def _load_rows(
    codes, scale, zero, row, inside, width, group_size,
    HALF: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Rows [BN]: PARTS entries of codes [C, BN, 4] with the scales and zeros of their groups."""
    inputs = width * 8
    entries = ()
    for part in tl.static_range(PARTS):
        chunk = part * C + tl.arange(0, C)
        first = _first_input(chunk, HALF)
        mask = inside[None, :] & (first < inputs)[:, None]
        groups, group = inputs // group_size, first // group_size
        words = load_words(codes, row, inside, chunk, width)
        scales = _load_groups(scale, row, groups, group, mask)
        entries += ((words, scales, _load_groups(zero, row, groups, group, mask)),)
    return entries


@triton.jit
def _nibble_sums(
    rows, token, scale, zero, BN: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr,
    LEVELS: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Σ (code - zero) · scale · value of rows [BN]; sums of a chunk are whole, below 2^24."""
    sums = tl.zeros([C, BN], tl.float32)
    for entry in tl.static_range(PARTS * LEVELS):
        words, scales, zeros = rows[entry // LEVELS]
        low, high, total, step = token[entry]
        front, back = split_words(words)
        found = dot_nibbles(front, low[0], high[0], ASSEMBLY)
        found = tl.sum(found + dot_nibbles(back, low[1], high[1], ASSEMBLY), axis=2)
        if zero is None:
            found -= NIBBLE_ZERO * total
        else:
            found -= zeros.to(tl.int32) * total
        factor = step
        if scale is not None:
            factor = step * scales.to(tl.float32)
        sums += found.to(tl.float32) * factor
    return tl.sum(sums, axis=0)


@triton.jit
def _gemv_nibbles(
    y, x, codes, scale, zero, factor, residual, outputs, width, group_size, eps,
    RMS: tl.constexpr, GATED: tl.constexpr, HAS_GROUPS: tl.constexpr, HALF: tl.constexpr,
    BN: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr, ASSEMBLY: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """HALF: bytes of a nibble block. A program keeps the token, times `factor` if there is one, as
    digits of PARTS times C chunks and takes blocks of BN rows in turn; a chunk lies within a nibble
    block, and so within one group. RMS: sums are divided by the token's root mean square."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    LEVELS: tl.constexpr = 2 if x.dtype.element_ty == tl.float32 else 1
    group_scale = scale if HAS_GROUPS else None
    begin, stride = tl.program_id(0) * BN, tl.num_programs(0) * BN
    row = begin.to(tl.int64) + tl.arange(0, BN)
    rows = _load_rows(
        codes, group_scale, zero, row, row < outputs, width, group_size, HALF, C, PARTS
    )
    up_rows = rows
    if GATED:
        up_rows = _load_rows(
            codes, group_scale, zero, row + outputs, row < outputs, width, group_size,
            HALF, C, PARTS,
        )  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_wait()
    token, squares = _load_token(x, factor, width * 8, HALF, C, PARTS, LEVELS, ASSEMBLY)
    rms = rms_of(squares, width * 8, eps, RMS)
    for _ in range(begin, outputs, stride):
        added = load_residual(residual, row, row < outputs)
        will_be = row + stride < outputs
        present = rows
        rows = _load_rows(
            codes, group_scale, zero, row + stride, will_be, width, group_size, HALF, C, PARTS
        )
        gate = _nibble_sums(present, token, group_scale, zero, BN, C, PARTS, LEVELS, ASSEMBLY)
        up = gate
        if GATED:
            present = up_rows
            up_rows = _load_rows(
                codes, group_scale, zero, row + stride + outputs, will_be, width, group_size,
                HALF, C, PARTS,
            )  # fmt: skip
            up = _nibble_sums(present, token, group_scale, zero, BN, C, PARTS, LEVELS, ASSEMBLY)
        row_scale = None if HAS_GROUPS else scale
        finish_row(y, gate, up, row_scale, rms, added, row, row < outputs, outputs, GATED)
        row += stride
