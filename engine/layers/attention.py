"""Grouped-query attention over the KV cache."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from engine.cache import LayerCache
from engine.comm import Group
from engine.kernels import api as ops
from engine.kernels.api import Attending
from engine.layers.linear import Arrays, Norm, Use
from engine.layers.parallel import RowParallel
from engine.mapping import LocalShape


class QKV(NamedTuple):
    q_THD: Tensor
    k_TGD: Tensor
    v_TGD: Tensor


class Attention:
    """h [T, E] → h + attention(norm(h)), maybe in h's memory; new keys and values are cached before
    they are read."""

    def __init__(self, arrays: Arrays, norm: Norm, shape: LocalShape, tp: Group):
        self._norm = norm
        self._qkv = arrays.linear("qkv")
        self._out = RowParallel(arrays.linear("out"), tp)
        self._shape = shape
        self.uses = (Use(self._qkv.product, norm), self._out.use)

    def __call__(
        self, h_TE: Tensor, angles: tuple[Tensor, Tensor], layer: LayerCache, batch: Attending
    ) -> Tensor:
        qkv = split_heads(self._qkv(h_TE, norm=self._norm), self._shape)
        o_THD = ops.rope_attention(*qkv, *angles, layer, batch)
        return self._out(o_THD.flatten(1), h_TE)


def split_heads(qkv_TN: Tensor, shape: LocalShape) -> QKV:
    """Rows of the fused projection are q heads, then k heads, then v heads."""
    widths = [shape.heads, shape.kv_heads, shape.kv_heads]
    parts = qkv_TN.split([heads * shape.head_dim for heads in widths], dim=-1)
    return QKV(
        *(part.unflatten(-1, (heads, -1)) for part, heads in zip(parts, widths, strict=True))
    )
