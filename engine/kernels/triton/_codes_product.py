"""Linear layers that multiply codes with codes: tokens are rounded to the weights' type first."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.kernels.triton._around import Around
from engine.kernels.triton._gemv import multiply_codes
from engine.kernels.triton._matmul import multiply_tiles
from engine.kernels.triton._product import Norm, Product
from engine.kernels.triton._quantize import Codes, quantize
from engine.kernels.triton._tactics import GEMV, Config
from engine.kernels.triton._weights import Weights


class CodesProduct(Product):
    """Tokens become codes in the kernel of their norm if there is one, or come as codes from the
    layer before; `input_scale` fp32 [1], or None for a scale per token."""

    def __init__(self, weights: Weights, input_scale: Tensor | None):
        super().__init__(weights)
        self.input_scale = input_scale
        self._divisor_K: Tensor | None = None

    def divide_by(self, divisor_K: Tensor) -> None:
        """Multiply x / divisor (fp32 [K]) from now on."""
        self._divisor_K = divisor_K

    def fused(
        self,
        x_TK: Tensor | Codes,
        *,
        norm: Norm | None = None,
        is_gated: bool = False,
        residual_TN: Tensor | None = None,
    ) -> Tensor | Codes | None:
        if isinstance(x_TK, Codes):
            assert norm is None
            return self.multiply(x_TK, self.choose(x_TK.codes_TK), is_gated, residual_TN)
        return super().fused(x_TK, norm=norm, is_gated=is_gated, residual_TN=residual_TN)

    def run(
        self,
        x_TK: Tensor,
        config: Config,
        norm: Norm | None = None,
        is_gated: bool = False,
        residual_TN: Tensor | None = None,
    ) -> Tensor | Codes | None:
        if self._rounds_itself(x_TK, config):
            around = Around(norm, is_gated, residual_TN)
            return multiply_codes(
                x_TK, self.input_scale, self.weights, config, around, dtype=x_TK.dtype
            )
        x = quantize(
            x_TK, self.weights.codes.dtype,
            given=self.input_scale, norm=norm, divisor_K=self._divisor_K,
        )  # fmt: skip
        return self.multiply(x, config, is_gated, residual_TN)

    def multiply(
        self, x: Codes, config: Config, is_gated: bool, residual_TN: Tensor | None
    ) -> Tensor | Codes:
        """y [T, N] of tokens that are codes, of the dtype that they were rounded from."""
        if config.kind == GEMV and len(x.codes_TK) == 1:
            around = Around(None, is_gated, residual_TN)
            return multiply_codes(x.codes_TK, x.scale, self.weights, config, around, dtype=x.dtype)
        return multiply_tiles(
            x.codes_TK, self.weights, config, dtype=x.dtype, x_scale=x.scale,
            is_gated=is_gated, residual_TN=residual_TN,
        )  # fmt: skip

    def _rounds_itself(self, x_TK: Tensor, config: Config) -> bool:
        """Whether the product's kernel rounds a token to codes, whose scale is known before."""
        return (
            config.kind == GEMV
            and len(x_TK) == 1
            and self.weights.codes.dtype == torch.float8_e4m3fn
            and self.input_scale is not None
            and self._divisor_K is None
        )
