"""Grouped-query attention over the paged cache: which kernel takes which batch.

Long prompts that begin with this step go to PyTorch, which has the faster kernels for them, and
everything else to `_prefill`; `rope_attention` has a kernel for single tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine.cache import LayerCache
from engine.kernels.api import Attending
from engine.kernels.triton._launch import capability
from engine.kernels.triton._prefill import prefill
from engine.kernels.triton._softmax import NO_WINDOW

# Tokens from which PyTorch's kernels, with their own launches, are worth it for a whole prompt.
WHOLE_FROM = 512
# Widest head that they take.
MAX_HEAD_DIM = 256

FALLBACKS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
# cuDNN is as fast as FlashAttention 3 on Hopper and slower than FlashAttention 2 before and after
# (benchmarks/attention_kernels.py).
BACKENDS = {(9, 0): [SDPBackend.CUDNN_ATTENTION, *FALLBACKS]}


def attention(q_THD: Tensor, layer: LayerCache, batch: Attending) -> Tensor:
    assert q_THD.stride(2) == 1 and q_THD.stride(1) == q_THD.shape[2]
    assert layer.k.stride() == layer.v.stride() and layer.k.stride()[2:] == (q_THD.shape[2], 1)
    whole_from = WHOLE_FROM if _has_torch_kernel(q_THD, layer, batch) else NO_WINDOW
    runs = list(_runs(batch, whole_from))
    if len(runs) == 1 and runs[0].is_whole:
        return _whole_prompts(q_THD, layer, batch, runs[0])
    out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
    if len(q_THD) and not all(run.is_whole for run in runs):
        prefill(out_THD, q_THD, layer, batch, whole_from)
    for run in runs:
        if run.is_whole:
            part = slice(run.token, run.token + run.count * run.length)
            out_THD[part] = _whole_prompts(q_THD[part], layer, batch, run)
    return out_THD


class _Run(NamedTuple):
    """Neighbouring sequences of one length: `count` of them from `sequence`, at packed `token`."""

    sequence: int
    count: int
    token: int
    length: int
    is_whole: bool


def _has_torch_kernel(q_THD: Tensor, layer: LayerCache, batch: Attending) -> bool:
    """Whether PyTorch's kernels take whole prompts as they are: 16 bits, no window."""
    return (
        q_THD.dtype == layer.k.dtype
        and q_THD.dtype.itemsize == 2
        and q_THD.shape[2] <= MAX_HEAD_DIM
        and batch.window is None
    )


def _runs(batch: Attending, whole_from: int) -> Iterator[_Run]:
    def key(lens: tuple[int, int]) -> tuple[int, bool]:
        query_len, kv_len = lens
        return query_len, query_len == kv_len and query_len >= whole_from

    sequence = token = 0
    pairs = zip(batch.query_lens, batch.kv_lens, strict=True)
    for (length, is_whole), group in groupby(pairs, key):
        run = _Run(sequence, sum(1 for _ in group), token, length, is_whole)
        yield run
        sequence += run.count
        token += run.count * length


def _whole_prompts(q_THD: Tensor, layer: LayerCache, batch: Attending, run: _Run) -> Tensor:
    """Causal attention of equally long prompts, all positions of which are new."""
    q_BHSD = q_THD.unflatten(0, (run.count, run.length)).transpose(1, 2)
    rows = slice(run.sequence, run.sequence + run.count)
    k_BGSD, v_BGSD = (_gather(stored, batch, rows, run.length) for stored in (layer.k, layer.v))
    with sdpa_kernel(_backends(q_THD.device), set_priority=True):
        o_BHSD = F.scaled_dot_product_attention(
            q_BHSD, k_BGSD, v_BGSD, is_causal=True, scale=batch.scale, enable_gqa=True
        )
    return o_BHSD.transpose(1, 2).reshape(q_THD.shape)


def _backends(device: torch.device) -> list[SDPBackend]:
    return BACKENDS.get(capability(device), FALLBACKS)


def _gather(stored: Tensor, batch: Attending, rows: slice, length: int) -> Tensor:
    """The first `length` positions of sequences, [B, G, S, D]: a view where each lies in one block
    and the blocks are neighbours."""
    block_tokens = stored.shape[2]
    used = -(-length // block_tokens)
    if used == 1:
        firsts = [row[0] for row in batch.block_lists[rows]]
        if firsts == list(range(firsts[0], firsts[0] + len(firsts))):
            return stored[firsts[0] : firsts[0] + len(firsts), :, :length]
    gathered = stored[batch.block_table_BM[rows, :used]]  # [B, blocks, G, block_tokens, D]
    return gathered.transpose(1, 2).flatten(2, 3)[:, :, :length]
