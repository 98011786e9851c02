"""Linear layers of all modes: which kernels a call gets, and what is fused around it.

`fused` is y = product(rms_norm(x)), gated if asked (gate's rows before up's), plus the residual,
in as few kernels as the configuration has. Sums stay in fp32 through scale, gate and residual and
are rounded once; RMSNorm's factor is applied to the sum. So results differ from the steps' by
roundings of the dtype.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from engine.kernels.triton._around import Around
from engine.kernels.triton._gemv import multiply_token
from engine.kernels.triton._launch import processors
from engine.kernels.triton._matmul import multiply_tiles
from engine.kernels.triton._matmul_digits import multiply_digits, suits_digits
from engine.kernels.triton._tactics import GEMV, LIBRARY, Config, choose
from engine.kernels.triton._weights import Weights
from engine.kernels.triton._widen import multiply_widened
from engine.kernels.triton.rms_norm import rms_norm
from engine.kernels.triton.silu_mul import silu_mul

Norm = tuple[Tensor, float]


class Product:
    """y [T, N] = x [T, K] @ wᵀ, x fp32, fp16 or bf16."""

    op: ClassVar[str]

    def __init__(self, weights: Weights):
        assert weights.codes.is_contiguous()
        self.weights = weights
        self._has_digits = suits_digits(weights)

    def __call__(self, x_TK: Tensor) -> Tensor:
        x_TK = _with_rows(x_TK)
        return self.apply(x_TK, self.choose(x_TK))

    def fused(
        self,
        x_TK: Tensor,
        *,
        norm: Norm | None = None,
        is_gated: bool = False,
        residual_TN: Tensor | None = None,
    ) -> Tensor:
        """May write the result over the residual."""
        x_TK = _with_rows(x_TK)
        return self.apply(x_TK, self.choose(x_TK), norm, is_gated, residual_TN)

    def apply(
        self,
        x_TK: Tensor,
        config: Config,
        norm: Norm | None = None,
        is_gated: bool = False,
        residual_TN: Tensor | None = None,
    ) -> Tensor:
        """`fused` by the kernels of `config`, or by a library where it has none."""
        y_TN = self.run(x_TK, config, norm, is_gated, residual_TN)
        if y_TN is not None:
            return y_TN
        x_TK = self.prepare(x_TK, norm)
        if not is_gated:
            return self.by_library(x_TK, residual_TN)
        y_TN = silu_mul(self.by_library(x_TK))
        return y_TN if residual_TN is None else residual_TN + y_TN

    def choose(self, x_TK: Tensor) -> Config:
        weights = self.weights
        return choose(self.op, len(x_TK), weights.outputs, weights.inputs, processors(x_TK.device))

    def run(
        self,
        x_TK: Tensor,
        config: Config,
        norm: Norm | None = None,
        is_gated: bool = False,
        residual_TN: Tensor | None = None,
    ) -> Tensor | None:
        """The kernels of `config`, or None if they do not serve these tokens."""
        if config.kind == GEMV and len(x_TK) == 1:
            around = self.around(norm, is_gated, residual_TN)
            return multiply_token(x_TK, self.weights, config, around)
        # Tensor cores have no fp32 products.
        if config.kind == LIBRARY or x_TK.dtype == torch.float32:
            return None
        if self._has_digits:
            around = self.around(norm, is_gated, residual_TN)
            return multiply_digits(x_TK, self.weights, config, around)
        return multiply_tiles(
            self.prepare(x_TK, norm), self.weights, config,
            is_gated=is_gated, residual_TN=residual_TN,
        )  # fmt: skip

    def around(self, norm: Norm | None, is_gated: bool, residual_TN: Tensor | None) -> Around:
        """What the kernels of one token and of tokens' digits do beside the product."""
        return Around(norm, is_gated, residual_TN)

    def prepare(self, x_TK: Tensor, norm: Norm | None) -> Tensor:
        """What the weights meet, where that is made by kernels of its own."""
        return x_TK if norm is None else rms_norm(x_TK, *norm)

    def by_library(self, x_TK: Tensor, residual_TN: Tensor | None = None) -> Tensor:
        """cuBLAS, which adds the residual to its sums, in its place."""
        return multiply_widened(x_TK, self.weights, residual_TN)


def _with_rows(x_TK: Tensor) -> Tensor:
    """Tokens that are contiguous, as all kernels take them."""
    return x_TK if x_TK.stride(1) == 1 else x_TK.contiguous()
