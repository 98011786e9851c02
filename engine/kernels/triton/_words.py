"""What the products of one token share: words of 32 bits, a token's digits, and a row's end.

A lane reads 16 bytes of each of its rows at a time, and the values of the token that they meet. The
fewer instructions a code takes, the closer a product comes to the memory's speed: bytes meet the
token's int8 digits four at a time (`dp4a`), whole numbers added up exactly.
"""

from __future__ import annotations

import triton
import triton.language as tl

from engine.kernels.triton._codes import ROUNDER

# A chunk's values are written with 16 bits: an unsigned lower and a signed upper byte.
DIGITS_MAX = tl.constexpr(32767.0)
# What is left of fp32 values is written with 16 bits more.
DIGITS_STEP = tl.constexpr(32768.0)
MIN_RANGE = tl.constexpr(1e-30)

# Four whole numbers in the low 16 bits of $2 … $5: their lower bytes in $0, their upper in $1.
PACK = tl.constexpr("""{
.reg .b32 first, second;
prmt.b32 first, $2, $3, 0x5140;
prmt.b32 second, $4, $5, 0x5140;
prmt.b32 $0, first, second, 0x5410;
prmt.b32 $1, first, second, 0x7632;
}""")
PACK_REGISTERS = tl.constexpr("=r,=r,r,r,r,r")
# $0 = Σ byte of $1 (unsigned, or signed) · (byte of $2 + 256 · byte of $3), and the same of $4 with
# nibbles: the low ones of $1 meet $2 and $3, the high ones $4 and $5.
BYTES = tl.constexpr("""{
.reg .b32 lower, upper;
dp4a.s32.u32 lower, $1, $2, 0;
dp4a.s32.s32 upper, $1, $3, 0;
mad.lo.s32 $0, upper, 256, lower;
}""")
BYTES_REGISTERS = tl.constexpr("=r,r,r,r")
NIBBLES = tl.constexpr("""{
.reg .b32 low, high, lower, upper;
and.b32 low, $1, 0x0F0F0F0F;
shr.u32 high, $1, 4;
and.b32 high, high, 0x0F0F0F0F;
dp4a.u32.u32 lower, low, $2, 0;
dp4a.u32.s32 upper, low, $3, 0;
dp4a.u32.u32 lower, high, $4, lower;
dp4a.u32.s32 upper, high, $5, upper;
mad.lo.s32 $0, upper, 256, lower;
}""")
NIBBLES_REGISTERS = tl.constexpr("=r,r,r,r,r,r")
NIBBLE_BITS, ONES = tl.constexpr(0x0F0F0F0F), tl.constexpr(0x01010101)


@triton.jit
def load_words(codes, row, inside, chunk, width):
    """Chunks `chunk` [C] of four words of rows [BN]: int32 [C, BN, 4], 0 outside.

    The compiler spreads the first dimension over lanes and warps: a lane has a chunk of every row,
    and its part of the token once.
    """
    column = chunk[:, None, None] * 4 + tl.arange(0, 4)[None, None, :]
    mask = inside[None, :, None] & (column < width)
    at = row[None, :, None] * width + column
    return tl.load(codes + at, mask=mask, other=0, eviction_policy="evict_first")


@triton.jit
def split_words(tile):
    """The first two and the last two words of every chunk, each [C, BN, 2]."""
    pairs = tl.reshape(tile, [tile.shape[0], tile.shape[1], 2, 2])
    return tl.split(tl.permute(pairs, 0, 1, 3, 2))


