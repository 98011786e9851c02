"""GPTQ's packing: 4-bit weights with zero points, grouped along the inputs.

Layout: qweight int32 [K/8, N], qzeros int32 [R, N/8], scales [R, N], g_idx int32 [K] (the group
of each input); eight values a word, the lowest nibble first. https://arxiv.org/abs/2210.17323
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from engine.checkpoint.base import WEIGHT_DTYPES
from engine.checkpoint.linear_layers import linear_shapes
from engine.checkpoint.quant_groups import WHOLE_ROW, Groups, read_groups, require_multiples
from engine.checkpoint.quant_scales import SCALE_DTYPES, read_scale
from engine.checkpoint.quant_settings import Settings, compile_pattern, find_left_out
from engine.checkpoint.quantised import Field, LinearFormat, StoredLinear, sketch_groups
from engine.config import ModelConfig
from engine.errors import CheckpointError
from engine.quant import Algorithm, QuantConfig
from engine.weights.types import Int4Groups

VALUES_PER_WORD = 8

# GPTQ-for-LLaMa, and AutoGPTQ after it, store zero - 1; the loader of TensorRT-LLM adds the one
# after unpacking, so that a stored 15 is a zero of 16. The format gptq_v2 stores the zero itself.
ZERO_BIAS = {"gptq": 1, "gptq_v2": 0}
SYMMETRIC_ZERO = 8

REMEDY = "quantise the model again to 4 bits in the format gptq or gptq_v2"


class Gptq(LinearFormat):
    """`zero_bias` is added to stored zero points; `sym` says that all of them are then 8."""

    def __init__(self, groups: Groups, zero_bias: int, *, sym: bool) -> None:
        self.groups, self.zero_bias, self.sym = groups, zero_bias, sym
        self.quant = QuantConfig(Algorithm.W4A16_GPTQ, group_size=groups.engine)

    def fields(self, outputs: int, inputs: int) -> dict[str, Field]:
        groups = self.groups.count(inputs)
        return {
            "qweight": Field(((inputs // VALUES_PER_WORD, outputs),), (torch.int32,)),
            "qzeros": Field(((groups, outputs // VALUES_PER_WORD),), (torch.int32,)),
            "scales": Field(((groups, outputs),), SCALE_DTYPES),
            "g_idx": Field(((inputs,),), (torch.int32, torch.int64), is_required=False),
            # Older AutoGPTQ writes one, of zeros, whether the layer has a bias or not.
            "bias": Field(((outputs,),), WEIGHT_DTYPES, is_required=False),
        }

    def check(self, linear: StoredLinear) -> None:
        if "g_idx" not in linear.tensors:
            return
        group = linear.inputs if self.groups.file == WHOLE_ROW else self.groups.file
        if not torch.equal(linear.read("g_idx").long(), torch.arange(linear.inputs) // group):
            source = linear.tensors["g_idx"]
            raise CheckpointError(
                f"{source.origin}: {source.name} does not assign {group} consecutive inputs to "
                "each group (activation order, desc_act), which the kernels rely on; quantise the "
                "model again with desc_act false, or with static_groups true"
            )

    def unpack(self, linear: StoredLinear) -> Int4Groups:
        self.check(linear)
        _refuse_bias(linear)
        scale_NR = read_scale(linear.tensors["scales"]).T
        return Int4Groups(
            codes_NK=unpack_nibbles(linear.read("qweight").T),
            scale_NR=self.groups.spread(scale_NR, linear.inputs),
            group_size=self.groups.engine,
            zero_NR=self._read_zeros(linear),
        )

    def sketch(self, linear: StoredLinear) -> Int4Groups:
        return sketch_groups(linear, self.groups, has_zero=not self.sym)

    def _read_zeros(self, linear: StoredLinear) -> Tensor | None:
        zero_NR = unpack_nibbles(linear.read("qzeros")).T + self.zero_bias
        if not self.sym:
            return self.groups.spread(zero_NR, linear.inputs)
        if (zero_NR != SYMMETRIC_ZERO).any():
            source = linear.tensors["qzeros"]
            raise CheckpointError(
                f"{source.origin}: {source.name} holds zero points other than {SYMMETRIC_ZERO} "
                "although the settings say sym true; set sym to false there, or correct "
                "checkpoint_format if all are off by one"
            )
        return None


def unpack_nibbles(words_RW: Tensor) -> Tensor:
    """int32 [rows, words] -> uint8 0…15 [rows, 8 · words], the lowest nibble first."""
    bytes_RB = words_RW.contiguous().view(torch.uint8)
    return torch.stack((bytes_RB & 15, bytes_RB >> 4), dim=-1).flatten(1)


def _refuse_bias(linear: StoredLinear) -> None:
    if "bias" in linear.tensors and linear.read("bias").any():
        source = linear.tensors["bias"]
        raise CheckpointError(
            f"{source.origin}: tensor {source.name!r} is a bias, which this network does not "
            "have; use a checkpoint without biases"
        )


def read_gptq(settings: Settings, config: ModelConfig) -> Gptq:
    """The format that the settings of AutoGPTQ or GPTQModel describe.

    Raises CheckpointError for other bit widths and formats, and for settings per module.
    `desc_act` is not looked at: the tensors tell whether the groups follow the activation order.
    """
    if settings.get("is_marlin_format"):
        raise settings.refusal("is_marlin_format", "false", REMEDY)
    format_key = "checkpoint_format" if settings.get("checkpoint_format") else "format"
    zero_bias = ZERO_BIAS[settings.require(format_key, tuple(ZERO_BIAS), REMEDY, default="gptq")]
    settings.require("bits", (4,), REMEDY)
    settings.require("pack_dtype", ("int32",), REMEDY, default="int32")
    settings.require("lm_head", (False,), "quantise the model again without lm_head", default=False)
    sym = settings.require("sym", (True, False), "correct the file", default=False)
    _refuse_partial(settings, list(linear_shapes(config)))
    require_multiples(config, settings.file, of_outputs=VALUES_PER_WORD, of_inputs=VALUES_PER_WORD)
    return Gptq(read_groups(settings, config), zero_bias, sym=sym)


def _refuse_partial(settings: Settings, stems: list[str]) -> None:
    """Raise CheckpointError for modules left out or quantised in a way of their own."""
    dynamic = settings.get("dynamic", {})
    if not isinstance(dynamic, Mapping):
        raise settings.refusal("dynamic", "an object of settings", "correct the file")
    for rule in dynamic:
        # GPTQModel: '-:' leaves out the modules that match, '+:' or nothing gives them settings.
        pattern = compile_pattern(settings, "dynamic", rule.removeprefix("-:").removeprefix("+:"))
        if any(pattern.match(stem) for stem in stems):
            raise CheckpointError(
                f"{settings.file}: dynamic {rule!r} treats some linear layers differently, but "
                "the linear layers of an engine are all stored alike; quantise the model again "
                "without it"
            )
    blocks = settings.get("modules_in_block_to_quantize", [])
    if not isinstance(blocks, list):
        raise settings.refusal("modules_in_block_to_quantize", "a list", "correct the file")
    inside = {name for part in blocks for name in ([part] if isinstance(part, str) else part)}
    if inside and find_left_out(
        settings,
        "modules_in_block_to_quantize",
        stems,
        lambda stem: not any(stem.endswith("." + name) for name in inside),
    ):
        raise settings.refusal("modules_in_block_to_quantize", "all linear layers", REMEDY)
