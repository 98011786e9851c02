"""AWQ layers of TensorRT-LLM's unified checkpoint, where fc and gate have factors of their own."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from engine.checkpoint.awq_file import round_rows
from engine.checkpoint.base import TensorSource
from engine.checkpoint.eight_bit import PRE_QUANT_SCALE
from engine.checkpoint.modelopt import PackedAwq, unpack_rows
from engine.checkpoint.quant_scales import read_scale
from engine.checkpoint.quantised import StoredLinear
from engine.weights.types import Int4Groups

SYMMETRIC_ZERO = 8


class UnifiedAwq(PackedAwq):
    """`PackedAwq` whose layers of one input may have different factors of it.

    An engine joins such layers and has one factor for them, the first one's. That layer keeps its
    codes; the codes of one whose factor differs are rounded a second time.
    """

    def unpack(self, linear: StoredLinear) -> Int4Groups:
        weights = Int4Groups(
            codes_NK=unpack_rows(linear.read("weight")),
            scale_NR=self.groups.spread(read_scale(linear.tensors["weight_scale"]), linear.inputs),
            group_size=self.groups.engine,
        )
        if not any(PRE_QUANT_SCALE in peer for peer in linear.peers):
            return weights
        ones_K = torch.ones(linear.inputs)
        own_K, common_K = (
            read_scale(tensors[PRE_QUANT_SCALE]) if PRE_QUANT_SCALE in tensors else ones_K
            for tensors in (linear.tensors, linear.peers[0])
        )
        if not torch.equal(own_K, common_K):
            source = Decoded(weights, linear.tensors["weight"])
            codes_NK, scale_NR = round_rows(source, weights.scale_NR, own_K / common_K)
            weights = replace(weights, codes_NK=codes_NK, scale_NR=scale_NR)
        return replace(weights, pre_scale_K=common_K)


class Decoded(TensorSource):
    """The values of 4-bit weights, fp32 [N, K]; `stored` is the tensor they come from."""

    def __init__(self, weights: Int4Groups, stored: TensorSource) -> None:
        self.name, self.origin = stored.name, stored.origin
        self.shape, self.dtype = tuple(weights.codes_NK.shape), torch.float32
        self.weights = weights

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        rows = slice(*self.row_span(start, stop))
        codes_NK = self.weights.codes_NK[rows].float() - SYMMETRIC_ZERO
        scale_NR = self.weights.scale_NR[rows]
        return codes_NK * scale_NR.repeat_interleave(self.weights.group_size, dim=1)
