"""Rows as long as the vocabulary, which several programs share: the last one of a row to arrive
joins what they found."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.triton._launch import processors

TILE = 1024
WARPS = 4
# Programs wanted per multiprocessor: each has one load under way.
RESIDENT = 8


@triton.jit
def arrive(arrivals, parts, PARTS: tl.constexpr):
    """Whether all other programs of the row have stored what they found."""
    # All threads' stores come before the one thread's arrival, which releases them.
    tl.debug_barrier()
    if PARTS == 1:
        return True
    is_last = tl.atomic_add(arrivals, 1, sem="acq_rel", scope="gpu") == parts - 1
    if is_last:
        tl.store(arrivals, 0)
    return is_last


@triton.jit
def load_found(found, parts, other, PARTS: tl.constexpr):
    """[PARTS] what the row's programs have stored, past the first-level cache: other
    multiprocessors wrote it."""
    at = tl.arange(0, PARTS)
    return tl.load(found + at, mask=at < parts, other=other, cache_modifier=".cg")


class Split(NamedTuple):
    """Programs of a row, tiles of each, and where they meet."""

    parts: int
    tiles: int
    found: Tensor  # [rows, parts]
    arrivals: Tensor  # int32 [rows] at least, zero between launches

    @property
    def options(self) -> dict[str, int]:
        return {"TILE": TILE, "PARTS": triton.next_power_of_2(self.parts), "num_warps": WARPS}


def split(
    rows: int, vocab: int, device: torch.device, *, found: torch.dtype = torch.int64
) -> Split:
    """How rows of the vocabulary's size are shared; a program finds one number of type `found`."""
    places = RESIDENT * processors(device)
    tiles = triton.cdiv(vocab, TILE)
    # As many rows as places are not split.
    part_tiles = min(tiles, triton.cdiv(tiles * rows, places))
    parts = triton.cdiv(tiles, part_tiles)
    numbers = torch.empty(rows, parts, dtype=found, device=device)
    return Split(parts, part_tiles, numbers, _arrivals(places, device))


@cache
def _arrivals(places: int, device: torch.device) -> Tensor:
    """Launches that share it must not overlap, which those of one stream do not."""
    if device.type == "cuda":
        assert not torch.cuda.is_current_stream_capturing(), "warm up before capturing a graph"
    return torch.zeros(places, dtype=torch.int32, device=device)
