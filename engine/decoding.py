"""How rows of logits become tokens: sampling or beam search behind one interface."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from engine.beam import BeamSearch, Hypothesis
from engine.sampling import FinishReason, Sampler, SamplingParams


@dataclass(frozen=True)
class Beam:
    """One continuation of a prompt: new tokens, the end id left out (a stop word is kept).

    `log_probs` has an entry per token when they were asked for; `cum_log_prob` is their sum, the
    end id's included (for beams: the hypothesis' score before the length penalty).
    """

    tokens: tuple[int, ...]
    reason: FinishReason
    log_probs: tuple[float, ...] | None = None
    cum_log_prob: float | None = None


class Choice(NamedTuple):
    """What a step decided, on the host: a token per row, whether the row is done, and the row of
    the previous step that each row continues (None: itself)."""

    tokens: list[int]
    finished: list[bool]
    parents: list[int] | None


class Decoder(Protocol):
    """Decides the next tokens of a batch from logits of any floating-point dtype. Rows of one
    request are next to each other."""

    beams: int

    def step(self, logits_RV: Tensor) -> Choice: ...

    def results(self) -> list[tuple[Beam, ...]]:
        """Each request's continuations so far, best first."""


class SamplingDecoder:
    """One row per request, greedy or sampled."""

    beams = 1

    def __init__(
        self,
        params: Sequence[SamplingParams],
        prompts: Sequence[Sequence[int]],
        vocab_size: int,
        device: torch.device,
    ):
        self._params = params
        self._sampler = Sampler(params, prompts, vocab_size, device)
        self._log_probs: list[Tensor] = []

    def step(self, logits_RV: Tensor) -> Choice:
        sampled = self._sampler.step(logits_RV)
        if sampled.log_probs_B is not None:
            self._log_probs.append(sampled.log_probs_B)
        finished = self._sampler.is_finished().tolist()
        return Choice(sampled.tokens_B.tolist(), finished, None)

    def results(self) -> list[tuple[Beam, ...]]:
        log_probs = torch.stack(self._log_probs, 1).tolist() if self._log_probs else None
        return read_beams(self._sampler, self._params, log_probs)


def read_beams(
    sampler: Sampler, params: Sequence[SamplingParams], log_probs: Sequence[list[float]] | None
) -> list[tuple[Beam, ...]]:
    """What a sampler has chosen for the requests `params`, its first rows; `log_probs` has a list
    of steps per row. Waits for the device."""
    reasons = sampler.reasons_B.tolist()
    beams = []
    for row, (one, tokens) in enumerate(zip(params, sampler.results(), strict=False)):
        scores = None
        if log_probs is not None and one.log_probs:
            scores = log_probs[row][: len(tokens)]
        beams.append((_beam(tokens, FinishReason(reasons[row]), scores),))
    return beams


class BeamDecoder:
    """`beams` rows per request."""

    def __init__(
        self,
        params: Sequence[SamplingParams],
        prompts: Sequence[Sequence[int]],
        vocab_size: int,
        device: torch.device,
    ):
        self.beams = params[0].num_beams
        self._search = BeamSearch(params, prompts, vocab_size, device)
        self._is_first = True

    def step(self, logits_RV: Tensor) -> Choice:
        if self._is_first:
            # The prompt was computed once; its beams start from the same logits.
            logits_RV = logits_RV.repeat_interleave(self.beams, 0)
            self._is_first = False
        chosen = self._search.step(logits_RV.float())
        finished = chosen.finished_B.repeat_interleave(self.beams).tolist()
        return Choice(chosen.tokens_R.tolist(), finished, chosen.parents_R.tolist())

    def results(self) -> list[tuple[Beam, ...]]:
        return [tuple(_hypothesis_beam(h) for h in found) for found in self._search.results()]


def make_decoder(
    params: Sequence[SamplingParams],
    prompts: Sequence[Sequence[int]],
    vocab_size: int,
    device: torch.device,
) -> Decoder:
    kind = BeamDecoder if params[0].num_beams > 1 else SamplingDecoder
    return kind(params, prompts, vocab_size, device)


def _beam(tokens: list[int], reason: FinishReason, scores: list[float] | None) -> Beam:
    kept = len(tokens) - (reason is FinishReason.END_ID)
    if scores is None:
        return Beam(tuple(tokens[:kept]), reason)
    return Beam(tuple(tokens[:kept]), reason, tuple(scores[:kept]), sum(scores))


def _hypothesis_beam(hypothesis: Hypothesis) -> Beam:
    kept = len(hypothesis.tokens) - (hypothesis.reason is FinishReason.END_ID)
    return Beam(
        tuple(hypothesis.tokens[:kept]), hypothesis.reason, None, cum_log_prob=hypothesis.log_prob
    )
