"""Products of a few tokens with a dense matrix: dense.cpp."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from engine.kernels.native import compiled

FUNCTIONS = {
    torch.float32: "yi_dense_fp32",
    torch.float16: "yi_dense_fp16",
    torch.bfloat16: "yi_dense_bf16",
}


def product(x_TK: Tensor, w_NK: Tensor) -> Tensor | None:
    """x @ wᵀ [T, N] in w's dtype, added up in fp32; None without the library or if the rows of w
    are not next to each other."""
    library = compiled.load("dense")
    if library is None or not w_NK.is_contiguous():
        return None
    return multiply(library, x_TK, w_NK)


def multiply(library: ctypes.CDLL, x_TK: Tensor, w_NK: Tensor) -> Tensor:
    assert w_NK.is_contiguous() and x_TK.shape[1] == w_NK.shape[1]
    x_TK = x_TK.float().contiguous()
    (tokens, inputs), outputs = x_TK.shape, len(w_NK)
    y_TN = torch.empty(tokens, outputs)
    getattr(library, FUNCTIONS[w_NK.dtype])(
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (x_TK, w_NK, y_TN)),
        *(ctypes.c_int64(size) for size in (tokens, outputs, inputs)),
        torch.get_num_threads(),
    )
    return y_TN.to(w_NK.dtype)
