"""What the attention kernels share: where a tile of cached positions lies, and the softmax step.

A tile is BN consecutive positions whose first is a multiple of BN, whatever the cache's block
size is: paged and contiguous caches give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from engine.kernels.triton._codes import decode

LOG2_E = 1.4426950408889634
# A window that hides nothing, as int32.
NO_WINDOW = 2**31 - 1


@triton.jit
def tile_rows(table, positions, is_valid, block_stride, PAGE: tl.constexpr, D: tl.constexpr):
    """Offsets (int64 [BN]) of positions in one head of the cache; `table` is the sequence's row.

    PAGE is the number of positions in a block, 0 where one block holds the whole sequence.
    """
    if PAGE == 0:
        rows = tl.load(table).to(tl.int64) * block_stride + positions * D
    else:
        blocks = tl.load(table + positions // PAGE, mask=is_valid, other=0).to(tl.int64)
        rows = blocks * block_stride + (positions % PAGE) * D
    return rows


@triton.jit
def load_tile(
    cache, rows, is_valid, dtype: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, FLOAT8: tl.constexpr,
):  # fmt: skip
    """Keys or values at `rows` of one head, [BN, BLOCK_D]; zeros at invalid positions, where the
    memory may hold anything."""
    channel = tl.arange(0, BLOCK_D)
    mask = is_valid[:, None]
    if D != BLOCK_D:
        mask = mask & (channel < D)[None, :]
    codes = tl.load(cache + rows[:, None] + channel[None, :], mask=mask, other=0)
    return decode(codes, dtype, FLOAT8)


@triton.jit
def attend_tile(state, scores, values, dtype: tl.constexpr):
    """One step of the online softmax (arXiv 2205.14135) over scores [BM, BN] in powers of two.

    The state is (output [BM, D], greatest score [BM], sum of weights [BM]), in fp32.
    """
    output, top, total = state
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    # A row that has seen nothing yet has no greatest score to subtract.
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores - base[:, None])
    decay = tl.exp2(top - base)
    total = total * decay + tl.sum(weights, axis=1)
    output = tl.dot(weights.to(dtype), values, output * decay[:, None], input_precision="ieee")
    return output, new_top, total
