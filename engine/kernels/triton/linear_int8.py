"""y = x @ (codes · scale)ᵀ, codes int8, scale fp32 per output."""

from __future__ import annotations

from torch import Tensor

from engine.kernels.triton._product import Product
from engine.kernels.triton._weights import Weights


class LinearInt8(Product):
    op = "linear_int8"

    def __init__(self, codes_NK: Tensor, scale_N: Tensor):
        super().__init__(Weights(codes_NK, scale_N))


def linear_int8(x_TK: Tensor, codes_NK: Tensor, scale_N: Tensor) -> Tensor:
    return LinearInt8(codes_NK, scale_N)(x_TK)


BOUND = {"linear_int8": LinearInt8}
