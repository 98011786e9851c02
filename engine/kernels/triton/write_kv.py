"""New keys and values into the cache, quantised where it has scales; a kv head per program."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from engine.cache import LayerCache
from engine.kernels.triton._codes import stored
from engine.kernels.triton._heads import (
    WARPS,
    is_row_of_heads,
    scale_of,
    slot_offset,
    store_head,
)
from engine.kernels.triton._launch import launch_options


@triton.jit
def _write_kv(
    k_cache, v_cache, k, v, k_scale, v_scale, slots,
    k_stride, v_stride, block_tokens, block_stride, head_stride,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    scale_k, scale_v = scale_of(k_scale, head), scale_of(v_scale, head)
    if PDL:
        tl.extra.cuda.gdc_wait()
    slot = tl.load(slots + token)
    at = slot_offset(slot, head, block_tokens, block_stride, head_stride, D)
    store_head(k_cache + at, k + token * k_stride + head * D, scale_k, slot >= 0, D, BLOCK_D)
    store_head(v_cache + at, v + token * v_stride + head * D, scale_v, slot >= 0, D, BLOCK_D)


def write_kv(k_TGD: Tensor, v_TGD: Tensor, layer: LayerCache, slots_T: Tensor) -> None:
    tokens, kv_heads, dim = k_TGD.shape
    assert is_row_of_heads(k_TGD) and is_row_of_heads(v_TGD) and slots_T.is_contiguous()
    k_cache, v_cache = stored(layer.k), stored(layer.v)
    assert k_cache.stride() == v_cache.stride() and k_cache.stride()[2:] == (dim, 1)
    if tokens:
        _write_kv[(tokens, kv_heads)](
            k_cache, v_cache, k_TGD, v_TGD, layer.k_scale_G, layer.v_scale_G, slots_T,
            k_TGD.stride(0), v_TGD.stride(0), k_cache.shape[2], *k_cache.stride()[:2],
            D=dim, BLOCK_D=triton.next_power_of_2(dim),
            num_warps=WARPS, **launch_options(k_TGD.device),
        )  # fmt: skip
