"""log Σ exp of each row: programs' results are joined as the numbers of a program are."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.triton._launch import launch_options
from engine.kernels.triton._vocabulary import arrive, load_found, split


@triton.jit
def _finite(top):
    """What exponents are reduced by: nothing where that would be infinite."""
    return tl.where(tl.abs(top) == float("inf"), 0.0, top)


@triton.jit
def _join(tops, totals):
    """log Σ totals · exp(tops)"""
    shift = _finite(tl.max(tops, axis=0))
    return tl.log(tl.sum(totals * tl.exp(tops - shift), axis=0)) + shift


@triton.jit
def _logsumexp(
    result, logits, found, arrivals, vocab, row_stride, part_tiles,
    TILE: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    parts = tl.num_programs(1)
    logits += row * row_stride
    found += row * parts
    tops = tl.full([TILE], float("-inf"), tl.float32)
    totals = tl.zeros([TILE], tl.float32)  # Σ exp(logit - top) of a place in all tiles
    for tile in range(part * part_tiles, (part + 1) * part_tiles):
        ids = tile * TILE + tl.arange(0, TILE)
        values = tl.load(logits + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
        new_tops = tl.maximum(tops, values)
        shift = _finite(new_tops)
        totals = totals * tl.exp(tops - shift) + tl.exp(values - shift)
        tops = new_tops
    tl.store(found + part, _join(tops, totals))
    if arrive(arrivals + row, parts, PARTS):
        sums = load_found(found, parts, float("-inf"), PARTS)
        tl.store(result + row, _join(sums, tl.full([PARTS], 1.0, tl.float32)))


def logsumexp(logits_BV: Tensor) -> Tensor:
    (rows, vocab), device = logits_BV.shape, logits_BV.device
    assert logits_BV.stride(1) == 1
    shared = split(rows, vocab, device, found=torch.float32)
    result_B = torch.empty(rows, dtype=torch.float32, device=device)
    _logsumexp[(rows, shared.parts)](
        result_B, logits_BV, shared.found, shared.arrivals,
        vocab, logits_BV.stride(0), shared.tiles, **shared.options, **launch_options(device),
    )  # fmt: skip
    return result_B
