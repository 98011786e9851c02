"""Attention of one new token per sequence, from the fused projection's row to the output.

A program rotates the query heads of one kv head, which share its keys and values, and attends to a
run of cached positions; the first also caches the new key and value and attends to them. Where a
sequence has several runs, further programs join the parts, some channels each, in the order of the
positions. The grid depends on what the host knows only: the batch and a bound of the lengths. True
lengths are read on the device, and programs past them return, so that one launch, captured in a
CUDA graph, serves every length up to the bound.

At small batches nothing but latency counts: all loads that do not depend on each other are under
way together, those of a whole part if it is one tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.cache import LayerCache
from engine.kernels.api import Attending
from engine.kernels.triton._codes import decode, encode, has_float8, stored
from engine.kernels.triton._heads import is_row_of_heads, scale_of, slot_offset, turn
from engine.kernels.triton._join import MIN_WORDS, join, store_words, workspace
from engine.kernels.triton._launch import launch_options, processors
from engine.kernels.triton._softmax import LOG2_E, NO_WINDOW, attend_tile
from engine.kernels.triton._split import plan_split
from engine.kernels.triton._tiles import hold, load_codes, place_tile, to_numbers

# Rows and channels of the smallest matrix product of the tensor cores.
MIN_ROWS = 16
# So many heads have a place in the workspace (see `_join.MIN_WORDS`).
MIN_HEADS = 8
WARPS, STAGES = 4, 3
IS_COMPILED = not triton.knobs.runtime.interpret


@triton.jit
def _attend(state, queries, tile, is_valid, factor, dtype: tl.constexpr):
    scores = tl.dot(queries[0], tl.trans(tile[0]), input_precision="ieee")
    scores = tl.dot(queries[1], tl.trans(tile[1]), scores, input_precision="ieee") * factor
    scores = tl.where(is_valid[None, :], scores, float("-inf"))
    return attend_tile(state, scores, tile[2], dtype)


@triton.jit
def _cache_new(
    k, v, to, low, high, value, k_factor, v_factor, keep, dtype: tl.constexpr,
    D: tl.constexpr, C: tl.constexpr, BLOCK_D: tl.constexpr, FLOAT8: tl.constexpr,
):  # fmt: skip
    """Store a key (in halves) and a value where `keep`, and return them as they will be read."""
    pair, channel = tl.arange(0, C), tl.arange(0, BLOCK_D)
    kind = k.dtype.element_ty
    low_code = encode(low.to(tl.float32), k_factor, kind)
    high_code = encode(high.to(tl.float32), k_factor, kind)
    value_code = encode(value.to(tl.float32), v_factor, kind)
    tl.store(k + to + pair, low_code, mask=(pair < D // 2) & keep)
    tl.store(k + to + D // 2 + pair, high_code, mask=(pair < D // 2) & keep)
    tl.store(v + to + channel, value_code, mask=(channel < D) & keep)
    return (
        decode(low_code, dtype, FLOAT8).to(tl.float32),
        decode(high_code, dtype, FLOAT8).to(tl.float32),
        decode(value_code, dtype, FLOAT8).to(tl.float32),
    )


@triton.jit
def _add_position(state, score, value):
    """The online softmax over one position more: score [ROWS], -inf to leave it out, and value
    [BLOCK_D]."""
    output, top, total = state
    new_top = tl.maximum(top, score)
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    weight, decay = tl.exp2(score - base), tl.exp2(top - base)
    output = output * decay[:, None] + weight[:, None] * value[None, :]
    return output, new_top, total * decay + weight


# What differs from launch to launch of one engine compiles once.
@triton.jit(do_not_specialize=["window", "most", "table_stride", "columns"])
def _decode(
    out, q, k, v, cos, sin, k_cache, v_cache, k_scale, v_scale, slots, kv_lens, table,
    partial, tops, score_scale, window, part_positions, most,
    q_stride, k_stride, v_stride, block_tokens, head_stride, block_stride, table_stride, columns,
    GROUP: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
    C: tl.constexpr, BLOCK_D: tl.constexpr, BN: tl.constexpr, PAGE: tl.constexpr,
    IS_TILE: tl.constexpr, JOINERS: tl.constexpr, AT_ONCE: tl.constexpr,
    HAS_WINDOW: tl.constexpr, FLOAT8: tl.constexpr, HOLD: tl.constexpr,
    KV_HEADS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    HALF: tl.constexpr = D // 2
    dtype: tl.constexpr = q.dtype.element_ty
    pair, part = tl.program_id(0), tl.program_id(1)
    sequence, kv_head = (pair // KV_HEADS).to(tl.int64), pair % KV_HEADS
    k_factor, v_factor = scale_of(k_scale, kv_head), scale_of(v_scale, kv_head)
    row, half, channel = tl.arange(0, ROWS), tl.arange(0, C), tl.arange(0, BLOCK_D)
    is_head, is_half, is_channel = row < GROUP, half < HALF, channel < D
    is_first = part == 0
    if PDL:
        tl.extra.cuda.gdc_wait()
    length = tl.load(kv_lens + sequence)
    past = tl.maximum(length - 1, 0)
    oldest, start = 0, 0
    if HAS_WINDOW:
        oldest = tl.maximum(length - window, 0)
        start = oldest // BN * BN
    begin = start + part * part_positions
    table += sequence * table_stride
    place = place_tile(table, begin, columns, block_stride, BN, PAGE, D)
    slot = tl.load(slots + sequence)
    cosine = tl.load(cos + sequence * HALF + half, mask=is_half, other=0.0)
    sine = tl.load(sin + sequence * HALF + half, mask=is_half, other=0.0)
    q += sequence * q_stride + kv_head * (GROUP * D) + row[:, None] * D + half[None, :]
    is_query = is_head[:, None] & is_half[None, :]
    q_low = tl.load(q, mask=is_query, other=0.0)  # [ROWS, C]
    q_high = tl.load(q + HALF, mask=is_query, other=0.0)
    k += sequence * k_stride + kv_head * D + half
    k_low = tl.load(k, mask=is_half & is_first, other=0.0)
    k_high = tl.load(k + HALF, mask=is_half & is_first, other=0.0)
    v += sequence * v_stride + kv_head * D + channel
    value = tl.load(v, mask=is_channel & is_first, other=0.0)
    parts = tl.maximum(tl.cdiv(past - start, part_positions), 1)
    out += pair.to(tl.int64) * (GROUP * D)
    partial += pair * most * (HEADS * BLOCK_D)
    tops += pair * most * (JOINERS * HEADS)
    if part >= most:
        if JOINERS > 0:  # noqa: SIM102 (without joiners the rest does not compile)
            if parts > 1:
                join(
                    out, partial, tops, parts, part - most,
                    GROUP, HEADS, D, BLOCK_D, JOINERS, AT_ONCE,
                )  # fmt: skip
    elif part < parts:
        to = slot_offset(slot, kv_head, block_tokens, block_stride, head_stride, D)
        k_head = k_cache + kv_head.to(tl.int64) * head_stride
        v_head = v_cache + kv_head.to(tl.int64) * head_stride
        factor = score_scale * k_factor
        state = (
            tl.zeros([ROWS, BLOCK_D], tl.float32),
            tl.full([ROWS], float("-inf"), tl.float32),
            tl.zeros([ROWS], tl.float32),
        )
        if IS_TILE:
            positions = begin + tl.arange(0, BN)
            is_valid = (positions >= oldest) & (positions < past)
            codes = load_codes(k_head, v_head, place, is_valid, D, C, BLOCK_D)
        cosine, sine = hold(cosine, HOLD), hold(sine, HOLD)
        q_low, q_high = hold(q_low, HOLD), hold(q_high, HOLD)
        q_low, q_high = turn(q_low, q_high, cosine[None, :], sine[None, :], dtype)
        queries = hold(q_low, HOLD), hold(q_high, HOLD)
        key = turn(k_low, k_high, cosine, sine, dtype)
        new_low, new_high, new_value = _cache_new(
            k_cache, v_cache, to, key[0], key[1], value, k_factor, v_factor,
            is_first & (slot >= 0), dtype, D, C, BLOCK_D, FLOAT8,
        )  # fmt: skip
        products = q_low.to(tl.float32) * new_low[None, :]
        products += q_high.to(tl.float32) * new_high[None, :]
        # A sequence without positions is padding: its output is zero.
        is_new = is_first & (length > 0)
        score = tl.where(is_new, tl.sum(products, axis=1) * factor, float("-inf"))
        if IS_TILE:
            tile = to_numbers(codes, dtype, FLOAT8, HOLD)
            state = _attend(state, queries, tile, is_valid, factor, dtype)
        else:
            # Plain tiles go to the products as they lie in shared memory.
            HELD: tl.constexpr = HOLD and k_cache.dtype.element_ty != dtype
            for first in range(begin, tl.minimum(begin + part_positions, past), BN):
                positions = first + tl.arange(0, BN)
                is_valid = (positions >= oldest) & (positions < past)
                codes = load_codes(k_head, v_head, place, is_valid, D, C, BLOCK_D)
                # Where the next tile lies is asked a tile ahead.
                place = place_tile(table, first + BN, columns, block_stride, BN, PAGE, D)
                tile = to_numbers(codes, dtype, FLOAT8, HELD)
                state = _attend(state, queries, tile, is_valid, factor, dtype)
        output, top, total = _add_position(state, score, tl.where(is_new, new_value, 0.0))
        total = tl.where(total > 0, total, 1.0)
        output *= (v_factor / total)[:, None]
        is_output = is_head[:, None] & is_channel[None, :]
        to_output = row[:, None] * D + channel[None, :]
        tl.store(out + to_output, output.to(dtype), mask=is_output & (parts == 1))
        if JOINERS > 0:
            is_part = is_head & (parts > 1)
            to_part = part * (HEADS * BLOCK_D) + row[:, None] * BLOCK_D + channel[None, :]
            store_words(partial + to_part, output, is_part[:, None])
            heights = tl.broadcast_to((top + tl.log2(total))[None, :], [JOINERS, ROWS])
            to_top = (part * JOINERS + tl.arange(0, JOINERS))[:, None] * HEADS + row[None, :]
            store_words(tops + to_top, heights, is_part[None, :])


def rope_decode(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    cos_TC: Tensor,
    sin_TC: Tensor,
    layer: LayerCache,
    batch: Attending,
) -> Tensor:
    """`rope_attention` where every sequence has one token; of `kv_lens` the greatest counts, as a
    bound."""
    (tokens, heads, dim), device = q_THD.shape, q_THD.device
    k, v, table_BM = stored(layer.k), stored(layer.v), batch.block_table_BM
    kv_heads, block_tokens = k.shape[1:3]
    assert all(map(is_row_of_heads, (q_THD, k_TGD, v_TGD))) and batch.slots_T.is_contiguous()
    assert cos_TC.is_contiguous() and sin_TC.is_contiguous()
    assert cos_TC.shape == sin_TC.shape == (tokens, dim // 2), "one angle per pair of channels"
    assert k.stride() == v.stride() and k.stride()[2:] == (dim, 1)
    group, pairs = heads // kv_heads, tokens * kv_heads
    is_wide = q_THD.dtype == torch.float32
    tile = 32 if is_wide else 64
    bound = max(batch.kv_lens)
    if batch.window is not None:
        # The first tile may begin before the window.
        bound = min(bound, batch.window + tile)
    split = plan_split(pairs, bound, tile, processors(device))
    padded = max(MIN_ROWS, triton.next_power_of_2(dim))
    group_rows = max(MIN_HEADS, triton.next_power_of_2(group))
    out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=device)
    partial = tops = batch.kv_lens_B
    if split.joiners:
        assert split.at_once * group_rows >= MIN_WORDS >= 32 * WARPS
        partial, tops = workspace(device, group_rows * padded, group_rows * split.joiners)
    _decode[(pairs, split.parts + split.joiners)](
        out_THD, q_THD, k_TGD, v_TGD, cos_TC, sin_TC, k, v, layer.k_scale_G, layer.v_scale_G,
        batch.slots_T, batch.kv_lens_B, table_BM, partial, tops,
        batch.scale * LOG2_E, batch.window or NO_WINDOW, split.positions, split.parts,
        q_THD.stride(0), k_TGD.stride(0), v_TGD.stride(0), block_tokens,
        k.stride(1), k.stride(0), table_BM.stride(0), table_BM.shape[1],
        GROUP=group, HEADS=group_rows, ROWS=max(MIN_ROWS, group_rows), D=dim,
        C=max(MIN_ROWS, triton.next_power_of_2(dim // 2)), BLOCK_D=padded, BN=split.tile,
        PAGE=0 if table_BM.shape[1] == 1 else block_tokens,
        IS_TILE=split.positions == split.tile, JOINERS=split.joiners, AT_ONCE=split.at_once,
        HAS_WINDOW=batch.window is not None, FLOAT8=has_float8(device),
        HOLD=IS_COMPILED and not is_wide, KV_HEADS=kv_heads,
        # A rotation rounds as two products and a sum do, as in `rope_write_kv`.
        enable_fp_fusion=False,
        num_warps=WARPS, num_stages=1 if is_wide else STAGES,
        **launch_options(device),
    )  # fmt: skip
    return out_THD
