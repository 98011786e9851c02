"""What a chosen token does to its row: one program for all rows, which counts those still alive."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.rows import FinishReason, RowState
from engine.kernels.triton._launch import launch_options

BLOCK = 128
WARPS = 4

NOT_FINISHED = tl.constexpr(FinishReason.NOT_FINISHED.value)
END_ID = tl.constexpr(FinishReason.END_ID.value)
STOP_WORDS = tl.constexpr(FinishReason.STOP_WORDS.value)
LENGTH = tl.constexpr(FinishReason.LENGTH.value)


@triton.jit
def _take_tokens(
    history_BH, ends_B, reasons_B, tokens_B, num_alive, starts_B, max_new_B, end_ids_BN, pad_ids_B,
    chosen, is_word,
    rows, history_stride, num_end_ids, BLOCK: tl.constexpr, END_IDS: tl.constexpr,
    PDL: tl.constexpr,
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
        is_alive = reason == NOT_FINISHED

        found = tl.where(end + 1 - start >= most, LENGTH, NOT_FINISHED)
        if is_word is not None:
            found = tl.where(tl.load(is_word + row, mask=inside, other=0), STOP_WORDS, found)
        is_end = tl.max((ids == token[:, None]).to(tl.int32), axis=1) > 0
        found = tl.where(is_end, END_ID, found)
        reason = tl.where(is_alive, found, reason)

        tl.store(history_BH + row.to(tl.int64) * history_stride + end, token, mask=is_alive)
        tl.store(ends_B + row, end + 1, mask=is_alive)
        tl.store(reasons_B + row, reason, mask=inside)
        tl.store(tokens_B + row, tl.where(is_alive, token, pad), mask=inside)
        alive_rows += (reason == NOT_FINISHED).to(tl.int64)
    tl.store(num_alive, tl.sum(alive_rows, axis=0))


def take_tokens(rows: RowState, chosen_B: Tensor, is_word_B: Tensor | None) -> None:
    assert all(t.is_contiguous() for t in (*rows, chosen_B))
    assert is_word_B is None or is_word_B.is_contiguous()
    count, num_end_ids = rows.end_ids_BN.shape
    _take_tokens[(1,)](
        *rows, chosen_B, is_word_B, count, rows.history_BH.shape[1], num_end_ids,
        BLOCK=BLOCK, END_IDS=triton.next_power_of_2(num_end_ids),
        num_warps=WARPS, **launch_options(chosen_B.device),
    )  # fmt: skip
