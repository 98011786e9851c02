"""One pass over the fused projection's row: q rotated, k rotated and stored, v stored.

A program has one token's kv head and the query heads that read it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.cache import LayerCache
from engine.kernels.triton._codes import stored
from engine.kernels.triton._heads import (
    ROUNDS_EACH,
    is_row_of_heads,
    rotate,
    scale_of,
    slot_offset,
    store_head,
    store_rotated,
)
from engine.kernels.triton._launch import launch_options


@triton.jit
def _rope_write_kv(
    out, k_cache, v_cache, q, k, v, cos, sin, k_scale, v_scale, slots,
    q_stride, k_stride, v_stride, block_tokens, block_stride, head_stride,
    GROUP: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    HALF: tl.constexpr = D // 2
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    kv_heads = tl.num_programs(1)
    scale_k, scale_v = scale_of(k_scale, head), scale_of(v_scale, head)
    if PDL:
        tl.extra.cuda.gdc_wait()
    cos += token * HALF
    sin += token * HALF
    q += token * q_stride + head * (GROUP * D)
    out += (token * kv_heads + head) * (GROUP * D)
    rotate(out, q, cos, sin, GROUP, HEADS, HALF, C)
    slot = tl.load(slots + token)
    at = slot_offset(slot, head, block_tokens, block_stride, head_stride, D)
    k += token * k_stride + head * D
    store_rotated(k_cache + at, k, cos, sin, scale_k, slot >= 0, HALF, C)
    store_head(v_cache + at, v + token * v_stride + head * D, scale_v, slot >= 0, D, 2 * C)


def rope_write_kv(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    cos_TC: Tensor,
    sin_TC: Tensor,
    layer: LayerCache,
    slots_T: Tensor,
) -> Tensor:
    (tokens, heads, dim), kv_heads = q_THD.shape, k_TGD.shape[1]
    assert all(map(is_row_of_heads, (q_THD, k_TGD, v_TGD))) and slots_T.is_contiguous()
    assert cos_TC.is_contiguous() and sin_TC.is_contiguous()
    assert cos_TC.shape == sin_TC.shape == (tokens, dim // 2), "one angle per pair of channels"
    k_cache, v_cache = stored(layer.k), stored(layer.v)
    assert k_cache.stride() == v_cache.stride() and k_cache.stride()[2:] == (dim, 1)
    out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
    if tokens:
        group = heads // kv_heads
        _rope_write_kv[(tokens, kv_heads)](
            out_THD, k_cache, v_cache, q_THD, k_TGD, v_TGD, cos_TC, sin_TC,
            layer.k_scale_G, layer.v_scale_G, slots_T,
            q_THD.stride(0), k_TGD.stride(0), v_TGD.stride(0),
            k_cache.shape[2], *k_cache.stride()[:2],
            GROUP=group, HEADS=triton.next_power_of_2(group), D=dim,
            C=triton.next_power_of_2(dim // 2),
            **ROUNDS_EACH, **launch_options(q_THD.device),
        )  # fmt: skip
    return out_THD
