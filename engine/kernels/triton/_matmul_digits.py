"""y = x @ wᵀ on tensor cores that multiply int8: tokens' digits with int8 codes or nibbles."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.triton._around import PLAIN, Around
from engine.kernels.triton._digits import BASE, write_digits
from engine.kernels.triton._launch import launch_options
from engine.kernels.triton._matmul import IS_COMPILED, fit, shared_bytes
from engine.kernels.triton._tactics import Config
from engine.kernels.triton._tile_end import VARYING, finish, workspace
from engine.kernels.triton._weights import NIBBLE_ZERO, Weights

# Of four bytes $2, the low nibbles less the bytes $3 in $0 and the high ones in $1: 128 more keeps
# a byte from borrowing from the next. A lop3 of 0xEA is (a & b) | c.
SPREAD = tl.constexpr("""{
.reg .b32 low, high;
shr.u32 high, $2, 4;
lop3.b32 low, $2, 0x0F0F0F0F, 0x80808080, 0xEA;
lop3.b32 high, high, 0x0F0F0F0F, 0x80808080, 0xEA;
sub.s32 low, low, $3;
sub.s32 high, high, $3;
xor.b32 $0, low, 0x80808080;
xor.b32 $1, high, 0x80808080;
}""")
SPREAD_REGISTERS = tl.constexpr("=r,=r,r,r")
# Inputs of a nibble block whose halves are as long as the shortest product of int8.
BLOCK = 64


@triton.jit
def _places(outputs, tokens, GATED: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr):
    """Rows of the weights [BN], or [2 BN] with up's behind gate's, and rows of the digits [2 BT],
    lower ones behind upper ones. Those past the last read the last one."""
    BM: tl.constexpr = 2 * BN if GATED else BN
    place = tl.arange(0, BM)
    row = tl.minimum(tl.program_id(0).to(tl.int64) * BN + place % BN, outputs - 1)
    digit = tl.arange(0, 2 * BT)
    token = tl.minimum(tl.program_id(1).to(tl.int64) * BT + digit % BT, tokens - 1)
    return row + place // BN * outputs, token + digit // BT * tokens


@triton.jit
def _finish_digits(
    y, sums, scale, step, residual, partial, counters, outputs, tokens, y_stride, residual_stride,
    splits,
    ROW_SCALE: tl.constexpr, GATED: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Join the digits' sums, fp32 [BN or 2 BN, 2 BT], and end the tile."""
    row = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    token = tl.program_id(1) * BT + tl.arange(0, BT)
    upper, lower = tl.split(tl.permute(tl.reshape(sums, [sums.shape[0], 2, BT]), 0, 2, 1))
    gate = upper * BASE + lower
    up = gate
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(gate, [2, BN, BT]), 1, 2, 0))
    finish(
        y, gate, up, scale, step, residual, partial, counters, row, token, outputs, tokens,
        y_stride, residual_stride, tl.program_id(2), splits, ROW_SCALE, True, GATED,
    )  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def _tiles_bytes(
    y, x, codes, scale, step, residual, partial, counters,
    tokens, splits, outputs, inputs, y_stride, residual_stride,
    GATED: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row, digit = _places(outputs, tokens, GATED, BN, BT)
    k = tl.arange(0, BK)
    span = tl.cdiv(tl.cdiv(inputs, BK), splits) * BK
    first = tl.program_id(2) * span
    codes += row[:, None] * inputs + k[None, :]
    x += digit[None, :] * inputs + k[:, None]
    sums = tl.zeros([codes.shape[0], 2 * BT], tl.int32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    for start in tl.range(first, min(first + span, inputs), BK, num_stages=STAGES):
        inside = k < inputs - start
        digits = tl.load(x + start, mask=inside[:, None], other=0)  # [BK, 2 BT]
        tile = tl.load(codes + start, mask=inside[None, :], other=0)
        sums = tl.dot(tile, digits, sums, out_dtype=tl.int32)
    _finish_digits(
        y, sums.to(tl.float32), scale, step, residual, partial, counters, outputs, tokens,
        y_stride, residual_stride, splits, True, GATED, BN, BT,
    )  # fmt: skip


@triton.jit
def _spread(codes, zero, ASSEMBLY: tl.constexpr):
    """uint8 → int8, int8: low nibbles - zero, high - zero; `zero` is uint8 of the same shape."""
    if ASSEMBLY:
        low, high = tl.inline_asm_elementwise(
            SPREAD, SPREAD_REGISTERS, [codes, zero], (tl.int8, tl.int8), True, 4
        )
    else:
        shift = zero.to(tl.int32)
        low = ((codes & 15).to(tl.int32) - shift).to(tl.int8)
        high = ((codes >> 4).to(tl.int32) - shift).to(tl.int8)
    return low, high


@triton.jit
def _load_group(scale, zero, at, GROUPS: tl.constexpr):
    """Of a group of each row: the factor of its sums, and its zero."""
    factor = 1.0
    if GROUPS:
        factor = tl.load(scale + at).to(tl.float32)
    shift = tl.full(at.shape, NIBBLE_ZERO, tl.uint8)
    if zero is not None:
        shift = tl.load(zero + at)
    return factor, shift


@triton.jit(do_not_specialize=VARYING)
def _tiles_nibble_digits(
    y, x, codes, scale, zero, step, residual, partial, counters,
    tokens, splits, outputs, width, group_size, y_stride, residual_stride,
    GATED: tl.constexpr, GROUPS: tl.constexpr, ASSEMBLY: tl.constexpr,
    BN: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """`width`: bytes of a row. BK divides a group, and K. Digits that meet low nibbles are in the
    first half of their row."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row, digit = _places(outputs, tokens, GATED, BN, BT)
    byte = tl.arange(0, BK // 2)
    inputs = width * 2
    groups = inputs // group_size
    span = tl.cdiv(tl.cdiv(inputs, BK), splits) * BK
    first = tl.program_id(2) * span
    codes += row[:, None] * width + byte[None, :]
    x += digit[None, :] * inputs + byte[:, None]
    at = row * groups
    # A group's scale and zero are on their way while the one before is multiplied.
    factor, shift = _load_group(
        scale, zero, at + tl.minimum(first // group_size, groups - 1), GROUPS
    )
    sums = tl.zeros([codes.shape[0], 2 * BT], tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    for start in tl.range(first, min(first + span, inputs), BK, num_stages=STAGES):
        following = tl.minimum((start + BK) // group_size, groups - 1)
        next_factor, next_shift = _load_group(scale, zero, at + following, GROUPS)
        meets_low = tl.load(x + start // 2)  # [BK/2, 2 BT]
        meets_high = tl.load(x + start // 2 + width)
        tile = tl.load(codes + start // 2)
        low, high = _spread(tile, tl.broadcast_to(shift[:, None], tile.shape), ASSEMBLY)
        found = tl.dot(low, meets_low, out_dtype=tl.int32)
        found = tl.dot(high, meets_high, found, out_dtype=tl.int32)
        if GROUPS:
            sums += found.to(tl.float32) * factor[:, None]
        else:
            sums += found.to(tl.float32)
        factor, shift = next_factor, next_shift
    _finish_digits(
        y, sums, scale, step, residual, partial, counters, outputs, tokens,
        y_stride, residual_stride, splits, not GROUPS, GATED, BN, BT,
    )  # fmt: skip


def suits_digits(weights: Weights) -> bool:
    """int8 codes, or nibbles whose groups are whole blocks."""
    if not weights.block:
        return weights.codes.dtype == torch.int8
    return weights.block == BLOCK and (weights.group or weights.inputs) % BLOCK == 0


def multiply_digits(
    x_TK: Tensor, weights: Weights, config: Config, around: Around = PLAIN
) -> Tensor:
    """y [T, N] (or [T, N/2] if gated) of x's dtype, fp16 or bf16, for weights that suit."""
    tokens, is_gated, residual_TN = len(x_TK), around.is_gated, around.residual_TN
    outputs = weights.outputs // (2 if is_gated else 1)
    y_TN = torch.empty(tokens, outputs, dtype=x_TK.dtype, device=x_TK.device)
    if not tokens:
        return y_TN
    config = _fit_both(config, weights, is_gated, shared_bytes(x_TK.device))
    grid = (-(-outputs // config.rows), -(-tokens // config.tokens), config.splits)
    ends = workspace(grid, tokens, weights.outputs, torch.float32, x_TK.device)
    numbers = (tokens, config.splits, outputs, weights.codes.shape[1])
    strides = (outputs, 0 if residual_TN is None else residual_TN.stride(0))
    options: dict[str, Any] = {
        "GATED": is_gated, "BN": config.rows, "BT": config.tokens, "BK": config.inputs,
        "STAGES": config.stages, "num_warps": config.warps, **launch_options(x_TK.device),
    }  # fmt: skip
    if not weights.block:
        x = write_digits(x_TK, around)
        _tiles_bytes[grid](
            y_TN, x.digits_2TK, weights.codes, weights.scale, x.step_T, residual_TN, *ends,
            *numbers, *strides, **options,
        )  # fmt: skip
        return y_TN
    x = write_digits(x_TK, around, half=weights.block // 2)
    _tiles_nibble_digits[grid](
        y_TN, x.digits_2TK, weights.codes, weights.scale, weights.zero_NR, x.step_T, residual_TN,
        *ends, *numbers, weights.group or weights.inputs, *strides,
        GROUPS=bool(weights.group), ASSEMBLY=IS_COMPILED, **options,
    )  # fmt: skip
    return y_TN


def _fit_both(config: Config, weights: Weights, is_gated: bool, shared: int) -> Config:
    """A tile has both digits of its tokens."""
    both = fit(config._replace(tokens=2 * config.tokens), weights, is_gated, 1, shared)
    return both._replace(tokens=config.tokens)
