"""y = x @ wᵀ, weights in the tokens' dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.triton._product import DenseProduct, Norm
from engine.kernels.triton._tactics import Config
from engine.kernels.triton._weights import Weights
from engine.kernels.triton.rms_norm import rms_norm
from engine.kernels.triton.silu_mul import silu_mul


class Linear(DenseProduct):
    def __init__(self, w_NK: Tensor):
        super().__init__(Weights(w_NK.contiguous()))

    def run(
        self,
        x_TK: Tensor,
        config: Config,
        norm: Norm | None = None,
        is_gated: bool = False,
        residual_TN: Tensor | None = None,
    ) -> Tensor:
        """Around cuBLAS' product there are kernels of ours, but for the residual, which it adds to
        its sums before they are rounded."""
        y_TN = super().run(x_TK, config, norm, is_gated, residual_TN)
        if y_TN is not None:
            return y_TN
        x_TK = x_TK if norm is None else rms_norm(x_TK, *norm)
        if residual_TN is None or is_gated:
            y_TN = F.linear(x_TK, self.weights.codes)
            y_TN = silu_mul(y_TN) if is_gated else y_TN
            return y_TN if residual_TN is None else residual_TN + y_TN
        return torch.addmm(residual_TN, x_TK, self.weights.codes.T)


def linear(x_TK: Tensor, w_NK: Tensor) -> Tensor:
    return Linear(w_NK)(x_TK)


BOUND = {"linear": Linear}
