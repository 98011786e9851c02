"""What is refused once the checkpoint is open and before a weight is read."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

from engine.checkpoint.base import Checkpoint
from engine.checkpoint.linear_layers import linear_shapes
from engine.checkpoint.quant_groups import GROUP_SIZES
from engine.config import ModelConfig
from engine.errors import UserError
from utils.quantisation.plan import QuantisePlan

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# GPTQ's format packs eight values a word, along the inputs and along the outputs.
GPTQ_MULTIPLE = 8
# ModelOpt's 4-bit export packs two outputs a byte.
PAIR = 2


def check(checkpoint: Checkpoint, plan: QuantisePlan) -> None:
    """Raise UserError unless `plan` can be carried out for `checkpoint` on this machine."""
    if checkpoint.quant is not None:
        raise UserError(
            f"--model_dir {plan.model_name} is quantised already ({checkpoint.quant}); name the "
            "full-precision checkpoint it was made from"
        )
    config = checkpoint.config
    if config.hidden_size % config.num_heads:
        raise UserError(
            f"--model_dir {plan.model_name} has the width {config.hidden_size} and "
            f"{config.num_heads} heads, and transformers, which calibrates it, needs a multiple "
            "of the heads; build it with --use_weight_only, which takes no calibration"
        )
    if plan.group_size:
        _check_groups(checkpoint.config, plan)
    if plan.format.needs_modelopt:
        _check_memory(checkpoint.config, plan)
    _check_disk(checkpoint.config, plan)


def _check_groups(config: ModelConfig, plan: QuantisePlan) -> None:
    group, sizes = plan.group_size, " or ".join(map(str, sorted(GROUP_SIZES)))
    if group not in GROUP_SIZES:
        raise UserError(
            f"--group_size {group} is not supported: the kernels read groups of {sizes} inputs; "
            "choose one of them"
        )
    multiple = GPTQ_MULTIPLE if plan.qformat == "int4_gptq" else PAIR
    for stem, (outputs, inputs) in linear_shapes(config).items():
        if inputs % group:
            raise UserError(
                f"--group_size {group} does not divide the {inputs} inputs of {stem}; choose "
                f"another of {sizes}, or --qformat int8_wo, which has no groups"
            )
        if outputs % multiple:
            raise UserError(
                f"--qformat {plan.qformat} packs {multiple} outputs together and {stem} has "
                f"{outputs}; choose --qformat int8_wo"
            )


def _check_memory(config: ModelConfig, plan: QuantisePlan) -> None:
    weights = config.num_parameters * BYTES[plan.dtype]
    needed, free = int(plan.format.memory * weights), available_memory(plan.device)
    if needed > free:
        place = "GPU memory" if plan.device == "cuda" else "memory"
        raise UserError(
            f"--qformat {plan.qformat} holds the whole model in {plan.dtype}, about "
            f"{needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB of {place} is free; use a larger "
            "machine or --qformat int4_gptq, which holds one layer at a time"
        )


def _check_disk(config: ModelConfig, plan: QuantisePlan) -> None:
    """A long calibration should not end at a full disk."""
    folder = next(path for path in plan.output.absolute().parents if path.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(
            f"--export_path {plan.output} cannot be written: {folder} is no directory you may "
            "write to; choose another"
        )
    needed, free = output_bytes(config, plan), shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"--export_path {plan.output} has {free / 1e9:.2f} GB free and the result needs about "
            f"{needed / 1e9:.2f} GB; free some space or choose another place"
        )


def output_bytes(config: ModelConfig, plan: QuantisePlan) -> int:
    """About what is written: the linear layers at the format's bits, the rest in 16."""
    if not plan.format.bits:
        return 0
    linear = sum(outputs * inputs for outputs, inputs in linear_shapes(config).values())
    return linear * plan.format.bits // 8 + (config.num_parameters - linear) * 2


def available_memory(device: str) -> int:
    """Bytes free for this process; without Linux' file of them, as much as anyone asks for."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 1 << 62
    sizes = dict(line.split(":", 1) for line in lines)
    return int(sizes["MemAvailable"].split()[0]) << 10
