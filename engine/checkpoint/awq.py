"""AutoAWQ's GEMM packing: 4-bit weights with zero points, grouped along the inputs.

Layout: qweight int32 [K, N/8], qzeros int32 [R, N/8], scales [R, N]; weight = (q - z) · scale.
The smoothing of AWQ is folded into the norms already. https://arxiv.org/abs/2306.00978
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.checkpoint.linear_layers import linear_shapes
from engine.checkpoint.quant_groups import Groups, read_groups, require_multiples
from engine.checkpoint.quant_scales import SCALE_DTYPES, read_scale
from engine.checkpoint.quant_settings import Settings, find_left_out
from engine.checkpoint.quantised import Field, LinearFormat, StoredLinear, sketch_groups
from engine.config import ModelConfig
from engine.quant import Algorithm, QuantConfig
from engine.weights.types import Int4Groups

# The nibbles of a word, lowest first, hold these of its eight output columns (AutoAWQ, gemm pack).
COLUMN_OF_NIBBLE = (0, 2, 4, 6, 1, 3, 5, 7)
WORD_COLUMNS = len(COLUMN_OF_NIBBLE)

REMEDY = "quantise the model again with AutoAWQ's version 'gemm', 4 bits and zero_point true"


class AwqGemm(LinearFormat):
    def __init__(self, groups: Groups) -> None:
        self.groups = groups
        self.quant = QuantConfig(Algorithm.W4A16_AWQ, group_size=groups.engine)

    def fields(self, outputs: int, inputs: int) -> dict[str, Field]:
        groups, words = self.groups.count(inputs), outputs // WORD_COLUMNS
        return {
            "qweight": Field(((inputs, words),), (torch.int32,)),
            "qzeros": Field(((groups, words),), (torch.int32,)),
            "scales": Field(((groups, outputs),), SCALE_DTYPES),
        }

    def unpack(self, linear: StoredLinear) -> Int4Groups:
        scale_NR = read_scale(linear.tensors["scales"]).T
        zero_NR = unpack_outputs(linear.read("qzeros"))
        return Int4Groups(
            codes_NK=unpack_outputs(linear.read("qweight")),
            scale_NR=self.groups.spread(scale_NR, linear.inputs),
            group_size=self.groups.engine,
            zero_NR=self.groups.spread(zero_NR, linear.inputs),
        )

    def sketch(self, linear: StoredLinear) -> Int4Groups:
        return sketch_groups(linear, self.groups, has_zero=True)


def unpack_outputs(words_KW: Tensor) -> Tensor:
    """int32 [K, N/8] -> uint8 0…15 [N, K]."""
    inputs, words = words_KW.shape
    # The low byte of a word comes first in the file, so byte b holds nibbles 2b and 2b + 1.
    bytes_WKB = words_KW.T.contiguous().view(torch.uint8).unflatten(1, (inputs, 4))
    codes_WCK = torch.empty((words, WORD_COLUMNS, inputs), dtype=torch.uint8)
    for nibble, column in enumerate(COLUMN_OF_NIBBLE):
        byte_WK = bytes_WKB[:, :, nibble // 2]
        codes_WCK[:, column] = byte_WK >> 4 if nibble % 2 else byte_WK & 15
    return codes_WCK.flatten(0, 1)


def read_awq(settings: Settings, config: ModelConfig) -> AwqGemm:
    """The format that AutoAWQ's settings describe; CheckpointError for any but 4-bit GEMM."""
    version_key = "version" if settings.get("version") else "checkpoint_format"
    version = str(settings.get(version_key, "gemm")).lower()
    if version != "gemm":
        raise settings.refusal(version_key, "gemm", REMEDY)
    settings.require("bits", (4,), REMEDY)
    settings.require("zero_point", (True,), REMEDY, default=True)
    left_out = settings.texts("modules_to_not_convert")
    if find_left_out(
        settings,
        "modules_to_not_convert",
        list(linear_shapes(config)),
        lambda stem: any(part in stem for part in left_out),
    ):
        raise settings.refusal("modules_to_not_convert", "lm_head", REMEDY)
    require_multiples(config, settings.file, of_outputs=WORD_COLUMNS)
    return AwqGemm(read_groups(settings, config, default=128))
