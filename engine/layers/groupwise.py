"""Linear layers with 4-bit weights whose scales belong to groups of inputs.

AWQ (arXiv 2306.00978) and GPTQ (arXiv 2210.17323) differ in how the weights were found and in
which of the optional arrays there are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from engine.kernels.registry import bind
from engine.layers.bound import BoundLinear

# Inputs of a nibble block; groups that are no multiple of it have the shorter one.
NIBBLE_BLOCK, SHORT_NIBBLE_BLOCK = 64, 32


class GroupwiseInt4(BoundLinear):
    """y [T, N] = (x · pre_scale) [T, K] @ ((codes - zero) · scale)ᵀ.

    codes uint8 [N, K/2] in nibble blocks, scale fp16 or fp32 [N, R]; optional are zero uint8
    [N, R] (else 8) and pre_scale fp32 [K] (else 1).
    """

    def __init__(self, arrays: Mapping[str, Tensor]):
        codes_NB, scale_NR = arrays["codes"], arrays["scale"]
        group_size = 2 * codes_NB.shape[1] // scale_NR.shape[1]
        block = SHORT_NIBBLE_BLOCK if group_size % NIBBLE_BLOCK else NIBBLE_BLOCK
        super().__init__(bind("linear_int4_groups", codes_NB, scale_NR, arrays.get("zero"), block))
        self._pre_scale_K = arrays.get("pre_scale")
        multiply_by = getattr(self._product, "multiply_by", None)
        if multiply_by is not None and self._pre_scale_K is not None:
            # The product multiplies in the pass that reads the tokens.
            multiply_by(self._pre_scale_K)
            self._pre_scale_K = None

    def __call__(self, x_TK: Tensor) -> Tensor:
        if self._pre_scale_K is not None:
            x_TK = (x_TK * self._pre_scale_K).to(x_TK.dtype)
        return self._product(x_TK)

    @property
    def fused(self) -> Callable[..., Tensor | None] | None:
        return super().fused if self._pre_scale_K is None else None
