"""What follows a product of codes that a library made: scales, gate and residual, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.triton._launch import launch_options
from engine.kernels.triton._tile_end import store_tile

ROWS, TOKENS = 512, 8
WARPS = 4


@triton.jit
def _scale_sums(
    y, sums, scale, x_scale, residual, outputs, tokens, sums_stride, residual_stride, unit,
    TOKEN_SCALE: tl.constexpr, GATED: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    token = tl.program_id(1).to(tl.int64) * BT + tl.arange(0, BT)
    inside = (row < outputs)[:, None] & (token < tokens)[None, :]
    sums += token[None, :] * sums_stride + row[:, None]
    if PDL:
        tl.extra.cuda.gdc_wait()
    gate = tl.load(sums, mask=inside, other=0.0).to(tl.float32) * unit  # [BN, BT]
    up = gate
    if GATED:
        up = tl.load(sums + outputs, mask=inside, other=0.0).to(tl.float32) * unit
    store_tile(
        y, gate, up, scale, x_scale, residual, row, token, outputs, tokens, outputs,
        residual_stride, True, TOKEN_SCALE, GATED,
    )  # fmt: skip


def scale_sums(
    sums_TN: Tensor,
    scale_N: Tensor,
    x_scale: Tensor,
    *,
    unit: float = 1.0,
    is_gated: bool = False,
    residual_TN: Tensor | None = None,
) -> Tensor:
    """y = sums · unit · x_scale · scale, halved by SwiGLU if gated, plus the residual; x_scale is
    fp32 [1] or [T]. Takes over the memory of `sums_TN` unless gated."""
    tokens, width = sums_TN.shape
    assert sums_TN.is_contiguous()
    outputs = width // 2 if is_gated else width
    y_TN = sums_TN
    if is_gated:
        y_TN = torch.empty(tokens, outputs, dtype=sums_TN.dtype, device=sums_TN.device)
    if tokens:
        _scale_sums[(-(-outputs // ROWS), -(-tokens // TOKENS))](
            y_TN, sums_TN, scale_N, x_scale, residual_TN, outputs, tokens, width,
            0 if residual_TN is None else residual_TN.stride(0), unit,
            TOKEN_SCALE=x_scale.numel() > 1, GATED=is_gated, BN=ROWS, BT=TOKENS,
            num_warps=WARPS, **launch_options(sums_TN.device),
        )  # fmt: skip
    return y_TN
