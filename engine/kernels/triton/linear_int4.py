"""y = x @ ((codes - 8) · scale)ᵀ, two codes a byte in blocks of 64 inputs, scale per output."""

from __future__ import annotations

from torch import Tensor

from engine.kernels.triton._product import Product
from engine.kernels.triton._weights import Weights

# Inputs of a nibble block.
BLOCK = 64


class LinearInt4(Product):
    op = "linear_int4"

    def __init__(self, codes_NB: Tensor, scale_N: Tensor):
        super().__init__(Weights(codes_NB, scale_N, block=BLOCK))


def linear_int4(x_TK: Tensor, codes_NB: Tensor, scale_N: Tensor) -> Tensor:
    return LinearInt4(codes_NB, scale_N)(x_TK)


BOUND = {"linear_int4": LinearInt4}
