"""Rows of a table by token; zeros for the ids that another rank's part of the table holds."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.triton._launch import launch_options

BLOCK = 1024
WARPS = 4


@triton.jit
def _embedding(
    x, tokens, table, first_row, rows, width, table_stride, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    place = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(tokens + place).to(tl.int64) - first_row
    is_held = (row >= 0) & (row < rows)
    inside = column < width
    values = tl.load(table + row * table_stride + column, mask=inside & is_held, other=0.0)
    tl.store(x + place * width + column, values, mask=inside)


def embedding(tokens_T: Tensor, table_VE: Tensor, first_row: int = 0) -> Tensor:
    rows, width = table_VE.shape
    assert tokens_T.is_contiguous() and table_VE.stride(1) == 1
    x_TE = torch.empty(len(tokens_T), width, dtype=table_VE.dtype, device=table_VE.device)
    if len(tokens_T):
        _embedding[(len(tokens_T), triton.cdiv(width, BLOCK))](
            x_TE, tokens_T, table_VE, first_row, rows, width, table_VE.stride(0),
            BLOCK=BLOCK, num_warps=WARPS, **launch_options(table_VE.device),
        )  # fmt: skip
    return x_TE
