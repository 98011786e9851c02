"""How TensorRT-LLM's unified checkpoint stores linear layers: what quant_algo means here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isclose
from typing import NamedTuple

import torch

from engine import unified
from engine.checkpoint.base import WEIGHT_DTYPES
from engine.checkpoint.eight_bit import PRE_QUANT_SCALE, EightBit
from engine.checkpoint.modelopt import ROWS_PER_BYTE
from engine.checkpoint.quant_groups import read_groups, require_multiples
from engine.checkpoint.quant_scales import read_scale
from engine.checkpoint.quant_settings import Settings
from engine.checkpoint.quantised import Field, FullPrecision, LinearFormat, StoredLinear, meta
from engine.checkpoint.unified_awq import UnifiedAwq
from engine.config import ModelConfig
from engine.errors import CheckpointError
from engine.quant import Algorithm, KVStorage, QuantConfig
from engine.weights.types import Int8

KV_NAMES = (("k_proj.k_scale", "v_proj.v_scale"),)
TO_INT8 = "to_int8"
KV_STORAGE = {name: storage for storage, name in unified.KV_ALGORITHMS.items()}
PLUGIN_MODES = {name: mode for mode, name in unified.SMOOTH_QUANT.items()}
LAZY_MODES = {"W8A16": Algorithm.W8A16, "W4A16": Algorithm.W4A16}
NO_MODES = (None, "NO_QUANT")
SUPPORTED = (
    *NO_MODES,
    *LAZY_MODES,
    "W4A16_AWQ",
    "FP8",
    unified.SMOOTHED_EVERYWHERE,
    *PLUGIN_MODES,
)


class Stored(NamedTuple):
    """A tensor of a linear layer: its suffix in the format that unpacks it, which of its
    dimensions are outputs and inputs, the dtype its bytes are viewed as, and whether it is a
    factor that the layer does without where it is 1 throughout."""

    suffix: str
    outputs: int | None = None
    inputs: int | None = None
    dtype: torch.dtype | None = None
    is_factor: bool = False


@dataclass(frozen=True)
class Form:
    """`tensors`: suffix in the files → what it is."""

    format: LinearFormat
    tensors: Mapping[str, Stored]


_PLAIN = {"weight": Stored("weight", 0, 1)}
_SMOOTHED = {
    **_PLAIN,
    "weights_scaling_factor": Stored("weight_scale", 0),
    "activation_scaling_factor": Stored("input_scale"),
    "prequant_scaling_factor": Stored(PRE_QUANT_SCALE, inputs=0),
}
_PLUGIN = {
    **_PLAIN,
    "per_channel_scale": Stored("per_channel_scale", 1),
    "act_scale": Stored("act_scale"),
    "smoother": Stored("smoother", inputs=1, is_factor=True),
}
_FP8 = {
    "weight": Stored("weight", 0, 1, torch.float8_e4m3fn),
    "weights_scaling_factor": Stored("weight_scale"),
    "activation_scaling_factor": Stored("input_scale"),
}
_AWQ = {
    "weight": Stored("weight", 0, 1, torch.uint8),
    "weights_scaling_factor": Stored("weight_scale", 0, 1),
    "prequant_scaling_factor": Stored(PRE_QUANT_SCALE, inputs=0, is_factor=True),
}


class Unrounded(FullPrecision):
    """Full-precision weights of a checkpoint that says how they are to be rounded."""

    def __init__(self, quant: QuantConfig) -> None:
        super().__init__(quant.kv, KV_NAMES)
        self.quant = quant

    def check(self, linear: StoredLinear) -> None:
        source = linear.tensors["weight"]
        if source.dtype not in WEIGHT_DTYPES:
            raise CheckpointError(f"{source.origin}: {_PREPROCESSED.format(self.quant)}")

    def fields(self, outputs: int, inputs: int) -> dict[str, Field]:
        # Pre-processed weights have any shape; `check` has a better sentence for them.
        shapes = ((outputs, inputs), (inputs, outputs), (inputs, outputs // 2))
        return {"weight": Field(shapes, (*WEIGHT_DTYPES, torch.int8))}


class PluginInt8(LinearFormat):
    """Int8 codes as TensorRT-LLM's converters write them.

    weight [N, K]; per_channel_scale [1, N] or [1, 1]; the smoother [1, K] the input is divided by.
    Static modes: the input is multiplied by to_int8 [1], and the sums by act_scale [1, 1] times
    per_channel_scale, which is the product of the scales of input and weight.
    """

    def __init__(self, quant: QuantConfig) -> None:
        self.quant, self.kv_names = quant, KV_NAMES

    def fields(self, outputs: int, inputs: int) -> dict[str, Field]:
        fields = {
            "weight": Field(((outputs, inputs),), (torch.int8,)),
            "per_channel_scale": Field(((1, outputs), (1, 1)), (torch.float32,)),
            "smoother": Field(((1, inputs),), (torch.float32,), is_required=False),
        }
        if not self.quant.per_token:
            fields["act_scale"] = Field(((1, 1), (1,), ()), (torch.float32,))
            fields[TO_INT8] = Field(((1,), (1, 1), ()), (torch.float32,))
        return fields

    def unpack(self, linear: StoredLinear) -> Int8:
        scale_N = read_scale(linear.tensors["per_channel_scale"]).reshape(-1)
        input_scale, smoother_K = None, None
        if not self.quant.per_token:
            act_scale = read_scale(linear.tensors["act_scale"]).item()
            to_int8 = read_scale(linear.tensors[TO_INT8]).item()
            # Without a range of the output act_scale is the input's scale, to the last bit.
            is_plain = isclose(act_scale * to_int8, 1, rel_tol=1e-6)
            input_scale = act_scale if is_plain else 1 / to_int8
            scale_N = scale_N if is_plain else scale_N * (act_scale * to_int8)
        if "smoother" in linear.tensors:
            smoother_K = read_scale(linear.tensors["smoother"]).reshape(-1)
        scale_N = scale_N.expand(linear.outputs).contiguous()
        return Int8(linear.read("weight"), scale_N, input_scale, smoother_K)

    def sketch(self, linear: StoredLinear) -> Int8:
        codes_NK = meta(linear.outputs, linear.inputs, dtype=torch.int8)
        smoother_K = meta(linear.inputs) if "smoother" in linear.tensors else None
        input_scale = None if self.quant.per_token else 1.0
        return Int8(codes_NK, meta(linear.outputs), input_scale, smoother_K)


_PREPROCESSED = (
    "its '{}' weights were rearranged for one class of GPU and cannot be read back; name the "
    "checkpoint they were made from"
)


def read_form(settings: Settings, config: ModelConfig) -> Form | None:
    """What the `quantization` section says; None for full precision throughout.

    Raises CheckpointError for algorithms that this program does not have.
    """
    remedy = "convert or export the model again with one of them"
    if settings.get("quant_algo") == "W4A16_GPTQ":
        raise CheckpointError(f"{settings.file}: {_PREPROCESSED.format('W4A16_GPTQ')}")
    name = settings.require("quant_algo", SUPPORTED, remedy)
    kv = KV_STORAGE[settings.require("kv_cache_quant_algo", tuple(KV_STORAGE), remedy)]
    if name in NO_MODES:
        return None if kv is KVStorage.NONE else Form(FullPrecision(kv, KV_NAMES), _PLAIN)
    if name in LAZY_MODES:
        return Form(Unrounded(QuantConfig(LAZY_MODES[name], kv=kv)), _PLAIN)
    if name == "FP8":
        return Form(EightBit(QuantConfig(Algorithm.FP8, kv=kv), KV_NAMES), _FP8)
    if name == unified.SMOOTHED_EVERYWHERE:
        quant = QuantConfig(Algorithm.W8A8_SQ, per_channel=True, kv=kv)
        return Form(EightBit(quant, KV_NAMES, is_smoothed=True), _SMOOTHED)
    if name in PLUGIN_MODES:
        per_token, per_channel = PLUGIN_MODES[name]
        quant = QuantConfig(Algorithm.W8A8_SQ, per_token=per_token, per_channel=per_channel, kv=kv)
        return Form(PluginInt8(quant), _PLUGIN)
    settings.require("has_zero_point", (False,), remedy, default=False)
    require_multiples(config, settings.file, of_outputs=ROWS_PER_BYTE)
    groups = read_groups(settings, config, default=unified.DEFAULT_GROUP_SIZE)
    return Form(UnifiedAwq(groups, kv), _AWQ)
