"""From requests to steps: packing tokens of several sequences into one pass of the network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from engine.cache import BlockTables
from engine.kernels.api import Attending
from engine.models.yi import Step


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
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        lengths: list[int] = []
        for segment in segments:
            start = self.tables.length(segment.row)
            slots += self.tables.append(segment.row, len(segment.tokens))
            tokens += segment.tokens
            positions += range(start, start + len(segment.tokens))
            lengths += [segment.length] * len(segment.tokens)
            if self.window is not None:
                self.tables.trim(segment.row, start - self.window + 1)
        rows = [segment.row for segment in segments]
        query_lens = tuple(len(segment.tokens) for segment in segments)
        kv_lens = tuple(self.tables.length(row) for row in rows)
        starts = torch.tensor((0, *query_lens), dtype=torch.int32).cumsum(0, dtype=torch.int32)
        attending = Attending(
            query_lens=query_lens,
            kv_lens=kv_lens,
            kv_lens_B=torch.tensor(kv_lens, dtype=torch.int32).to(self.device),
            query_starts_B1=starts.to(self.device),
            block_table_BM=self.tables.table(rows).to(self.device),
            slots_T=self._long(slots),
            window=self.window,
            scale=self.scale,
        )
        return Step(
            self._long(tokens),
            self._long(positions),
            self._long(lengths),
            attending,
            self._long(outputs),
        )

    def _long(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64).to(self.device)


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
