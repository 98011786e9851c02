"""What a row of a batch is between two decode steps: its tokens so far, and when it stops.

Sampling and beam search choose tokens; here is what happens to a token that has been chosen.
"""

# Dimensions:
#   B rows   H history columns   X candidate tokens of a row
#   N entries of a per-row list (end ids, words)   L tokens of the longest word

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

# Stands for any token in the leading places of a word shorter than the longest one.
ANY_TOKEN = -1


class FinishReason(IntEnum):
    """Why a row stopped; where several apply, the first of them."""

    NOT_FINISHED = 0
    END_ID = 1
    STOP_WORDS = 2
    LENGTH = 3


class StopRules(NamedTuple):
    """When rows stop, int64 throughout. Lists shorter than the longest are filled with an id that
    no token has."""

    max_new_B: Tensor
    end_ids_BN: Tensor
    words_BNL: Tensor | None = None  # right-aligned, led by ANY_TOKEN; None: no row has stop words
    word_lengths_BN: Tensor | None = None

    @property
    def tail_length(self) -> int:
        """Tokens of the longest stop word, 0 without stop words."""
        return 0 if self.words_BNL is None else self.words_BNL.shape[-1]


class RowState(NamedTuple):
    """Rows that decode together, int64 throughout; `take_tokens` changes the first five in place.

    Row b has the tokens `history_BH[b, : ends_B[b]]`, new ones from column `starts_B[b]` on, and
    has finished when it has a reason. As many tokens as the longest stop word has always exist.
    """

    history_BH: Tensor
    ends_B: Tensor
    reasons_B: Tensor
    tokens_B: Tensor  # the newest token; the pad id from the step after the last one on
    num_alive: Tensor  # [1], rows that have not finished
    starts_B: Tensor
    pad_ids_B: Tensor
    rules: StopRules


def append(history_BH: Tensor, ends_B: Tensor, tokens_B: Tensor, alive_B: Tensor) -> None:
    """Add one token to each row that is alive, in place."""
    columns_B1 = ends_B[:, None]
    kept_B1 = torch.where(alive_B[:, None], tokens_B[:, None], history_BH.gather(1, columns_B1))
    history_BH.scatter_(1, columns_B1, kept_B1)
    ends_B.add_(alive_B)


def tail(history_BH: Tensor, ends_B: Tensor, length: int) -> Tensor:
    """The newest `length` tokens per row; [B, length]."""
    offsets = torch.arange(-length, 0, device=ends_B.device)
    return history_BH.gather(1, ends_B[:, None] + offsets)


def match_words(tails: Tensor, words: Tensor) -> Tensor:
    """Which words [..., N, L] equal the tail [..., L] of their row; bool [..., N]."""
    return ((words == tails.unsqueeze(-2)) | (words == ANY_TOKEN)).all(-1)


def find_reasons(
    tokens_BX: Tensor, tails_BXL: Tensor, num_new_B: Tensor, rules: StopRules
) -> Tensor:
    """Reasons [B, X] to stop, for X candidate tokens per row of the rules.

    `tails_BXL` holds the newest `tail_length` tokens and ends with the candidate; `num_new_B`
    counts the candidate.
    """
    is_end_BX = (tokens_BX[..., None] == rules.end_ids_BN[:, None]).any(-1)
    is_full_B1 = (num_new_B >= rules.max_new_B)[:, None]
    reasons_BX = (is_full_B1 * FinishReason.LENGTH.value).expand_as(tokens_BX)
    if rules.words_BNL is not None:
        matches_BXN = match_words(tails_BXL, rules.words_BNL[:, None])
        # A stop word that begins in the prompt is none.
        matches_BXN &= (rules.word_lengths_BN <= num_new_B[:, None])[:, None]
        reasons_BX = reasons_BX.masked_fill(matches_BXN.any(-1), FinishReason.STOP_WORDS.value)
    return reasons_BX.masked_fill(is_end_BX, FinishReason.END_ID.value)
