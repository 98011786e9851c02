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
from engine.kernels.triton._weights import Weights

NIBBLE_ZERO = tl.constexpr(8)
# Of four bytes $2, the low nibbles less 8 in $0 and the high ones in $1, sixteenfold.
NIBBLE_UNIT = tl.constexpr(16)
SPREAD = tl.constexpr("""{
.reg .b32 signed;
xor.b32 signed, $2, 0x88888888;
shl.b32 $0, signed, 4;
and.b32 $0, $0, 0xF0F0F0F0;
and.b32 $1, signed, 0xF0F0F0F0;
}""")
# Inputs of a nibble block whose halves are as long as the shortest product of int8.
BLOCK = 64


@triton.jit
def _join(upper, lower):
    return upper.to(tl.float32) * BASE + lower.to(tl.float32)


@triton.jit(do_not_specialize=VARYING)
def _tiles_bytes(
    y, x, codes, scale, step, residual, partial, counters,
    tokens, splits, outputs, inputs, y_stride, residual_stride,
    GATED: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    split = tl.program_id(2)
    row = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    token = tl.program_id(1) * BT + tl.arange(0, BT)
    k = tl.arange(0, BK)
    if PDL:
        tl.extra.cuda.gdc_wait()
    # Rows past the last read the last one: a mask of K alone keeps the loads wide.
    codes += tl.minimum(row, outputs - 1)[:, None] * inputs + k[None, :]
    up_codes = codes + tl.cast(outputs, tl.int64) * inputs
    x += tl.minimum(token, tokens - 1).to(tl.int64)[None, :] * inputs + k[:, None]
    lower_x = x + tl.cast(tokens, tl.int64) * inputs
    upper = tl.zeros([BN, BT], tl.int32)
    lower = tl.zeros([BN, BT], tl.int32)
    up_upper = tl.zeros([BN, BT], tl.int32)
    up_lower = tl.zeros([BN, BT], tl.int32)
    span = tl.cdiv(tl.cdiv(inputs, BK), splits) * BK
    for start in tl.range(split * span, min(split * span + span, inputs), BK, num_stages=STAGES):
        inside = k < inputs - start
        upper_digits = tl.load(x + start, mask=inside[:, None], other=0)  # [BK, BT]
        lower_digits = tl.load(lower_x + start, mask=inside[:, None], other=0)
        tile = tl.load(codes + start, mask=inside[None, :], other=0)  # [BN, BK]
        upper = tl.dot(tile, upper_digits, upper, out_dtype=tl.int32)
        lower = tl.dot(tile, lower_digits, lower, out_dtype=tl.int32)
        if GATED:
            tile = tl.load(up_codes + start, mask=inside[None, :], other=0)
            up_upper = tl.dot(tile, upper_digits, up_upper, out_dtype=tl.int32)
            up_lower = tl.dot(tile, lower_digits, up_lower, out_dtype=tl.int32)
    finish(
        y, _join(upper, lower), _join(up_upper, up_lower), scale, step, residual,
        partial, counters, row, token, outputs, tokens, y_stride, residual_stride, split, splits,
        True, True, GATED,
    )  # fmt: skip


@triton.jit
def _spread(codes, ASSEMBLY: tl.constexpr):
    """uint8 → int8, int8: the low and the high nibbles less 8, sixteenfold."""
    if ASSEMBLY:
        low, high = tl.inline_asm_elementwise(
            SPREAD, "=r,=r,r", [codes], (tl.int8, tl.int8), True, 4
        )
    else:
        signed = codes ^ 0x88
        low = ((signed << 4) & 0xF0).to(tl.int8, bitcast=True)
        high = (signed & 0xF0).to(tl.int8, bitcast=True)
    return low, high


@triton.jit
def _group_sums(
    codes, zero, digit_sums, upper_low, upper_high, lower_low, lower_high, ASSEMBLY: tl.constexpr
):
    """Σ 16 (code - zero) (128 · upper + lower) of inputs of one group, fp32 [BN, BT]; `digit_sums`
    are Σ (128 · upper + lower)."""
    low, high = _spread(codes, ASSEMBLY)
    upper = tl.dot(high, upper_high, tl.dot(low, upper_low, out_dtype=tl.int32), out_dtype=tl.int32)
    lower = tl.dot(high, lower_high, tl.dot(low, lower_low, out_dtype=tl.int32), out_dtype=tl.int32)
    sums = _join(upper, lower)
    if zero is not None:
        shift = (zero.to(tl.int32) - NIBBLE_ZERO) * NIBBLE_UNIT
        sums -= shift.to(tl.float32)[:, None] * digit_sums.to(tl.float32)[None, :]
    return sums


@triton.jit
def _load_factor(scale, at, GROUPS: tl.constexpr):
    """What a group's sums are multiplied with: its scale, and the sixteenth that codes lack."""
    factor = 1.0 / NIBBLE_UNIT
    if GROUPS:
        factor = tl.load(scale + at).to(tl.float32)[:, None] / NIBBLE_UNIT
    return factor


@triton.jit(do_not_specialize=VARYING)
def _tiles_nibble_digits(
    y, x, codes, scale, zero, step, digit_sums, residual, partial, counters,
    tokens, splits, outputs, width, group_size, y_stride, residual_stride,
    GATED: tl.constexpr, GROUPS: tl.constexpr, ASSEMBLY: tl.constexpr,
    BN: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """`width`: bytes of a row. BK divides a group, and K. Digits that meet low nibbles are in the
    first half of their row."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    split = tl.program_id(2)
    row = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    token = tl.program_id(1) * BT + tl.arange(0, BT)
    known, known_token = tl.minimum(row, outputs - 1), tl.minimum(token, tokens - 1).to(tl.int64)
    byte = tl.arange(0, BK // 2)
    inputs = width * 2
    groups = inputs // group_size
    span = tl.cdiv(tl.cdiv(inputs, BK), splits) * BK
    first, last = split * span, min(split * span + span, inputs)
    group = first // group_size
    at, up_at = known * groups, (known + outputs) * groups
    codes += known[:, None] * width + byte[None, :]
    up_codes = codes + tl.cast(outputs, tl.int64) * width
    # A group's scale is on its way while the one before is multiplied.
    factor = _load_factor(scale, at + tl.minimum(group, groups - 1), GROUPS)
    up_factor = factor
    if GATED:
        up_factor = _load_factor(scale, up_at + tl.minimum(group, groups - 1), GROUPS)
    if PDL:
        tl.extra.cuda.gdc_wait()
    x += known_token[None, :] * inputs + byte[:, None]
    lower_x = x + tl.cast(tokens, tl.int64) * inputs
    sums = tl.zeros([BN, BT], tl.float32)
    up_sums = tl.zeros([BN, BT], tl.float32)
    for start in tl.range(first, last, BK, num_stages=STAGES):
        group = start // group_size
        following = tl.minimum((start + BK) // group_size, groups - 1)
        next_factor = _load_factor(scale, at + following, GROUPS)
        shift, up_shift, totals = zero, zero, zero
        if zero is not None:
            shift = tl.load(zero + at + group)
            totals = tl.load(digit_sums + known_token * (inputs // BK) + start // BK)
        upper_low = tl.load(x + start // 2)  # [BK/2, BT]
        upper_high = tl.load(x + start // 2 + width)
        lower_low = tl.load(lower_x + start // 2)
        lower_high = tl.load(lower_x + start // 2 + width)
        tile = tl.load(codes + start // 2)  # [BN, BK/2]
        sums += factor * _group_sums(
            tile, shift, totals, upper_low, upper_high, lower_low, lower_high, ASSEMBLY
        )
        factor = next_factor
        if GATED:
            next_factor = _load_factor(scale, up_at + following, GROUPS)
            if zero is not None:
                up_shift = tl.load(zero + up_at + group)
            tile = tl.load(up_codes + start // 2)
            up_sums += up_factor * _group_sums(
                tile, up_shift, totals, upper_low, upper_high, lower_low, lower_high, ASSEMBLY
            )
            up_factor = next_factor
    finish(
        y, sums, up_sums, scale, step, residual, partial, counters, row, token, outputs, tokens,
        y_stride, residual_stride, split, splits, not GROUPS, True, GATED,
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
    summed = 0 if weights.zero_NR is None else config.inputs
    x = write_digits(x_TK, around, half=weights.block // 2, group=summed)
    _tiles_nibble_digits[grid](
        y_TN, x.digits_2TK, weights.codes, weights.scale, weights.zero_NR, x.step_T, x.sums_TR,
        residual_TN, *ends, *numbers, weights.group or weights.inputs, *strides,
        GROUPS=bool(weights.group), ASSEMBLY=IS_COMPILED, **options,
    )  # fmt: skip
    return y_TN


def _fit_both(config: Config, weights: Weights, is_gated: bool, shared: int) -> Config:
    """A tile has both digits of its tokens."""
    both = fit(config._replace(tokens=2 * config.tokens), weights, is_gated, 1, shared)
    return both._replace(tokens=config.tokens)
