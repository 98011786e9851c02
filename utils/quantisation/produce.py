"""Carries out a QuantisePlan: opens the checkpoint, calibrates, writes, and says how to build."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from engine.checkpoint.base import Checkpoint
from engine.checkpoint.fp8_scales import SIZES, model_sizes
from engine.checkpoint.hf import CONFIG_FILE
from engine.checkpoint.meta import PARAMS_FILE
from engine.checkpoint.open import open_checkpoint
from engine.config import ModelConfig
from engine.quant import DEFAULT_GROUP_SIZE
from utils import log
from utils.build_plan import TOKENIZER_FILES
from utils.datasets import calibration_texts
from utils.quantisation.awq_model import drop_ones, refine, watch_inputs
from utils.quantisation.batches import make_batches
from utils.quantisation.checks import check
from utils.quantisation.gptq_file import plan_tensors
from utils.quantisation.gptq_model import make_tensors, round_layers
from utils.quantisation.hf_model import load_model
from utils.quantisation.output import SafetensorsWriter, write_file, write_folder
from utils.quantisation.plan import QuantisePlan
from utils.quantisation.ptq import export_model, quantise_model, read_awq_state, read_fp8_factors
from utils.tokenizer import load_tokenizer

DESCRIPTION_FILE = "llama_tp1.json"
# What build.py is told beside the model; {path} is the file written.
BUILD_FLAGS = {
    "fp8": "--quantized_fp8_model_path {path} --enable_fp8",
    "int4_awq": "--quant_ckpt_path {path} --use_weight_only --weight_only_precision int4_awq",
    "int4_gptq": "--quant_ckpt_path {path} --use_weight_only --weight_only_precision int4_gptq",
}


def produce(plan: QuantisePlan) -> None:
    """Write what `plan` asks for; UserError for what the files and the calibration show."""
    with _open(plan.model_dir) as checkpoint:
        check(checkpoint, plan)
        batches = _make_batches(checkpoint.config, plan)
        tokens = sum(tokens_BS.numel() for tokens_BS in batches)
        log.info(
            f"{plan.qformat} of {checkpoint.where} on {plan.device} in {plan.dtype}, calibrated "
            f"on {tokens:,} tokens"
        )
        _PRODUCERS[plan.qformat](checkpoint, batches, plan)


def build_command(plan: QuantisePlan) -> str:
    """The build.py command that takes what was written."""
    folder = plan.model_dir if plan.format.suffix else plan.output
    source = "--meta_ckpt_dir" if _is_meta(folder) else "--model_dir"
    name = plan.model_name if plan.format.suffix else str(plan.output)
    words = ["python build.py", source, shlex.quote(name)]
    if plan.qformat in BUILD_FLAGS:
        words.append(BUILD_FLAGS[plan.qformat].format(path=shlex.quote(str(plan.output))))
        if plan.group_size not in (0, DEFAULT_GROUP_SIZE):
            words.append(f"--group_size {plan.group_size}")
    return " ".join([*words, "--dtype", plan.build_dtype])


def _open(folder: Path) -> Checkpoint:
    if _is_meta(folder):
        return open_checkpoint(meta_ckpt_dir=str(folder))
    return open_checkpoint(str(folder))


def _is_meta(folder: Path) -> bool:
    return (folder / PARAMS_FILE).exists() and not (folder / CONFIG_FILE).exists()


def _make_batches(config: ModelConfig, plan: QuantisePlan) -> list[Tensor]:
    """Token ids of the calibration texts; none for a format that takes none."""
    wanted = plan.calibration
    if not plan.format.calib_size:
        return []
    tokenizer = load_tokenizer(plan.model_dir)
    texts = calibration_texts(
        wanted.dataset, size=wanted.size, cache_dir=wanted.cache_dir, flag="--calib_dataset"
    )
    return make_batches(
        texts,
        tokenizer,
        batch_size=wanted.batch_size,
        max_length=min(wanted.max_length, config.max_positions),
        vocab_size=config.vocab_size,
        seed=wanted.seed,
    )


def _load(checkpoint: Checkpoint, plan: QuantisePlan) -> LlamaForCausalLM:
    return load_model(checkpoint, getattr(torch, plan.dtype), torch.device(plan.device))


def _calibrated(
    checkpoint: Checkpoint, batches: Sequence[Tensor], plan: QuantisePlan
) -> LlamaForCausalLM:
    model = _load(checkpoint, plan)
    return quantise_model(model, batches, plan.qformat, plan.group_size)


def _produce_fp8(checkpoint: Checkpoint, batches: Sequence[Tensor], plan: QuantisePlan) -> None:
    config = checkpoint.config
    factors = read_fp8_factors(_calibrated(checkpoint, batches, plan), config)
    arrays = {name: np.array(value, dtype=np.float32) for name, value in factors.items()}
    arrays[SIZES] = np.array(model_sizes(config), dtype=np.int64)
    with write_file(plan.output) as draft, open(draft, "wb") as file:
        np.savez(file, **arrays)
    if plan.output.name == plan.format.file_name:
        with write_file(plan.output.with_name(DESCRIPTION_FILE)) as draft:
            draft.write_text(json.dumps(_describe(config, batches, plan), indent=2) + "\n")


def _describe(config: ModelConfig, batches: Sequence[Tensor], plan: QuantisePlan) -> dict[str, Any]:
    """What a reader of the directory wants to know; build.py reads the archive only."""
    return {
        "producer": "quantize.py",
        "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"},
        "model": config.to_dict(),
        "calibration": asdict(plan.calibration)
        | {"tokens": sum(tokens_BS.numel() for tokens_BS in batches), "dtype": plan.dtype},
    }


def _produce_awq(checkpoint: Checkpoint, batches: Sequence[Tensor], plan: QuantisePlan) -> None:
    model = _load(checkpoint, plan)
    with watch_inputs(model, checkpoint.config, plan.group_size) as hessians:
        model = quantise_model(model, batches, plan.qformat, plan.group_size)
    state = read_awq_state(model)
    refine(state, checkpoint, hessians)
    drop_ones(state)
    with write_file(plan.output) as draft:
        torch.save(state, draft)


def _produce_gptq(checkpoint: Checkpoint, batches: Sequence[Tensor], plan: QuantisePlan) -> None:
    layers = round_layers(
        checkpoint,
        batches,
        group_size=plan.group_size,
        dtype=getattr(torch, plan.dtype),
        device=torch.device(plan.device),
    )
    watched = log.progress(layers, "GPTQ", total=checkpoint.config.num_layers)
    planned = plan_tensors(checkpoint.config, plan.group_size)
    with write_file(plan.output) as draft, SafetensorsWriter(draft, planned) as file:
        for name, tensor in make_tensors(checkpoint, watched, plan.group_size):
            file.write(name, tensor)


def _produce_folder(checkpoint: Checkpoint, batches: Sequence[Tensor], plan: QuantisePlan) -> None:
    """A checkpoint directory in ModelOpt's own format, with the model's tokenizer."""
    model = _calibrated(checkpoint, batches, plan)
    with write_folder(plan.output) as draft:
        export_model(model, draft, getattr(torch, plan.dtype))
        for name in TOKENIZER_FILES:
            if (plan.model_dir / name).is_file():
                shutil.copyfile(plan.model_dir / name, draft / name)


_PRODUCERS: dict[str, Callable[[Checkpoint, Sequence[Tensor], QuantisePlan], None]] = {
    "fp8": _produce_fp8,
    "int4_awq": _produce_awq,
    "int4_gptq": _produce_gptq,
    "int8_sq": _produce_folder,
    "int8_wo": _produce_folder,
    "int4_wo": _produce_folder,
}
