"""Quantised weights as fp32, fp16 or bf16, for products that cuBLAS does better.

A block of rows at a time, so that the wide copy of a layer stays small next to the layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.triton._codes import decode
from engine.kernels.triton._launch import launch_options
from engine.kernels.triton._weights import NIBBLE_ZERO, Weights

BLOCK = 2048
WARPS = 4
# Weights widened at a time: 256 MiB of bf16, all of a layer of Yi-6B.
WIDE_WEIGHTS = 2**27
# Rows of such a part are a multiple of these, so that results begin at whole cache lines.
ROW_MULTIPLE = 256


@triton.jit
def _widen(wide, codes, scale, inputs, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < inputs
    code = tl.load(codes + row * inputs + column, mask=inside, other=0)  # [BLOCK]
    value = decode(code, tl.float32, False) * tl.load(scale + row)
    tl.store(wide + row * inputs + column, value.to(wide.dtype.element_ty), mask=inside)


@triton.jit
def _widen_nibbles(
    wide, codes, scale, zero, inputs, group_size,
    HALF: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK codes, of BLOCK / 2 bytes, a program."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    byte = tl.program_id(1) * (BLOCK // 2) + tl.arange(0, BLOCK // 2)
    inside = byte < inputs // 2
    code = tl.load(codes + row * (inputs // 2) + byte, mask=inside, other=0).to(tl.int32)
    column = byte // HALF * (2 * HALF) + byte % HALF
    at = row * (inputs // group_size) + column // group_size
    shift = NIBBLE_ZERO
    if zero is not None:
        shift = tl.load(zero + at, mask=inside, other=0).to(tl.int32)
    factor = tl.load(scale + at, mask=inside, other=0.0).to(tl.float32)
    dtype = wide.dtype.element_ty
    out = wide + row * inputs + column
    tl.store(out, (((code & 15) - shift).to(tl.float32) * factor).to(dtype), mask=inside)
    tl.store(out + HALF, (((code >> 4) - shift).to(tl.float32) * factor).to(dtype), mask=inside)


def multiply_widened(x_TK: Tensor, weights: Weights, residual_TN: Tensor | None = None) -> Tensor:
    """y [T, N] in x's dtype, to which the weights are rounded; or added to `residual_TN`, in its
    place."""
    y_TN = residual_TN
    if y_TN is None:
        y_TN = torch.empty(len(x_TK), weights.outputs, dtype=x_TK.dtype, device=x_TK.device)
    for rows in _row_blocks(weights):
        wide_KN, part_TN = widen(weights.rows(rows), x_TK.dtype).T, y_TN[:, rows]
        if residual_TN is None:
            torch.mm(x_TK, wide_KN, out=part_TN)
        else:
            part_TN.addmm_(x_TK, wide_KN)
    return y_TN


def widen(weights: Weights, dtype: torch.dtype) -> Tensor:
    """[N, K] of `dtype`."""
    outputs, inputs = weights.outputs, weights.inputs
    assert weights.scale is not None
    device = weights.codes.device
    wide_NK = torch.empty(outputs, inputs, dtype=dtype, device=device)
    grid = (outputs, -(-inputs // BLOCK))
    options: dict[str, Any] = {"BLOCK": BLOCK, "num_warps": WARPS, **launch_options(device)}
    if weights.block:
        _widen_nibbles[grid](
            wide_NK, weights.codes, weights.scale, weights.zero_NR, inputs,
            weights.group or inputs, HALF=weights.block // 2, **options,
        )  # fmt: skip
    else:
        _widen[grid](wide_NK, weights.codes, weights.scale, inputs, **options)
    return wide_NK


def _row_blocks(weights: Weights) -> Iterator[slice]:
    """Blocks of about equally many rows: cuBLAS is several times slower where a block's results do
    not begin at multiples of 16 bytes."""
    outputs = weights.outputs
    blocks = -(-outputs * weights.inputs // WIDE_WEIGHTS)
    step = -(-outputs // (blocks * ROW_MULTIPLE)) * ROW_MULTIPLE
    return (slice(i, min(i + step, outputs)) for i in range(0, outputs, step))
