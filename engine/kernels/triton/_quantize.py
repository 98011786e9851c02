"""Activations as int8 or float8_e4m3fn codes, a token per program, with RMSNorm before if asked.

The scale is given, or each token's amax (at least 1e-6) / 127 or 448. A norm's result is rounded
to the activations' dtype first, so codes are those of a norm and a quantisation in a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.triton._codes import encode
from engine.kernels.triton._launch import launch_options
from engine.kernels.triton._norm import normalise, row_block
from engine.kernels.triton._weights import bits_of

MIN_TOKEN_RANGE = tl.constexpr(1e-6)
CODE_RANGE = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


@triton.jit
def _quantize(
    codes, scales, x, norm, given, width, x_stride, code_range, eps,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
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
    if given is None:
        amax = tl.maximum(tl.max(tl.abs(wide), axis=0), MIN_TOKEN_RANGE)
        scale = tl.div_rn(amax, tl.full([], code_range, tl.float32))
        tl.store(scales + row, scale)
    else:
        scale = tl.load(given)
    result = encode(wide, tl.zeros_like(wide) + scale, codes.dtype.element_ty)
    tl.store(codes + row * width + column, result, mask=inside)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


def quantize(
    x_TK: Tensor,
    dtype: torch.dtype,
    *,
    given: Tensor | None,
    norm: tuple[Tensor, float] | None = None,
) -> tuple[Tensor, Tensor]:
    """Codes of `dtype` [T, K], and their scale fp32: `given` [1], or one per token [T]."""
    tokens, width = x_TK.shape
    assert x_TK.stride(1) == 1
    norm_K, eps = (None, 0.0) if norm is None else norm
    codes_TK = torch.empty(tokens, width, dtype=dtype, device=x_TK.device)
    scale = given
    if scale is None:
        scale = torch.empty(tokens, dtype=torch.float32, device=x_TK.device)
    if tokens:
        block, warps = row_block(width)
        _quantize[(tokens,)](
            bits_of(codes_TK), scale, x_TK, norm_K, given, width, x_TK.stride(0),
            CODE_RANGE[dtype], eps,
            BLOCK=block, num_warps=warps, **launch_options(x_TK.device),
        )  # fmt: skip
    return codes_TK, scale
