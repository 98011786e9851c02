"""Kernels of one token whose values are rounded to codes of the weights' type: int8, float8.

The token comes as codes, or, if its scale is known before, is rounded to them here, after its norm
if there is one: a program then runs over it once more, while its first weights are on their way.
"""

from __future__ import annotations

import triton
import triton.language as tl

from engine.kernels.triton._codes import (
    E4M3_MAX,
    E4M3_MIN_NORMAL,
    E4M3_SCALE,
    E4M3_STEPS,
    ROUNDER,
    divide_by,
)
from engine.kernels.triton._words import (
    finish_row,
    load_residual,
    load_values,
    load_words,
    split_words,
)

INT8_DOT, DOT_REGISTERS = tl.constexpr("dp4a.s32.s32 $0, $1, $2, $3;"), tl.constexpr("=r,r,r,r")
# Ada and later convert float8 by instructions: four of a word to fp32, and two fp32 to the nearest.
WIDEN = tl.constexpr("""{
.reg .b16 low, high, h0, h1, h2, h3;
.reg .b32 first, second;
mov.b32 {low, high}, $4;
cvt.rn.f16x2.e4m3x2 first, low;
cvt.rn.f16x2.e4m3x2 second, high;
mov.b32 {h0, h1}, first;
mov.b32 {h2, h3}, second;
cvt.f32.f16 $0, h0;
cvt.f32.f16 $1, h1;
cvt.f32.f16 $2, h2;
cvt.f32.f16 $3, h3;
}""")
WIDEN_REGISTERS = tl.constexpr("=f,=f,=f,=f,r")
ROUND = tl.constexpr("""{
.reg .b16 codes, h0, h1;
.reg .b32 both;
cvt.rn.satfinite.e4m3x2.f32 codes, $3, $2;
cvt.rn.f16x2.e4m3x2 both, codes;
mov.b32 {h0, h1}, both;
cvt.f32.f16 $0, h0;
cvt.f32.f16 $1, h1;
}""")
ROUND_REGISTERS = tl.constexpr("=f,=f,f,f")
# Elsewhere: sign and the other seven bits, moved to where fp32 has them, are 2^-120 of the number.
E4M3_BITS = tl.constexpr(-2014314496)  # 0x87F00000


@triton.jit
def _widen_byte(words, LEFT: tl.constexpr):
    bits = ((words << LEFT) >> 4) & E4M3_BITS
    return bits.to(tl.float32, bitcast=True) * E4M3_SCALE


@triton.jit
def _widen(words, CONVERTS: tl.constexpr):
    """The four float8_e4m3fn of int32 words, in fp32."""
    if CONVERTS:
        kinds: tl.constexpr = (tl.float32, tl.float32, tl.float32, tl.float32)
        b0, b1, b2, b3 = tl.inline_asm_elementwise(WIDEN, WIDEN_REGISTERS, [words], kinds, True, 1)
    else:
        b0, b1 = _widen_byte(words, 24), _widen_byte(words, 16)
        b2, b3 = _widen_byte(words, 8), _widen_byte(words, 0)
    return b0, b1, b2, b3


@triton.jit
def _round(x):
    """fp32 → the nearest number of float8_e4m3fn, ties to even, within ±448."""
    size = tl.minimum(tl.abs(x), E4M3_MAX, tl.PropagateNan.ALL)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -1048576).to(tl.float32, bitcast=True)
    small = ((size * E4M3_STEPS + ROUNDER) - ROUNDER) / E4M3_STEPS
    rounded = tl.where(size < E4M3_MIN_NORMAL, small, normal)
    return tl.where(x < 0, -rounded, rounded)


@triton.jit
def _round_two(a, b, CONVERTS: tl.constexpr):
    if CONVERTS:
        kinds: tl.constexpr = (tl.float32, tl.float32)
        a, b = tl.inline_asm_elementwise(ROUND, ROUND_REGISTERS, [a, b], kinds, True, 1)
    else:
        a, b = _round(a), _round(b)
    return a, b


@triton.jit
def _add_int8(words, x_words, sums, ASSEMBLY: tl.constexpr):
    """sums + Σ of the products of four bytes of each word."""
    if ASSEMBLY:
        operands = [words, x_words, sums]
        sums = tl.inline_asm_elementwise(INT8_DOT, DOT_REGISTERS, operands, tl.int32, True, 1)
    else:
        for place in tl.static_range(4):
            left: tl.constexpr = 24 - 8 * place
            sums += ((words << left) >> 24) * ((x_words << left) >> 24)
    return sums


@triton.jit
def _add_four(words, x, sums, CONVERTS: tl.constexpr):
    w0, w1, w2, w3 = _widen(words, CONVERTS)
    return tl.fma(w3, x[3], tl.fma(w2, x[2], tl.fma(w1, x[1], tl.fma(w0, x[0], sums))))


@triton.jit
def _add_float8(words, value, sums, CONVERTS: tl.constexpr):
    """sums [C, BN, 2] + the products of the codes with the values at the front and at the back."""
    front, back = split_words(words)
    return _add_four(back, value[1], _add_four(front, value[0], sums, CONVERTS), CONVERTS)


