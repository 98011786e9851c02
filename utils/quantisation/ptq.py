"""Runs NVIDIA ModelOpt: a transformers model gets quantisers, calibration texts their ranges."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.utils import logging as hf_logging

from engine.checkpoint.fp8_scales import INPUT, WEIGHT, factor_name, kv_names
from engine.checkpoint.linear_layers import linear_shapes
from engine.config import ModelConfig
from engine.errors import UserError
from utils import log

FP8_MAX = 448.0
# ModelOpt's name of each format's recipe.
RECIPES = {
    "fp8": "FP8_DEFAULT_CFG",
    "int4_awq": "INT4_AWQ_CFG",
    "int8_sq": "INT8_SMOOTHQUANT_CFG",
    "int8_wo": "INT8_WEIGHT_ONLY_CFG",
    "int4_wo": "INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
}
# Where another algorithm than the recipe's is taken. ModelOpt smooths with alpha 1; 0.8 is usual
# for Llama-like models, and on the bundled model it more than halves the loss of perplexity.
ALGORITHMS = {"int8_sq": {"method": "smoothquant", "alpha": 0.8}}
# Part of a state dict's names -> what AWQ found there.
AWQ_SCALES = (".weight_quantizer._amax", ".input_quantizer._pre_quant_scale")


def quantise_model(
    model: LlamaForCausalLM, batches: Sequence[Tensor], qformat: str, group_size: int
) -> LlamaForCausalLM:
    """`model` with ModelOpt's quantisers, calibrated on the token ids `batches` [B, S].

    `group_size` is 0 for formats without groups; weight-only formats need no batches.
    """
    with _quiet():
        import modelopt.torch.quantization as mtq

        recipe = _recipe(mtq, qformat, group_size)

        def run_all(module: LlamaForCausalLM) -> None:
            for tokens_BS in log.progress(batches, "calibrating"):
                module(tokens_BS.to(module.device), use_cache=False)

        return mtq.quantize(model, recipe, run_all if batches else None)


def _recipe(mtq: Any, qformat: str, group_size: int) -> dict[str, Any]:
    recipe = copy.deepcopy(getattr(mtq, RECIPES[qformat]))
    recipe["algorithm"] = ALGORITHMS.get(qformat, recipe["algorithm"])
    if qformat == "fp8":
        recipe["quant_cfg"] += mtq.FP8_KV_CFG["quant_cfg"]
    if group_size:
        recipe["quant_cfg"].append(
            {
                "quantizer_name": "*_proj.weight_quantizer",
                "cfg": {"num_bits": 4, "block_sizes": {-1: group_size}},
            }
        )
    return recipe


def read_fp8_factors(model: LlamaForCausalLM, config: ModelConfig) -> dict[str, float]:
    """Array name -> scaling factor, the largest magnitude over 448, of all linear layers and of
    the keys and values of all layers. UserError for one that is no finite number above zero.
    """
    quantisers = {}
    for stem in linear_shapes(config):
        linear = model.get_submodule(stem)
        quantisers[factor_name(stem, INPUT)] = linear.input_quantizer
        quantisers[factor_name(stem, WEIGHT)] = linear.weight_quantizer
    for layer in range(config.num_layers):
        attention = model.model.layers[layer].self_attn
        k_name, v_name = kv_names(layer)
        quantisers[k_name] = attention.k_bmm_quantizer
        quantisers[v_name] = attention.v_bmm_quantizer
    return {name: _largest(name, q.amax) / FP8_MAX for name, q in quantisers.items()}


def _largest(name: str, amax: Tensor | None) -> float:
    value = float("nan") if amax is None else amax.float().max().item()
    if not 0 < value < float("inf"):
        raise UserError(
            f"the calibration found {value:g} as the largest magnitude for {name}; use --dtype "
            "bfloat16 or float32, and check the checkpoint and the calibration texts"
        )
    return value


def read_awq_state(model: LlamaForCausalLM) -> dict[str, Tensor]:
    """The smoothed weights and AWQ's scales by their names in the state dict, on the CPU.

    UserError for scales that are not finite.
    """
    state = {}
    for name, tensor in model.state_dict().items():
        is_scale = name.endswith(AWQ_SCALES)
        if "_quantizer." in name and not is_scale:
            continue
        if is_scale and not torch.isfinite(tensor).all():
            raise UserError(
                f"AWQ found no finite {name}; use --dtype bfloat16 or float32, and check the "
                "checkpoint and the calibration texts"
            )
        # A group of zeros has no range; any scale does.
        state[name] = torch.where(tensor > 0, tensor, 1).cpu() if is_scale else tensor.cpu()
    return state


def export_model(model: LlamaForCausalLM, folder: Path, dtype: torch.dtype) -> None:
    """Write ModelOpt's Hugging Face export: config.json, hf_quant_config.json and weights."""
    with _quiet():
        from modelopt.torch.export import export_hf_checkpoint

        export_hf_checkpoint(model, dtype=dtype, export_dir=folder)


@contextmanager
def _quiet() -> Iterator[None]:
    """What ModelOpt prints goes to the debug log; its warnings and transformers' go nowhere."""
    printed, level = io.StringIO(), hf_logging.get_verbosity()
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(), redirect_stdout(printed):
            warnings.simplefilter("ignore")
            yield
    finally:
        hf_logging.set_verbosity(level)
    for line in printed.getvalue().splitlines():
        log.debug(line)
