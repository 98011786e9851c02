"""What programs on tensor cores do with a tile's sums: scales, gate, residual, and splits of K.

Where K is split, sums go to a workspace, and the last program to arrive at a tile adds them in the
order of K, so results do not depend on timing. Its counter is back at zero afterwards; one stream
at a time may run these kernels.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

COUNTERS = 2**16
# One kernel serves all numbers of these.
VARYING = ["tokens", "splits"]


@triton.jit
def store_tile(
    y, gate, up, scale, x_scale, residual, row, token, outputs, tokens, y_stride, residual_stride,
    ROW_SCALE: tl.constexpr, TOKEN_SCALE: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Scale sums [BN, BT], gate them, add the residual, and store."""
    inside = (row < outputs)[:, None] & (token < tokens)[None, :]
    gate = gate.to(tl.float32)
    up = up.to(tl.float32)
    factor = 1.0
    if x_scale is not None:
        if TOKEN_SCALE:
            factor = tl.load(x_scale + token, mask=token < tokens, other=0.0)[None, :]
        else:
            factor = tl.load(x_scale)
    up_factor = factor
    if ROW_SCALE:
        factor *= tl.load(scale + row, mask=row < outputs, other=0.0)[:, None]
        if GATED:
            up_factor *= tl.load(scale + outputs + row, mask=row < outputs, other=0.0)[:, None]
    gate *= factor
    up *= up_factor
    if GATED:
        gate = gate * tl.sigmoid(gate) * up
    if residual is not None:
        at = token[None, :] * residual_stride + row[:, None]
        gate += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    at = token[None, :] * y_stride + row[:, None]
    tl.store(y + at, gate.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _is_last(
    gate, up, partial, counters, row, token, outputs, tokens, split, splits,
    GATED: tl.constexpr,
):  # fmt: skip
    """Leave this split's sums in the workspace [splits, T, N]; whether all others have."""
    inside = (row < outputs)[:, None] & (token < tokens)[None, :]
    width = outputs * 2 if GATED else outputs
    at = (split * tokens + token)[None, :] * width + row[:, None]
    tl.store(partial + at, gate, mask=inside)
    if GATED:
        tl.store(partial + at + outputs, up, mask=inside)
    # The atomic is one thread's: it must not run ahead of the others' stores.
    tl.debug_barrier()
    arrived = tl.atomic_add(counters, 1, sem="acq_rel", scope="gpu")
    return arrived == splits - 1


@triton.jit
def _add_splits(partial, row, token, outputs, width, tokens, splits):
    """Sums of all splits, in their order, read past the first-level cache."""
    inside = (row < outputs)[:, None] & (token < tokens)[None, :]
    at = token[None, :] * width + row[:, None]
    total = tl.load(partial + at, mask=inside, other=0, cache_modifier=".cg")
    for _ in range(1, splits):
        at += tokens * width
        total += tl.load(partial + at, mask=inside, other=0, cache_modifier=".cg")
    return total


@triton.jit
def finish(
    y, gate, up, scale, x_scale, residual, partial, counters, row, token, outputs, tokens,
    y_stride, residual_stride, split, splits,
    ROW_SCALE: tl.constexpr, TOKEN_SCALE: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    token = token.to(tl.int64)
    if partial is None:
        store_tile(
            y, gate, up, scale, x_scale, residual, row, token, outputs, tokens, y_stride,
            residual_stride, ROW_SCALE, TOKEN_SCALE, GATED,
        )  # fmt: skip
    else:
        counters += tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        if _is_last(gate, up, partial, counters, row, token, outputs, tokens, split, splits, GATED):
            width = outputs * 2 if GATED else outputs
            gate = _add_splits(partial, row, token, outputs, width, tokens, splits)
            if GATED:
                up = _add_splits(partial + outputs, row, token, outputs, width, tokens, splits)
            store_tile(
                y, gate, up, scale, x_scale, residual, row, token, outputs, tokens, y_stride,
                residual_stride, ROW_SCALE, TOKEN_SCALE, GATED,
            )  # fmt: skip
            tl.store(counters, 0)


def workspace(
    grid: tuple[int, int, int], tokens: int, outputs: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """For a grid (rows, tokens, splits) of programs: sums of `dtype` [splits, T, N], and arrivals
    at each tile, zero between launches. None where K is whole."""
    if grid[2] == 1:
        return None, None
    assert grid[0] * grid[1] <= COUNTERS
    return torch.empty(grid[2], tokens, outputs, dtype=dtype, device=device), _counters(device)


@cache
def _counters(device: torch.device) -> Tensor:
    return torch.zeros(COUNTERS, dtype=torch.int32, device=device)
