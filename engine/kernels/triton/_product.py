"""Linear layers of all modes: which kernel a call gets, and what is fused around it.

`fused` is y = product(rms_norm(x)), gated if asked (gate's rows before up's), plus the residual,
in as few kernels as the configuration has; None if it has none for the case. Sums stay in fp32
through scale, gate and residual and are rounded once; RMSNorm's factor is applied to the sum. So
results differ from the steps' by roundings of the dtype.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.triton._gemv import Around, multiply_token
from engine.kernels.triton._launch import processors
from engine.kernels.triton._matmul import multiply_tiles
from engine.kernels.triton._tactics import GEMV, LIBRARY, Config, choose
from engine.kernels.triton._weights import Weights
from engine.kernels.triton._widen import multiply_widened
from engine.kernels.triton.rms_norm import rms_norm

Norm = tuple[Tensor, float]


class Product:
    """y [T, N] = x [T, K] @ wᵀ, x fp32, fp16 or bf16."""

    op: ClassVar[str]

    def __init__(self, weights: Weights):
        assert weights.codes.is_contiguous()
        self.weights = weights

    def __call__(self, x_TK: Tensor) -> Tensor:
        x_TK = _with_rows(x_TK)
        return self.apply(x_TK, self.choose(x_TK))

    def apply(self, x_TK: Tensor, config: Config) -> Tensor:
        """y by the kernel of `config`, or by a library where it has none."""
        y_TN = self.run(x_TK, config)
        return self._by_library(x_TK) if y_TN is None else y_TN

    def fused(
        self,
        x_TK: Tensor,
        *,
        norm: Norm | None = None,
        is_gated: bool = False,
        residual_TN: Tensor | None = None,
    ) -> Tensor | None:
        x_TK = _with_rows(x_TK)
        return self.run(x_TK, self.choose(x_TK), norm, is_gated, residual_TN)

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
            around = Around(norm, is_gated, residual_TN)
            return multiply_token(x_TK, self.weights, config, around)
        # Tensor cores have no fp32 products.
        if config.kind == LIBRARY or x_TK.dtype == torch.float32:
            return None
        return multiply_tiles(
            x_TK if norm is None else rms_norm(x_TK, *norm), self.weights, config,
            is_gated=is_gated, residual_TN=residual_TN,
        )  # fmt: skip

    def _by_library(self, x_TK: Tensor) -> Tensor:
        return multiply_widened(x_TK, self.weights)


class DenseProduct(Product):
    """16-bit or fp32 weights: cuBLAS but for a single token, unless tiles measured faster."""

    op = "linear"

    def _by_library(self, x_TK: Tensor) -> Tensor:
        return F.linear(x_TK, self.weights.codes)


def _with_rows(x_TK: Tensor) -> Tensor:
    """Tokens that are contiguous, as all kernels take them."""
    return x_TK if x_TK.stride(1) == 1 else x_TK.contiguous()
