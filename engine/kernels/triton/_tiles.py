"""Tiles of the cache as a decode step reads them: keys in halves, as rotation pairs channels."""

from __future__ import annotations

import triton
import triton.language as tl

from engine.kernels.triton._codes import decode


@triton.jit
def hold(x, HOLD: tl.constexpr):
    """x, of 16 or 32 bits, but not before this point of the program. Otherwise the compiler puts
    what is made of a load right behind it, and each load waits for the one before."""
    if HOLD:
        PACK: tl.constexpr = 32 // x.dtype.primitive_bitwidth
        x = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [x], x.dtype, is_pure=False, pack=PACK
        )
    return x


@triton.jit
def place_tile(
    table, first, columns, block_stride, BN: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr
):
    """Where the positions first … first + BN - 1 lie in one head of the cache: int64, of all (a
    scalar) or of each, and int32 [BN] to add. `first` is a multiple of BN.

    It needs no length: past the `columns` of the sequence's row `table` the last one counts. PAGE
    is the number of positions in a block, 0 where one block holds the whole sequence.
    """
    offset = tl.arange(0, BN)
    if PAGE == 0:
        base = tl.load(table).to(tl.int64) * block_stride + first * D
        rows = offset * D
    elif PAGE % BN == 0:
        block = tl.load(table + tl.minimum(first // PAGE, columns - 1)).to(tl.int64)
        base = block * block_stride + first % PAGE * D
        rows = offset * D
    else:
        position = first + offset
        blocks = tl.load(table + tl.minimum(position // PAGE, columns - 1)).to(tl.int64)
        base = (blocks * block_stride)[:, None]
        rows = position % PAGE * D
    return base, rows


@triton.jit
def load_codes(k, v, place, is_valid, D: tl.constexpr, C: tl.constexpr, BLOCK_D: tl.constexpr):
    """What the cache holds of a tile: the halves of its keys, [BN, C] each, and its values
    [BN, BLOCK_D]; zeros at invalid positions, where the memory may hold anything."""
    base, rows = place
    pair, channel = tl.arange(0, C), tl.arange(0, BLOCK_D)
    mask = is_valid[:, None]
    pair_mask = mask & (pair < D // 2)[None, :] if 2 * C != D else mask
    mask = mask & (channel < D)[None, :] if BLOCK_D != D else mask
    at = rows[:, None] + pair[None, :]
    low = tl.load(k + base + at, mask=pair_mask, other=0)
    high = tl.load(k + base + (at + D // 2), mask=pair_mask, other=0)
    values = tl.load(v + base + (rows[:, None] + channel[None, :]), mask=mask, other=0)
    return low, high, values


@triton.jit
def to_numbers(codes, dtype: tl.constexpr, FLOAT8: tl.constexpr, HOLD: tl.constexpr):
    """All codes of a tile as `dtype`, scales left out."""
    return (
        hold(decode(codes[0], dtype, FLOAT8), HOLD),
        hold(decode(codes[1], dtype, FLOAT8), HOLD),
        hold(decode(codes[2], dtype, FLOAT8), HOLD),
    )
