"""(rms_norm(s), s) with s = residual + x rounded to their dtype, a row per program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.triton._launch import launch_options
from engine.kernels.triton._norm import normalise, row_block


@triton.jit
def _add_rms_norm(
    y, total, x, residual, weight,
    width, x_stride, residual_stride, eps,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    w = tl.load(weight + column, mask=inside, other=0.0)  # [BLOCK]
    if PDL:
        tl.extra.cuda.gdc_wait()
    old = tl.load(residual + row * residual_stride + column, mask=inside, other=0.0)
    new = tl.load(x + row * x_stride + column, mask=inside, other=0.0)
    dtype = total.dtype.element_ty
    # In fp32 and rounded once, which is what an addition in the dtype gives.
    added = (old.to(tl.float32) + new.to(tl.float32)).to(dtype)
    tl.store(total + row * width + column, added, mask=inside)
    result = normalise(added.to(tl.float32), w, width, eps, dtype)
    tl.store(y + row * width + column, result, mask=inside)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


def add_rms_norm(
    x_TE: Tensor, residual_TE: Tensor, weight_E: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    tokens, width = x_TE.shape
    assert x_TE.stride(1) == residual_TE.stride(1) == 1 and weight_E.is_contiguous()
    assert residual_TE.shape == x_TE.shape and residual_TE.dtype == x_TE.dtype
    y_TE = torch.empty(x_TE.shape, dtype=x_TE.dtype, device=x_TE.device)
    sum_TE = torch.empty_like(y_TE)
    if tokens:
        block, warps = row_block(width)
        _add_rms_norm[(tokens,)](
            y_TE, sum_TE, x_TE, residual_TE, weight_E,
            width, x_TE.stride(0), residual_TE.stride(0), eps,
            BLOCK=block, num_warps=warps, **launch_options(x_TE.device),
        )  # fmt: skip
    return y_TE, sum_TE
