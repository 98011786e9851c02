"""Deterministic beam search over one decode step's logits, with the results of transformers 5.

Each request keeps `num_beams` running beams and its best `num_beams` finished hypotheses. A step is
tensor code of fixed shape and never waits for the host. It knows no model and no cache: it says
which beam each beam continues, and the caller reorders.
"""

# Dimensions:
#   B requests   W beams of a request   R = B * W rows, request-major   V vocabulary
#   C candidate continuations of a request   N new tokens   L tokens of the longest stop word

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from engine.penalties import (
    Device,
    DeviceState,
    History,
    Penalties,
    check_tokens,
    find_lookback,
    round_up,
)
from engine.sampling import FinishReason, SamplingParams, Stops

# Score of what must not win: far below any log probability, yet finite, so that dead beams keep an
# order among themselves.
DEAD = -1.0e9


class BeamStep(NamedTuple):
    """What every row is to continue with; rows of finished requests get pad_id and themselves."""

    tokens_R: Tensor  # int64
    parents_R: Tensor  # int64; row, counted over the whole batch, whose state the row takes over
    finished_B: Tensor  # bool


class Hypothesis(NamedTuple):
    """`tokens` are new ones and end with the end id, if one came; `log_prob` is the sum of the
    processed log probabilities and `score` that sum / number of tokens ** length_penalty."""

    tokens: list[int]
    log_prob: float
    score: float
    reason: FinishReason


class Hypotheses(DeviceState):
    """The best finished hypotheses per request, best first; a place still free has no reason."""

    def __init__(self, batch: int, beams: int, *, steps: int, device: Device):
        super().__init__()
        self.scores_BW = nn.Buffer(torch.full((batch, beams), DEAD, device=device))
        self.log_probs_BW = nn.Buffer(torch.full((batch, beams), DEAD, device=device))
        self.reasons_BW = nn.Buffer(torch.zeros(batch, beams, dtype=torch.int64, device=device))
        self.lengths_BW = nn.Buffer(torch.zeros(batch, beams, dtype=torch.int64, device=device))
        self.tokens_BWN = nn.Buffer(
            torch.zeros(batch, beams, steps, dtype=torch.int64, device=device)
        )

    def merge(
        self,
        scores_BW: Tensor,
        log_probs_BW: Tensor,
        *,
        reasons_BW: Tensor,
        lengths_BW: Tensor,
        tokens_BWN: Tensor,
    ) -> None:
        """Keep the W best of what is here and what comes; only what has a reason has ended."""
        arriving = {
            "scores_BW": scores_BW.masked_fill(reasons_BW == FinishReason.NOT_FINISHED.value, DEAD),
            "log_probs_BW": log_probs_BW,
            "reasons_BW": reasons_BW,
            "lengths_BW": lengths_BW,
        }
        merged = {name: torch.cat([getattr(self, name), new], 1) for name, new in arriving.items()}
        kept_BW = merged["scores_BW"].topk(self.scores_BW.shape[1]).indices
        for name, both in merged.items():
            getattr(self, name).copy_(both.gather(1, kept_BW))
        both = torch.cat([self.tokens_BWN, tokens_BWN], 1)
        self.tokens_BWN.copy_(both.gather(1, kept_BW[..., None].expand_as(tokens_BWN)))

    def is_full(self) -> Tensor:
        """Whether no place is free; bool [B]."""
        return (self.reasons_BW != FinishReason.NOT_FINISHED.value).all(1)


class Patience(nn.Module):
    """When a request's search ends before its length does.

    Tables over the number of new tokens n: `norms_BN` is n ** length_penalty; `bounds_BN` is the
    norm under which the best running beam is compared with the finished ones.
    """

    def __init__(self, params: Sequence[SamplingParams], steps: int, device: Device):
        super().__init__()
        counts = torch.arange(steps, dtype=torch.float64).clamp_(min=1)
        norms = torch.stack([counts**p.length_penalty for p in params])
        bounds = norms.clone()
        for row, p in enumerate(params):
            if p.early_stopping not in (0, 1) and p.length_penalty > 0:
                # The longest continuation then has the best possible score.
                bounds[row] = norms[row, p.max_new_tokens]
        self.norms_BN = nn.Buffer(norms.to(torch.float32).to(device))
        self.bounds_BN = nn.Buffer(bounds.to(torch.float32).to(device))
        stops_full = [p.early_stopping == 1 for p in params]
        self.stops_full_B = nn.Buffer(torch.tensor(stops_full).to(device))

    def is_over(self, best_B: Tensor, num_new_B: Tensor, finished: Hypotheses) -> Tensor:
        """Whether no running beam is worth going on with; bool [B]. `best_B` is the log
        probability of the best one."""
        bound_B = self.bounds_BN.gather(1, num_new_B[:, None]).squeeze(1)
        is_hopeless_B = best_B / bound_B <= finished.scores_BW.amin(1)
        return is_hopeless_B | (finished.is_full() & self.stops_full_B)


