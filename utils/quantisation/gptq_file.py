"""The file of GPTQ-for-LLaMa: which tensors it has, and how a rounded matrix is packed.

Layout: qweight int32 [K/8, N], qzeros int32 [R, N/8], scales fp16 [R, N], g_idx int32 [K]; eight
values a word, the lowest nibble first. https://github.com/qwopqwop200/GPTQ-for-LLaMa
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from engine.checkpoint.base import HEAD, canonical_shapes
from engine.checkpoint.linear_layers import is_linear
from engine.config import ModelConfig
from utils.quantisation.gptq import Rounded
from utils.quantisation.output import PlannedTensor

VALUES_PER_WORD = 8
BITS = 4
# The format stores a zero point minus one.
ZERO_BIAS = 1


def plan_tensors(config: ModelConfig, group_size: int) -> list[PlannedTensor]:
    """The tensors of a model's file, in the order of the network; a tied head is left out."""
    plan = []
    for name, shape in canonical_shapes(config).items():
        if is_linear(name):
            plan += _plan_linear(name.removesuffix(".weight"), *shape, group_size)
        elif not (name == HEAD and config.tie_word_embeddings):
            plan.append(PlannedTensor(name, torch.float16, shape))
    return plan


def _plan_linear(stem: str, outputs: int, inputs: int, group_size: int) -> list[PlannedTensor]:
    groups = inputs // group_size
    shapes = {
        "qweight": (torch.int32, (inputs // VALUES_PER_WORD, outputs)),
        "qzeros": (torch.int32, (groups, outputs // VALUES_PER_WORD)),
        "scales": (torch.float16, (groups, outputs)),
        "g_idx": (torch.int32, (inputs,)),
    }
    return [PlannedTensor(f"{stem}.{suffix}", *kind) for suffix, kind in shapes.items()]


def pack_linear(rounded: Rounded, group_size: int) -> dict[str, Tensor]:
    """The tensors of a linear layer by the part of their name after the stem."""
    zero_RN = rounded.grid.zero_NR.T.to(torch.int64) - ZERO_BIAS
    return {
        "qweight": pack_columns(rounded.codes_NK).T.contiguous(),
        "qzeros": pack_columns(zero_RN),
        "scales": rounded.grid.scale_NR.T.half().contiguous(),
        "g_idx": torch.arange(rounded.codes_NK.shape[1], dtype=torch.int32) // group_size,
    }


def pack_columns(values: Tensor) -> Tensor:
    """Values 0…15 [rows, columns] -> int32 [rows, columns / 8], the lowest nibble first."""
    assert sys.byteorder == "little"
    nibbles = values.to(torch.uint8).unflatten(1, (-1, 2))
    packed = nibbles[..., 0] | (nibbles[..., 1] << BITS)
    return packed.contiguous().view(torch.int32)
