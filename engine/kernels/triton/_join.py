"""Joining the parts of an attention that several programs computed, within the same launch.

Data are their own signals: a word of the workspace holds EMPTY, which no result is, until its
program has stored it. Who joins reads until nothing is EMPTY, and leaves it EMPTY for the next
launch. That takes one trip to the second-level cache and back, where counting arrivals takes
three: a fence, the count, and the read. Programs that wait come last in the grid, so that those
they wait for have started before them.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.triton._split import MAX_JOINED

# Threads of a program that joins, at most.
MIN_WORDS = 128
# A NaN that no arithmetic makes: all ones, where that of GPUs is 0x7fffffff.
EMPTY = tl.constexpr(-1)


@triton.jit
def store_words(pointers, x, mask):
    """fp32 for another program to take; should it be the NaN that is EMPTY, another one."""
    words = x.to(tl.int32, bitcast=True)
    tl.store(pointers, tl.where(words == EMPTY, 0x7FFFFFFF, words), mask=mask)


@triton.jit
def _take(tops, outputs, mask):
    """fp32 of both once all of it is there; leaves both EMPTY. `mask` is that of `tops`.

    Neither has fewer elements than the program has threads (`MIN_WORDS`): two threads that load
    the same one could find different words, of which the compiler would look at one.
    """
    mask_3d = mask[:, :, None]
    top = tl.load(tops, mask=mask, other=0, volatile=True)
    output = tl.load(outputs, mask=mask_3d, other=0, volatile=True)
    while (tl.max((top == EMPTY).to(tl.int32)) | tl.max((output == EMPTY).to(tl.int32))) > 0:
        top = tl.load(tops, mask=mask, other=0, volatile=True)
        output = tl.load(outputs, mask=mask_3d, other=0, volatile=True)
    tl.store(tops, tl.full(top.shape, EMPTY, tl.int32), mask=mask)
    tl.store(outputs, tl.full(output.shape, EMPTY, tl.int32), mask=mask_3d)
    return top.to(tl.float32, bitcast=True), output.to(tl.float32, bitcast=True)


@triton.jit
def join(
    out, partial, tops, parts, joiner,
    GROUP: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    JOINERS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """out [GROUP, D] = Σ partial[p] · 2^tops[p] / Σ 2^tops[p], the channels of one joiner.

    partial [parts, HEADS, BLOCK_D] and tops [parts, JOINERS, HEADS], one copy for each joiner.
    """
    CHANNELS: tl.constexpr = BLOCK_D // JOINERS
    head, channel = tl.arange(0, HEADS), joiner * CHANNELS + tl.arange(0, CHANNELS)
    is_head = head < GROUP
    joined = tl.zeros([HEADS, CHANNELS], tl.float32)
    top = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    at = head[:, None] * BLOCK_D + channel[None, :]
    for first in range(0, parts, AT_ONCE):
        part = first + tl.arange(0, AT_ONCE)
        is_part = part < parts
        heights, outputs = _take(
            tops + (part * JOINERS + joiner)[:, None] * HEADS + head[None, :],
            partial + part[:, None, None] * (HEADS * BLOCK_D) + at[None, :, :],
            is_part[:, None] & is_head[None, :],
        )
        heights = tl.where(is_part[:, None], heights, float("-inf"))
        new_top = tl.maximum(top, tl.max(heights, axis=0))
        weights = tl.exp2(heights - new_top[None, :])  # [AT_ONCE, HEADS]
        decay = tl.exp2(top - new_top)
        total = total * decay + tl.sum(weights, axis=0)
        joined = joined * decay[:, None] + tl.sum(outputs * weights[:, :, None], axis=0)
        top = new_top
    result = (joined / total[:, None]).to(out.dtype.element_ty)
    mask = is_head[:, None] & (channel < D)[None, :]
    tl.store(out + head[:, None] * D + channel[None, :], result, mask=mask)


@cache
def workspace(device: torch.device, words: int, top_words: int) -> tuple[Tensor, Tensor]:
    """MAX_JOINED rows of `words` and of `top_words`, EMPTY between launches. Launches that share
    them must not overlap, which those of one stream do not."""
    if device.type == "cuda":
        assert not torch.cuda.is_current_stream_capturing(), "warm up before capturing a graph"
    options = {"dtype": torch.int32, "device": device}
    partial = torch.full((MAX_JOINED, words), EMPTY.value, **options)
    return partial, torch.full((MAX_JOINED, top_words), EMPTY.value, **options)
