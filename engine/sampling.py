"""Choosing the next token: request parameters, greedy and sampled decoding, stop detection.

A step is tensor code of fixed shape over persistent state and never waits for the host, so it runs
inside a CUDA graph. It knows token ids only: no text, no model, no cache. Beams are in `beam`.
"""

# Dimensions:
#   B rows, one per request   V vocabulary   C candidates kept by top-k   H history columns
#   N entries of a per-row list (end ids, stop words, steps)   L tokens of the longest stop word
#   X candidate tokens per row

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from engine.errors import RequestError
from engine.kernels import api as ops
from engine.kernels.rows import FinishReason, RowState, StopRules, find_reasons
from engine.penalties import (
    BANNED,
    Device,
    DeviceState,
    History,
    Penalties,
    check_tokens,
    find_lookback,
    make_column,
    pack_words,
    round_up,
)
from engine.transfer import longs, to_device


@dataclass(frozen=True)
class SamplingParams:
    """What one request asks of decoding. Impossible values raise `RequestError` naming the flag."""

    max_new_tokens: int
    end_ids: tuple[int, ...] = (2,)
    pad_id: int = 0
    # End ids are banned while fewer new tokens than this exist; 0 and 1 ban nothing.
    min_length: int = 1
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 1  # 1 is greedy, 0 is no limit
    top_p: float = 0.0  # 0 and 1 are no limit
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # counts prompt and output
    presence_penalty: float = 0.0  # counts the output only, as does the next
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    bad_words: tuple[tuple[int, ...], ...] = ()
    stop_words: tuple[tuple[int, ...], ...] = ()
    random_seed: int = 0
    # Beam search is deterministic: it ignores temperature and refuses top_k, top_p and min_p.
    num_beams: int = 1
    length_penalty: float = 1.0
    # 1: stop at num_beams finished hypotheses; 0: when the best running beam scores worse than all
    # of them; other: when no continuation can beat them ("never" in transformers).
    early_stopping: int = 1
    log_probs: bool = False

    def __post_init__(self) -> None:
        for rule in _RULES:
            value = getattr(self, rule.field)
            if not rule.holds(value):
                raise RequestError(f"--{rule.flag} {value} is not possible; {rule.remedy}")
        if self.min_length > self.max_new_tokens:
            raise RequestError(
                f"--min_length {self.min_length} is more than --max_output_len "
                f"{self.max_new_tokens}; lower the one or raise the other"
            )
        if self.num_beams > 1:
            self._check_beams()

    def _check_beams(self) -> None:
        neutral = {"top_k": (0, 1), "top_p": (0.0, 1.0), "min_p": (0.0,)}
        for field, values in neutral.items():
            if getattr(self, field) not in values:
                raise RequestError(
                    f"--{field} {getattr(self, field)} cannot be combined with --num_beams "
                    f"{self.num_beams}, since beam search does not sample; drop one of them"
                )

    @property
    def is_greedy(self) -> bool:
        return self.top_k == 1 or self.temperature == 0


class _Rule(NamedTuple):
    field: str
    flag: str
    holds: Callable[..., bool]
    remedy: str


def _are_words(words: Sequence[Sequence[int]]) -> bool:
    return all(word and min(word) >= 0 for word in words)


