"""Positions, lengths and cache slots of the rows' newest tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.api import Places
from engine.kernels.triton._launch import launch_options

BLOCK = 32
WARPS = 1


@triton.jit
def _place_tokens(
    positions, kv_lens, slots, ends, table, rows, first, block_tokens, table_stride,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    end = tl.load(ends + row, mask=inside, other=0).to(tl.int32)
    position = end - first - 1
    at = row.to(tl.int64) * table_stride + position // block_tokens
    block = tl.load(table + at, mask=inside, other=0).to(tl.int64)
    slot = block * block_tokens + position % block_tokens
    is_padding = position == 0
    tl.store(positions + row, position, mask=inside)
    tl.store(kv_lens + row, tl.where(is_padding, 0, position + 1), mask=inside)
    tl.store(slots + row, tl.where(is_padding, -1, slot), mask=inside)


def place_tokens(ends_B: Tensor, first: int, table_BM: Tensor, block_tokens: int) -> Places:
    rows, device = len(ends_B), ends_B.device
    assert ends_B.is_contiguous() and table_BM.is_contiguous()
    positions_B = torch.empty(rows, dtype=torch.int64, device=device)
    slots_B = torch.empty_like(positions_B)
    kv_lens_B = torch.empty(rows, dtype=torch.int32, device=device)
    _place_tokens[(triton.cdiv(rows, BLOCK),)](
        positions_B, kv_lens_B, slots_B, ends_B, table_BM,
        rows, first, block_tokens, table_BM.shape[1],
        BLOCK=BLOCK, num_warps=WARPS, **launch_options(device),
    )  # fmt: skip
    return Places(positions_B, kv_lens_B, slots_B)