class BeamSearch(DeviceState):
    """Beam search for a batch of requests with one number of beams; all else is per request.

    The caller runs the prompts once per request and gives every beam of a request the same logits
    and cache at the first step. Penalties and bans act on log probabilities.
    """

    def __init__(
        self,
        params: Sequence[SamplingParams],
        prompts: Sequence[Sequence[int]],
        vocab_size: int,
        device: Device,
    ):
        super().__init__()
        assert len(params) == len(prompts) > 0, "one SamplingParams per prompt"
        assert len({p.num_beams for p in params}) == 1, "one number of beams per batch"
        check_tokens(params, prompts, vocab_size)
        self.vocab_size, self.beams = vocab_size, params[0].num_beams
        self.num_candidates = _count_candidates(params, vocab_size)
        # Tables reach from 0 to one token past a full request, which steps on without effect.
        batch, self.steps = len(params), round_up(2 + max(p.max_new_tokens for p in params))
        rows = [p for p in params for _ in range(self.beams)]
        self.history = History(
            [prompt for prompt in prompts for _ in range(self.beams)],
            [p.max_new_tokens for p in rows],
            lookback=find_lookback(params),
            vocab_size=vocab_size,
            device=device,
        )
        self.penalties = Penalties(rows, vocab_size, device)
        self.stops = Stops(params, vocab_size, device)
        self.patience = Patience(params, self.steps, device)
        self.finished = Hypotheses(batch, self.beams, steps=self.steps, device=device)
        # All beams start equal, so only the first may propose continuations at the first step.
        scores_BW = torch.full((batch, self.beams), DEAD)
        scores_BW[:, 0] = 0.0
        self.scores_BW = nn.Buffer(scores_BW.to(device))
        self.done_B = nn.Buffer(torch.zeros(batch, dtype=torch.bool, device=device))
        self.pad_B1 = nn.Buffer(torch.tensor([[p.pad_id] for p in params]).to(device))

    def extra_repr(self) -> str:
        return f"vocab={self.vocab_size}, beams={self.beams}, candidates={self.num_candidates}"

    def step(self, logits_RV: Tensor) -> BeamStep:
        """Continue the beams of every request that has not finished. `logits_RV` is float32."""
        assert logits_RV.dtype == torch.float32 and logits_RV.shape[1] == self.vocab_size
        log_probs_RV = self.penalties(logits_RV.log_softmax(-1), self.history)
        totals_BC, parents_BC, tokens_BC = self._find_candidates(log_probs_RV)
        reasons_BC = self._find_reasons(parents_BC, tokens_BC)
        self._finish(totals_BC, parents_BC, tokens_BC, reasons_BC)
        ends_BC = reasons_BC != FinishReason.NOT_FINISHED.value
        # Ending candidates sink by a constant; enough others remain to fill the beams.
        scores_BW, chosen_BW = (totals_BC + ends_BC * DEAD).topk(self.beams)
        parents_BW = parents_BC.gather(1, chosen_BW)
        tokens_BW = tokens_BC.gather(1, chosen_BW)
        self._advance(scores_BW, parents_BW, tokens_BW)
        is_over_B = self.patience.is_over(self.scores_BW[:, 0], self._num_new(), self.finished)
        self.done_B.logical_or_(is_over_B | ends_BC.all(1))
        done_B1 = self.done_B[:, None]
        own_BW = torch.arange(self.beams, device=logits_RV.device).expand_as(parents_BW)
        return BeamStep(
            tokens_R=torch.where(done_B1, self.pad_B1, tokens_BW).flatten(),
            parents_R=self._to_rows(torch.where(done_B1, own_BW, parents_BW)).flatten(),
            finished_B=self.done_B.clone(),
        )

    def results(self) -> list[list[Hypothesis]]:
        """Per request its finished hypotheses, best first; waits for the device.

        After all requests finished there are `num_beams` of each, unless so much is banned that
        fewer could end: a missing one is empty, not finished, with log probability -inf.
        """
        state = self.finished
        columns = (state.reasons_BW, state.tokens_BWN, state.lengths_BW)
        columns = (*columns, state.log_probs_BW, state.scores_BW)
        requests = zip(*(column.tolist() for column in columns), strict=True)
        return [[_make_hypothesis(*place) for place in zip(*r, strict=True)] for r in requests]

    def _num_new(self) -> Tensor:
        return self.history.num_new()[:: self.beams]

    def _to_rows(self, parents_BX: Tensor) -> Tensor:
        offsets_B = torch.arange(
            0, len(self.done_B) * self.beams, self.beams, device=parents_BX.device
        )
        return parents_BX + offsets_B[:, None]

    def _find_candidates(self, log_probs_RV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The best continuations: total log probability, parent beam and token, each [B, C]."""
        totals_RV = self.scores_BW.view(-1, 1) + log_probs_RV
        totals_BC, places_BC = totals_RV.view(len(self.done_B), -1).topk(self.num_candidates)
        return totals_BC, places_BC // self.vocab_size, places_BC % self.vocab_size

    def _find_reasons(self, parents_BC: Tensor, tokens_BC: Tensor) -> Tensor:
        """Why candidates end their hypothesis, if they do; int64 [B, C]."""
        tails_RL = self.history.tail(max(0, self.stops.tail_length - 1))
        tails_BCL = torch.cat([tails_RL[self._to_rows(parents_BC)], tokens_BC[..., None]], -1)
        return self.stops.find_reasons(tokens_BC, tails_BCL, self._num_new() + 1)

    def _finish(
        self, totals_BC: Tensor, parents_BC: Tensor, tokens_BC: Tensor, reasons_BC: Tensor
    ) -> None:
        """Offer the ending ones among the best W candidates to the finished hypotheses."""
        totals_BW, parents_BW, tokens_BW, reasons_BW = (
            t[:, : self.beams] for t in (totals_BC, parents_BC, tokens_BC, reasons_BC)
        )
        place_BW = self._num_new()[:, None].expand_as(tokens_BW)
        sequences_RN = self.history.new_tokens(self.steps)
        sequences_BWN = sequences_RN[self._to_rows(parents_BW)]
        sequences_BWN.scatter_(2, place_BW[..., None], tokens_BW[..., None])
        norms_BW = self.patience.norms_BN.gather(1, place_BW + 1)
        self.finished.merge(
            totals_BW / norms_BW,
            totals_BW,
            reasons_BW=reasons_BW.masked_fill(
                self.done_B[:, None], FinishReason.NOT_FINISHED.value
            ),
            lengths_BW=place_BW + 1,
            tokens_BWN=sequences_BWN,
        )

    def _advance(self, scores_BW: Tensor, parents_BW: Tensor, tokens_BW: Tensor) -> None:
        """Make the chosen continuations the running beams of requests that are not done."""
        done_B1 = self.done_B[:, None]
        self.scores_BW.copy_(torch.where(done_B1, self.scores_BW, scores_BW))
        # A request that is done may be reordered freely: its beams are read no more.
        self.history.reorder(self._to_rows(parents_BW).flatten())
        alive_R = (~done_B1).expand_as(tokens_BW).flatten()
        self.history.append(tokens_BW.flatten(), alive_R)


def _count_candidates(params: Sequence[SamplingParams], vocab_size: int) -> int:
    """Continuations to look at per request, so that W remain when all that can end do."""
    beams = params[0].num_beams
    endings = max(len({*p.end_ids, *(word[-1] for word in p.stop_words)}) for p in params)
    return min(1 + max(1, endings), vocab_size) * beams


def _make_hypothesis(
    reason: int, tokens: list[int], length: int, log_prob: float, score: float
) -> Hypothesis:
    if reason == FinishReason.NOT_FINISHED:
        return Hypothesis([], -math.inf, -math.inf, FinishReason.NOT_FINISHED)
    return Hypothesis(tokens[:length], log_prob, score, FinishReason(reason))
