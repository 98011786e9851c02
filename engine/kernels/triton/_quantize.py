"""Activations as int8 or float8_e4m3fn codes, a token per program, with what makes them before it.

The scale is given, or each token's amax (at least 1e-6) / 127 or 448. A norm's result is rounded
to the activations' dtype first, so codes are those of a norm and a quantisation in a row; a gate's
result is not.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.triton._codes import encode, has_float8
from engine.kernels.triton._launch import launch_options
from engine.kernels.triton._norm import normalise, row_block
from engine.kernels.triton._weights import bits_of

IS_COMPILED = not triton.knobs.runtime.interpret
MIN_TOKEN_RANGE = tl.constexpr(1e-6)
# Elements of a part of a row, and those that a warp loads at once, 16 bytes a lane.
GATED_BLOCK = 4096
GATED_LOAD = 256
# x / (1 + 2^(-x log2 e)), within 2 units in the last place; the compiler's exponential and division
# take three times the instructions, for numbers whose results are zeros here.
SILU = tl.constexpr("""{
.reg .f32 part;
mul.f32 part, $1, 0fBFB8AA3B;
ex2.approx.ftz.f32 part, part;
add.f32 part, part, 0f3F800000;
rcp.approx.ftz.f32 part, part;
mul.f32 $0, $1, part;
}""")
CODE_RANGE = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


class Codes(NamedTuple):
    """Activations [T, K] of `dtype` as codes, with their scale fp32: [1], or [T]."""

    codes_TK: Tensor
    scale: Tensor
    dtype: torch.dtype


@triton.jit
def _find_scale(scales, magnitude, given, row, code_range):
    """The scale `given`, or that of a token of these magnitudes, which is stored."""
    if given is None:
        amax = tl.maximum(tl.max(magnitude, axis=0), MIN_TOKEN_RANGE)
        scale = tl.div_rn(amax, tl.full([], code_range, tl.float32))
        tl.store(scales + row, scale)
    else:
        scale = tl.load(given)
    return scale


@triton.jit
def _store_codes(codes, wide, scale, row, column, width, FLOAT8: tl.constexpr):
    result = encode(wide, scale, codes.dtype.element_ty, FLOAT8)
    tl.store(codes + row * width + column, result, mask=column < width)


@triton.jit
def _quantize(
    codes, scales, x, norm, divisor, given, width, x_stride, code_range, eps,
    FLOAT8: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    if norm is not None:
        weight = tl.load(norm + column, mask=inside, other=0.0)  # [BLOCK]
    if PDL:
        tl.extra.cuda.gdc_wait()
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0)
    wide = value.to(tl.float32)
    if norm is not None:
        wide = normalise(wide, weight, width, eps, x.dtype.element_ty).to(tl.float32)
    if divisor is not None:
        wide = tl.div_rn(wide, tl.load(divisor + column, mask=inside, other=1.0))
    scale = _find_scale(scales, tl.abs(wide), given, row, code_range)
    _store_codes(codes, wide, scale, row, column, width, FLOAT8)


@triton.jit
def _silu(x, ASSEMBLY: tl.constexpr):
    if ASSEMBLY:
        found = tl.inline_asm_elementwise(SILU, "=f,f", [x], tl.float32, True, 1)
    else:
        found = x * tl.sigmoid(x)
    return found


@triton.jit
def _quantize_gated(
    codes, scales, sums, scale, x_scale, given, width, code_range, unit,
    TOKEN_SCALE: tl.constexpr, FLOAT8: tl.constexpr, ASSEMBLY: tl.constexpr,
    PARTS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """silu(gate) * up of a product's sums [T, 2 width], which its scales have yet to multiply.

    A row is in registers in PARTS of BLOCK: one block of a power of two would be a third empty."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_wait()
    sums += row * width * 2
    factor = unit * tl.load(x_scale + (row if TOKEN_SCALE else 0))
    parts = ()
    top = tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(PARTS):
        column = part * BLOCK + tl.arange(0, BLOCK)
        inside = column < width
        # Past the first-level cache, which keeps the scales for the programs to come.
        gate = tl.load(sums + column, mask=inside, other=0.0, cache_modifier=".cg")  # [BLOCK]
        up = tl.load(sums + width + column, mask=inside, other=0.0, cache_modifier=".cg")
        wide = gate.to(tl.float32) * (factor * tl.load(scale + column, mask=inside, other=0.0))
        up_scale = factor * tl.load(scale + width + column, mask=inside, other=0.0)
        wide = _silu(wide, ASSEMBLY) * (up.to(tl.float32) * up_scale)
        top = tl.maximum(top, tl.abs(wide))
        parts = parts + (wide,)
    step = _find_scale(scales, top, given, row, code_range)
    for part in tl.static_range(PARTS):
        column = part * BLOCK + tl.arange(0, BLOCK)
        _store_codes(codes, parts[part], step, row, column, width, FLOAT8)


def quantize(
    x_TK: Tensor,
    dtype: torch.dtype,
    *,
    given: Tensor | None,
    norm: tuple[Tensor, float] | None = None,
    divisor_K: Tensor | None = None,
) -> Codes:
    """Codes of `dtype` by the scale `given` fp32 [1], or by one per token; of x / divisor (fp32),
    which is rounded to nothing else, where there is one."""
    tokens, width = x_TK.shape
    device = x_TK.device
    assert x_TK.stride(1) == 1
    norm_K, eps = (None, 0.0) if norm is None else norm
    result = _empty(tokens, width, dtype, given, x_TK)
    if tokens:
        block, warps = row_block(width)
        _quantize[(tokens,)](
            bits_of(result.codes_TK), result.scale, x_TK, norm_K, divisor_K, given, width,
            x_TK.stride(0), CODE_RANGE[dtype], eps,
            FLOAT8=has_float8(device), BLOCK=block, num_warps=warps, **launch_options(device),
        )  # fmt: skip
    return result


def quantize_gated(
    sums_TN: Tensor,
    scale_N: Tensor,
    x_scale: Tensor,
    dtype: torch.dtype,
    *,
    given: Tensor | None,
    unit: float = 1.0,
) -> Codes:
    """Codes of silu(gate) * up: y = sums · unit · x_scale · scale holds gate and then up."""
    tokens, width = sums_TN.shape[0], sums_TN.shape[1] // 2
    device = sums_TN.device
    assert sums_TN.is_contiguous()
    result = _empty(tokens, width, dtype, given, sums_TN)
    if tokens:
        block = min(GATED_BLOCK, max(32, triton.next_power_of_2(width)))
        _quantize_gated[(tokens,)](
            bits_of(result.codes_TK), result.scale, sums_TN, scale_N, x_scale, given, width,
            CODE_RANGE[dtype], unit,
            TOKEN_SCALE=x_scale.numel() > 1, FLOAT8=has_float8(device), ASSEMBLY=IS_COMPILED,
            PARTS=-(-width // block), BLOCK=block, num_warps=max(1, block // GATED_LOAD),
            **launch_options(device),
        )  # fmt: skip
    return result


def _empty(
    tokens: int, width: int, dtype: torch.dtype, given: Tensor | None, like: Tensor
) -> Codes:
    codes_TK = torch.empty(tokens, width, dtype=dtype, device=like.device)
    scale = given
    if scale is None:
        scale = torch.empty(tokens, dtype=torch.float32, device=like.device)
    return Codes(codes_TK, scale, like.dtype)
