"""From requests to steps: packing tokens of several sequences into one pass of the network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, chain
from operator import add
from typing import NamedTuple

import torch
from torch import Tensor

from engine.cache import BlockTables
from engine.kernels.api import Attending
from engine.models.yi import Step
from engine.transfer import longs, to_device


class Segment(NamedTuple):
    """Consecutive new tokens of one row. `length` is what dynamic RoPE scales by: the whole
    prompt's length while it is prefilled, the current length afterwards."""

    row: int
    tokens: Sequence[int]
    length: int


class Packer:
    """Turns segments into steps and keeps each row's cached length and cache blocks."""

    def __init__(
        self,
        tables: BlockTables,
        *,
        scale: float,
        window: int | None,
        device: torch.device,
    ):
        self.tables = tables
        self.scale, self.window, self.device = scale, window, device

    def pack(self, segments: Sequence[Segment], outputs: Sequence[int]) -> Step:
        """One step; `outputs` are the positions in the packed batch whose logits are wanted."""
        rows = [segment.row for segment in segments]
        query_lens = tuple(len(segment.tokens) for segment in segments)
        starts = [self._append(segment) for segment in segments]
        kv_lens = tuple(map(add, starts, query_lens))
        table_BM = self.tables.table(rows)
        spread = _spread(starts, query_lens, table_BM, self.tables.block_tokens)
        lengths_B = longs(segment.length for segment in segments)
        attending = Attending(
            query_lens=query_lens,
            kv_lens=kv_lens,
            kv_lens_B=self._send(longs(kv_lens).int()),
            query_starts_B1=self._send(longs(accumulate(query_lens, initial=0)).int()),
            block_table_BM=self._send(table_BM),
            slots_T=self._send(spread.slots_T),
            window=self.window,
            scale=self.scale,
        )
        return Step(
            self._send(longs(chain.from_iterable(segment.tokens for segment in segments))),
            self._send(spread.positions_T),
            self._send(lengths_B[spread.segments_T]),
            attending,
            self._send(longs(outputs)),
        )

    def _append(self, segment: Segment) -> int:
        """Make room for a segment; the position of its first token."""
        start = self.tables.length(segment.row)
        self.tables.append(segment.row, len(segment.tokens))
        if self.window is not None:
            self.tables.trim(segment.row, start - self.window + 1)
        return start

    def _send(self, x: Tensor) -> Tensor:
        return to_device(x, self.device)


class _Spread(NamedTuple):
    """Where each token of a packed batch belongs, int64 on the CPU."""

    segments_T: Tensor
    positions_T: Tensor
    slots_T: Tensor


def _spread(
    starts: Sequence[int], query_lens: Sequence[int], table_BM: Tensor, block_tokens: int
) -> _Spread:
    """Of segments that begin at the positions `starts`."""
    counts_B = longs(query_lens)
    segments_T = torch.arange(len(starts)).repeat_interleave(counts_B)
    # A token's position is its place in the batch and what its segment is ahead of that.
    ahead_B = longs(starts) + counts_B - counts_B.cumsum(0)
    positions_T = torch.arange(len(segments_T)) + ahead_B[segments_T]
    blocks_T = table_BM[segments_T, positions_T // block_tokens].long()
    slots_T = blocks_T * block_tokens + positions_T % block_tokens
    return _Spread(segments_T, positions_T, slots_T)


class Chunk(NamedTuple):
    """The tokens [start, stop) of one prompt."""

    row: int
    start: int
    stop: int


def plan_prefill(lengths: Sequence[int], max_tokens: int | None) -> Iterator[list[Chunk]]:
    """Cut prompts of the given lengths into steps of at most `max_tokens` packed tokens."""
    room = limit = max_tokens or sum(lengths)
    step: list[Chunk] = []
    for row, length in enumerate(lengths):
        start = 0
        while start < length:
            stop = min(length, start + room)
            step.append(Chunk(row, start, stop))
            room -= stop - start
            start = stop
            if not room:
                yield step
                step, room = [], limit
    if step:
        yield step
