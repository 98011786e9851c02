"""Products of tokens with 4-bit weights: int4.cpp."""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows of a block of the packed layout.
ROWS = 16
# Int8 digits that a token is written with: 31 bits below its largest value, or 15.
FP32_DIGITS, DIGITS = 4, 2
FUNCTIONS = {torch.float32: "yi_int4_multiply_fp32", torch.float16: "yi_int4_multiply_fp16"}


class PackedInt4:
    """x [T, K] → x @ ((codes - zero) · scale)ᵀ [T, N] in x's dtype.

    codes uint8 [N, K/2] in nibble blocks of `block` inputs, scale fp16 or fp32 [N, R], zero uint8
    [N, R] or None for 8. No result depends on the batch it is computed in.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        codes_NB: Tensor,
        scale_NR: Tensor,
        zero_NR: Tensor | None,
        block: int,
    ):
        self._outputs, self._inputs = len(codes_NB), 2 * codes_NB.shape[1]
        self._groups = scale_NR.shape[1]
        self._multiply = getattr(library, FUNCTIONS[scale_NR.dtype])
        self._codes = _pack(library, codes_NB.contiguous(), block)
        self._scale = _in_blocks(scale_NR)
        self._zero = None if zero_NR is None else _in_blocks(zero_NR)

    def __call__(self, x_TK: Tensor) -> Tensor:
        assert x_TK.shape[1] == self._inputs
        wide_TK = x_TK.float().contiguous()
        y_TN = torch.empty(len(x_TK), self._outputs)
        arrays = (wide_TK, self._codes, self._scale, self._zero, y_TN)
        self._multiply(
            *(None if a is None else ctypes.c_void_p(a.data_ptr()) for a in arrays),
            *(ctypes.c_int64(n) for n in (len(x_TK), self._outputs, self._inputs, self._groups)),
            FP32_DIGITS if x_TK.dtype == torch.float32 else DIGITS,
            torch.get_num_threads(),
        )
        return y_TN.to(x_TK.dtype)


def _pack(library: ctypes.CDLL, codes_NB: Tensor, block: int) -> Tensor:
    outputs, width = codes_NB.shape
    packed = torch.empty(-(-outputs // ROWS) * ROWS, width, dtype=torch.uint8)
    packed[outputs // ROWS * ROWS :] = 0
    pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (codes_NB, packed))
    sizes = (ctypes.c_int64(size) for size in (outputs, 2 * width, block))
    library.yi_int4_pack(*pointers, *sizes)
    return packed


def _in_blocks(of_NR: Tensor) -> Tensor:
    """[N, R] → [N / 16, R, 16], the last block filled up with zeros."""
    padded = F.pad(of_NR, (0, 0, 0, -len(of_NR) % ROWS))
    return padded.unflatten(0, (-1, ROWS)).transpose(1, 2).contiguous()
