"""SwiGLU feed-forward layer (arXiv 2002.05202)."""

from __future__ import annotations

from torch import Tensor

from engine.comm import Group
from engine.kernels import api as ops
from engine.layers.linear import Arrays


class MLP:
    """x [T, E] → [T, E]; gate and up are one matrix, gate's rows first."""

    def __init__(self, arrays: Arrays, tp: Group):
        self._gate_up = arrays.linear("gate_up")
        self._down = arrays.linear("down")
        self._tp = tp

    def __call__(self, x_TE: Tensor) -> Tensor:
        return self._tp.all_reduce(self._down(ops.silu_mul(self._gate_up(x_TE))))