@triton.jit
def _rms(x, inputs, eps, BLOCK: tl.constexpr):
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, inputs, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = tl.load(x + column, mask=column < inputs, other=0.0).to(tl.float32)
        squares = tl.fma(value, value, squares)
    return tl.rsqrt(tl.sum(squares, axis=0) / inputs + eps)


@triton.jit
def _scaled(value, normed_by, rms, x_scale, inverse, dtype: tl.constexpr):
    """value / x_scale, after the norm, which rounds as its own kernel does."""
    if normed_by is not None:
        value = (value * rms).to(dtype).to(tl.float32)
        value = (value * normed_by).to(dtype).to(tl.float32)
    return divide_by(value, x_scale, inverse)


@triton.jit
def _load_rounded(
    x, norm, first, BACK: tl.constexpr, inside, rms, x_scale, inverse, CONVERTS: tl.constexpr
):
    """Eight neighbours of the token as numbers of float8_e4m3fn, see `load_values`."""
    dtype: tl.constexpr = x.dtype.element_ty
    x0, x1, x2, x3 = load_values(x, first, BACK, inside)
    n0, n1, n2, n3 = None, None, None, None
    if norm is not None:
        n0, n1, n2, n3 = load_values(norm, first, BACK, inside)
    x0 = _scaled(x0, n0, rms, x_scale, inverse, dtype)
    x1 = _scaled(x1, n1, rms, x_scale, inverse, dtype)
    x2 = _scaled(x2, n2, rms, x_scale, inverse, dtype)
    x3 = _scaled(x3, n3, rms, x_scale, inverse, dtype)
    x0, x1 = _round_two(x0, x1, CONVERTS)
    x2, x3 = _round_two(x2, x3, CONVERTS)
    return x0, x1, x2, x3


@triton.jit
def _load_token(x, norm, chunk, width, rms, x_scale, inverse, CONVERTS: tl.constexpr):
    """The float8 numbers that the front and the back of a chunk's words meet."""
    if x.dtype.element_ty == tl.int32:
        column = chunk[:, None, None] * 4 + tl.arange(0, 4)[None, None, :]
        front, back = split_words(tl.load(x + column, mask=column < width, other=0))
        front, back = _widen(front, CONVERTS), _widen(back, CONVERTS)
    else:
        first, column = chunk * 16, chunk * 4
        around = rms, x_scale, inverse
        front = _load_rounded(x, norm, first, False, column < width, *around, CONVERTS)
        back = _load_rounded(x, norm, first, True, column + 2 < width, *around, CONVERTS)
    return front, back


@triton.jit
def _gemv_codes(
    y, x, codes, scale, x_scale, norm, residual, outputs, width, eps,
    IS_FLOAT: tl.constexpr, CONVERTS: tl.constexpr, GATED: tl.constexpr, BN: tl.constexpr,
    C: tl.constexpr, ASSEMBLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`codes` int32 words of four codes, `width` a row; x words as well, or (float8 only) values to
    be rounded. The products' sums are exact for int8."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    HAS_CODES: tl.constexpr = x.dtype.element_ty == tl.int32
    kind: tl.constexpr = tl.float32 if IS_FLOAT else tl.int32
    WAYS: tl.constexpr = 2 if IS_FLOAT else 4
    row = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    inside = row < outputs
    lane = tl.arange(0, C)
    tile = load_words(codes, row, inside, lane, width)  # [C, BN, 4]
    if GATED:
        up_tile = load_words(codes, row + outputs, inside, lane, width)
    if PDL:
        tl.extra.cuda.gdc_wait()
    added = load_residual(residual, row, inside)
    token_scale = tl.load(x_scale)
    inverse = tl.div_rn(tl.full([], 1.0, tl.float32), token_scale)
    rms = 1.0
    if norm is not None:
        rms = _rms(x, width * 4, eps, C * 16)
    sums = tl.zeros([C, BN, WAYS], kind)
    up_sums = tl.zeros([C, BN, WAYS], kind)
    for start in range(0, tl.cdiv(width, 4), C):
        chunk = start + lane
        present = tile
        tile = load_words(codes, row, inside, chunk + C, width)
        if GATED:
            up_present = up_tile
            up_tile = load_words(codes, row + outputs, inside, chunk + C, width)
        if IS_FLOAT:
            value = _load_token(x, norm, chunk, width, rms, token_scale, inverse, CONVERTS)
            sums = _add_float8(present, value, sums, CONVERTS)
            if GATED:
                up_sums = _add_float8(up_present, value, up_sums, CONVERTS)
        else:
            tl.static_assert(HAS_CODES)
            column = chunk[:, None, None] * 4 + tl.arange(0, 4)[None, None, :]
            value = tl.load(x + column, mask=column < width, other=0)
            sums = _add_int8(present, tl.broadcast_to(value, sums.shape), sums, ASSEMBLY)
            if GATED:
                up_sums = _add_int8(
                    up_present, tl.broadcast_to(value, sums.shape), up_sums, ASSEMBLY
                )
    total = tl.sum(tl.sum(sums, axis=2), axis=0).to(tl.float32) * token_scale
    up_total = tl.sum(tl.sum(up_sums, axis=2), axis=0).to(tl.float32) * token_scale
    finish_row(y, total, up_total, scale, 1.0, added, row, inside, outputs, GATED)
