"""Linear layer with FP8 (e4m3) weights and FP8 activations."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from engine.kernels.registry import bind
from engine.layers.bound import BoundLinear


class Fp8(BoundLinear):
    """y [T, N] = (x_codes @ codesᵀ) · x_scale · scale; x_codes are x rounded to FP8.

    codes float8_e4m3fn [N, K], scale fp32 [N]; optional is input_scale fp32 [1] (else one per
    token).
    """

    def __init__(self, arrays: Mapping[str, Tensor]):
        super().__init__(
            bind("linear_fp8", arrays["codes"], arrays["scale"], arrays.get("input_scale"))
        )
