"""y = silu(gate) * up, where a row of the input holds gate and then up."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.triton._launch import launch_options

BLOCK = 1024
WARPS = 4


@triton.jit
def _silu_mul(y, gate_up, width, row_stride, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_up + row * row_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * row_stride + width + column, mask=inside, other=0.0)  # [BLOCK]
    dtype = y.dtype.element_ty
    # silu is rounded to the dtype before the product, as by two operations in a row.
    activated = (gate * tl.sigmoid(gate)).to(dtype).to(tl.float32)
    tl.store(y + row * width + column, (activated * up.to(tl.float32)).to(dtype), mask=inside)


def silu_mul(gate_up_TF2: Tensor) -> Tensor:
    tokens, width = gate_up_TF2.shape[0], gate_up_TF2.shape[1] // 2
    assert gate_up_TF2.stride(1) == 1
    device = gate_up_TF2.device
    y_TF = torch.empty(tokens, width, dtype=gate_up_TF2.dtype, device=device)
    if tokens:
        _silu_mul[(tokens, -(-width // BLOCK))](
            y_TF, gate_up_TF2, width, gate_up_TF2.stride(0),
            BLOCK=BLOCK, num_warps=WARPS, **launch_options(device),
        )  # fmt: skip
    return y_TF