_RULES = (
    _Rule("max_new_tokens", "max_output_len", lambda v: v >= 1, "ask for at least 1 new token"),
    _Rule("end_ids", "end_id", lambda v: all(i >= 0 for i in v), "token ids start at 0"),
    _Rule("pad_id", "pad_id", lambda v: v >= 0, "token ids start at 0"),
    _Rule("min_length", "min_length", lambda v: v >= 0, "give a number of tokens, or 0 for none"),
    _Rule(
        "temperature",
        "temperature",
        lambda v: 0 <= v < math.inf,
        "give a finite number above 0, or 0 for greedy decoding",
    ),
    _Rule("top_k", "top_k", lambda v: v >= 0, "give a number of tokens, or 0 for no limit"),
    _Rule(
        "top_p", "top_p", lambda v: 0 <= v <= 1, "give a probability from 0 to 1, 0 for no limit"
    ),
    _Rule("min_p", "min_p", lambda v: 0 <= v <= 1, "give a ratio from 0 to 1, 0 for no limit"),
    _Rule(
        "repetition_penalty",
        "repetition_penalty",
        lambda v: 0 < v < math.inf,
        "give a finite number above 0, 1 for no penalty",
    ),
    _Rule("presence_penalty", "presence_penalty", math.isfinite, "give a finite number"),
    _Rule("frequency_penalty", "frequency_penalty", math.isfinite, "give a finite number"),
    _Rule(
        "no_repeat_ngram_size",
        "no_repeat_ngram_size",
        lambda v: v >= 0,
        "give the length of an n-gram, or 0 to allow repeats",
    ),
    _Rule("bad_words", "bad_words", _are_words, "every word needs a token and ids start at 0"),
    _Rule("stop_words", "stop_words", _are_words, "every word needs a token and ids start at 0"),
    _Rule("random_seed", "random_seed", lambda v: 0 <= v < 2**32, "seeds go from 0 to 2**32 - 1"),
    _Rule("num_beams", "num_beams", lambda v: v >= 1, "ask for at least 1 beam"),
    _Rule("length_penalty", "length_penalty", math.isfinite, "give a finite number"),
)


class Sampled(NamedTuple):
    """One step's result, until the next step.

    Log probabilities are those of the model's own logits, before any penalty or temperature: 0
    where the row had finished before, None when no request asks for them.
    """

    tokens_B: Tensor  # int64; pad_id where the row had finished before
    log_probs_B: Tensor | None  # float32


class Stops(nn.Module):
    """End ids, stop words and length limits of a batch."""

    def __init__(self, params: Sequence[SamplingParams], vocab_size: int, device: Device):
        super().__init__()
        ends = pack_words(
            [[(i,) for i in p.end_ids] for p in params], empty=vocab_size, device=device
        )
        self.end_ids_BN = nn.Buffer(ends.squeeze(-1))
        self.max_new_B = nn.Buffer(to_device(longs(p.max_new_tokens for p in params), device))
        self.has_words = any(p.stop_words for p in params)
        if self.has_words:
            lists = [p.stop_words for p in params]
            lengths = [[(len(word),) for word in words] for words in lists]
            lengths_BN1 = pack_words(lengths, empty=0, device=device)
            self.words_BNL = nn.Buffer(pack_words(lists, empty=vocab_size, device=device))
            self.lengths_BN = nn.Buffer(lengths_BN1.squeeze(-1))

    @property
    def rules(self) -> StopRules:
        words = (self.words_BNL, self.lengths_BN) if self.has_words else ()
        return StopRules(self.max_new_B, self.end_ids_BN, *words)

    @property
    def tail_length(self) -> int:
        """Tokens of the longest stop word, 0 without stop words."""
        return self.rules.tail_length

    def find_reasons(self, tokens_BX: Tensor, tails_BXL: Tensor, num_new_B: Tensor) -> Tensor:
        """Reasons [B, X] to stop, for X candidate tokens per row (see engine.kernels.rows)."""
        return find_reasons(tokens_BX, tails_BXL, num_new_B, self.rules)


