"""y = x / sqrt(mean(x²) + eps) * weight, a row per program (arXiv 1910.07467)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.triton._launch import launch_options
from engine.kernels.triton._norm import normalise, row_block


@triton.jit
def _rms_norm(y, x, weight, width, x_stride, eps, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    w = tl.load(weight + column, mask=inside, other=0.0)  # [BLOCK]
    if PDL:
        tl.extra.cuda.gdc_wait()
    values = tl.load(x + row * x_stride + column, mask=inside, other=0.0)  # [BLOCK]
    result = normalise(values.to(tl.float32), w, width, eps, y.dtype.element_ty)
    tl.store(y + row * width + column, result, mask=inside)


def rms_norm(x_TE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
    tokens, width = x_TE.shape
    assert x_TE.stride(1) == 1 and weight_E.is_contiguous()
    y_TE = torch.empty(x_TE.shape, dtype=x_TE.dtype, device=x_TE.device)
    if tokens:
        block, warps = row_block(width)
        _rms_norm[(tokens,)](
            y_TE, x_TE, weight_E, width, x_TE.stride(0), eps,
            BLOCK=block, num_warps=warps, **launch_options(x_TE.device),
        )  # fmt: skip
    return y_TE