@triton.jit
def _load_four(x, first, inside):
    """fp32 elements first [C] … first + 3, each [C, 1]."""
    at = first[:, None, None] + tl.arange(0, 4)[None, None, :]
    values = tl.load(x + at, mask=inside[:, None, None], other=0.0)
    even, odd = tl.split(tl.reshape(values, [first.shape[0], 1, 2, 2]))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def load_values(x, first, BACK: tl.constexpr, inside):
    """Eight neighbours in fp32, as four tensors [C, 1, 2] of those that meet the bytes 0 … 3 of two
    words: elements first [C], first + 1 … or, if BACK, from first + 8 on.

    A lane loads 16 bytes at a time and keeps what its codes meet.
    """
    if x.dtype.element_ty == tl.float32:
        a0, a1, a2, a3 = _load_four(x, first + 8 * BACK, inside)
        b0, b1, b2, b3 = _load_four(x, first + 8 * BACK + 4, inside)
        x0, x1, x2, x3 = tl.join(a0, b0), tl.join(a1, b1), tl.join(a2, b2), tl.join(a3, b3)
    else:
        column = (first // 2)[:, None, None] + 4 * BACK + tl.arange(0, 4)[None, None, :]
        words = tl.load(
            x.to(tl.pointer_type(tl.int32)) + column, mask=inside[:, None, None], other=0
        )
        even, odd = tl.split(tl.reshape(words, [words.shape[0], 1, 2, 2]))
        x0, x1 = halves(even, x.dtype.element_ty)
        x2, x3 = halves(odd, x.dtype.element_ty)
    return x0, x1, x2, x3


@triton.jit
def halves(words, dtype: tl.constexpr):
    """The lower and the higher 16 bits of int32, as fp32."""
    if dtype == tl.bfloat16:
        low = (words << 16).to(tl.float32, bitcast=True)
        high = (words & -65536).to(tl.float32, bitcast=True)
    else:
        low = words.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
        high = (words >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def load_normed(x, norm, first, BACK: tl.constexpr, inside):
    """`load_values` of x · norm (any factors of the inputs), and the sum of their x² [C, 1]."""
    x0, x1, x2, x3 = load_values(x, first, BACK, inside)
    squares = tl.zeros([first.shape[0], 1], tl.float32)
    if norm is not None:
        squares = tl.sum(x0 * x0 + x1 * x1 + x2 * x2 + x3 * x3, axis=2)
        n0, n1, n2, n3 = load_values(norm, first, BACK, inside)
        x0 *= n0
        x1 *= n1
        x2 *= n2
        x3 *= n3
    return (x0, x1, x2, x3), squares


@triton.jit
def _greater(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def range_of(x):
    """The largest magnitude of four values [C, 1, 2] in each chunk, [C, 1]; NaN if one is."""
    largest = _greater(_greater(tl.abs(x[0]), tl.abs(x[1])), _greater(tl.abs(x[2]), tl.abs(x[3])))
    return tl.reduce(largest, 2, _greater)


@triton.jit
def step_of(front, back):
    """What a chunk's digits count, [C, 1]: its largest value has DIGITS_MAX of it."""
    largest = _greater(_greater(front, back), MIN_RANGE)
    return largest / DIGITS_MAX


@triton.jit
def scale_four(x, factor):
    return x[0] * factor, x[1] * factor, x[2] * factor, x[3] * factor


@triton.jit
def take_digits(x, ASSEMBLY: tl.constexpr):
    """Four values up to DIGITS_MAX, rounded: words of their lower and of their upper bytes."""
    v0 = (x[0] + ROUNDER).to(tl.int32, bitcast=True)
    v1 = (x[1] + ROUNDER).to(tl.int32, bitcast=True)
    v2 = (x[2] + ROUNDER).to(tl.int32, bitcast=True)
    v3 = (x[3] + ROUNDER).to(tl.int32, bitcast=True)
    if ASSEMBLY:
        lower, upper = tl.inline_asm_elementwise(
            PACK, PACK_REGISTERS, [v0, v1, v2, v3], (tl.int32, tl.int32), True, 1
        )
    else:
        lower = (v0 & 255) | ((v1 & 255) << 8) | ((v2 & 255) << 16) | (v3 << 24)
        upper = ((v0 >> 8) & 255) | (v1 & 65280) | ((v2 & 65280) << 8) | ((v3 & 65280) << 16)
    return lower, upper


@triton.jit
def leave_rest(x):
    """What `take_digits` leaves of four values, in units of the next 16 bits."""
    r0 = (x[0] - ((x[0] + ROUNDER) - ROUNDER)) * DIGITS_STEP
    r1 = (x[1] - ((x[1] + ROUNDER) - ROUNDER)) * DIGITS_STEP
    r2 = (x[2] - ((x[2] + ROUNDER) - ROUNDER)) * DIGITS_STEP
    r3 = (x[3] - ((x[3] + ROUNDER) - ROUNDER)) * DIGITS_STEP
    return r0, r1, r2, r3


@triton.jit
def _dot_four(a, b, A_SIGNED: tl.constexpr, B_SIGNED: tl.constexpr):
    """Σ of the products of the bytes of two words, as `dp4a`."""
    total = tl.zeros_like(a)
    for place in tl.static_range(4):
        byte_a = (a << (24 - 8 * place)) >> 24
        byte_b = (b << (24 - 8 * place)) >> 24
        if not A_SIGNED:
            byte_a &= 255
        if not B_SIGNED:
            byte_b &= 255
        total += byte_a * byte_b
    return total


@triton.jit
def dot_bytes(words, digits, ASSEMBLY: tl.constexpr):
    """Σ of four int8 codes · values written as two digits, of each word."""
    lower, upper = digits
    if ASSEMBLY:
        sums = tl.inline_asm_elementwise(
            BYTES, BYTES_REGISTERS, [words, lower, upper], tl.int32, True, 1
        )
    else:
        words, lower = tl.broadcast(words, lower)
        words, upper = tl.broadcast(words, upper)
        sums = _dot_four(words, lower, True, False) + 256 * _dot_four(words, upper, True, True)
    return sums


@triton.jit
def dot_nibbles(words, low, high, ASSEMBLY: tl.constexpr):
    """Σ of eight codes 0…15 · values as digits: `low` meet the low nibbles, `high` the others."""
    if ASSEMBLY:
        operands = [words, low[0], low[1], high[0], high[1]]
        sums = tl.inline_asm_elementwise(NIBBLES, NIBBLES_REGISTERS, operands, tl.int32, True, 1)
    else:
        sums = dot_bytes(words & NIBBLE_BITS, low, ASSEMBLY)
        sums += dot_bytes((words >> 4) & NIBBLE_BITS, high, ASSEMBLY)
    return sums


@triton.jit
def sum_digits(digits, ASSEMBLY: tl.constexpr):
    """Σ of the values of each chunk, [C, 1]; `digits` of its front and of its back."""
    ones = tl.full(digits[0][0].shape, ONES, tl.int32)
    sums = dot_bytes(ones, digits[0], ASSEMBLY) + dot_bytes(ones, digits[1], ASSEMBLY)
    return tl.sum(sums, axis=2)


@triton.jit
def rms_of(squares, inputs, eps, HAS_NORM: tl.constexpr):
    """RMSNorm's factor from parts of Σ x² [C, 1]; 1 without a norm."""
    rms = 1.0
    if HAS_NORM:
        rms = tl.rsqrt(tl.sum(squares) / inputs + eps)
    return rms


@triton.jit
def load_residual(residual, row, inside):
    value = 0.0
    if residual is not None:
        value = tl.load(residual + row, mask=inside, other=0.0).to(tl.float32)
    return value


@triton.jit
def finish_row(y, gate, up, scale, rms, residual, row, inside, outputs, GATED: tl.constexpr):
    """Scale sums fp32 [BN] by `rms` and by a row's `scale` if given, gate them, add `residual` (a
    number or [BN]), and store."""
    if scale is not None:
        gate *= tl.load(scale + row, mask=inside, other=0.0)
        if GATED:
            up *= tl.load(scale + outputs + row, mask=inside, other=0.0)
    gate *= rms
    if GATED:
        gate = gate * tl.sigmoid(gate) * (up * rms)
    tl.store(y + row, (gate + residual).to(y.dtype.element_ty), mask=inside)