class Warper(nn.Module):
    """Temperature, top-k, top-p and min-p, in this order, for the rows that sample.

    Scores equal to the last kept one are kept, too, so the result does not hang on the order of a
    sort. Rows that decode greedily pass unchanged.
    """

    def __init__(self, params: Sequence[SamplingParams], vocab_size: int, device: Device):
        super().__init__()
        temperatures = [1.0 if p.is_greedy else p.temperature for p in params]
        limits = [0 if p.is_greedy or p.top_k >= vocab_size else p.top_k for p in params]
        masses = [1.0 if p.is_greedy or p.top_p == 0 else p.top_p for p in params]
        ratios = [-math.inf if p.is_greedy or p.min_p == 0 else math.log(p.min_p) for p in params]
        self.has_temperature = any(t != 1 for t in temperatures)
        self.has_top_p = any(m < 1 for m in masses)
        self.has_min_p = any(r > -math.inf for r in ratios)
        unlimited = any(m < 1 and k == 0 for m, k in zip(masses, limits, strict=True))
        self.num_candidates = vocab_size if unlimited else max(limits)
        self.temperature_B1 = nn.Buffer(make_column(temperatures, torch.float32, device=device))
        self.top_k_B1 = nn.Buffer(make_column(limits, torch.int64, device=device))
        self.top_p_B1 = nn.Buffer(make_column(masses, torch.float32, device=device))
        self.min_p_B1 = nn.Buffer(make_column(ratios, torch.float32, device=device))

    def extra_repr(self) -> str:
        return (
            f"temperature={self.has_temperature}, candidates={self.num_candidates}, "
            f"top_p={self.has_top_p}, min_p={self.has_min_p}"
        )

    def forward(self, scores_BV: Tensor) -> Tensor:
        if self.has_temperature:
            scores_BV = scores_BV / self.temperature_B1
        if self.num_candidates:
            scores_BV = self._limit(scores_BV)
        if self.has_min_p:
            floor_B1 = scores_BV.amax(-1, keepdim=True) + self.min_p_B1
            scores_BV = scores_BV.masked_fill(scores_BV < floor_B1, BANNED)
        return scores_BV

    def _limit(self, scores_BV: Tensor) -> Tensor:
        if self.num_candidates == scores_BV.shape[1]:
            best_BC = scores_BV.sort(-1, descending=True).values
        else:
            best_BC = scores_BV.topk(self.num_candidates).values
        kth_B1 = best_BC.gather(1, (self.top_k_B1 - 1).clamp_(min=0))
        floor_B1 = kth_B1.masked_fill(self.top_k_B1 == 0, BANNED)
        scores_BV = scores_BV.masked_fill(scores_BV < floor_B1, BANNED)
        if not self.has_top_p:
            return scores_BV
        best_BC = best_BC.masked_fill(best_BC < floor_B1, BANNED)
        probs_BC = (best_BC - ops.logsumexp(scores_BV)[:, None]).exp_()
        # The nucleus is every token before which less than top_p of the mass lies.
        before_BC = probs_BC.cumsum(-1) - probs_BC
        kept_B1 = (before_BC < self.top_p_B1).sum(-1, keepdim=True).clamp_(min=1)
        floor_B1 = best_BC.gather(1, kept_B1 - 1).masked_fill(self.top_p_B1 >= 1, BANNED)
        return scores_BV.masked_fill(scores_BV < floor_B1, BANNED)


def make_uniforms(params: Sequence[SamplingParams], device: Device) -> Tensor:
    """Random numbers float64 [B, N] in [0, 1), one per request and step, from each request's seed.

    Drawn on the host, so that they depend neither on the batch nor on the device.
    """
    steps = round_up(1 + max(p.max_new_tokens for p in params))
    uniforms_BN = torch.zeros(len(params), steps, dtype=torch.float64)
    for row, p in enumerate(params):
        generator = torch.Generator().manual_seed(p.random_seed)
        uniforms_BN[row, : p.max_new_tokens] = torch.rand(
            p.max_new_tokens, dtype=torch.float64, generator=generator
        )
    return to_device(uniforms_BN, device)


