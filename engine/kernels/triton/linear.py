"""y = x @ wᵀ, weights in the tokens' dtype."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from engine.kernels.triton._product import Product
from engine.kernels.triton._weights import Weights


class Linear(Product):
    """cuBLAS but for a single token, unless tiles measured faster."""

    op = "linear"

    def __init__(self, w_NK: Tensor):
        super().__init__(Weights(w_NK.contiguous()))

    def by_library(self, x_TK: Tensor, residual_TN: Tensor | None = None) -> Tensor:
        if residual_TN is None:
            return F.linear(x_TK, self.weights.codes)
        # In place: a result of its own would cost cuBLAS a copy of the residual before the product.
        return residual_TN.addmm_(x_TK, self.weights.codes.T)


def linear(x_TK: Tensor, w_NK: Tensor) -> Tensor:
    return Linear(w_NK)(x_TK)


BOUND = {"linear": Linear}
