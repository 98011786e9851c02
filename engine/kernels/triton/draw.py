"""Tokens drawn from a softmax, after the best of each row has been found."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.reference import largest_weight
from engine.kernels.triton._launch import launch_options
from engine.kernels.triton._vocabulary import arrive, load_found, split
from engine.kernels.triton.argmax import argmax

LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def _weigh(scores, ids, vocab, best, largest):
    values = tl.load(scores + ids, mask=ids < vocab, other=float("-inf"))  # [TILE]
    return (tl.exp(values - best) * largest).to(tl.int64)


@triton.jit
def _draw(
    tokens, scores, best_ids, uniform, found, arrivals, vocab, row_stride, part_tiles, largest,
    TILE: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    parts = tl.num_programs(1)
    scores += row * row_stride
    found += row * parts
    best = tl.maximum(tl.load(scores + tl.load(best_ids + row)), LOWEST)
    weights = tl.zeros([TILE], tl.int64)
    for tile in range(part * part_tiles, (part + 1) * part_tiles):
        ids = tile * TILE + tl.arange(0, TILE)
        weights += _weigh(scores, ids, vocab, best, largest)
    tl.store(found + part, tl.sum(weights, axis=0))
    if arrive(arrivals + row, parts, PARTS):
        sums = tl.cumsum(load_found(found, parts, 0, PARTS), axis=0)
        total = tl.max(sums, axis=0)
        target = (tl.load(uniform + row) * total.to(tl.float64)).to(tl.int64)
        # The first part whose sum is past the target; none where every token is banned.
        part = tl.sum((sums <= target).to(tl.int32), axis=0)
        before = tl.max(tl.where(sums <= target, sums, 0), axis=0)
        token = vocab - 1
        stop = tl.minimum((part + 1) * part_tiles, tl.cdiv(vocab, TILE))
        for tile in range(part * part_tiles, stop):
            ids = tile * TILE + tl.arange(0, TILE)
            weights = _weigh(scores, ids, vocab, best, largest)
            is_past = before + tl.cumsum(weights, axis=0) > target
            token = tl.minimum(token, tl.min(tl.where(is_past, ids, token), axis=0))
            before += tl.sum(weights, axis=0)
        tl.store(tokens + row, token)


def draw(scores_BV: Tensor, uniform_B: Tensor) -> Tensor:
    (rows, vocab), device = scores_BV.shape, scores_BV.device
    assert scores_BV.stride(1) == 1 and uniform_B.is_contiguous()
    best_B = argmax(scores_BV)
    shared = split(rows, vocab, device)
    tokens_B = torch.empty_like(best_B)
    _draw[(rows, shared.parts)](
        tokens_B, scores_BV, best_B, uniform_B, shared.found, shared.arrivals,
        vocab, scores_BV.stride(0), shared.tiles, largest_weight(vocab),
        **shared.options, **launch_options(device),
    )  # fmt: skip
    return tokens_B