class Sampler(DeviceState):
    """Chooses one token per row and step, each row by its own parameters.

    A row with top_k 1 or temperature 0 takes the highest processed score, of equal ones the lowest
    id. `step` is to be called once per decode step; everything it changes is a buffer.
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
        assert all(p.num_beams == 1 for p in params), "beams are BeamSearch's"
        check_tokens(params, prompts, vocab_size)
        self.vocab_size = vocab_size
        lengths = [p.max_new_tokens for p in params]
        lookback = find_lookback(params)
        self.history = History(
            prompts, lengths, lookback=lookback, vocab_size=vocab_size, device=device
        )
        self.penalties = Penalties(params, vocab_size, device)
        self.warper = Warper(params, vocab_size, device)
        self.stops = Stops(params, vocab_size, device)
        self.has_greedy = any(p.is_greedy for p in params)
        self.has_sampled = not all(p.is_greedy for p in params)
        self.has_log_probs = any(p.log_probs for p in params)
        greedy_B = torch.tensor([p.is_greedy for p in params])
        self.greedy_B = nn.Buffer(to_device(greedy_B, device))
        self.pad_B = nn.Buffer(to_device(longs(p.pad_id for p in params), device))
        zeros_B = torch.zeros(len(params), dtype=torch.int64, device=device)
        self.reasons_B, self.tokens_B = nn.Buffer(zeros_B), nn.Buffer(zeros_B.clone())
        self.num_alive = nn.Buffer(torch.full_like(zeros_B[:1], len(params)))
        if self.has_sampled:
            self.uniforms_BN = nn.Buffer(make_uniforms(params, device))

    def extra_repr(self) -> str:
        return (
            f"vocab={self.vocab_size}, greedy={self.has_greedy}, sampled={self.has_sampled}, "
            f"log_probs={self.has_log_probs}"
        )

    def processed_logits(self, logits_BV: Tensor) -> Tensor:
        """The scores [B, V] that the next `step` on these logits chooses from: penalties applied to
        every row, temperature and the limits to rows that sample. fp32, but where nothing is
        applied the logits as they are, which have the same best."""
        if not (self.has_sampled or self.penalties.stages):
            return logits_BV
        return self.warper(self.penalties(logits_BV.float(), self.history))

    def step(self, logits_BV: Tensor) -> Sampled:
        """Choose a token for every row that has not finished. The logits are not changed."""
        assert logits_BV.is_floating_point() and logits_BV.shape[1] == self.vocab_size
        chosen_B = self._choose(self.processed_logits(logits_BV))
        log_probs_B = self._log_probs(logits_BV, chosen_B) if self.has_log_probs else None
        ops.take_tokens(self._rows(), chosen_B)
        return Sampled(self.tokens_B, log_probs_B)

    def is_finished(self) -> Tensor:
        """Which rows have finished, the newest token included; bool [B]."""
        return self.reasons_B != FinishReason.NOT_FINISHED.value

    def results(self) -> list[list[int]]:
        """New tokens of each row so far, the end id or stop word included. Waits for the device."""
        longest = self.history.tokens_BH.shape[1]
        rows = self.history.new_tokens(longest).tolist()
        counts = self.history.num_new().tolist()
        return [row[:count] for row, count in zip(rows, counts, strict=True)]

    def _choose(self, scores_BV: Tensor) -> Tensor:
        if not self.has_sampled:
            return ops.argmax(scores_BV)
        uniform_B = self.uniforms_BN.gather(1, self.history.num_new()[:, None]).squeeze(1)
        drawn_B = ops.draw(scores_BV, uniform_B)
        if not self.has_greedy:
            return drawn_B
        return torch.where(self.greedy_B, ops.argmax(scores_BV), drawn_B)

    def _rows(self) -> RowState:
        return RowState(
            history_BH=self.history.tokens_BH,
            ends_B=self.history.ends_B,
            reasons_B=self.reasons_B,
            tokens_B=self.tokens_B,
            num_alive=self.num_alive,
            starts_B=self.history.starts_B,
            pad_ids_B=self.pad_B,
            rules=self.stops.rules,
        )

    def _log_probs(self, logits_BV: Tensor, tokens_B: Tensor) -> Tensor:
        chosen_B = logits_BV.gather(1, tokens_B[:, None]).squeeze(1).float()
        return (chosen_B - ops.logsumexp(logits_BV)).masked_fill_(self.is_finished(), 0.0)
