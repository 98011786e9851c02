"""The id of each row's greatest logit. Programs share a row's vocabulary; the last one of a row to
arrive joins what they found."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.triton._launch import launch_options, processors

TILE = 1024
WARPS = 4
# Programs wanted per multiprocessor: each has one load under way.
RESIDENT = 8

MAX_INT = tl.constexpr(2**31 - 1)
LEAST = tl.constexpr(-(2**63))


@triton.jit
def _rank(logits, ids):
    """int64 in the order of logits and, among equal ones, against that of ids."""
    values = logits.to(tl.float32)
    # Both zeros are equal. Bits have the order of numbers once those of negative ones are turned.
    bits = tl.where(values == 0, 0.0, values).to(tl.int32, bitcast=True)
    ordered = tl.where(values != values, MAX_INT, bits ^ ((bits >> 31) & MAX_INT))
    return (ordered.to(tl.int64) << 32) | (ids ^ MAX_INT).to(tl.int64)


@triton.jit
def _id(rank):
    return (rank & MAX_INT) ^ MAX_INT


@triton.jit
def _argmax(
    tokens, logits, partial, arrivals, vocab, row_stride, part_tiles,
    TILE: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    logits += row * row_stride
    ranks = tl.full([TILE], LEAST, tl.int64)
    for tile in range(part * part_tiles, (part + 1) * part_tiles):
        ids = tile * TILE + tl.arange(0, TILE)
        tile_logits = tl.load(logits + ids, mask=ids < vocab, other=float("-inf"))  # [TILE]
        ranks = tl.maximum(ranks, _rank(tile_logits, ids))
    best = tl.max(ranks, axis=0)
    if PARTS == 1:
        tl.store(tokens + row, _id(best))
    else:
        parts = tl.num_programs(1)
        partial += row * parts
        tl.store(partial + part, best)
        # The store comes before the arrival, which releases it.
        tl.debug_barrier()
        if tl.atomic_add(arrivals + row, 1, sem="acq_rel", scope="gpu") == parts - 1:
            tl.store(arrivals + row, 0)
            at = tl.arange(0, PARTS)
            # Other multiprocessors wrote what is read here: past the first-level cache.
            bests = tl.load(partial + at, mask=at < parts, other=LEAST, cache_modifier=".cg")
            tl.store(tokens + row, _id(tl.max(bests, axis=0)))


@cache
def _arrivals(device: torch.device) -> Tensor:
    """Zero between launches: the last program of a row resets its count. Launches that share it
    must not overlap, which those of one stream do not."""
    if device.type == "cuda":
        assert not torch.cuda.is_current_stream_capturing(), "warm up before capturing a graph"
    return torch.zeros(_places(device), dtype=torch.int32, device=device)


def _places(device: torch.device) -> int:
    """Programs that fill the device: as many rows or more are not split."""
    return RESIDENT * processors(device)


def argmax(logits_BV: Tensor) -> Tensor:
    (rows, vocab), device = logits_BV.shape, logits_BV.device
    assert logits_BV.stride(1) == 1
    tiles = triton.cdiv(vocab, TILE)
    part_tiles = min(tiles, triton.cdiv(tiles * rows, _places(device)))
    parts = triton.cdiv(tiles, part_tiles)
    tokens_B = torch.empty(rows, dtype=torch.int64, device=device)
    partial = arrivals = tokens_B
    if parts > 1:
        partial = torch.empty(rows, parts, dtype=torch.int64, device=device)
        arrivals = _arrivals(device)
    _argmax[(rows, parts)](
        tokens_B, logits_BV, partial, arrivals, vocab, logits_BV.stride(0), part_tiles,
        TILE=TILE, PARTS=triton.next_power_of_2(parts), num_warps=WARPS, **launch_options(device),
    )  # fmt: skip
    return tokens_B
