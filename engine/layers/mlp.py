"""SwiGLU feed-forward layer (arXiv 2002.05202)."""

from __future__ import annotations

from torch import Tensor

from engine.comm import Group
from engine.layers.linear import Arrays, Norm, Use
from engine.layers.parallel import RowParallel


class MLP:
    """h [T, E] → h + MLP(norm(h)), maybe in h's memory.

    Gate and up are one matrix, gate's rows first. Only `down` reads what they make: a product that
    has `feed` may make it in `down`'s codes.
    """

    def __init__(self, arrays: Arrays, norm: Norm, tp: Group):
        self._norm = norm
        self._gate_up = arrays.linear("gate_up")
        self._down = RowParallel(arrays.linear("down"), tp)
        self.uses = (Use(self._gate_up.product, norm, is_gated=True), self._down.use)
        feed = getattr(self._gate_up.product, "feed", None)
        if feed is not None:
            feed(self._down.use.product)

    def __call__(self, h_TE: Tensor) -> Tensor:
        a_TF = self._gate_up(h_TE, norm=self._norm, is_gated=True)
        return self._down(a_TF, h_TE)
