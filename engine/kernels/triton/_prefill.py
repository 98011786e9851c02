"""Attention of a ragged batch: prompts, parts of prompts after a cached prefix, decoding rows.

A program takes consecutive tokens of one sequence with all query heads of one kv head as the rows
of a matrix (row = token * group + head), so that a group shares one pass over its keys and short
parts of prompts still fill the tiles (FlashAttention-2, arXiv 2307.08691). A result does not
depend on what else is in the batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.cache import LayerCache
from engine.kernels.api import Attending
from engine.kernels.triton._codes import has_float8, stored
from engine.kernels.triton._heads import scale_of
from engine.kernels.triton._launch import capability, launch_options
from engine.kernels.triton._softmax import LOG2_E, NO_WINDOW, attend_tile, load_tile, tile_rows


class Tiles(NamedTuple):
    """Rows and positions of a tile, and what runs it."""

    rows: int
    positions: int
    warps: int
    stages: int


# Warpgroup products and tensor memory (Hopper, datacentre Blackwell) hold larger tiles than the
# registers of the others; IEEE fp32 has no tensor cores at all.
LARGE_TILES = Tiles(rows=128, positions=64, warps=8, stages=2)
SMALL_TILES = Tiles(rows=64, positions=32, warps=4, stages=2)
FLOAT_TILES = Tiles(rows=32, positions=16, warps=8, stages=1)
LARGE_CAPABILITIES = (9, 10)


def choose_tiles(dtype: torch.dtype, major: int) -> Tiles:
    """Tiles for a GPU of compute capability `major`.x."""
    if dtype == torch.float32:
        return FLOAT_TILES
    return LARGE_TILES if major in LARGE_CAPABILITIES else SMALL_TILES


@triton.jit
def _attend_range(
    state, queries, at_row, k, v, table, begin, end, length, window, factor, block_stride,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BN: tl.constexpr, PAGE: tl.constexpr,
    FLOAT8: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The online softmax over the positions begin … end - 1; `begin` is a multiple of BN. Without
    MASKED every row sees all of them."""
    output, top, total = state
    dtype: tl.constexpr = queries.dtype
    for first in range(begin, end, BN):
        positions = first + tl.arange(0, BN)
        is_valid = positions < length
        rows = tile_rows(table, positions, is_valid, block_stride, PAGE, D)
        if MASKED:
            # Blocks that lie before every row's window are freed: what they hold is not loaded.
            is_valid = is_valid & (positions > tl.min(at_row) - window)
        keys = load_tile(k, rows, is_valid, dtype, D, BLOCK_D, FLOAT8)
        values = load_tile(v, rows, is_valid, dtype, D, BLOCK_D, FLOAT8)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * factor
        if MASKED:
            behind = at_row[:, None] - positions[None, :]
            scores = tl.where((behind >= 0) & (behind < window), scores, float("-inf"))
        output, top, total = attend_tile((output, top, total), scores, values, dtype)
    return output, top, total


