"""y = x @ ((codes - zero) · scale)ᵀ, two codes a byte, scale and zero for groups of inputs."""

from __future__ import annotations

from torch import Tensor

from engine.kernels.triton._around import Around
from engine.kernels.triton._columns import multiply_columns
from engine.kernels.triton._product import Norm, Product
from engine.kernels.triton._weights import Weights


class LinearInt4Groups(Product):
    op = "linear_int4_groups"

    def __init__(self, codes_NB: Tensor, scale_NR: Tensor, zero_NR: Tensor | None, block: int):
        super().__init__(Weights(codes_NB, scale_NR, zero_NR, block))
        self._factor_K: Tensor | None = None
        self._folded: tuple[Tensor, Tensor] | None = None

    def multiply_by(self, factor_K: Tensor) -> None:
        """Multiply x · factor (fp32 [K]) from now on: AWQ's scales of the inputs."""
        self._factor_K = factor_K.float().contiguous()

    def around(self, norm: Norm | None, is_gated: bool, residual_TN: Tensor | None) -> Around:
        if norm is None:
            return Around(None, is_gated, residual_TN, self._factor_K)
        return super().around(self._fold(norm), is_gated, residual_TN)

    def prepare(self, x_TK: Tensor, norm: Norm | None) -> Tensor:
        if norm is not None:
            return super().prepare(x_TK, self._fold(norm))
        return x_TK if self._factor_K is None else multiply_columns(x_TK, self._factor_K)

    def _fold(self, norm: Norm) -> Norm:
        """The norm with the factor in its weight, kept for the next call."""
        if self._factor_K is None:
            return norm
        weight_K, eps = norm
        if self._folded is None or self._folded[0] is not weight_K:
            self._folded = weight_K, weight_K.float() * self._factor_K
        return self._folded[1], eps


def linear_int4_groups(
    x_TK: Tensor, codes_NB: Tensor, scale_NR: Tensor, zero_NR: Tensor | None, block: int
) -> Tensor:
    return LinearInt4Groups(codes_NB, scale_NR, zero_NR, block)(x_TK)


BOUND = {"linear_int4_groups": LinearInt4Groups}
