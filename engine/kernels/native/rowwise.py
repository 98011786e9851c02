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


def _pointers(*tensors: Tensor) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]


def _sizes(*numbers: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(number) for number in numbers]
