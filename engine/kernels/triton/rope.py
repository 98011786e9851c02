"""q and k rotated (arXiv 2104.09864): channel i pairs with channel i + D/2; a token per program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.triton._heads import ROUNDS_EACH, is_row_of_heads, rotate
from engine.kernels.triton._launch import launch_options


@triton.jit
def _rope(
    out, x, cos, sin, heads, x_stride,
    HEADS: tl.constexpr, HALF: tl.constexpr, C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * HEADS
    left = heads - first
    source = x + token * x_stride + first * 2 * HALF
    target = out + (token * heads + first) * 2 * HALF
    rotate(target, source, cos + token * HALF, sin + token * HALF, left, HEADS, HALF, C)


def rope(q_THD: Tensor, k_TGD: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> tuple[Tensor, Tensor]:
    return _rotated(q_THD, cos_TC, sin_TC), _rotated(k_TGD, cos_TC, sin_TC)


def _rotated(x_THD: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
    tokens, heads, dim = x_THD.shape
    assert is_row_of_heads(x_THD) and cos_TC.is_contiguous() and sin_TC.is_contiguous()
    assert cos_TC.shape == sin_TC.shape == (tokens, dim // 2), "one angle per pair of channels"
    out_THD = torch.empty(x_THD.shape, dtype=x_THD.dtype, device=x_THD.device)
    if tokens:
        at_once = min(8, triton.next_power_of_2(heads))
        _rope[(tokens, triton.cdiv(heads, at_once))](
            out_THD, x_THD, cos_TC, sin_TC, heads, x_THD.stride(0),
            HEADS=at_once, HALF=dim // 2, C=triton.next_power_of_2(dim // 2),
            **ROUNDS_EACH, **launch_options(x_THD.device),
        )  # fmt: skip
    return out_THD
