"""Tokens of 16 bits as two int8 digits of base 128, for tensor cores that multiply int8.

A token's largest value takes all of both, so what is rounded is below 2⁻¹⁵ of that value, and sums
of digits and codes are whole. Weights widened to 16 bits would cost several instructions each.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.triton._around import Around
from engine.kernels.triton._codes import ROUNDER
from engine.kernels.triton._launch import launch_options
from engine.kernels.triton._norm import normalise, row_block
from engine.kernels.triton._words import MIN_RANGE

BASE = tl.constexpr(128)
BASE_BITS = tl.constexpr(7)
# 127 · 128 + 63: the greatest that two signed digits write, the lower from -64 to 63.
DIGITS_MAX = tl.constexpr(16319.0)
# Those of 1.5 · 2^23, which ROUNDER is.
ROUNDER_BITS = tl.constexpr(0x4B400000)


class Digits(NamedTuple):
    """Values [T, K] = (128 · upper + lower) · step: int8 [2, T, K], upper digits before lower ones,
    and fp32 [T]."""

    digits_2TK: Tensor
    step_T: Tensor


@triton.jit
def _write_digits(
    digits, steps, x, factor, width, x_stride, plane, eps,
    RMS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Of x times `factor` if there is one, which is an RMSNorm's weight if RMS. HALF: inputs that
    are neighbours in a half of a row, whose first half has those of all low nibbles; 0 keeps their
    order."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    if factor is not None:
        weight = tl.load(factor + column, mask=inside, other=0.0)  # [BLOCK]
    if PDL:
        tl.extra.cuda.gdc_wait()
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0)
    wide = value.to(tl.float32)
    if RMS:
        wide = normalise(wide, weight, width, eps, x.dtype.element_ty).to(tl.float32)
    elif factor is not None:
        wide *= weight
    largest = tl.maximum(tl.max(tl.abs(wide), axis=0), MIN_RANGE)
    # One value that is not finite makes NaN of the token's results.
    tl.store(steps + row, largest / DIGITS_MAX + tl.sum(wide * 0.0, axis=0))
    whole = (wide * (DIGITS_MAX / largest) + ROUNDER).to(tl.int32, bitcast=True) - ROUNDER_BITS
    upper = (whole + BASE // 2) >> BASE_BITS
    if HALF:
        of_block = column % (2 * HALF)
        column = of_block // HALF * (width // 2) + column // (2 * HALF) * HALF + of_block % HALF
    digits += row * width + column
    tl.store(digits, upper.to(tl.int8), mask=inside)
    tl.store(digits + plane, (whole - upper * BASE).to(tl.int8), mask=inside)


def write_digits(x_TK: Tensor, around: Around, *, half: int = 0) -> Digits:
    """Digits of x, of rms_norm(x) or of x times its factor. `half` > 0: of each 2 · half inputs,
    the first ones in the first half of a row, the others in the second, as in blocks of
    nibbles."""
    tokens, width = x_TK.shape
    assert x_TK.stride(1) == 1
    device = x_TK.device
    digits_2TK = torch.empty(2, tokens, width, dtype=torch.int8, device=device)
    step_T = torch.empty(tokens, dtype=torch.float32, device=device)
    factor_K, eps, is_norm = around.factors
    block, warps = row_block(width)
    _write_digits[(tokens,)](
        digits_2TK, step_T, x_TK, factor_K, width, x_TK.stride(0), tokens * width, eps,
        RMS=is_norm, HALF=half, BLOCK=block, num_warps=warps, **launch_options(device),
    )  # fmt: skip
    return Digits(digits_2TK, step_T)