@triton.jit
def _prefill(
    out, q, k, v, k_scale, v_scale, query_starts, kv_lens, table,
    score_scale, window, whole_from, q_stride, head_stride, block_stride, table_stride,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, PAGE: tl.constexpr, HAS_WINDOW: tl.constexpr, FLOAT8: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    kv_head, sequence = tl.program_id(1), tl.program_id(2)
    k_factor, v_factor = scale_of(k_scale, kv_head), scale_of(v_scale, kv_head)
    if PDL:
        tl.extra.cuda.gdc_wait()
    start = tl.load(query_starts + sequence)
    tokens = tl.load(query_starts + sequence + 1) - start
    length = tl.load(kv_lens + sequence)
    # The last rows see most: they come first. Another kernel has the long whole prompts.
    tile = tl.cdiv(tokens * GROUP, BM) - 1 - tl.program_id(0)
    if (tile >= 0) & ((tokens < length) | (tokens < whole_from)):
        row, channel = tile * BM + tl.arange(0, BM), tl.arange(0, BLOCK_D)
        token, head = row // GROUP, kv_head * GROUP + row % GROUP
        mask = (token < tokens)[:, None] & (channel < D)[None, :]
        q += start.to(tl.int64) * q_stride
        at = token[:, None].to(tl.int64) * q_stride + head[:, None] * D + channel[None, :]
        queries = tl.load(q + at, mask=mask, other=0.0)  # [BM, BLOCK_D]
        # Rows past the last token repeat it, and are not stored.
        at_row = length - tokens + tl.minimum(token, tokens - 1)
        oldest, newest = tl.min(at_row), tl.max(at_row)
        table += sequence.to(tl.int64) * table_stride
        k += kv_head.to(tl.int64) * head_stride
        v += kv_head.to(tl.int64) * head_stride
        state = (
            tl.zeros([BM, BLOCK_D], tl.float32),
            tl.full([BM], float("-inf"), tl.float32),
            tl.zeros([BM], tl.float32),
        )
        begin = 0
        # Tiles that every row sees whole end before the oldest row's position.
        middle = tl.maximum(oldest + 1, 0) // BN * BN
        factor = score_scale * k_factor
        if HAS_WINDOW:
            begin = tl.maximum(oldest - window + 1, 0) // BN * BN
            seen_by_all = tl.cdiv(tl.maximum(newest - window + 1, 0), BN) * BN
            seen_by_all = tl.minimum(seen_by_all, tl.maximum(middle, begin))
            state = _attend_range(
                state, queries, at_row, k, v, table, begin, seen_by_all, length, window, factor,
                block_stride, D, BLOCK_D, BN, PAGE, FLOAT8, True,
            )  # fmt: skip
            begin = seen_by_all
        state = _attend_range(
            state, queries, at_row, k, v, table, begin, middle, length, window, factor,
            block_stride, D, BLOCK_D, BN, PAGE, FLOAT8, False,
        )  # fmt: skip
        begin = tl.maximum(begin, middle)
        output, top, total = _attend_range(
            state, queries, at_row, k, v, table, begin, newest + 1, length, window, factor,
            block_stride, D, BLOCK_D, BN, PAGE, FLOAT8, True,
        )  # fmt: skip
        output *= v_factor / tl.where(total > 0, total, 1.0)[:, None]
        # The output is contiguous: a token has as many heads as all programs of the grid row.
        heads = tl.num_programs(1) * GROUP
        place = (start + token)[:, None].to(tl.int64) * (heads * D) + head[:, None] * D
        tl.store(out + place + channel[None, :], output.to(out.dtype.element_ty), mask=mask)


def prefill(
    out_THD: Tensor, q_THD: Tensor, layer: LayerCache, batch: Attending, whole_from: int
) -> None:
    """`attention` into `out_THD`, all but sequences of `whole_from` tokens or more that begin
    with this step."""
    dim, device = q_THD.shape[2], q_THD.device
    k, v = stored(layer.k), stored(layer.v)
    kv_heads, block_tokens = k.shape[1:3]
    group = q_THD.shape[1] // kv_heads
    tiles = choose_tiles(q_THD.dtype, capability(device)[0])
    most = triton.cdiv(max(batch.query_lens) * group, tiles.rows)
    _prefill[(most, kv_heads, len(batch.query_lens))](
        out_THD, q_THD, k, v, layer.k_scale_G, layer.v_scale_G,
        batch.query_starts_B1, batch.kv_lens_B, batch.block_table_BM,
        batch.scale * LOG2_E, batch.window or NO_WINDOW, whole_from,
        q_THD.stride(0), k.stride(1), k.stride(0), batch.block_table_BM.stride(0),
        GROUP=group, D=dim, BLOCK_D=max(16, triton.next_power_of_2(dim)),
        BM=tiles.rows, BN=tiles.positions,
        PAGE=0 if batch.block_table_BM.shape[1] == 1 else block_tokens,
        HAS_WINDOW=batch.window is not None, FLOAT8=has_float8(device),
        num_warps=tiles.warps, num_stages=tiles.stages, **launch_options(device),
    )  # fmt: skip
