"""Linear layer with int8 weights and int8 activations, as SmoothQuant prepares them
(arXiv 2211.10438)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from engine.kernels.registry import bind
from engine.layers.bound import BoundLinear


class SmoothInt8(BoundLinear):
    """y [T, N] = (x_codes @ codesᵀ) · x_scale · scale; x_codes are x / smoother rounded to int8.

    codes int8 [N, K], scale fp32 [N]; optional are input_scale fp32 [1] (else one per token) and
    smoother fp32 [K] (else 1).
    """

    def __init__(self, arrays: Mapping[str, Tensor]):
        super().__init__(
            bind("linear_w8a8", arrays["codes"], arrays["scale"], arrays.get("input_scale"))
        )
        self._smoother_K = arrays.get("smoother")
        divide_by = getattr(self._product, "divide_by", None)
        if divide_by is not None and self._smoother_K is not None:
            # The product divides in the pass that rounds tokens to codes.
            divide_by(self._smoother_K)
            self._smoother_K = None

    def __call__(self, x_TK: Tensor) -> Tensor:
        if self._smoother_K is None:
            return self._product(x_TK)
        # Stays in fp32, so that the input is rounded once, to its codes.
        return self._product(x_TK.float() / self._smoother_K).to(x_TK.dtype)

    @property
    def fused(self) -> Callable[..., Tensor | None] | None:
        return super().fused if self._smoother_K is None else None
