"""Unquantised linear layer: weight [N, K] in the engine's dtype."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from engine.kernels.registry import bind
from engine.layers.bound import BoundLinear


class Dense(BoundLinear):
    """y [T, N] = x [T, K] @ weightᵀ."""

    def __init__(self, arrays: Mapping[str, Tensor]):
        super().__init__(bind("linear", arrays["weight"]))
