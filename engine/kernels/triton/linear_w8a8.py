"""y = (x_codes @ codesᵀ) · x_scale · scale, int8 products with int32 sums."""

from __future__ import annotations

from torch import Tensor

from engine.kernels.triton._codes_product import CodesProduct
from engine.kernels.triton._weights import Weights


class LinearW8A8(CodesProduct):
    op = "linear_w8a8"

    def __init__(self, codes_NK: Tensor, scale_N: Tensor, input_scale: Tensor | None):
        super().__init__(Weights(codes_NK, scale_N), input_scale)


def linear_w8a8(
    x_TK: Tensor, codes_NK: Tensor, scale_N: Tensor, input_scale: Tensor | None
) -> Tensor:
    return LinearW8A8(codes_NK, scale_N, input_scale)(x_TK)


BOUND = {"linear_w8a8": LinearW8A8}
