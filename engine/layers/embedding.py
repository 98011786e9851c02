"""Token embedding table: whole, cut by vocabulary, or cut by hidden size."""

from __future__ import annotations

from torch import Tensor

from engine.comm import Group
from engine.kernels import api as ops


class Embedding:
    """tokens [T] → x [T, E], the same on every rank of the tensor-parallel group.

    `sharding_dim`: 0 each rank holds a range of rows, 1 a range of columns, None the whole table.
    """

    def __init__(self, table_VE: Tensor, sharding_dim: int | None, tp: Group):
        self.table_VE = table_VE
        self._sharding_dim = sharding_dim if tp.size > 1 else None
        self._tp = tp

    def __call__(self, tokens_T: Tensor) -> Tensor:
        if self._sharding_dim == 0:
            first_row = self._tp.rank * self.table_VE.shape[0]
            return self._tp.all_reduce(ops.embedding(tokens_T, self.table_VE, first_row))
        x_TE = ops.embedding(tokens_T, self.table_VE)
        return self._tp.all_gather(x_TE) if self._sharding_dim == 1 else x_TE
