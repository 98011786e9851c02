"""build.py's TensorRT switches: what config.json records of them and what they do here.

Each one either chooses something in the torch backend or is reported as having no effect on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Switch:
    """A flag, its key in plugin_config or builder_config (None: not recorded), and `why` the torch
    backend does not need it ('' where the flag has its effect)."""

    flag: str
    key: str | None
    why: str = ""


SWITCHES = (
    Switch("use_gpt_attention_plugin", "gpt_attention_plugin", "attention is always fused"),
    Switch("use_gemm_plugin", "gemm_plugin", "matrix products are chosen by shape at run time"),
    Switch("use_rmsnorm_plugin", "rmsnorm_plugin", "RMSNorm is always fused"),
    Switch("enable_context_fmha", "context_fmha_type", "prompt attention is always fused"),
    Switch(
        "enable_context_fmha_fp32_acc", "context_fmha_type", "attention always accumulates in fp32"
    ),
    Switch("multi_block_mode", "multi_block_mode", "the decode kernel splits long contexts itself"),
    Switch("remove_input_padding", "remove_input_padding", "batches are always packed"),
    Switch("use_fused_mlp", "use_fused_mlp", "gate and up are always one product"),
    Switch("use_custom_all_reduce", "use_custom_all_reduce"),
    Switch("strongly_typed", "strongly_typed", "every tensor has the engine's dtype"),
    Switch("builder_opt", "opt_level", "there is no optimisation level"),
    Switch("load_by_shard", None, "checkpoints are always read by slice"),
    Switch("gpus_per_node", None, "ranks of a host are counted through MPI"),
    Switch("disable_weight_only_quant_plugin", None, "weight-only kernels are chosen at run time"),
    Switch("visualize", None, "there is no TensorRT network to draw"),
    Switch("enable_debug_output", None, "there is no TensorRT network to tap"),
    Switch("timing_cache", None),
    Switch("trust_remote_code", None, "a build never runs code from a checkpoint"),
    Switch("per_group", None, "--weight_only_precision says whether scales are grouped"),
    Switch("paged_kv_cache", "paged_kv_cache"),
    Switch("tokens_per_block", "tokens_per_block"),
)

# The keys TensorRT-LLM's runtimes expect to find, with the values of an engine without plugins.
_PLUGIN_DEFAULTS: dict[str, Any] = {
    "attention_qk_half_accumulation": False,
    "bert_attention_plugin": False,
    "context_fmha_type": 0,
    "gemm_plugin": False,
    "gpt_attention_plugin": False,
    "identity_plugin": False,
    "layernorm_plugin": False,
    "layernorm_quantization_plugin": False,
    "lookup_plugin": False,
    "multi_block_mode": False,
    "nccl_plugin": False,
    "paged_kv_cache": False,
    "quantize_per_token_plugin": False,
    "quantize_tensor_plugin": False,
    "remove_input_padding": False,
    "rmsnorm_plugin": False,
    "rmsnorm_quantization_plugin": False,
    "smooth_quant_gemm_plugin": False,
    "tokens_per_block": 64,
    "use_custom_all_reduce": False,
    "weight_only_groupwise_quant_matmul_plugin": False,
    "weight_only_quant_matmul_plugin": False,
}


def plugin_config(flags: Mapping[str, Any], dtype: str, tp: int) -> dict[str, Any]:
    """The seed's `plugin_config` section for the given build.py flags."""
    values = dict(_PLUGIN_DEFAULTS)
    for switch in SWITCHES:
        if switch.key in values and switch.flag in flags and switch.key != "context_fmha_type":
            values[switch.key] = flags[switch.flag]
    if flags.get("enable_context_fmha_fp32_acc"):
        values["context_fmha_type"] = 2
    elif flags.get("enable_context_fmha"):
        values["context_fmha_type"] = 1
    values["nccl_plugin"] = dtype if tp > 1 else False
    return values


def wants_one_shot(config: Mapping[str, Any]) -> bool:
    """Whether an engine's config.json asks for sums of tensor-parallel ranks in shared memory."""
    section = config.get("plugin_config")
    return isinstance(section, Mapping) and section.get("use_custom_all_reduce") is True


def builder_switches(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The given build.py flags that belong to the seed's `builder_config` section."""
    keys = {switch.flag: switch.key for switch in SWITCHES if switch.key not in _PLUGIN_DEFAULTS}
    return {key: flags[flag] for flag, key in keys.items() if key and flag in flags}


def without_effect(flags: Mapping[str, Any], defaults: Mapping[str, Any]) -> tuple[str, ...]:
    """'--flag (reason)' for every given flag that the torch backend does not need."""
    return tuple(
        f"--{switch.flag} ({switch.why})"
        for switch in SWITCHES
        if switch.why and flags.get(switch.flag) != defaults.get(switch.flag)
    )
