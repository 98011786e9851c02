"""Operations that treat each token alone: rowwise.cpp.

Each returns None without the library, or for shapes and dtypes that the kernel does not take.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from engine.kernels.native import compiled

NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
# Widths are whole vectors.
LANES = 16

_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64
# q, k, v and their tokens' distances, cos, sin, slots, rotated q, both caches, tokens, heads,
# groups, half a head, block tokens, threads
_WRITE_ARGUMENTS = (
    *(_POINTER, _POINTER, _POINTER, _SIZE, _SIZE, _SIZE, _POINTER, _POINTER, _POINTER, _POINTER),
    *(_POINTER, _POINTER, _SIZE, _SIZE, _SIZE, _SIZE, _SIZE, ctypes.c_int),
)


def rms_norm(x_TE: Tensor, weight_E: Tensor, eps: float) -> Tensor | None:
    library = compiled.load("rowwise")
    is_whole = x_TE.shape[1] % LANES == 0 and x_TE.is_contiguous() and weight_E.is_contiguous()
    if library is None or not is_whole or x_TE.dtype != weight_E.dtype:
        return None
    y_TE = torch.empty_like(x_TE)
    getattr(library, f"yi_rms_norm_{NAMES[x_TE.dtype]}")(
        *_pointers(x_TE, weight_E, y_TE),
        *_sizes(*x_TE.shape),
        ctypes.c_float(eps),
        torch.get_num_threads(),
    )
    return y_TE


def rotate(x_THD: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor | None:
    """The rotation of `api.rope`; tokens of x may lie apart, their heads may not."""
    library = compiled.load("rowwise")
    tokens, heads, head_dim = x_THD.shape
    half = head_dim // 2
    assert cos_TC.shape == sin_TC.shape == (tokens, half)
    is_whole = half % LANES == 0 and x_THD.stride()[1:] == (head_dim, 1)
    if library is None or not (is_whole and cos_TC.is_contiguous() and sin_TC.is_contiguous()):
        return None
    y_THD = torch.empty(x_THD.shape, dtype=x_THD.dtype)
    getattr(library, f"yi_rotate_{NAMES[x_THD.dtype]}")(
        *_pointers(x_THD),
        *_sizes(x_THD.stride(0)),
        *_pointers(cos_TC, sin_TC, y_THD),
        *_sizes(tokens, heads, half),
        torch.get_num_threads(),
    )
    return y_THD


def rotate_and_write(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    cos_TC: Tensor,
    sin_TC: Tensor,
    cache: tuple[Tensor, Tensor],
    slots_T: Tensor,
) -> Tensor | None:
    """`api.rope_write_kv` into a cache that stores the dtype of q, k and v; tokens may lie
    apart, their heads may not."""
    library, dtype = compiled.load("rowwise"), q_THD.dtype
    tokens, heads, head_dim = q_THD.shape
    groups, half, rows = k_TGD.shape[1], head_dim // 2, (q_THD, k_TGD, v_TGD)
    is_whole = half % LANES == 0 and all(x.stride()[1:] == (head_dim, 1) for x in rows)
    others = (cos_TC, sin_TC, slots_T, *cache)
    if library is None or not (is_whole and all(t.is_contiguous() for t in others)):
        return None
    if any(stored.dtype != dtype for stored in cache) or slots_T.dtype != torch.int64:
        return None
    q_out_THD = torch.empty(q_THD.shape, dtype=dtype)
    write = getattr(library, f"yi_rotate_and_write_{NAMES[dtype]}")
    write.argtypes = _WRITE_ARGUMENTS
    write(
        *(q_THD.data_ptr(), k_TGD.data_ptr(), v_TGD.data_ptr()),
        *(x.stride(0) for x in rows),
        *(cos_TC.data_ptr(), sin_TC.data_ptr(), slots_T.data_ptr(), q_out_THD.data_ptr()),
        *(cache[0].data_ptr(), cache[1].data_ptr(), tokens, heads, groups, half),
        *(cache[0].shape[2], torch.get_num_threads()),
    )
    return q_out_THD


def _pointers(*tensors: Tensor) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]


def _sizes(*numbers: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(number) for number in numbers]
