"""Unquantised linear layer: weight [N, K] in the engine's dtype."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from engine.kernels import api as ops


class Dense:
    """y [T, N] = x [T, K] @ weightᵀ."""

    def __init__(self, arrays: Mapping[str, Tensor]):
        self.weight_NK = arrays["weight"]

    def __call__(self, x_TK: Tensor) -> Tensor:
        return ops.linear(x_TK, self.weight_NK)
