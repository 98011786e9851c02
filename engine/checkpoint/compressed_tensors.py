"""The compressed-tensors format of llm-compressor: W4A16, W8A8 and FP8 linear layers.

Layouts: https://github.com/vllm-project/compressed-tensors (compressors: pack_quantized and
naive_quantized). What the engine does not have is refused by the name of its setting.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from engine.checkpoint.eight_bit import EightBit
from engine.checkpoint.linear_layers import linear_shapes
from engine.checkpoint.quant_groups import (
    WHOLE_ROW,
    Groups,
    plan_groups,
    read_groups,
    require_multiples,
)
from engine.checkpoint.quant_scales import SCALE_DTYPES, read_scale
from engine.checkpoint.quant_settings import Settings, compile_pattern, find_left_out
from engine.checkpoint.quantised import (
    Field,
    FullPrecision,
    LinearFormat,
    StoredLinear,
    sketch_groups,
)
from engine.config import ModelConfig
from engine.errors import CheckpointError
from engine.quant import Algorithm, KVStorage, QuantConfig
from engine.weights.types import Int4Groups

VALUES_PER_WORD = 8
LINEAR_CLASS = "Linear"

PACKED, INT8, FLOAT8 = "pack-quantized", "int-quantized", "float-quantized"
KV_TYPES = {"int": KVStorage.INT8, "float": KVStorage.FP8}
# The second pair is what versions before 0.8 wrote.
KV_NAMES = (("k_scale", "v_scale"), ("k_proj.output_scale", "v_proj.output_scale"))

REMEDY = (
    "quantise the model again with one of llm-compressor's schemes W4A16, W4A16_ASYM, W8A8, FP8 "
    "and FP8_DYNAMIC"
)


class PackedInt4(LinearFormat):
    """weight_packed int32 [N, K/8]; weight_scale [N, R]; weight_zero_point int32 [N/8, R].

    Values are stored plus 8, the lowest nibble first; zero points are packed along the outputs.
    """

    def __init__(self, groups: Groups, kv: KVStorage, *, is_symmetric: bool) -> None:
        self.groups, self.is_symmetric = groups, is_symmetric
        self.quant = QuantConfig(Algorithm.W4A16_GPTQ, group_size=groups.engine, kv=kv)
        self.kv_names = KV_NAMES

    def fields(self, outputs: int, inputs: int) -> dict[str, Field]:
        groups = self.groups.count(inputs)
        fields = {
            "weight_packed": Field(((outputs, inputs // VALUES_PER_WORD),), (torch.int32,)),
            "weight_scale": Field(((outputs, groups),), SCALE_DTYPES),
            "weight_shape": Field(((2,),), (torch.int64, torch.int32)),
        }
        if not self.is_symmetric:
            zero_shape = (outputs // VALUES_PER_WORD, groups)
            fields["weight_zero_point"] = Field((zero_shape,), (torch.int32,))
        return fields

    def check(self, linear: StoredLinear) -> None:
        shape = linear.read("weight_shape").tolist()
        if shape != [linear.outputs, linear.inputs]:
            source = linear.tensors["weight_shape"]
            raise CheckpointError(
                f"{source.origin}: {source.name} says {shape} but the config needs "
                f"{[linear.outputs, linear.inputs]}; use the config file that came with the weights"
            )

    def unpack(self, linear: StoredLinear) -> Int4Groups:
        scale_NR = read_scale(linear.tensors["weight_scale"])
        zero_NR = None
        if not self.is_symmetric:
            zero_NR = unpack_inputs(linear.read("weight_zero_point").T).T
            zero_NR = self.groups.spread(zero_NR, linear.inputs)
        return Int4Groups(
            codes_NK=unpack_inputs(linear.read("weight_packed")),
            scale_NR=self.groups.spread(scale_NR, linear.inputs),
            group_size=self.groups.engine,
            zero_NR=zero_NR,
        )

    def sketch(self, linear: StoredLinear) -> Int4Groups:
        return sketch_groups(linear, self.groups, has_zero=not self.is_symmetric)


def unpack_inputs(words_NW: Tensor) -> Tensor:
    """int32 [N, K/8] -> uint8 0…15 [N, K], the lowest nibble first."""
    bytes_NB = words_NW.contiguous().view(torch.uint8)
    codes_NBC = torch.empty((*bytes_NB.shape, 2), dtype=torch.uint8)
    codes_NBC[..., 0] = bytes_NB & 15
    codes_NBC[..., 1] = bytes_NB >> 4
    return codes_NBC.flatten(1)


def read_compressed_tensors(settings: Settings, config: ModelConfig) -> LinearFormat:
    """The format that the settings describe; CheckpointError names what the engine lacks."""
    settings.require("quantization_status", ("compressed",), REMEDY, default="compressed")
    for key in ("sparsity_config", "transform_config"):
        section = settings.section(key)
        if section.values and section.get("format") != "dense":
            raise settings.refusal(key, "{}", "use a checkpoint without it")
    kv = _read_kv(settings)
    scheme = _find_scheme(settings, config)
    if scheme is None:
        return FullPrecision(kv, KV_NAMES)
    if scheme.values.get("output_activations") is not None:
        raise scheme.refusal("output_activations", "null", REMEDY)
    format_of = scheme if scheme.get("format") else settings
    kind = format_of.require("format", (PACKED, INT8, FLOAT8), REMEDY)
    if kind == PACKED:
        return _read_packed(scheme, config, kv)
    return EightBit(_read_eight_bit(scheme, kind, kv), KV_NAMES)


def _read_packed(scheme: Settings, config: ModelConfig, kv: KVStorage) -> PackedInt4:
    if scheme.get("input_activations"):
        raise scheme.refusal("input_activations", "null", REMEDY)
    weights = scheme.section("weights")
    weights.require("num_bits", (4,), REMEDY)
    weights.require("type", ("int",), REMEDY)
    weights.require("actorder", (None, False, "weight", "static"), "choose actorder 'static'")
    strategy = weights.require("strategy", ("group", "channel"), REMEDY)
    is_symmetric = weights.require("symmetric", (True, False), REMEDY, default=True)
    require_multiples(config, weights.file, of_outputs=VALUES_PER_WORD, of_inputs=VALUES_PER_WORD)
    groups = (
        plan_groups(WHOLE_ROW, config, f"{weights.file}: {weights.prefix}strategy channel,")
        if strategy == "channel"
        else read_groups(weights, config)
    )
    return PackedInt4(groups, kv, is_symmetric=is_symmetric)


def _read_eight_bit(scheme: Settings, kind: str, kv: KVStorage) -> QuantConfig:
    algorithm, number = {
        INT8: (Algorithm.W8A8_SQ, "int"),
        FLOAT8: (Algorithm.FP8, "float"),
    }[kind]
    weights, inputs = scheme.section("weights"), scheme.section("input_activations")
    if not inputs.values:
        raise scheme.refusal("input_activations", "8 bits", REMEDY)
    for part in (weights, inputs):
        part.require("num_bits", (8,), REMEDY)
        part.require("type", (number,), REMEDY)
        part.require("symmetric", (True,), REMEDY, default=True)
    weights.require("dynamic", (False,), REMEDY, default=False)
    per_channel = weights.require("strategy", ("tensor", "channel"), REMEDY) == "channel"
    per_token = inputs.require("dynamic", (True, False), REMEDY, default=False)
    inputs.require("strategy", ("token" if per_token else "tensor",), REMEDY)
    return QuantConfig(algorithm, per_token=per_token, per_channel=per_channel, kv=kv)


def _read_kv(settings: Settings) -> KVStorage:
    scheme = settings.section("kv_cache_scheme")
    if not scheme.values:
        return KVStorage.NONE
    remedy = "quantise the model again with a static 8-bit scheme of the KV cache, or without one"
    scheme.require("num_bits", (8,), remedy)
    scheme.require("symmetric", (True,), remedy, default=True)
    scheme.require("dynamic", (False,), remedy, default=False)
    scheme.require("strategy", ("tensor", "attn_head"), remedy, default="tensor")
    return KV_TYPES[scheme.require("type", tuple(KV_TYPES), remedy)]


def _find_scheme(settings: Settings, config: ModelConfig) -> Settings | None:
    """The one group of settings for all linear layers; None if they are not quantised."""
    groups = settings.section("config_groups")
    if not groups.values:
        return None
    if len(groups.values) > 1:
        raise CheckpointError(
            f"{settings.file}: {groups.prefix[:-1]} has {len(groups.values)} groups "
            f"({', '.join(groups.values)}), but the linear layers of an engine are all stored "
            "alike; quantise the model again with one scheme"
        )
    scheme = groups.section(next(iter(groups.values)))
    targets = _matcher(scheme, "targets")
    ignored = _matcher(settings, "ignore")
    is_none = find_left_out(
        scheme, "targets", list(linear_shapes(config)), lambda stem: not targets(stem)
    ) or find_left_out(settings, "ignore", list(linear_shapes(config)), ignored)
    return None if is_none else scheme


def _matcher(settings: Settings, key: str) -> Callable[[str], bool]:
    """A test of module names: a target is a name, a class, or 're:' and the start of a name."""
    texts = settings.texts(key)
    patterns = [
        compile_pattern(settings, key, text.removeprefix("re:"))
        for text in texts
        if text.startswith("re:")
    ]

    def matches(stem: str) -> bool:
        is_named = stem in texts or LINEAR_CLASS in texts
        return is_named or any(pattern.match(stem) for pattern in patterns)

    return matches
