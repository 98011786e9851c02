"""Attention of one token over a cache of values: attention.cpp."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from engine.kernels.native import compiled

NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
# Heads are whole vectors.
LANES = 16


def attend_once(
    q_HD: Tensor, k: Tensor, v: Tensor, blocks: Sequence[int], positions: range, scale: float
) -> Tensor | None:
    """o [H, D] of one token that sees consecutive `positions` of a sequence, whose blocks of the
    cache k, v [blocks, G, block tokens, D] are `blocks`; None without the library, or for heads
    that it does not take."""
    library = compiled.load("attention")
    _, groups, block_tokens, head_dim = k.shape
    if library is None or head_dim % LANES or not (k.is_contiguous() and v.is_contiguous()):
        return None
    heads, wide_HD = len(q_HD) // groups, q_HD.float().contiguous()
    o_HD = torch.empty(wide_HD.shape)
    sizes = (block_tokens, groups, heads, head_dim, positions.start, positions.stop)
    getattr(library, f"yi_attend_{NAMES[k.dtype]}")(
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (wide_HD, k, v)),
        (ctypes.c_int32 * len(blocks))(*blocks),
        *(ctypes.c_int64(size) for size in sizes),
        ctypes.c_float(scale),
        ctypes.c_void_p(o_HD.data_ptr()),
        torch.get_num_threads(),
    )
    return o_HD.to(q_HD.dtype)
