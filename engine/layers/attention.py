"""Grouped-query attention over the KV cache."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from engine.cache import LayerCache
from engine.comm import Group
from engine.kernels import api as ops
from engine.kernels.api import Attending
from engine.layers.linear import Arrays
from engine.mapping import LocalShape


class QKV(NamedTuple):
    q_THD: Tensor
    k_TGD: Tensor
    v_TGD: Tensor


class Attention:
    """x [T, E] → [T, E]; writes the new keys and values before it reads the cache."""

    def __init__(self, arrays: Arrays, shape: LocalShape, tp: Group):
        self._qkv = arrays.linear("qkv")
        self._out = arrays.linear("out")
        self._shape = shape
        self._tp = tp

    def __call__(
        self, x_TE: Tensor, angles: tuple[Tensor, Tensor], layer: LayerCache, batch: Attending
    ) -> Tensor:
        qkv = split_heads(self._qkv(x_TE), self._shape)
        q_THD, k_TGD = ops.rope(qkv.q_THD, qkv.k_TGD, *angles)
        ops.write_kv(k_TGD, qkv.v_TGD, layer, batch.slots_T)
        o_THD = ops.attention(q_THD, layer, batch)
        return self._tp.all_reduce(self._out(o_THD.flatten(1)))


def split_heads(qkv_TN: Tensor, shape: LocalShape) -> QKV:
    """Rows of the fused projection are q heads, then k heads, then v heads."""
    widths = [shape.heads, shape.kv_heads, shape.kv_heads]
    parts = qkv_TN.split([heads * shape.head_dim for heads in widths], dim=-1)
    return QKV(
        *(part.unflatten(-1, (heads, -1)) for part, heads in zip(parts, widths, strict=True))
    )
