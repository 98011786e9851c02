"""Linear layers with 8-bit or 4-bit weights and one scale per output."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from engine.kernels.registry import bind
from engine.layers.bound import BoundLinear


class WeightOnlyInt8(BoundLinear):
    """y [T, N] = x [T, K] @ (codes · scale)ᵀ: codes int8 [N, K], scale fp32 [N]."""

    def __init__(self, arrays: Mapping[str, Tensor]):
        super().__init__(bind("linear_int8", arrays["codes"], arrays["scale"]))


class WeightOnlyInt4(BoundLinear):
    """y [T, N] = x [T, K] @ ((codes - 8) · scale)ᵀ: codes uint8 [N, K/2] in nibble blocks of 64,
    scale fp32 [N]."""

    def __init__(self, arrays: Mapping[str, Tensor]):
        super().__init__(bind("linear_int4", arrays["codes"], arrays["scale"]))
