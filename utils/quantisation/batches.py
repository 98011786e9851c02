"""Calibration texts as batches of token ids."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from itertools import groupby

import torch
from torch import Tensor

from engine.errors import UserError
from utils.tokenizer import Tokenizer


def make_batches(
    texts: Iterable[str],
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    max_length: int,
    vocab_size: int,
    seed: int | None = None,
) -> list[Tensor]:
    """Token ids int64 [B, S] of at most `batch_size` texts and `max_length` positions each.

    Only texts of one length share a batch, so nothing is padded and no padding is calibrated on.
    Of a longer text the beginning is taken, or with a `seed` a part of it at a random place.
    UserError for token ids outside the vocabulary.
    """
    generator = None if seed is None else random.Random(seed)
    cut = [
        _cut(tokenizer.encode(text, add_special_tokens=True), max_length, generator)
        for text in texts
    ]
    cut = sorted((ids for ids in cut if ids), key=len, reverse=True)
    if not cut:
        raise UserError("the calibration texts hold no tokens; name others as --calib_dataset")
    largest = max(map(max, cut))
    if largest >= vocab_size:
        raise UserError(
            f"the tokenizer gives the token id {largest} but the model's vocabulary has "
            f"{vocab_size}; put the tokenizer that belongs to the checkpoint into --model_dir"
        )
    return [
        torch.tensor(rows)
        for _, alike in groupby(cut, key=len)
        for rows in _chunks(list(alike), batch_size)
    ]


def _cut(ids: Sequence[int], length: int, generator: random.Random | None) -> Sequence[int]:
    start = generator.randint(0, max(0, len(ids) - length)) if generator else 0
    return ids[start : start + length]


def _chunks(rows: list[Sequence[int]], size: int) -> Iterable[list[Sequence[int]]]:
    return (rows[start : start + size] for start in range(0, len(rows), size))
