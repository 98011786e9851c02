"""y = (x_codes @ codesᵀ) · x_scale · scale, float8_e4m3fn products with fp32 sums.

Many tokens of one scale and weights of one scale are cuBLAS' case (`torch._scaled_mm`, Ada and
later); it takes rows of 16 bytes only. Everything else is Triton's.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from engine.kernels.triton._codes import has_float8
from engine.kernels.triton._product import CodesProduct, Norm
from engine.kernels.triton._quantize import quantize
from engine.kernels.triton._tactics import FEW_TOKENS, Config
from engine.kernels.triton._weights import Weights

LIBRARY_MULTIPLE = 16


class LinearFp8(CodesProduct):
    op = "linear_fp8"

    def __init__(self, codes_NK: Tensor, scale_N: Tensor, input_scale: Tensor | None):
        super().__init__(Weights(codes_NK, scale_N), input_scale)

    def run(
        self,
        x_TK: Tensor,
        config: Config,
        norm: Norm | None = None,
        is_gated: bool = False,
        residual_TN: Tensor | None = None,
    ) -> Tensor | None:
        if len(x_TK) <= FEW_TOKENS or not self._suits_library or x_TK.dtype == torch.float32:
            return super().run(x_TK, config, norm, is_gated, residual_TN)
        if is_gated or residual_TN is not None:
            return None
        codes_TK, scale = quantize(
            x_TK, self.weights.codes.dtype, given=self.input_scale, norm=norm
        )
        return torch._scaled_mm(
            codes_TK, self.weights.codes.T, scale_a=scale.reshape(()), scale_b=self._weight_scale,
            out_dtype=x_TK.dtype, use_fast_accum=False,
        )  # fmt: skip

    @cached_property
    def _suits_library(self) -> bool:
        """Looks at the scales once, which waits for the device: never while a graph is captured,
        whose warm-up comes first."""
        codes_NK, scale_N = self.weights.codes, self.weights.scale
        assert scale_N is not None
        return (
            codes_NK.is_cuda
            and has_float8(codes_NK.device)
            and self.input_scale is not None
            and not any(size % LIBRARY_MULTIPLE for size in codes_NK.shape)
            and bool((scale_N == scale_N[0]).all())
        )

    @property
    def _weight_scale(self) -> Tensor:
        assert self.weights.scale is not None
        return self.weights.scale[0]


def linear_fp8(
    x_TK: Tensor, codes_NK: Tensor, scale_N: Tensor, input_scale: Tensor | None
) -> Tensor:
    return LinearFp8(codes_NK, scale_N, input_scale)(x_TK)


BOUND = {"linear_fp8": LinearFp8}
