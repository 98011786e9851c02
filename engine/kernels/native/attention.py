"""Attention of one token a sequence over a cache of values: attention.cpp."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from engine.kernels.native import compiled

NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
# Heads are whole vectors.
LANES = 16
NO_WINDOW = 2**31

_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64
# q, k, v, block table and its width, lengths, window, tokens, block tokens, groups, heads of a
# group, head size, scale, o, threads
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
    library = compiled.load("attention")
    _, groups, block_tokens, head_dim = k.shape
    is_whole = k.is_contiguous() and v.is_contiguous() and k.dtype == q_BHD.dtype
    if library is None or head_dim % LANES or not is_whole:
        return None
    q_BHD, block_table_BM = q_BHD.contiguous(), block_table_BM.contiguous()
    o_BHD = torch.empty_like(q_BHD)
    attend = getattr(library, f"yi_attend_{NAMES[k.dtype]}")
    attend.argtypes = _ARGUMENTS
    attend(
        *(q_BHD.data_ptr(), k.data_ptr(), v.data_ptr()),
        *(block_table_BM.data_ptr(), block_table_BM.shape[1], kv_lens_B.contiguous().data_ptr()),
        *(NO_WINDOW if window is None else window, len(q_BHD)),
        *(block_tokens, groups, q_BHD.shape[1] // groups, head_dim),
        *(scale, o_BHD.data_ptr(), torch.get_num_threads()),
    )
    return o_BHD
