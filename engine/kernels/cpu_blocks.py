"""A decode step's layers in one compiled call, where all their products are packed ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engine.kernels import registry
from engine.kernels.native.blocks import BlockParts, BlockStack, HeadShape, takes_blocks
from engine.kernels.packing import Packing

CPU = torch.device("cpu")


class BlockWeights(NamedTuple):
    """A layer's products – qkv, out, gate_up and down – and the weights of its norms."""

    products: Sequence[Callable[[Tensor], Tensor]]
    attn_norm_E: Tensor
    mlp_norm_E: Tensor


def bind_blocks(blocks: Sequence[BlockWeights], shape: HeadShape, eps: float) -> BlockStack | None:
    """What runs these layers; None where other kernels than the native ones compute them. Waits
    until all weights are packed."""
    if blocks[0].attn_norm_E.device != CPU or not registry.runs_by("cpu", "rope_attention", CPU):
        return None
    parts = []
    for products, attn_norm_E, mlp_norm_E in blocks:
        packed = [product.product for product in products if isinstance(product, Packing)]
        if len(packed) < len(products):
            return None
        part = BlockParts(*packed, attn_norm_E, mlp_norm_E)
        if not takes_blocks(part, attn_norm_E.dtype):
            return None
        parts.append(part)
    return BlockStack(parts, shape, eps)
