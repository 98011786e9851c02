"""y = x @ ((codes - zero) · scale)ᵀ, two codes a byte, scale and zero for groups of inputs."""

from __future__ import annotations

from torch import Tensor

from engine.kernels.triton._product import Product
from engine.kernels.triton._weights import Weights


class LinearInt4Groups(Product):
    op = "linear_int4_groups"

    def __init__(self, codes_NB: Tensor, scale_NR: Tensor, zero_NR: Tensor | None, block: int):
        super().__init__(Weights(codes_NB, scale_NR, zero_NR, block))


def linear_int4_groups(
    x_TK: Tensor, codes_NB: Tensor, scale_NR: Tensor, zero_NR: Tensor | None, block: int
) -> Tensor:
    return LinearInt4Groups(codes_NB, scale_NR, zero_NR, block)(x_TK)


BOUND = {"linear_int4_groups": LinearInt4Groups}
