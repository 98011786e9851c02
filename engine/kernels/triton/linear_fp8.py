"""y = (x_codes @ codesᵀ) · x_scale · scale, float8_e4m3fn products with fp32 sums.

Many tokens are cuBLAS' case (`torch._scaled_mm`, Ada and later); it takes rows of 16 bytes only.
It gets no scales but a power of two, since its product by rows is slower and, before PyTorch 2.12,
ignores the current stream; a kernel of ours scales the sums in the pass that gates them or adds
the residual. So sums are rounded to the dtype once more than elsewhere: an error of half a unit in
the last place, where rounding the tokens to three bits costs hundreds.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from engine.kernels.triton._codes import has_float8
from engine.kernels.triton._codes_product import CodesProduct
from engine.kernels.triton._quantize import CODE_RANGE, Codes, quantize_gated
from engine.kernels.triton._scale import scale_sums
from engine.kernels.triton._tactics import FEW_TOKENS, Config
from engine.kernels.triton._weights import Weights

LIBRARY_MULTIPLE = 16
# Hopper's fast sums have 14 bits: prompts of Yi-6B take 2 % less time on an H100, and fp16 products
# of K = 11008 have errors of 0.25 % in place of 0.03.
USES_FAST_SUMS = False
MAX_FP16 = 65504


class LinearFp8(CodesProduct):
    op = "linear_fp8"

    def __init__(self, codes_NK: Tensor, scale_N: Tensor, input_scale: Tensor | None):
        super().__init__(Weights(codes_NK, scale_N), input_scale)
        # Each factor of the library's product takes half of a unit that keeps sums within fp16.
        largest = codes_NK.shape[1] * CODE_RANGE[codes_NK.dtype] ** 2
        half = 2.0 ** -math.ceil(math.log2(largest / MAX_FP16) / 2)
        self._half_unit = torch.tensor(half, device=codes_NK.device)
        self._unit = half**-2
        is_whole = not any(size % LIBRARY_MULTIPLE for size in codes_NK.shape)
        self._suits_library = is_whole and has_float8(codes_NK.device)
        self._reader: LinearFp8 | None = None

    def feed(self, reader: Callable[[Tensor], Tensor]) -> None:
        """Gated results are for `reader` alone: it gets its codes where that saves a pass."""
        self._reader = reader if isinstance(reader, LinearFp8) else None

    def multiply(
        self, x: Codes, config: Config, is_gated: bool, residual_TN: Tensor | None
    ) -> Tensor | Codes:
        weights = self.weights
        is_library = self._suits_library and x.codes_TK.shape[0] > FEW_TOKENS
        if not is_library or x.dtype == torch.float32:
            return super().multiply(x, config, is_gated, residual_TN)
        sums_TN = torch._scaled_mm(
            x.codes_TK, weights.codes.T, scale_a=self._half_unit, scale_b=self._half_unit,
            out_dtype=x.dtype, use_fast_accum=USES_FAST_SUMS,
        )  # fmt: skip
        assert weights.scale is not None
        if is_gated and self._reader is not None and residual_TN is None:
            return quantize_gated(
                sums_TN, weights.scale, x.scale, weights.codes.dtype,
                given=self._reader.input_scale, unit=self._unit,
            )  # fmt: skip
        return scale_sums(
            sums_TN, weights.scale, x.scale,
            unit=self._unit, is_gated=is_gated, residual_TN=residual_TN,
        )  # fmt: skip


def linear_fp8(
    x_TK: Tensor, codes_NK: Tensor, scale_N: Tensor, input_scale: Tensor | None
) -> Tensor:
    return LinearFp8(codes_NK, scale_N, input_scale)(x_TK)


BOUND = {"linear_fp8": LinearFp8}
