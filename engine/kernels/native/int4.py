"""Packing 4-bit weights for int4.cpp."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import torch
from torch import Tensor

from engine.kernels.native.product import Packed, PackedProduct, blocks_of_rows, in_blocks

FUNCTIONS = {torch.float32: "yi_int4_multiply_fp32", torch.float16: "yi_int4_multiply_fp16"}


def pack(
    library: ctypes.CDLL,
    codes_NB: Tensor,
    scale_NR: Tensor,
    zero_NR: Tensor | None,
    block: int,
    prompt_digits: Mapping[torch.dtype, int] | None = None,
) -> PackedProduct:
    """x [T, K] → x @ ((codes - zero) · scale)ᵀ: codes uint8 [N, K/2] in nibble blocks of `block`
    inputs, scale fp16 or fp32 [N, R], zero uint8 [N, R] or None for 8."""
    outputs, width = codes_NB.shape
    codes_NB, packed = codes_NB.contiguous(), blocks_of_rows(outputs, width)
    pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (codes_NB, packed))
    sizes = (ctypes.c_int64(size) for size in (outputs, 2 * width, block))
    library.yi_int4_pack(*pointers, *sizes)
    zero = None if zero_NR is None else in_blocks(zero_NR)
    weights = Packed(outputs, 2 * width, packed, in_blocks(scale_NR), zero)
    multiply = getattr(library, FUNCTIONS[scale_NR.dtype])
    return PackedProduct(multiply, weights, prompt_digits=prompt_digits)
