"""y = x @ wᵀ, weights in the tokens' dtype."""

from __future__ import annotations

from torch import Tensor

from engine.kernels.triton._product import DenseProduct
from engine.kernels.triton._weights import Weights


class Linear(DenseProduct):
    def __init__(self, w_NK: Tensor):
        super().__init__(Weights(w_NK.contiguous()))


def linear(x_TK: Tensor, w_NK: Tensor) -> Tensor:
    return Linear(w_NK)(x_TK)


BOUND = {"linear": Linear}
