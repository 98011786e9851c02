"""The decoder layers of a decode step in one call: blocks.cpp."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.cache import LayerCache
from engine.kernels.api import Attending
from engine.kernels.native import attention, compiled, rowwise
from engine.kernels.native.product import DTYPES, PROMPT_TOKENS, PackedProduct

_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64


class BlockParts(NamedTuple):
    """A layer's products and the weights of its two norms."""

    qkv: PackedProduct
    out: PackedProduct
    gate_up: PackedProduct
    down: PackedProduct
    attn_norm_E: Tensor
    mlp_norm_E: Tensor


class HeadShape(NamedTuple):
    heads: int
    kv_heads: int
    head_dim: int


class _Product(ctypes.Structure):
    _fields_ = (("multiply", _POINTER), ("matrix", _POINTER), ("digits", _SIZE))


class _Block(ctypes.Structure):
    _fields_ = (
        *((name, _Product) for name in ("qkv", "out", "gate_up", "down")),
        *((name, _POINTER) for name in ("attn_norm", "mlp_norm", "k", "v")),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        *((name, _POINTER) for name in ("write", "attend", "h", "middle", "qkv", "q", "o", "a")),
        *((name, _POINTER) for name in ("cos", "sin", "slots", "table", "lengths")),
        *((name, _SIZE) for name in ("table_stride", "window", "tokens", "heads", "groups")),
        *((name, _SIZE) for name in ("head_size", "block_tokens")),
        *((name, ctypes.c_float) for name in ("scale", "eps")),
        *((name, ctypes.c_int32) for name in ("dtype", "value_bytes", "threads")),
    )


class BlockStack:
    """h [T, E] → h through layers whose products are all packed ones, the same bits as one after
    the other."""

    def __init__(self, blocks: Sequence[BlockParts], shape: HeadShape, eps: float):
        self._blocks, self._shape, self._eps = blocks, shape, eps
        self._arrays: tuple[Any, Any] | None = None

    def __call__(
        self,
        h_TE: Tensor,
        angles: tuple[Tensor, Tensor],
        caches: Sequence[LayerCache],
        batch: Attending,
    ) -> Tensor | None:
        """None for what the kernels of a layer do not take: prompts, many tokens, codes in the
        cache."""
        run = self._library(h_TE, angles, caches, batch)
        if run is None:
            return None
        first, dtype = self._blocks[0], h_TE.dtype
        heads, kv_heads, head_dim = self._shape
        tokens, width = h_TE.shape
        attended = heads * head_dim
        widths = (width, width, first.qkv.outputs, attended, attended, first.down.inputs)
        buffers = [torch.empty(tokens, columns, dtype=dtype) for columns in widths]
        buffers[0].copy_(h_TE)
        table_BM, cos_TC, sin_TC = batch.block_table_BM, *(angle.contiguous() for angle in angles)
        step = _Step(
            *self._kernels(dtype),
            *(buffer.data_ptr() for buffer in buffers),
            *(t.data_ptr() for t in (cos_TC, sin_TC, batch.slots_T, table_BM, batch.kv_lens_B)),
            *(table_BM.stride(0), batch.window or attention.NO_WINDOW, tokens, heads, kv_heads),
            *(head_dim, caches[0].k.shape[2], batch.scale, self._eps),
            *(DTYPES[dtype], h_TE.element_size(), torch.get_num_threads()),
        )
        run(self._layers(caches, dtype), _SIZE(len(self._blocks)), ctypes.byref(step))
        return buffers[0]

    def _library(
        self,
        h_TE: Tensor,
        angles: tuple[Tensor, Tensor],
        caches: Sequence[LayerCache],
        batch: Attending,
    ) -> Any:
        k, v, k_scale_G, _ = caches[0]
        takes = (
            0 < len(h_TE) < PROMPT_TOKENS
            and all(count == 1 for count in batch.query_lens)
            and k_scale_G is None
            and k.dtype == v.dtype == h_TE.dtype == self._blocks[0].attn_norm_E.dtype
            and k.is_contiguous()
            and v.is_contiguous()
            and batch.slots_T.is_contiguous()
            and batch.block_table_BM.stride(1) == batch.kv_lens_B.stride(0) == 1
            and self._shape.head_dim % (2 * rowwise.LANES) == 0
        )
        library = compiled.load("blocks") if takes else None
        return None if library is None else library.yi_run_blocks

    def _kernels(self, dtype: torch.dtype) -> tuple[int, int]:
        write = getattr(compiled.load("rowwise"), f"yi_rotate_and_write_{rowwise.NAMES[dtype]}")
        attend = getattr(compiled.load("attention"), attention.NAMES[dtype])
        return _address(write), _address(attend)

    def _layers(self, caches: Sequence[LayerCache], dtype: torch.dtype) -> Any:
        """The layers as C sees them, kept as long as the cache is the same."""
        places = tuple(pointer for c in caches for pointer in (c.k.data_ptr(), c.v.data_ptr()))
        if self._arrays is None or self._arrays[0] != (places, dtype):
            layers = (_Block * len(self._blocks))()
            for layer, parts, cache in zip(layers, self._blocks, caches, strict=True):
                for name in ("qkv", "out", "gate_up", "down"):
                    product = getattr(parts, name)
                    setattr(layer, name, _Product(*product.native_call(dtype)))
                layer.attn_norm = parts.attn_norm_E.data_ptr()
                layer.mlp_norm = parts.mlp_norm_E.data_ptr()
                layer.k, layer.v = cache.k.data_ptr(), cache.v.data_ptr()
            self._arrays = ((places, dtype), layers)
        return self._arrays[1]


def takes_blocks(parts: BlockParts, dtype: torch.dtype) -> bool:
    """Whether the products fuse norm, gate and residual for tokens of `dtype`, and the other
    kernels of a layer are there."""
    names = ("blocks", "rowwise", "attention")
    return (
        parts.qkv.fuses(parts.attn_norm_E, dtype, is_gated=False)
        and parts.gate_up.fuses(parts.mlp_norm_E, dtype, is_gated=True)
        and parts.attn_norm_E.is_contiguous()
        and parts.mlp_norm_E.is_contiguous()
        and all(compiled.load(name) is not None for name in names)
    )


def _address(function: Any) -> int:
    address = ctypes.cast(function, _POINTER).value
    assert address is not None
    return address
