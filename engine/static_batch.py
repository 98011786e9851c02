"""One static batch from prefill to its last token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from engine.batch import Packer, Segment, plan_prefill
from engine.cache import KVCache
from engine.comm import Group
from engine.decoding import Choice, Decoder
from engine.models.yi import Yi


class StaticBatch:
    """Prompts that start together; finished rows leave the packed batch, nothing joins it.

    `decoder` is None except on rank `decides_on` of `group`, whose choices the others follow.
    With `context_logits` the prompts' logits are kept there: one fp32 [prompt, V] CPU tensor each.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        beams: int,
        *,
        decoder: Decoder | None,
        network: Yi,
        cache: KVCache,
        packer: Packer,
        group: Group,
        decides_on: int,
        max_tokens: int | None = None,
        context_logits: bool = False,
        generation_logits: bool = False,
    ):
        self.decoder = decoder
        self.context_logits: list[Tensor] = []
        self._prompts, self._beams = prompts, beams
        self._network, self._cache, self._packer = network, cache, packer
        self._group, self._decides_on, self._max_tokens = group, decides_on, max_tokens
        self._wants_context, self._wants_generation = context_logits, generation_logits
        self._last = [0] * (len(prompts) * beams)
        self._live = [True] * (len(prompts) * beams)
        self._steps: list[Tensor] = []
        packer.tables.open(len(prompts) * beams)

    @property
    def is_finished(self) -> bool:
        return not any(self._live)

    def run(self) -> Iterator[None]:
        """Compute to the end; control returns after every token."""
        logits_RV = self.prefill()
        self._fork_beams()
        while True:
            self._follow(self._decide(logits_RV))
            yield
            if self.is_finished:
                return
            logits_RV = self._decode()

    def prefill(self) -> Tensor | None:
        """Compute the prompts; logits [B, V] after each, None except on the last stage."""
        last: list[Tensor] = []
        context: list[list[Tensor]] = [[] for _ in self._prompts]
        lengths = [len(prompt) for prompt in self._prompts]
        for chunks in plan_prefill(lengths, self._max_tokens):
            segments = [
                Segment(c.row * self._beams, self._prompts[c.row][c.start : c.stop], lengths[c.row])
                for c in chunks
            ]
            ends = list(accumulate(len(s.tokens) for s in segments))
            complete = [c.stop == lengths[c.row] for c in chunks]
            tails = [
                end - 1 for end, is_complete in zip(ends, complete, strict=True) if is_complete
            ]
            wanted = range(ends[-1]) if self._wants_context else tails
            logits_RV = self._network(self._packer.pack(segments, wanted), self._cache)
            if logits_RV is None:
                continue
            if self._wants_context and self.decoder is not None:
                parts = logits_RV.cpu().float().split([len(s.tokens) for s in segments])
                for chunk, part in zip(chunks, parts, strict=True):
                    context[chunk.row].append(part)
            last.append(logits_RV[tails] if self._wants_context else logits_RV)
        if self._wants_context and self.decoder is not None:
            self.context_logits = [torch.cat(parts) for parts in context]
        return torch.cat(last) if last else None

    def generation_logits(self) -> list[Tensor]:
        """Logits fp32 [new tokens, V] that each row's tokens were chosen from, on the CPU."""
        if not self._wants_generation or self.decoder is None:
            return []
        steps_BNV = torch.stack(self._steps, 1)
        counts = [len(beams[0].tokens) for beams in self.decoder.results()]
        return [logits_NV[:count] for logits_NV, count in zip(steps_BNV, counts, strict=True)]

    def _decode(self) -> Tensor | None:
        """One token further; logits [rows, V], zeros in rows that have finished."""
        rows = [row for row, live in enumerate(self._live) if live]
        tables = self._packer.tables
        segments = [Segment(row, [self._last[row]], tables.length(row) + 1) for row in rows]
        logits_RV = self._network(self._packer.pack(segments, range(len(rows))), self._cache)
        if logits_RV is None or len(rows) == len(self._live):
            return logits_RV
        full_RV = logits_RV.new_zeros(len(self._live), logits_RV.shape[1])
        full_RV[rows] = logits_RV
        return full_RV

    def _decide(self, logits_RV: Tensor | None) -> Choice:
        """The decoder's choice, the same on every rank."""
        rows = len(self._last)
        message = torch.zeros(3, rows, dtype=torch.int64, device=self._network.device)
        if self.decoder is not None:
            assert logits_RV is not None
            if self._wants_generation:
                self._steps.append(logits_RV.cpu().float())
            choice = self.decoder.step(logits_RV)
            if self._group.size == 1:
                return choice
            parents = range(rows) if choice.parents is None else choice.parents
            message.copy_(torch.tensor([choice.tokens, choice.finished, list(parents)]))
        tokens, finished, parents = self._group.broadcast(message, self._decides_on).tolist()
        return Choice(tokens, [bool(flag) for flag in finished], parents)

    def _follow(self, choice: Choice) -> None:
        if self._beams > 1 and choice.parents is not None:
            self._take_over(choice.parents)
        self._last = choice.tokens
        self._live = [not finished for finished in choice.finished]

    def _fork_beams(self) -> None:
        """Every beam of a prompt continues what the first of them has computed."""
        if self._beams > 1:
            self._take_over([row - row % self._beams for row in range(len(self._last))])

    def _take_over(self, parents: Sequence[int]) -> None:
        tables = self._packer.tables
        longest = max(tables.length(row) for row in range(len(self._last)))
        copies = tables.reorder(parents)
        self._cache.copy_blocks(copies, tokens=min(longest, tables.block_tokens))
