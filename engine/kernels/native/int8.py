"""Packing 8-bit weights for int8.cpp."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from engine.kernels.native.product import Packed, PackedProduct, blocks_of_rows, in_blocks
from engine.kernels.quantized_reference import MIN_TOKEN_RANGE

# Inputs of a line of the packed layout.
LINE = 4
# Sums of products of more inputs would not fit in 32 bits.
MAX_INPUTS = 2**17
ONE_DIGIT = {torch.float32: 1, torch.float16: 1, torch.bfloat16: 1}


def pack_weights(library: ctypes.CDLL, codes_NK: Tensor, scale_N: Tensor) -> PackedProduct:
    """x [T, K] → x @ (codes · scale)ᵀ."""
    return PackedProduct(library.yi_int8_multiply, _pack(library, codes_NK, scale_N))


def pack_activations(
    library: ctypes.CDLL, codes_NK: Tensor, scale_N: Tensor, input_scale: Tensor | None
) -> PackedProduct:
    """`api.linear_w8a8` with these weights."""
    return PackedProduct(
        library.yi_int8_multiply,
        _pack(library, codes_NK, scale_N),
        digits=ONE_DIGIT,
        input_scale=input_scale,
        least_range=MIN_TOKEN_RANGE,
    )


def _pack(library: ctypes.CDLL, codes_NK: Tensor, scale_N: Tensor) -> Packed:
    outputs, inputs = codes_NK.shape
    assert inputs <= MAX_INPUTS
    codes_NK, packed = codes_NK.contiguous(), blocks_of_rows(outputs, -(-inputs // LINE) * LINE)
    pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (codes_NK, packed))
    library.yi_int8_pack(*pointers, ctypes.c_int64(outputs), ctypes.c_int64(inputs))
    return Packed(outputs, inputs, packed, in_blocks(scale_N[:, None]))
