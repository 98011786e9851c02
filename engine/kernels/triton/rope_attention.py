"""A layer's attention from the fused projection's row: one launch where every sequence has one
token, `rope_write_kv` and `attention` otherwise."""

from __future__ import annotations

from torch import Tensor

from engine.cache import LayerCache
from engine.kernels.api import Attending
from engine.kernels.triton._decode import rope_decode
from engine.kernels.triton.attention import attention
from engine.kernels.triton.rope_write_kv import rope_write_kv


def rope_attention(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    cos_TC: Tensor,
    sin_TC: Tensor,
    layer: LayerCache,
    batch: Attending,
) -> Tensor:
    lens = batch.query_lens
    if len(q_THD) == len(lens) and min(lens, default=0) == 1:
        return rope_decode(q_THD, k_TGD, v_TGD, cos_TC, sin_TC, layer, batch)
    q_THD = rope_write_kv(q_THD, k_TGD, v_TGD, cos_TC, sin_TC, layer, batch.slots_T)
    return attention(q_THD, layer, batch)
