"""Hugging Face exports of NVIDIA ModelOpt: FP8, W4A16_AWQ, W8A8_SQ_PER_CHANNEL and W8A16.

Their settings lie in hf_quant_config.json and, from newer versions, in config.json as well.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

import torch
from torch import Tensor

from engine.checkpoint.eight_bit import PRE_QUANT_SCALE, EightBit, read_shared_factor
from engine.checkpoint.linear_layers import linear_shapes
from engine.checkpoint.quant_groups import Groups, read_groups, require_multiples
from engine.checkpoint.quant_scales import SCALE_DTYPES, read_scale
from engine.checkpoint.quant_settings import Settings, find_left_out
from engine.checkpoint.quantised import (
    Field,
    FullPrecision,
    LinearFormat,
    StoredLinear,
    meta,
    sketch_groups,
)
from engine.config import ModelConfig
from engine.quant import Algorithm, KVStorage, QuantConfig
from engine.weights.types import Int4Groups, Int8

ALGORITHMS = ("FP8", "W4A16_AWQ", "W8A8_SQ_PER_CHANNEL", "W8A16")
KV_ALGORITHMS = {"FP8": KVStorage.FP8, "INT8": KVStorage.INT8}
KV_TYPES = {"float": KVStorage.FP8, "int": KVStorage.INT8}
KV_NAMES = (("k_proj.k_scale", "v_proj.v_scale"),)

ROWS_PER_BYTE = 2
SIGN_BIT = 8

REMEDY = "export the model again in one of them, or quantise the full-precision checkpoint here"


class PackedAwq(LinearFormat):
    """weight uint8 [N/2, K], the low nibble being the even row, two's complement; weight_scale
    fp32 [N, R]; pre_quant_scale [K], the factor of the input, where no norm could take it.
    """

    def __init__(self, groups: Groups, kv: KVStorage) -> None:
        self.groups = groups
        self.quant = QuantConfig(Algorithm.W4A16_AWQ, group_size=groups.engine, kv=kv)
        self.kv_names = KV_NAMES

    def fields(self, outputs: int, inputs: int) -> dict[str, Field]:
        return {
            "weight": Field(((outputs // ROWS_PER_BYTE, inputs),), (torch.uint8,)),
            "weight_scale": Field(((outputs, self.groups.count(inputs)),), SCALE_DTYPES),
            PRE_QUANT_SCALE: Field(((inputs,),), SCALE_DTYPES, is_required=False),
        }

    def unpack(self, linear: StoredLinear) -> Int4Groups:
        pre_scale_K = None
        if any(PRE_QUANT_SCALE in peer for peer in linear.peers):
            pre_scale_K = read_shared_factor(linear, PRE_QUANT_SCALE)
        scale_NR = read_scale(linear.tensors["weight_scale"])
        return Int4Groups(
            codes_NK=unpack_rows(linear.read("weight")),
            scale_NR=self.groups.spread(scale_NR, linear.inputs),
            group_size=self.groups.engine,
            pre_scale_K=pre_scale_K,
        )

    def sketch(self, linear: StoredLinear) -> Int4Groups:
        is_scaled = any(PRE_QUANT_SCALE in peer for peer in linear.peers)
        return sketch_groups(linear, self.groups, has_pre_scale=is_scaled)


class WeightOnlyInt8(LinearFormat):
    """weight int8 [N, K]; weight_scale per output [N]; activations stay as they are."""

    def __init__(self, kv: KVStorage) -> None:
        self.quant = QuantConfig(Algorithm.W8A16, kv=kv)
        self.kv_names = KV_NAMES

    def fields(self, outputs: int, inputs: int) -> dict[str, Field]:
        return {
            "weight": Field(((outputs, inputs),), (torch.int8,)),
            "weight_scale": Field(((outputs,), (outputs, 1)), SCALE_DTYPES),
        }

    def unpack(self, linear: StoredLinear) -> Int8:
        scale_N = read_scale(linear.tensors["weight_scale"]).reshape(-1)
        return Int8(linear.read("weight"), scale_N)

    def sketch(self, linear: StoredLinear) -> Int8:
        codes_NK = meta(linear.outputs, linear.inputs, dtype=torch.int8)
        return Int8(codes_NK, meta(linear.outputs))


def unpack_rows(bytes_MK: Tensor) -> Tensor:
    """uint8 [N/2, K] of two's complement nibbles -> uint8 0…15 [N, K], a value plus 8."""
    codes_MPK = torch.stack((bytes_MK & 15, bytes_MK >> 4), dim=1)
    # Adding 8 to a two's complement nibble flips its highest bit.
    return codes_MPK.bitwise_xor_(SIGN_BIT).flatten(0, 1)


def read_modelopt(settings: Settings, config: ModelConfig) -> LinearFormat:
    """The format that ModelOpt's settings describe; CheckpointError for other algorithms."""
    kv = _read_kv(settings)
    algorithm = settings.require("quant_algo", (None, *ALGORITHMS), REMEDY)
    excluded_key = "exclude_modules" if "exclude_modules" in settings.values else "ignore"
    patterns = settings.texts(excluded_key)
    is_none = find_left_out(
        settings,
        excluded_key,
        list(linear_shapes(config)),
        lambda stem: _is_excluded(stem, patterns),
    )
    if algorithm is None or is_none:
        return FullPrecision(kv, KV_NAMES)
    if algorithm == "FP8":
        return EightBit(QuantConfig(Algorithm.FP8, kv=kv), KV_NAMES)
    if algorithm == "W8A8_SQ_PER_CHANNEL":
        quant = QuantConfig(Algorithm.W8A8_SQ, per_channel=True, kv=kv)
        return EightBit(quant, KV_NAMES, is_smoothed=True)
    if algorithm == "W8A16":
        return WeightOnlyInt8(kv)
    settings.require("has_zero_point", (False,), REMEDY, default=False)
    require_multiples(config, settings.file, of_outputs=ROWS_PER_BYTE)
    return PackedAwq(read_groups(settings, config, default=128), kv)


def _read_kv(settings: Settings) -> KVStorage:
    """From hf_quant_config.json's algorithm or config.json's scheme, which says the same."""
    remedy = "export the model again with another KV cache"
    name = settings.require("kv_cache_quant_algo", (None, *KV_ALGORITHMS), remedy)
    if name is not None:
        return KV_ALGORITHMS[name]
    scheme = settings.section("kv_cache_scheme")
    if not scheme.values:
        return KVStorage.NONE
    scheme.require("num_bits", (8,), remedy)
    scheme.require("dynamic", (False,), remedy, default=False)
    return KV_TYPES[scheme.require("type", tuple(KV_TYPES), remedy)]


def _is_excluded(stem: str, patterns: tuple[str, ...]) -> bool:
    """A pattern is a module, or one with shell wildcards; it covers what the module contains."""
    return any(fnmatchcase(stem, p) or fnmatchcase(stem, f"{p}.*") for p in patterns)
