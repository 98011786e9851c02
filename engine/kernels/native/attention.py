"""Attention of one token a sequence over a cache of values: attention.cpp."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from engine.kernels.native import compiled

NAMES = {
    torch.float32: "yi_attend_fp32",
    torch.float16: "yi_attend_fp16",
    torch.bfloat16: "yi_attend_bf16",
}
# Heads are whole vectors.
LANES = 16
NO_WINDOW = 2**31

_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64
# q, k, v, block table, distance of its rows, lengths, window, tokens, block tokens, groups, heads
# of a group, head size, scale, o, threads
_ARGUMENTS = (
    *(_POINTER, _POINTER, _POINTER, _POINTER, _SIZE, _POINTER, _SIZE),
    *(_SIZE, _SIZE, _SIZE, _SIZE, _SIZE, ctypes.c_float, _POINTER, ctypes.c_int),
)


def attend_last(
    q_BHD: Tensor,
    k: Tensor,
    v: Tensor,
    block_table_BM: Tensor,
    kv_lens_B: Tensor,
    *,
    window: int | None,
    scale: float,
) -> Tensor | None:
    """o [B, H, D] of the last token of each sequence, whose positions are in blocks of the cache
    k, v [blocks, G, block tokens, D]; int32 tables as in `api.Attending`. None without the
    library, or for heads and caches that it does not take."""
    attend = _function(k.dtype)
    _, groups, block_tokens, head_dim = k.shape
    is_whole = k.is_contiguous() and v.is_contiguous() and k.dtype == q_BHD.dtype
    if attend is None or head_dim % LANES or not is_whole:
        return None
    assert block_table_BM.stride(1) == kv_lens_B.stride(0) == 1
    q_BHD = q_BHD.contiguous()
    o_BHD = torch.empty_like(q_BHD)
    attend(
        *(q_BHD.data_ptr(), k.data_ptr(), v.data_ptr()),
        *(block_table_BM.data_ptr(), block_table_BM.stride(0), kv_lens_B.data_ptr()),
        *(NO_WINDOW if window is None else window, len(q_BHD)),
        *(block_tokens, groups, q_BHD.shape[1] // groups, head_dim),
        *(scale, o_BHD.data_ptr(), torch.get_num_threads()),
    )
    return o_BHD


def _function(dtype: torch.dtype) -> Any:
    library = compiled.load("attention")
    if library is None:
        return None
    attend = getattr(library, NAMES[dtype])
    attend.argtypes = _ARGUMENTS
    return attend
