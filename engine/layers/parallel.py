"""Linear layers whose inputs are cut among the tensor-parallel ranks."""

from __future__ import annotations

from torch import Tensor

from engine.comm import Group
from engine.layers.linear import Projection, Use


class RowParallel:
    """y [T, N] = residual + the sum over ranks of each one's product, maybe in the residual's
    memory."""

    def __init__(self, projection: Projection, tp: Group):
        self._projection, self._tp = projection, tp

    @property
    def use(self) -> Use:
        return Use(self._projection.product, has_residual=self._tp.size == 1)

    def __call__(self, x_TK: Tensor, residual_TN: Tensor) -> Tensor:
        if self._tp.size == 1:
            return self._projection(x_TK, residual_TN=residual_TN)
        return residual_TN + self._tp.all_reduce(self._projection(x_TK))
