"""The id of each row's greatest logit."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.triton._launch import launch_options
from engine.kernels.triton._vocabulary import arrive, load_found, split

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
def _argmax(
    tokens, logits, found, arrivals, vocab, row_stride, part_tiles,
    TILE: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    parts = tl.num_programs(1)
    logits += row * row_stride
    found += row * parts
    ranks = tl.full([TILE], LEAST, tl.int64)
    for tile in range(part * part_tiles, (part + 1) * part_tiles):
        ids = tile * TILE + tl.arange(0, TILE)
        tile_logits = tl.load(logits + ids, mask=ids < vocab, other=float("-inf"))  # [TILE]
        ranks = tl.maximum(ranks, _rank(tile_logits, ids))
    tl.store(found + part, tl.max(ranks, axis=0))
    if arrive(arrivals + row, parts, PARTS):
        best = tl.max(load_found(found, parts, LEAST, PARTS), axis=0)
        tl.store(tokens + row, (best & MAX_INT) ^ MAX_INT)


def argmax(logits_BV: Tensor) -> Tensor:
    (rows, vocab), device = logits_BV.shape, logits_BV.device
    assert logits_BV.stride(1) == 1
    shared = split(rows, vocab, device)
    tokens_B = torch.empty(rows, dtype=torch.int64, device=device)
    _argmax[(rows, shared.parts)](
        tokens_B, logits_BV, shared.found, shared.arrivals,
        vocab, logits_BV.stride(0), shared.tiles, **shared.options, **launch_options(device),
    )  # fmt: skip
    return tokens_B
