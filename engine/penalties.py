"""What earlier tokens do to the next token's scores: repetition, n-gram, word and length rules.

Shared by sampling and beam search. Every stage is a function of the token history alone, so a beam
that changes its parent only reorders the history. Fixed shapes, no host reads: it runs inside a
CUDA graph. It knows nothing of models, caches or how a token is chosen.
"""

# Dimensions:
#   B rows (requests, or beams of requests)   H history columns   V vocabulary
#   N entries of a per-row list (words, end ids)   L tokens of the longest word

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from engine.errors import RequestError
from engine.kernels import rows
from engine.kernels.rows import ANY_TOKEN, match_words
from engine.transfer import longs, to_device

if TYPE_CHECKING:
    from engine.sampling import SamplingParams

BANNED = float("-inf")
# Sizes are rounded up to this, so that batches of like size need one captured graph, not many.
COLUMNS_ROUNDING = 128

Device = torch.device | str


def round_up(count: int) -> int:
    return -(-count // COLUMNS_ROUNDING) * COLUMNS_ROUNDING


def make_column(values: Sequence[float], dtype: torch.dtype, *, device: Device) -> Tensor:
    """One value per row as [B, 1]."""
    return to_device(torch.tensor(list(values), dtype=dtype).unsqueeze(1), device)


def pack_words(lists: Sequence[Sequence[Sequence[int]]], *, empty: int, device: Device) -> Tensor:
    """Token sequences per row as int64 [B, N, L]: right-aligned, led by `ANY_TOKEN`; rows with
    fewer sequences are filled with `empty`, which no history token equals."""
    most = max(len(words) for words in lists)
    longest = max((len(word) for words in lists for word in words), default=1)
    packed = torch.full((len(lists), max(1, most), longest), empty, dtype=torch.int64)
    for row, words in enumerate(lists):
        for place, word in enumerate(words):
            packed[row, place] = ANY_TOKEN
            packed[row, place, longest - len(word) :] = torch.tensor(word)
    return to_device(packed, device)


class DeviceState(nn.Module):
    """Tensors of fixed shape that a step reads and updates in place, held as buffers.

    A captured graph keeps their addresses. To serve another batch with it, make a new object and
    let the captured one `adopt` it, which is possible when both have the same `plan`.
    """

    def plan(self) -> tuple:
        """Hashable; equal for two objects whose step runs the same kernels on the same shapes."""
        shapes = tuple((name, tuple(t.shape)) for name, t in self.state_dict().items())
        return repr(self), shapes

    def adopt(self, other: DeviceState) -> None:
        """Copy the state of `other`, which has the same plan, into this object's tensors."""
        assert self.plan() == other.plan(), "only an object of the same plan can be adopted"
        self.load_state_dict(other.state_dict())


class History(DeviceState):
    """Prompt and new tokens per row, with places for what is still to come.

    Places without a token hold `empty` (= vocabulary size), an id that no token has. Before the
    prompt stand `lookback` such places, so that a tail of that length always exists.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: Sequence[int],
        *,
        lookback: int,
        vocab_size: int,
        device: Device,
    ):
        super().__init__()
        self.empty, self.lookback = vocab_size, lookback
        longest = max(len(p) + n for p, n in zip(prompts, max_new_tokens, strict=True))
        # One place more than tokens: a full row writes nothing, but still has an address to write.
        shape = (len(prompts), round_up(lookback + longest + 1))
        tokens_BH = torch.full(shape, self.empty, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            tokens_BH[row, lookback : lookback + len(prompt)] = longs(prompt)
        starts_B = to_device(longs(lookback + len(p) for p in prompts), device)
        self.tokens_BH = nn.Buffer(to_device(tokens_BH, device))
        self.starts_B = nn.Buffer(starts_B)
        self.ends_B = nn.Buffer(starts_B.clone())

    def extra_repr(self) -> str:
        return f"lookback={self.lookback}"

    def num_new(self) -> Tensor:
        """New tokens per row; int64 [B]."""
        return self.ends_B - self.starts_B

    def tail(self, length: int) -> Tensor:
        """The newest `length` tokens per row, `empty` where there are fewer; int64 [B, length]."""
        return rows.tail(self.tokens_BH, self.ends_B, length)

    def new_tokens(self, length: int) -> Tensor:
        """The first `length` places after the prompt, `empty` where not reached; [B, length]."""
        columns = self.starts_B[:, None] + torch.arange(length, device=self.starts_B.device)
        # Rows with long prompts have fewer places than asked; their last place is never written.
        return self.tokens_BH.gather(1, columns.clamp_(max=self.tokens_BH.shape[1] - 1))

    def output_mask(self) -> Tensor:
        """Which places lie behind the prompt; bool [B, H]."""
        columns = torch.arange(self.tokens_BH.shape[1], device=self.starts_B.device)
        return columns >= self.starts_B[:, None]

    def append(self, tokens_B: Tensor, alive_B: Tensor) -> None:
        """Add one token to each row that is alive."""
        rows.append(self.tokens_BH, self.ends_B, tokens_B, alive_B)

    def reorder(self, parents_B: Tensor) -> None:
        """Row b continues what row parents_B[b], of the same request, had."""
        self.tokens_BH.copy_(self.tokens_BH.index_select(0, parents_B))


class RepetitionPenalty(nn.Module):
    """Scores of tokens seen in prompt or output are divided (above 0) or multiplied (below 0) by
    the penalty, once however often they occurred (CTRL, https://arxiv.org/abs/1909.05858)."""

    def __init__(self, penalties: Sequence[float], device: Device):
        super().__init__()
        self.penalty_B1 = nn.Buffer(make_column(penalties, torch.float32, device=device))

    def forward(self, scores_BV: Tensor, history: History) -> Tensor:
        seen_BV = _mark(history.tokens_BH, scores_BV)
        penalised_BV = torch.where(
            scores_BV < 0, scores_BV * self.penalty_B1, scores_BV / self.penalty_B1
        )
        return torch.where(seen_BV, penalised_BV, scores_BV)


class OutputPenalties(nn.Module):
    """Score - presence * [count > 0] - frequency * count, where count is how often the token stands
    in the output; the prompt does not count, as in OpenAI's API."""

    def __init__(self, presence: Sequence[float], frequency: Sequence[float], device: Device):
        super().__init__()
        self.presence_B1 = nn.Buffer(make_column(presence, torch.float32, device=device))
        self.frequency_B1 = nn.Buffer(make_column(frequency, torch.float32, device=device))

    def forward(self, scores_BV: Tensor, history: History) -> Tensor:
        outside = torch.full_like(history.tokens_BH, history.empty)
        tokens_BH = torch.where(history.output_mask(), history.tokens_BH, outside)
        batch, vocab_size = scores_BV.shape
        counts = torch.zeros(batch, vocab_size + 1, device=scores_BV.device)
        counts_BV = counts.scatter_add_(
            1, tokens_BH, torch.ones_like(tokens_BH, dtype=counts.dtype)
        )
        counts_BV = counts_BV[:, :vocab_size]
        penalties_BV = self.presence_B1 * (counts_BV > 0) + self.frequency_B1 * counts_BV
        return scores_BV - penalties_BV


class RepeatedNgrams(nn.Module):
    """Tokens that would complete an n-gram which the row (prompt included) already holds."""

    def __init__(self, sizes: Sequence[int], size: int, device: Device):
        super().__init__()
        self.size = size
        self.uses_B1 = nn.Buffer(make_column([s == size for s in sizes], torch.bool, device=device))

    def extra_repr(self) -> str:
        return f"size={self.size}"

    def forward(self, history: History) -> Tensor:
        tokens_BH = history.tokens_BH
        tail = history.tail(self.size - 1)
        windows = tokens_BH.shape[1] - self.size + 1
        matches = self.uses_B1.expand(-1, windows)
        for place in range(self.size - 1):
            matches = matches & (tokens_BH[:, place : place + windows] == tail[:, place, None])
        last = tokens_BH[:, self.size - 1 :]
        return torch.where(matches, last, torch.full_like(last, history.empty))


class BadWords(nn.Module):
    """Tokens that would complete a forbidden sequence; its beginning may lie in the prompt."""

    def __init__(self, lists: Sequence[Sequence[Sequence[int]]], vocab_size: int, device: Device):
        super().__init__()
        words_BNL = pack_words(lists, empty=vocab_size, device=device)
        self.prefixes_BNL = nn.Buffer(words_BNL[..., :-1].contiguous())
        self.last_BN = nn.Buffer(words_BNL[..., -1].contiguous())

    def forward(self, history: History) -> Tensor:
        tail = history.tail(self.prefixes_BNL.shape[-1])
        matches_BN = match_words(tail, self.prefixes_BNL)
        return torch.where(matches_BN, self.last_BN, torch.full_like(self.last_BN, history.empty))


class EarlyEnds(nn.Module):
    """End ids, for rows with fewer new tokens than their minimum (0 and 1 are no minimum)."""

    def __init__(self, params: Sequence[SamplingParams], vocab_size: int, device: Device):
        super().__init__()
        ends = pack_words(
            [[(i,) for i in p.end_ids] for p in params], empty=vocab_size, device=device
        )
        self.end_ids_BN = nn.Buffer(ends.squeeze(-1))
        minimums = [p.min_length if p.min_length > 1 else 0 for p in params]
        self.minimum_B1 = nn.Buffer(make_column(minimums, torch.int64, device=device))

    def forward(self, history: History) -> Tensor:
        early_B1 = history.num_new()[:, None] < self.minimum_B1
        ids_BN = self.end_ids_BN
        return torch.where(early_B1, ids_BN, torch.full_like(ids_BN, history.empty))


class Bans(nn.Module):
    """Sets the scores of all tokens that any of its sources names to -inf."""

    def __init__(self, sources: Sequence[nn.Module]):
        super().__init__()
        self.sources = nn.ModuleList(sources)

    def forward(self, scores_BV: Tensor, history: History) -> Tensor:
        tokens_BN = torch.cat([source(history) for source in self.sources], dim=1)
        return scores_BV.masked_fill(_mark(tokens_BN, scores_BV), BANNED)


class Penalties(nn.Module):
    """The stages that at least one row asks for, in the order of transformers' `generate`:
    repetition; n-grams, bad words and minimum length; then presence and frequency."""

    def __init__(self, params: Sequence[SamplingParams], vocab_size: int, device: Device):
        super().__init__()
        self.stages = nn.ModuleList(_make_stages(params, vocab_size, device))

    def forward(self, scores_BV: Tensor, history: History) -> Tensor:
        for stage in self.stages:
            scores_BV = stage(scores_BV, history)
        return scores_BV


def find_lookback(params: Sequence[SamplingParams]) -> int:
    """How many tokens back any rule of these requests looks."""
    words = [len(word) for p in params for word in (*p.bad_words, *p.stop_words)]
    return max([1, *words, *(p.no_repeat_ngram_size for p in params)])


def check_tokens(
    params: Sequence[SamplingParams], prompts: Sequence[Sequence[int]], vocab_size: int
) -> None:
    """Refuse empty prompts and token ids that the vocabulary does not have (`RequestError`)."""
    for request, (p, prompt) in enumerate(zip(params, prompts, strict=True)):
        if not prompt:
            raise RequestError(f"the prompt of request {request} has no tokens; give at least one")
        sources = {
            f"the prompt of request {request}": prompt,
            "--end_id": p.end_ids,
            "--pad_id": (p.pad_id,),
            "--bad_words": [token for word in p.bad_words for token in word],
            "--stop_words": [token for word in p.stop_words for token in word],
        }
        for source, tokens in sources.items():
            if tokens and (min(tokens) < 0 or max(tokens) >= vocab_size):
                wrong = next(token for token in tokens if not 0 <= token < vocab_size)
                raise RequestError(
                    f"{source} holds token id {wrong}, but the engine's vocabulary has ids 0 to "
                    f"{vocab_size - 1}; use the tokenizer the engine was built with"
                )


def _make_stages(
    params: Sequence[SamplingParams], vocab_size: int, device: Device
) -> list[nn.Module]:
    stages: list[nn.Module] = []
    if any(p.repetition_penalty != 1 for p in params):
        stages.append(RepetitionPenalty([p.repetition_penalty for p in params], device))
    sizes = [p.no_repeat_ngram_size for p in params]
    sources: list[nn.Module] = [RepeatedNgrams(sizes, n, device) for n in sorted({*sizes} - {0})]
    if any(p.bad_words for p in params):
        sources.append(BadWords([p.bad_words for p in params], vocab_size, device))
    if any(p.min_length > 1 and p.end_ids for p in params):
        sources.append(EarlyEnds(params, vocab_size, device))
    if sources:
        stages.append(Bans(sources))
    if any(p.presence_penalty or p.frequency_penalty for p in params):
        presence = [p.presence_penalty for p in params]
        frequency = [p.frequency_penalty for p in params]
        stages.append(OutputPenalties(presence, frequency, device))
    return stages


def _mark(tokens_BN: Tensor, scores_BV: Tensor) -> Tensor:
    """Mask of the vocabulary, True at the row's tokens; the id V falls into a spare column."""
    batch, vocab_size = scores_BV.shape
    marks = torch.zeros(batch, vocab_size + 1, dtype=torch.bool, device=scores_BV.device)
    return marks.scatter_(1, tokens_BN, True)[:, :vocab_size]
