"""y = x @ wᵀ on tensor cores, weights the wide operand: tiles of BN outputs by BT tokens.

Weights and tokens have one type: 16 bits, or codes (int32 sums of int8; fp32 sums of float8,
widened to fp16, which holds them exactly, where the GPU has no float8 products); nibbles of other
groups than _matmul_digits.py takes are widened to the tokens' dtype in registers. Where outputs
alone give too few programs, K is split: see _tile_end.py.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels import gpu
from engine.kernels.triton._codes import decode, has_float8
from engine.kernels.triton._launch import launch_options
from engine.kernels.triton._tactics import Config
from engine.kernels.triton._tile_end import VARYING, finish, workspace
from engine.kernels.triton._weights import NIBBLE_ZERO, Weights, bits_of, unpack

# Hopper adds float8 products with 14 bits; this many inputs at a time, then in fp32.
FP8_SUM = tl.constexpr(128)
# Tiles of tokens that neighbouring programs go through before the next rows of the weights.
TOKEN_TILES = tl.constexpr(8)
# Accumulators that a program's registers hold beside an operand that is widened there, or second
# ones that float8 products are added up in; and those alone.
MAX_TILE = 128 * 128
MAX_INT8_TILE = 128 * 256
FOUR_WARPS_TILE = 64 * 64
# Shared memory planned for where there is no GPU: Ampere's, of consumers.
INTERPRETED_SHARED = 99 << 10
IS_COMPILED = not triton.knobs.runtime.interpret


@triton.jit
def _multiply(weights, x, sums, FLOAT8: tl.constexpr):
    """sums + weights [BN, BK] @ x [BK, BT]."""
    if x.dtype == tl.int8:
        sums = tl.dot(weights, x, sums, out_dtype=tl.int32)
    elif x.dtype == tl.uint8:
        if FLOAT8:
            sums = tl.dot(
                weights.to(tl.float8e4nv, bitcast=True), x.to(tl.float8e4nv, bitcast=True), sums,
                max_num_imprecise_acc=min(FP8_SUM, x.shape[0]),
            )  # fmt: skip
        else:
            wide = decode(weights, tl.float16, False)
            sums = tl.dot(wide, decode(x, tl.float16, False), sums)
    else:
        sums = tl.dot(weights, x, sums)
    return sums


@triton.jit(do_not_specialize=VARYING)
def _tiles(
    y, x, codes, scale, x_scale, residual, partial, counters,
    tokens, splits, outputs, inputs, x_stride, y_stride, residual_stride,
    GATED: tl.constexpr, TOKEN_SCALE: tl.constexpr, FLOAT8: tl.constexpr, BN: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    split = tl.program_id(2)
    # Programs that run together share tiles of both operands, which stay in the second-level cache.
    token_tile, row_tile = tl.swizzle2d(
        tl.program_id(1), tl.program_id(0), tl.num_programs(1), tl.num_programs(0), TOKEN_TILES
    )
    row = row_tile.to(tl.int64) * BN + tl.arange(0, BN)
    token = token_tile * BT + tl.arange(0, BT)
    k = tl.arange(0, BK)
    if PDL:
        tl.extra.cuda.gdc_wait()
    # Rows past the last read the last one: a mask of K alone keeps the loads wide.
    codes += tl.minimum(row, outputs - 1)[:, None] * inputs + k[None, :]
    up_codes = codes + tl.cast(outputs, tl.int64) * inputs
    x += tl.minimum(token, tokens - 1).to(tl.int64)[None, :] * x_stride + k[:, None]
    kind: tl.constexpr = tl.int32 if x.dtype.element_ty == tl.int8 else tl.float32
    sums = tl.zeros([BN, BT], kind)
    up_sums = tl.zeros([BN, BT], kind)
    span = tl.cdiv(tl.cdiv(inputs, BK), splits) * BK
    for start in tl.range(split * span, min(split * span + span, inputs), BK, num_stages=STAGES):
        inside = k < inputs - start
        value = tl.load(x + start, mask=inside[:, None], other=0)  # [BK, BT]
        tile = tl.load(codes + start, mask=inside[None, :], other=0)  # [BN, BK]
        sums = _multiply(tile, value, sums, FLOAT8)
        if GATED:
            tile = tl.load(up_codes + start, mask=inside[None, :], other=0)
            up_sums = _multiply(tile, value, up_sums, FLOAT8)
    finish(
        y, sums, up_sums, scale, x_scale, residual, partial, counters, row, token, outputs,
        tokens, y_stride, residual_stride, split, splits, scale is not None, TOKEN_SCALE, GATED,
    )  # fmt: skip


@triton.jit
def _multiply_nibbles(
    codes, scale, zero, low, high, sums, row, start, inputs, group_size,
    GROUPS: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """sums + (nibbles [BN, BK/2] - zero) · scale @ (low, high) [BK/2, BT], of one group."""
    at = row * (inputs // group_size) + start // group_size
    if zero is None:
        shift = tl.full(codes.shape, NIBBLE_ZERO, tl.uint8)
    else:
        shift = tl.broadcast_to(tl.load(zero + at)[:, None], codes.shape)
    low_codes, high_codes = unpack(codes, shift, low.dtype, ASSEMBLY)
    if GROUPS:
        part = tl.dot(high_codes, high, tl.dot(low_codes, low))
        sums += part * tl.load(scale + at).to(tl.float32)[:, None]
    else:
        sums = tl.dot(high_codes, high, tl.dot(low_codes, low, sums))
    return sums


@triton.jit(do_not_specialize=VARYING)
def _tiles_nibbles(
    y, x, codes, scale, zero, residual, partial, counters,
    tokens, splits, outputs, width, group_size, x_stride, y_stride, residual_stride,
    GATED: tl.constexpr, GROUPS: tl.constexpr, HALF: tl.constexpr, ASSEMBLY: tl.constexpr,
    BN: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """`width` and HALF: bytes of a row and of a nibble block. BK divides a group, and K."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    split = tl.program_id(2)
    token = tl.program_id(1) * BT + tl.arange(0, BT)
    row = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    known = tl.minimum(row, outputs - 1)
    byte = tl.arange(0, BK // 2)
    if PDL:
        tl.extra.cuda.gdc_wait()
    inputs = width * 2
    codes += known[:, None] * width + byte[None, :]
    up_codes = codes + tl.cast(outputs, tl.int64) * width
    low_input = byte // HALF * (2 * HALF) + byte % HALF
    x += tl.minimum(token, tokens - 1).to(tl.int64)[None, :] * x_stride + low_input[:, None]
    sums = tl.zeros([BN, BT], tl.float32)
    up_sums = tl.zeros([BN, BT], tl.float32)
    span = tl.cdiv(tl.cdiv(inputs, BK), splits) * BK
    for start in tl.range(split * span, min(split * span + span, inputs), BK, num_stages=STAGES):
        low = tl.load(x + start)  # [BK/2, BT]
        high = tl.load(x + start + HALF)
        tile = tl.load(codes + start // 2)  # [BN, BK/2]
        sums = _multiply_nibbles(
            tile, scale, zero, low, high, sums, known, start, inputs, group_size, GROUPS,
            ASSEMBLY,
        )  # fmt: skip
        if GATED:
            tile = tl.load(up_codes + start // 2)
            up_sums = _multiply_nibbles(
                tile, scale, zero, low, high, up_sums, known + outputs, start, inputs,
                group_size, GROUPS, ASSEMBLY,
            )  # fmt: skip
    finish(
        y, sums, up_sums, scale, None, residual, partial, counters, row, token, outputs,
        tokens, y_stride, residual_stride, split, splits, not GROUPS, False, GATED,
    )  # fmt: skip


def multiply_tiles(
    x_TK: Tensor,
    weights: Weights,
    config: Config,
    *,
    dtype: torch.dtype | None = None,
    x_scale: Tensor | None = None,
    is_gated: bool = False,
    residual_TN: Tensor | None = None,
) -> Tensor:
    """y [T, N] (or [T, N/2] if gated), of `dtype` or x's. x is fp16 or bf16 for weights of that
    type or nibbles, or codes of the weights' type with their scale, fp32 [1] or [T]."""
    tokens = len(x_TK)
    assert x_TK.shape[1] == weights.inputs and x_TK.stride(1) == 1
    outputs = weights.outputs // (2 if is_gated else 1)
    y_TN = torch.empty(tokens, outputs, dtype=dtype or x_TK.dtype, device=x_TK.device)
    if not tokens:
        return y_TN
    config = fit(config, weights, is_gated, x_TK.element_size(), shared_bytes(x_TK.device))
    grid = (-(-outputs // config.rows), -(-tokens // config.tokens), config.splits)
    kind = torch.int32 if x_TK.dtype == torch.int8 else torch.float32
    partial, counters = workspace(grid, tokens, weights.outputs, kind, x_TK.device)
    options: dict[str, Any] = {
        "GATED": is_gated, "BN": config.rows, "BT": config.tokens, "BK": config.inputs,
        "STAGES": config.stages, "num_warps": config.warps,
        **launch_options(x_TK.device),
    }  # fmt: skip
    residual_stride = 0 if residual_TN is None else residual_TN.stride(0)
    strides = (x_TK.stride(0), y_TN.stride(0), residual_stride)
    if weights.block:
        _tiles_nibbles[grid](
            y_TN, x_TK, weights.codes, weights.scale, weights.zero_NR, residual_TN, partial,
            counters, tokens, config.splits, outputs, weights.codes.shape[1],
            weights.group or weights.inputs, *strides,
            GROUPS=bool(weights.group), HALF=weights.block // 2, ASSEMBLY=IS_COMPILED, **options,
        )  # fmt: skip
        return y_TN
    _tiles[grid](
        y_TN, bits_of(x_TK), bits_of(weights.codes), weights.scale, x_scale, residual_TN, partial,
        counters, tokens, config.splits, outputs, weights.inputs, *strides,
        TOKEN_SCALE=x_scale is not None and x_scale.numel() > 1,
        # Hopper's sums of float8 products have 14 bits, those of fp16 all of fp32's.
        FLOAT8=has_float8(x_TK.device) and y_TN.dtype != torch.float32,
        **options,
    )  # fmt: skip
    return y_TN


def fit(
    config: Config, weights: Weights, is_gated: bool, x_bytes: int, shared_bytes: int
) -> Config:
    """`config` within what weights and GPU allow: an iteration of nibbles is of one group, and
    the stages of the pipeline fit shared memory."""
    rows, inputs, warps = config.rows, config.inputs, config.warps
    is_widened = weights.codes.element_size() < x_bytes
    most = MAX_INT8_TILE if weights.codes.dtype == torch.int8 and not is_widened else MAX_TILE
    if is_gated and rows * config.tokens * 2 > most:
        rows //= 2
    if is_gated and rows * config.tokens > FOUR_WARPS_TILE // 2:
        # Two accumulators, and beside them an operand that is widened in registers.
        warps = max(warps, 8)
        inputs = min(inputs, 64) if is_widened else inputs
    if weights.block:
        whole = weights.group or weights.inputs
        inputs = next(size for size in (256, 128, 64, 32) if size <= inputs and whole % size == 0)
    row_bytes = inputs * weights.codes.element_size() // (2 if weights.block else 1)
    stage_bytes = rows * (2 if is_gated else 1) * row_bytes + config.tokens * inputs * x_bytes
    stages = max(1, min(config.stages, shared_bytes // stage_bytes))
    return config._replace(rows=rows, inputs=inputs, warps=warps, stages=stages)


@cache
def shared_bytes(device: torch.device) -> int:
    """What a program may take."""
    if device.type == "cpu":
        return INTERPRETED_SHARED
    if target := gpu.imagined(device):
        return target.shared_bytes
    index = torch.cuda.current_device() if device.index is None else device.index
    return triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]
