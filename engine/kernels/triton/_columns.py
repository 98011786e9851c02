"""y = x · factor, a factor for each column, rounded once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.triton._launch import launch_options

BLOCK = 1024
WARPS = 4


@triton.jit
def _multiply_columns(y, x, factor, width, x_stride, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    by = tl.load(factor + column, mask=inside, other=0.0)  # [BLOCK]
    if PDL:
        tl.extra.cuda.gdc_wait()
    values = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)  # [BLOCK]
    tl.store(y + row * width + column, (values * by).to(y.dtype.element_ty), mask=inside)


def multiply_columns(x_TK: Tensor, factor_K: Tensor) -> Tensor:
    """y [T, K] of x's dtype; factor fp32 [K]."""
    tokens, width = x_TK.shape
    assert x_TK.stride(1) == 1 and factor_K.shape == (width,)
    y_TK = torch.empty(x_TK.shape, dtype=x_TK.dtype, device=x_TK.device)
    if tokens:
        _multiply_columns[(tokens, -(-width // BLOCK))](
            y_TK, x_TK, factor_K, width, x_TK.stride(0),
            BLOCK=BLOCK, num_warps=WARPS, **launch_options(x_TK.device),
        )  # fmt: skip
    return y_TK
