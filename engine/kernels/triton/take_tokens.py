"""What a chosen token does to its row: one program for all rows, which counts those still alive."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.rows import ANY_TOKEN, FinishReason, RowState
from engine.kernels.triton._launch import launch_options

BLOCK = 128
WARPS = 4

NOT_FINISHED = tl.constexpr(FinishReason.NOT_FINISHED.value)
END_ID = tl.constexpr(FinishReason.END_ID.value)
STOP_WORDS = tl.constexpr(FinishReason.STOP_WORDS.value)
ANY = tl.constexpr(ANY_TOKEN)
LENGTH = tl.constexpr(FinishReason.LENGTH.value)


@triton.jit
def _ends_with_word(
    token, words, lengths, history, end, num_new, inside, num_words, longest, WORDS: tl.constexpr
):
    """Whether the tokens before column `end` and then `token` end with a word; [BLOCK]."""
    place = tl.arange(0, WORDS)[None, :]
    is_entry = inside[:, None] & (place < num_words)
    length = tl.load(lengths + place, mask=is_entry, other=0)  # [BLOCK, WORDS]
    matches = is_entry & (length <= num_new[:, None])
    for at in range(longest):
        is_earlier = inside & (at < longest - 1)
        earlier = tl.load(history + end - (longest - 1) + at, mask=is_earlier, other=0)
        expected = tl.load(words + place * longest + at, mask=is_entry, other=0)
        held = tl.where(is_earlier, earlier, token)[:, None]
        matches = matches & ((expected == held) | (expected == ANY))
    return tl.max(matches.to(tl.int32), axis=1) > 0


@triton.jit
def _take_tokens(
    history_BH, ends_B, reasons_B, tokens_B, num_alive, starts_B, pad_ids_B,
    max_new_B, end_ids_BN, words_BNL, word_lengths_BN, chosen,
    rows, history_stride, num_end_ids, num_words, longest,
    BLOCK: tl.constexpr, END_IDS: tl.constexpr, WORDS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    place = tl.arange(0, END_IDS)[None, :]
    alive_rows = tl.zeros([BLOCK], tl.int64)
    for first in range(0, rows, BLOCK):
        row = first + tl.arange(0, BLOCK)
        inside = row < rows
        is_id = inside[:, None] & (place < num_end_ids)
        token = tl.load(chosen + row, mask=inside, other=0)
        end = tl.load(ends_B + row, mask=inside, other=0)
        start = tl.load(starts_B + row, mask=inside, other=0)
        most = tl.load(max_new_B + row, mask=inside, other=0)
        pad = tl.load(pad_ids_B + row, mask=inside, other=0)
        reason = tl.load(reasons_B + row, mask=inside, other=LENGTH)
        ids = tl.load(end_ids_BN + row[:, None] * num_end_ids + place, mask=is_id, other=-1)
        history = history_BH + row.to(tl.int64) * history_stride
        num_new = end + 1 - start
        is_alive = reason == NOT_FINISHED

        found = tl.where(num_new >= most, LENGTH, NOT_FINISHED)
        if words_BNL is not None:
            words = words_BNL + row[:, None] * num_words * longest
            lengths = word_lengths_BN + row[:, None] * num_words
            is_word = _ends_with_word(
                token, words, lengths, history, end, num_new, inside, num_words, longest, WORDS
            )
            found = tl.where(is_word, STOP_WORDS, found)
        is_end = tl.max((ids == token[:, None]).to(tl.int32), axis=1) > 0
        found = tl.where(is_end, END_ID, found)
        reason = tl.where(is_alive, found, reason)

        tl.store(history + end, token, mask=is_alive)
        tl.store(ends_B + row, end + 1, mask=is_alive)
        tl.store(reasons_B + row, reason, mask=inside)
        tl.store(tokens_B + row, tl.where(is_alive, token, pad), mask=inside)
        alive_rows += (reason == NOT_FINISHED).to(tl.int64)
    tl.store(num_alive, tl.sum(alive_rows, axis=0))


def take_tokens(rows: RowState, chosen_B: Tensor) -> None:
    *state, rules = rows
    assert all(t is None or t.is_contiguous() for t in (*state, *rules, chosen_B))
    count, num_end_ids = rules.end_ids_BN.shape
    num_words = 0 if rules.word_lengths_BN is None else rules.word_lengths_BN.shape[1]
    _take_tokens[(1,)](
        *state, *rules, chosen_B,
        count, rows.history_BH.shape[1], num_end_ids, num_words, rules.tail_length,
        BLOCK=BLOCK, END_IDS=triton.next_power_of_2(num_end_ids),
        WORDS=triton.next_power_of_2(max(1, num_words)),
        num_warps=WARPS, **launch_options(chosen_B.device),
    )  # fmt: skip
