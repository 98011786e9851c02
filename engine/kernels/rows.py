"""What a row of a batch is between two decode steps: its tokens so far, and when it stops.

Sampling and beam search choose tokens; here is what happens to a token that has been chosen.
"""

# Dimensions:
#   B rows   H history columns   N end ids of a row   X candidate tokens of a row

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor


class FinishReason(IntEnum):
    """Why a row stopped; where several apply, the first of them."""

    NOT_FINISHED = 0
    END_ID = 1
    STOP_WORDS = 2
    LENGTH = 3


class RowState(NamedTuple):
    """Rows that decode together, int64 throughout; `take_tokens` changes the first five in place.

    Row b has the tokens `history_BH[b, : ends_B[b]]`, new ones from column `starts_B[b]` on, and
    has finished when it has a reason.
    """

    history_BH: Tensor
    ends_B: Tensor
    reasons_B: Tensor
    tokens_B: Tensor  # the newest token; the pad id from the step after the last one on
    num_alive: Tensor  # [1], rows that have not finished
    starts_B: Tensor
    max_new_B: Tensor
    end_ids_BN: Tensor  # filled with an id that no token has
    pad_ids_B: Tensor


def append(history_BH: Tensor, ends_B: Tensor, tokens_B: Tensor, alive_B: Tensor) -> None:
    """Add one token to each row that is alive, in place."""
    columns_B1 = ends_B[:, None]
    kept_B1 = torch.where(alive_B[:, None], tokens_B[:, None], history_BH.gather(1, columns_B1))
    history_BH.scatter_(1, columns_B1, kept_B1)
    ends_B.add_(alive_B)


def find_reasons(
    tokens_BX: Tensor,
    num_new_B: Tensor,
    *,
    max_new_B: Tensor,
    end_ids_BN: Tensor,
    is_word_BX: Tensor | None,
) -> Tensor:
    """Reasons [B, X] to stop, for X candidate tokens per row, which `num_new_B` counts.

    `is_word_BX` tells which of them complete a stop word; None: none does.
    """
    is_end_BX = (tokens_BX[..., None] == end_ids_BN[:, None]).any(-1)
    is_full_B1 = (num_new_B >= max_new_B)[:, None]
    reasons_BX = (is_full_B1 * FinishReason.LENGTH.value).expand_as(tokens_BX)
    if is_word_BX is not None:
        reasons_BX = reasons_BX.masked_fill(is_word_BX, FinishReason.STOP_WORDS.value)
    return reasons_BX.masked_fill(is_end_BX, FinishReason.END_ID.value)
