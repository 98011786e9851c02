"""Attention of one token per sequence: the cached positions are split over programs.

A program takes the query heads of one kv head as the rows of a matrix, so that keys and values
are read once, and a run of positions. The last program of a (sequence, kv head) to arrive joins
the parts, in the order of the positions. The grid depends on what the host knows only: the batch
and a bound of the lengths. True lengths are read on the device, and programs past them return, so
that one launch, captured in a CUDA graph, serves every length up to the bound.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.cache import LayerCache
from engine.kernels.api import Attending
from engine.kernels.triton._codes import has_float8, stored
from engine.kernels.triton._heads import scale_of
from engine.kernels.triton._launch import launch_options, processors
from engine.kernels.triton._softmax import LOG2_E, NO_WINDOW, attend_tile, load_tile, tile_rows

# Rows of the smallest matrix product of the tensor cores.
MIN_ROWS = 16
# Programs that a multiprocessor holds at once, by shared memory.
RESIDENT = 2
# What a program costs beyond its tiles, and what joining a part costs, in tiles.
PROGRAM_COST, PART_COST = 1.5, 1 / 16
# (sequence, kv head) pairs beyond which there is nothing to split: they fill any GPU.
MAX_SPLIT_PAIRS = 4096
MAX_PARTS = 128
# Parts joined at a time.
JOINED = 8


@triton.jit
def _join(
    out, partial, tops, parts,
    GROUP: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    JOINED: tl.constexpr,
):  # fmt: skip
    """out [GROUP, D] = Σ partial[p] · 2^tops[p] / Σ 2^tops[p], JOINED parts at a time."""
    head, channel = tl.arange(0, HEADS), tl.arange(0, BLOCK_D)
    is_head, is_channel = head < GROUP, channel < D
    joined = tl.zeros([HEADS, BLOCK_D], tl.float32)
    top = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    for first in range(0, parts, JOINED):
        part = first + tl.arange(0, JOINED)
        row = part[:, None] * GROUP + head[None, :]
        is_part = (part < parts)[:, None] & is_head[None, :]
        # Other multiprocessors wrote what is read here: past the first-level cache.
        heights = tl.load(tops + row, mask=is_part, other=float("-inf"), cache_modifier=".cg")
        outputs = tl.load(
            partial + row[:, :, None] * D + channel[None, None, :],
            mask=is_part[:, :, None] & is_channel[None, None, :],
            other=0.0, cache_modifier=".cg",
        )  # fmt: skip
        new_top = tl.where(is_head, tl.maximum(top, tl.max(heights, axis=0)), 0.0)
        weights = tl.exp2(heights - new_top[None, :])  # [JOINED, HEADS]
        decay = tl.exp2(top - new_top)
        total = total * decay + tl.sum(weights, axis=0)
        joined = joined * decay[:, None] + tl.sum(outputs * weights[:, :, None], axis=0)
        top = new_top
    result = (joined / tl.where(is_head, total, 1.0)[:, None]).to(out.dtype.element_ty)
    mask = is_head[:, None] & is_channel[None, :]
    tl.store(out + head[:, None] * D + channel[None, :], result, mask=mask)


@triton.jit
def _decode(
    out, q, k, v, k_scale, v_scale, kv_lens, table, partial, tops, arrivals,
    score_scale, window, part_positions,
    q_stride, head_stride, block_stride, table_stride,
    GROUP: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BN: tl.constexpr, PAGE: tl.constexpr,
    JOINED: tl.constexpr, FLOAT8: tl.constexpr, KV_HEADS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    pair, part = tl.program_id(0), tl.program_id(1)
    sequence, kv_head = pair // KV_HEADS, pair % KV_HEADS
    k_factor, v_factor = scale_of(k_scale, kv_head), scale_of(v_scale, kv_head)
    if PDL:
        tl.extra.cuda.gdc_wait()
    length = tl.load(kv_lens + sequence)
    oldest = tl.maximum(length - window, 0)
    start = oldest // BN * BN
    parts = tl.maximum(tl.cdiv(length - start, part_positions), 1)
    if part < parts:
        row, channel = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
        is_head, is_channel = row < GROUP, channel < D
        mask = is_head[:, None] & is_channel[None, :]
        dtype: tl.constexpr = q.dtype.element_ty
        at = row[:, None] * D + channel[None, :]
        q += sequence.to(tl.int64) * q_stride + kv_head * (GROUP * D)
        queries = tl.load(q + at, mask=mask, other=0.0)  # [ROWS, BLOCK_D]
        table += sequence.to(tl.int64) * table_stride
        k += kv_head.to(tl.int64) * head_stride
        v += kv_head.to(tl.int64) * head_stride
        factor = score_scale * k_factor
        output = tl.zeros([ROWS, BLOCK_D], tl.float32)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        begin = start + part * part_positions
        for first in range(begin, tl.minimum(begin + part_positions, length), BN):
            positions = first + tl.arange(0, BN)
            is_valid = (positions >= oldest) & (positions < length)
            rows = tile_rows(table, positions, is_valid, block_stride, PAGE, D)
            keys = load_tile(k, rows, is_valid, dtype, D, BLOCK_D, FLOAT8)
            values = load_tile(v, rows, is_valid, dtype, D, BLOCK_D, FLOAT8)
            scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * factor
            scores = tl.where(is_valid[None, :], scores, float("-inf"))
            output, top, total = attend_tile((output, top, total), scores, values, dtype)
        # A sequence without positions is padding: its output is zero.
        output *= v_factor / tl.where(total > 0, total, 1.0)[:, None]
        out += pair.to(tl.int64) * (GROUP * D)
        if parts == 1:
            tl.store(out + at, output.to(dtype), mask=mask)
        else:
            most = tl.num_programs(1)
            partial += pair.to(tl.int64) * most * (GROUP * D)
            tops += pair * most * GROUP
            tl.store(partial + part * (GROUP * D) + at, output, mask=mask)
            tl.store(tops + part * GROUP + row, top + tl.log2(total), mask=is_head)
            # All threads' stores come before the one thread's arrival, which releases them.
            tl.debug_barrier()
            if tl.atomic_add(arrivals + pair, 1, sem="acq_rel", scope="gpu") == parts - 1:
                tl.store(arrivals + pair, 0)
                _join(out, partial, tops, parts, GROUP, HEADS, D, BLOCK_D, JOINED)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


class Split(NamedTuple):
    """How the positions of a sequence are cut: at most `parts` runs of `positions` each."""

    parts: int
    positions: int


@lru_cache(maxsize=4096)
def plan_split(pairs: int, bound: int, tile: int, places: int) -> Split:
    """The cheapest split for `pairs` (sequence, kv head) pairs of up to `bound` positions on a
    GPU with `places` programs at once, counted in tiles of a program."""
    tiles = max(1, -(-bound // tile))
    most = 1 if pairs > MAX_SPLIT_PAIRS else min(tiles, MAX_PARTS)

    def cost(parts: int) -> float:
        waves = -(-pairs * parts // places)
        join = parts * PART_COST if parts > 1 else 0
        return waves * (-(-tiles // parts) + PROGRAM_COST) + join

    per_part = -(-tiles // min(range(1, most + 1), key=cost))
    return Split(-(-tiles // per_part), per_part * tile)


@cache
def _arrivals(device: torch.device) -> Tensor:
    """Zero between launches: whoever joins a pair's parts resets its count. Launches that share
    it must not overlap, which those of one stream do not."""
    if device.type == "cuda":
        assert not torch.cuda.is_current_stream_capturing(), "warm up before capturing a graph"
    return torch.zeros(MAX_SPLIT_PAIRS, dtype=torch.int32, device=device)


def decode(q_THD: Tensor, layer: LayerCache, batch: Attending) -> Tensor:
    """`attention` where every sequence has one token; of `kv_lens` the greatest counts, as a
    bound."""
    (tokens, heads, dim), device = q_THD.shape, q_THD.device
    k, v = stored(layer.k), stored(layer.v)
    kv_heads, block_tokens = k.shape[1:3]
    is_wide = q_THD.dtype == torch.float32
    group, tile = heads // kv_heads, 32 if is_wide else 64
    bound = max(batch.kv_lens)
    if batch.window is not None:
        # The first tile may begin before the window.
        bound = min(bound, batch.window + tile - 1)
    split = plan_split(tokens * kv_heads, bound, tile, RESIDENT * processors(device))
    out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=device)
    partial = tops = arrivals = out_THD
    if split.parts > 1:
        shape = (tokens * kv_heads, split.parts, group)
        partial = torch.empty(*shape, dim, dtype=torch.float32, device=device)
        tops = torch.empty(shape, dtype=torch.float32, device=device)
        arrivals = _arrivals(device)
    _decode[(tokens * kv_heads, split.parts)](
        out_THD, q_THD, k, v, layer.k_scale_G, layer.v_scale_G,
        batch.kv_lens_B, batch.block_table_BM, partial, tops, arrivals,
        batch.scale * LOG2_E, batch.window or NO_WINDOW, split.positions,
        q_THD.stride(0), k.stride(1), k.stride(0), batch.block_table_BM.stride(0),
        GROUP=group, HEADS=triton.next_power_of_2(group),
        ROWS=max(MIN_ROWS, triton.next_power_of_2(group)),
        D=dim, BLOCK_D=max(16, triton.next_power_of_2(dim)), BN=tile,
        PAGE=0 if batch.block_table_BM.shape[1] == 1 else block_tokens,
        JOINED=JOINED, FLOAT8=has_float8(device), KV_HEADS=kv_heads,
        num_warps=4, num_stages=1 if is_wide else 3, **launch_options(device),
    )  # fmt: skip
    return out_THD
