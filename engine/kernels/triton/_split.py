"""How a decode step's attention is cut into programs: by what the host knows, and no more.

Costs are in tiles that a program reads one after the other, about a microsecond each on Hopper,
fitted to measurements (benchmarks/NOTES.md).
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

# What a part costs beyond its tiles, more if it is a loop over several.
PART_COST, LOOP_COST = 0.1, 0.6
# A tile, alone on its multiprocessor and where there is one on each.
TILE_COST, BUSY_COST = 1.2, 1.4
# Waiting for the parts of others, and joining some of them at a time.
WAIT_COST, ROUND_COST = 0.7, 1.3
# (sequence, kv head) pairs times parts, where there are parts to join.
MAX_JOINED = 2048
MAX_PARTS = 128
# Programs that join the parts of a pair, where there are up to FEW_PAIRS and beyond.
JOINERS, BUSY_JOINERS, FEW_PAIRS = 8, 4, 16
# Parts joined at a time.
SOME_PARTS, MANY_PARTS = 16, 32


class Split(NamedTuple):
    """At most `parts` runs of `positions` each, a multiple of `tile`; where there are several,
    `joiners` programs of a pair join them, `at_once` at a time."""

    parts: int
    positions: int
    tile: int
    joiners: int
    at_once: int


@lru_cache(maxsize=4096)
def plan_split(pairs: int, bound: int, tile: int, processors: int) -> Split:
    """The cheapest split for `pairs` (sequence, kv head) pairs of up to `bound` positions, the
    newest of which is not read from the cache, on a GPU with so many multiprocessors."""
    tiles = max(1, -(-(bound - 1) // tile))
    most = max(1, min(tiles, MAX_PARTS, MAX_JOINED // pairs))

    def cost(parts: int) -> float:
        tile_cost = max(TILE_COST, BUSY_COST * pairs * parts / processors)
        each = -(-tiles // parts)
        join = WAIT_COST + ROUND_COST * -(-parts // MANY_PARTS) if parts > 1 else 0
        return (each + (LOOP_COST if each > 1 else PART_COST)) * tile_cost + join

    per_part = -(-tiles // min(range(1, most + 1), key=cost))
    parts = -(-tiles // per_part)
    joiners = JOINERS if pairs <= FEW_PAIRS else BUSY_JOINERS
    return Split(
        parts,
        per_part * tile,
        tile,
        joiners if parts > 1 else 0,
        SOME_PARTS if parts <= SOME_PARTS else MANY_PARTS,
    )
