"""One token and codes that are read as words of 32 bits: int8, or nibbles.

A lane reads 16 bytes of each of its rows, and four values of the token at a time. The codes of a
word become numbers where they are, or after one shift, by one instruction each.
"""

from __future__ import annotations

import triton
import triton.language as tl

from engine.kernels.triton._weights import between, byte_between

CHUNK_BYTES = 16
NIBBLE_ZERO = tl.constexpr(8.0)
# A nibble stays where it is in a word, but for one shift a byte: in bits 12…15 of the mantissa of
# 2^11, or 16…19 of that of 2^7, it counts ones. One instruction puts it there; the offset is
# taken off the sum of many, or of each where fp32 tokens ask for all their bits.
LOW_BITS, LOW_OFFSET = tl.constexpr(0x45000000), tl.constexpr(2048.0)
# So does a byte in bits 15…22 of the mantissa of 2^8; 128 more undo the flipped sign.
BYTE_BITS, BYTE_OFFSET = tl.constexpr(0x43800000), tl.constexpr(384.0)
SIGN_BITS = tl.constexpr(-2139062144)  # 0x80808080
HIGH_BITS, HIGH_OFFSET = tl.constexpr(0x43000000), tl.constexpr(128.0)


@triton.jit
def _finish_row(
    y, gate, up, scale, squares, residual, row, inside, outputs, inputs, eps,
    HAS_SCALE: tl.constexpr, HAS_NORM: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Scale sums fp32 [BN], gate them, add the residual, and store."""
    if HAS_SCALE:
        gate *= tl.load(scale + row, mask=inside, other=0.0)
        if GATED:
            up *= tl.load(scale + outputs + row, mask=inside, other=0.0)
    if HAS_NORM:
        rms = tl.rsqrt(tl.sum(squares, axis=0) / inputs + eps)
        gate *= rms
        up *= rms
    if GATED:
        gate = gate * tl.sigmoid(gate) * up
    if residual is not None:
        gate += tl.load(residual + row, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row, gate.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _load_words(codes, row, inside, chunk, width):
    """Chunks `chunk` [C] of four words of eight nibbles, of rows [BN]: int32 [C, BN, 4]."""
    column = chunk[:, None, None] * 4 + tl.arange(0, 4)[None, None, :]
    mask = inside[None, :, None] & (column < width)
    at = row[None, :, None] * width + column
    return tl.load(codes + at, mask=mask, other=0, eviction_policy="evict_first")


@triton.jit
def _load_fours(x, fours, inside):
    """Four neighbours at a time, in fp32: elements 4 · fours [C, 1, 4], + 1, + 2 and + 3.

    16-bit ones come as words of 64 bits, so that a lane's load is as wide as it can be.
    """
    if x.dtype.element_ty == tl.float32:
        x += fours * 4
        x0 = tl.load(x, mask=inside, other=0.0)
        x1 = tl.load(x + 1, mask=inside, other=0.0)
        x2 = tl.load(x + 2, mask=inside, other=0.0)
        x3 = tl.load(x + 3, mask=inside, other=0.0)
    else:
        words = tl.load(x.to(tl.pointer_type(tl.int64)) + fours, mask=inside, other=0)
        x0, x1 = _halves(words.to(tl.int32), x.dtype.element_ty)
        x2, x3 = _halves((words >> 32).to(tl.int32), x.dtype.element_ty)
    return x0, x1, x2, x3


@triton.jit
def _halves(words, dtype: tl.constexpr):
    """The lower and the higher 16 bits of int32, as fp32."""
    if dtype == tl.bfloat16:
        low = (words << 16).to(tl.float32, bitcast=True)
        high = (words & -65536).to(tl.float32, bitcast=True)
    else:
        low = words.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
        high = (words >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def _load_normed(x, norm, fours, inside):
    """x · norm of four neighbours, each [C, 1, 4], their sum and that of their x² [C, 1]."""
    x0, x1, x2, x3 = _load_fours(x, fours, inside)
    squares = x0 * x0 + x1 * x1 + x2 * x2 + x3 * x3
    if norm is not None:
        n0, n1, n2, n3 = _load_fours(norm, fours, inside)
        x0 *= n0
        x1 *= n1
        x2 *= n2
        x3 *= n3
    return x0, x1, x2, x3, tl.sum(x0 + x1 + x2 + x3, axis=2), tl.sum(squares, axis=2)


@triton.jit
def _add_byte(words, low, high, sums, SHIFT: tl.constexpr, EXACT: tl.constexpr, ASM: tl.constexpr):
    """sums + the products of one byte of each word, moved left by SHIFT bits, with low and high."""
    words = words << SHIFT if SHIFT > 0 else words >> -SHIFT
    low_codes = between(words, LOW_BITS, True, ASM)
    high_codes = between(words, HIGH_BITS, False, ASM)
    if EXACT:
        low_codes -= LOW_OFFSET
        high_codes -= HIGH_OFFSET
    return tl.fma(high_codes, high, tl.fma(low_codes, low, sums))


@triton.jit
def _nibble_sums(
    words, low, high, scale, zero, at, inside,
    HAS_GROUPS: tl.constexpr, EXACT: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Σ (code - zero) · x of each chunk [C, BN], scaled if scales belong to groups."""
    sums = tl.zeros(words.shape, tl.float32)
    sums = _add_byte(words, low[0], high[0], sums, 12, EXACT, ASM)
    sums = _add_byte(words, low[1], high[1], sums, 4, EXACT, ASM)
    sums = _add_byte(words, low[2], high[2], sums, -4, EXACT, ASM)
    sums = _add_byte(words, low[3], high[3], sums, -12, EXACT, ASM)
    zeros = (
        NIBBLE_ZERO if zero is None else tl.load(zero + at, mask=inside, other=0.0).to(tl.float32)
    )
    total = tl.sum(sums, axis=2) - zeros * (low[4] + high[4])
    if not EXACT:
        total -= LOW_OFFSET * low[4] + HIGH_OFFSET * high[4]
    if HAS_GROUPS:
        total *= tl.load(scale + at, mask=inside, other=0.0).to(tl.float32)
    return total


@triton.jit
def _gemv_nibbles(
    y, x, codes, scale, zero, norm, residual, outputs, width, group_size, eps,
    GATED: tl.constexpr, HAS_GROUPS: tl.constexpr, HALF: tl.constexpr, BN: tl.constexpr,
    C: tl.constexpr, ASSEMBLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`width`: words of a row; HALF: bytes of a nibble block; C chunks of 16 bytes an iteration. A
    chunk lies within a block, and so within one group."""
    EXACT: tl.constexpr = x.dtype.element_ty == tl.float32
    row = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    inside = row < outputs
    lane = tl.arange(0, C)
    inputs = width * 8
    groups = inputs // group_size
    tile = _load_words(codes, row, inside, lane, width)  # [C, BN, 4]
    if GATED:
        up_tile = _load_words(codes, row + outputs, inside, lane, width)
    if PDL:
        tl.extra.cuda.gdc_wait()
    sums = tl.zeros([C, BN], tl.float32)
    up_sums = tl.zeros([C, BN], tl.float32)
    squares = tl.zeros([C, 1], tl.float32)
    for start in range(0, width // 4, C):
        chunk = start + lane
        # The input of a chunk's first low nibble; that of its high one is HALF further on.
        first = chunk * 16 // HALF * (2 * HALF) + chunk * 16 % HALF
        fours = (first // 4)[:, None, None] + tl.arange(0, 4)[None, None, :]
        here = (first < inputs)[:, None, None]
        low = _load_normed(x, norm, fours, here)
        high = _load_normed(x, norm, fours + HALF // 4, here)
        squares += low[5] + high[5]
        group = (first // group_size)[:, None]
        mask = inside[None, :] & (first < inputs)[:, None]
        present = tile
        tile = _load_words(codes, row, inside, chunk + C, width)
        sums += _nibble_sums(
            present, low, high, scale, zero, row[None, :] * groups + group, mask,
            HAS_GROUPS, EXACT, ASSEMBLY,
        )  # fmt: skip
        if GATED:
            present = up_tile
            up_tile = _load_words(codes, row + outputs, inside, chunk + C, width)
            up_sums += _nibble_sums(
                present, low, high, scale, zero, (row[None, :] + outputs) * groups + group,
                mask, HAS_GROUPS, EXACT, ASSEMBLY,
            )  # fmt: skip
    _finish_row(
        y, tl.sum(sums, axis=0), tl.sum(up_sums, axis=0), scale, squares, residual,
        row, inside, outputs, inputs, eps, not HAS_GROUPS, norm is not None, GATED,
    )  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _add_codes(words, value, sums, SHIFT: tl.constexpr, EXACT: tl.constexpr, ASM: tl.constexpr):
    """sums + the products of one byte of each word, moved left by SHIFT bits, with `value`."""
    words = words << SHIFT if SHIFT > 0 else words >> -SHIFT
    codes = byte_between(words, BYTE_BITS, ASM)
    if EXACT:
        codes -= BYTE_OFFSET
    return tl.fma(codes, value, sums)


@triton.jit
def _byte_sums(words, x, EXACT: tl.constexpr, ASM: tl.constexpr):
    """Σ code · x of each chunk [C, BN]; a code is a byte less 128 once its sign bit is flipped."""
    words = words ^ SIGN_BITS
    sums = tl.zeros(words.shape, tl.float32)
    sums = _add_codes(words, x[0], sums, 15, EXACT, ASM)
    sums = _add_codes(words, x[1], sums, 7, EXACT, ASM)
    sums = _add_codes(words, x[2], sums, -1, EXACT, ASM)
    sums = _add_codes(words, x[3], sums, -9, EXACT, ASM)
    sums_CN = tl.sum(sums, axis=2)
    return sums_CN if EXACT else sums_CN - BYTE_OFFSET * x[4]


@triton.jit
def _gemv_bytes(
    y, x, codes, scale, norm, residual, outputs, width, eps,
    GATED: tl.constexpr, BN: tl.constexpr, C: tl.constexpr, ASSEMBLY: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """int8 codes. `width`: words of a row; C chunks of 16 bytes an iteration."""
    EXACT: tl.constexpr = x.dtype.element_ty == tl.float32
    row = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    inside = row < outputs
    lane = tl.arange(0, C)
    inputs = width * 4
    tile = _load_words(codes, row, inside, lane, width)  # [C, BN, 4]
    if GATED:
        up_tile = _load_words(codes, row + outputs, inside, lane, width)
    if PDL:
        tl.extra.cuda.gdc_wait()
    sums = tl.zeros([C, BN], tl.float32)
    up_sums = tl.zeros([C, BN], tl.float32)
    squares = tl.zeros([C, 1], tl.float32)
    for start in range(0, tl.cdiv(width, 4), C):
        chunk = start + lane
        fours = chunk[:, None, None] * 4 + tl.arange(0, 4)[None, None, :]
        value = _load_normed(x, norm, fours, fours < width)
        squares += value[5]
        present = tile
        tile = _load_words(codes, row, inside, chunk + C, width)
        sums += _byte_sums(present, value, EXACT, ASSEMBLY)
        if GATED:
            present = up_tile
            up_tile = _load_words(codes, row + outputs, inside, chunk + C, width)
            up_sums += _byte_sums(present, value, EXACT, ASSEMBLY)
    _finish_row(
        y, tl.sum(sums, axis=0), tl.sum(up_sums, axis=0), scale, squares, residual,
        row, inside, outputs, inputs, eps, True, norm is not None, GATED,
    )  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
