"""Linear layer with FP8 (e4m3) weights and FP8 activations."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from engine.kernels.registry import bind


class Fp8:
    """y [T, N] = (x_codes @ codesᵀ) · x_scale · scale; x_codes are x rounded to FP8.

    codes float8_e4m3fn [N, K], scale fp32 [N]; optional is input_scale fp32 [1] (else one per
    token).
    """

    def __init__(self, arrays: Mapping[str, Tensor]):
        self._product = bind(
            "linear_fp8", arrays["codes"], arrays["scale"], arrays.get("input_scale")
        )

    def __call__(self, x_TK: Tensor) -> Tensor:
        return self._product(x_TK)
