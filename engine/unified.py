"""TensorRT-LLM's unified checkpoint as data: the names of its tensors and of its config.json.

A directory of `config.json` and one `rank{r}.safetensors` per rank, which TensorRT-LLM 0.8 … 1.2
builds engines from. Reader and writer share what is here; nothing here opens a file.
"""

from __future__ import annotations

from collections.abc import Mapping as Names
from dataclasses import replace
from typing import Any

from engine.config import ModelConfig, Rope
from engine.errors import CheckpointError, UserError
from engine.mapping import Mapping
from engine.quant import GROUPED, Algorithm, KVStorage, QuantConfig

ARCHITECTURE = "LlamaForCausalLM"
EMBEDDING, FINAL_NORM, HEAD = "transformer.vocab_embedding", "transformer.ln_f", "lm_head"
LAYER = "transformer.layers.{i}."
QKV, DENSE = "attention.qkv", "attention.dense"
# TensorRT-LLM's fc is the gate (the factor inside the activation), its gate is the up projection.
FC, GATE, PROJ = "mlp.fc", "mlp.gate", "mlp.proj"
ATTENTION_NORM, MLP_NORM = "input_layernorm", "post_layernorm"
KV_SCALE = "attention.kv_cache_scaling_factor"

# SmoothQuant's static modes multiply the input of these layers by 127 / its largest magnitude
# before it is rounded; fc and gate share theirs.
TO_INT8 = {
    QKV: f"{ATTENTION_NORM}.scale_to_int",
    DENSE: "attention.quantization_scaling_factor",
    FC: f"{MLP_NORM}.scale_to_int",
    PROJ: "mlp.quantization_scaling_factor",
}

# SmoothQuant by (per_token, per_channel). ModelOpt's form, where every input is smoothed at run
# time, has a name of its own.
SMOOTH_QUANT = {
    (False, False): "W8A8_SQ_PER_TENSOR_PLUGIN",
    (False, True): "W8A8_SQ_PER_CHANNEL_PER_TENSOR_PLUGIN",
    (True, False): "W8A8_SQ_PER_TENSOR_PER_TOKEN_PLUGIN",
    (True, True): "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN",
}
SMOOTHED_EVERYWHERE = "W8A8_SQ_PER_CHANNEL"
ALGORITHMS = {
    Algorithm.NONE: None,
    Algorithm.W8A16: "W8A16",
    Algorithm.W4A16: "W4A16",
    Algorithm.W4A16_AWQ: "W4A16_AWQ",
    Algorithm.W4A16_GPTQ: "W4A16_GPTQ",
    Algorithm.FP8: "FP8",
}
KV_ALGORITHMS = {KVStorage.NONE: None, KVStorage.INT8: "INT8", KVStorage.FP8: "FP8"}

# The library's own default differs between its code and its documentation, so it is written always.
DEFAULT_GROUP_SIZE = 128
# Scaling types of rotary embeddings that the library has for Llama.
ROPE_TYPES = ("default", "linear", "dynamic", "llama3")
LLAMA3_FIELDS = {
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_positions": "original_max_position_embeddings",
}
# Required field of config.json → its name in Hugging Face's.
HF_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "max_position_embeddings": "max_position_embeddings",
    "norm_epsilon": "rms_norm_eps",
}
OPTIONAL_HF_NAMES = {
    "num_key_value_heads": "num_key_value_heads",
    "head_size": "head_dim",
    "hidden_act": "hidden_act",
    "rotary_base": "rope_theta",
    "rotary_scaling": "rope_scaling",
    "share_embedding_table": "tie_word_embeddings",
    "attn_bias": "attention_bias",
    "mlp_bias": "mlp_bias",
    "bias": "mlp_bias",
    "moe_num_experts": "num_local_experts",
}


def rank_file(rank: int) -> str:
    return f"rank{rank}.safetensors"


def algorithm_name(quant: QuantConfig, *, is_smoothed_everywhere: bool = False) -> str | None:
    """The library's word for a mode of the linear layers; None for full precision."""
    if quant.algorithm is not Algorithm.W8A8_SQ:
        return ALGORITHMS[quant.algorithm]
    if is_smoothed_everywhere:
        return SMOOTHED_EVERYWHERE
    return SMOOTH_QUANT[quant.per_token, quant.per_channel]


def write_config(
    config: ModelConfig,
    dtype: str,
    quant: QuantConfig,
    mapping: Mapping,
    *,
    embedding_dim: int | None,
    algorithm: str | None,
) -> dict[str, Any]:
    """The config.json of a checkpoint; UserError for a RoPE scaling the library does not have."""
    return {
        "architecture": ARCHITECTURE,
        "dtype": dtype,
        "logits_dtype": "float32",
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_positions,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_size": config.head_dim,
        "hidden_act": config.hidden_act,
        "norm_epsilon": config.rms_norm_eps,
        "position_embedding_type": "rope_gpt_neox",
        "rotary_base": config.rope.theta,
        "rotary_scaling": _write_scaling(config.rope),
        "use_parallel_embedding": embedding_dim is not None,
        "embedding_sharding_dim": embedding_dim or 0,
        # The head is always written: versions disagree on who shares a tied one.
        "share_embedding_table": False,
        "attn_bias": False,
        "mlp_bias": False,
        "residual_mlp": False,
        "disable_weight_only_quant_plugin": False,
        "mapping": {"world_size": mapping.world, "tp_size": mapping.tp, "pp_size": mapping.pp},
        "quantization": _write_quant(quant, algorithm),
    }


def _write_quant(quant: QuantConfig, algorithm: str | None) -> dict[str, Any]:
    return {
        "quant_algo": algorithm,
        "kv_cache_quant_algo": KV_ALGORITHMS[quant.kv],
        "group_size": quant.group_size or DEFAULT_GROUP_SIZE,
        "smoothquant_val": None,
        "has_zero_point": quant.algorithm is Algorithm.W4A16_GPTQ,
        "pre_quant_scale": quant.algorithm is Algorithm.W4A16_AWQ,
        "exclude_modules": None if algorithm is None else ["lm_head"],
    }


def _write_scaling(rope: Rope) -> dict[str, Any] | None:
    if rope.type not in ROPE_TYPES:
        raise UserError(
            f"rope scaling {rope.type!r} is not one of TensorRT-LLM's for Llama "
            f"({', '.join(ROPE_TYPES)}); this model runs on the torch backend only"
        )
    if rope.type == "default":
        return None
    scaling = {"type": rope.type, "rope_type": rope.type, "factor": rope.factor}
    if rope.type == "llama3":
        scaling |= {name: getattr(rope, field) for field, name in LLAMA3_FIELDS.items()}
    return scaling


def read_model(raw: Names[str, Any], where: str) -> ModelConfig:
    """The network that a checkpoint's config.json (`raw`, the file `where`) describes.

    Without a `rotary_base` the RoPE base is TensorRT-LLM's 10000, which may be wrong.
    """
    for key in HF_NAMES:
        if raw.get(key) is None:
            raise CheckpointError(
                f"{where}: field {key!r} is missing; give the config.json that came with the "
                "checkpoint"
            )
    names = HF_NAMES | OPTIONAL_HF_NAMES
    known = {hf: raw[key] for key, hf in names.items() if raw.get(key) is not None}
    return ModelConfig.from_hf({**known, "architectures": [raw.get("architecture")]}, where)


def read_mapping(raw: Names[str, Any], where: str) -> Mapping:
    """The ranks that a checkpoint was cut for; CheckpointError for cuts this program lacks."""
    values = raw.get("mapping", {})
    if not isinstance(values, dict):
        raise CheckpointError(f"{where}: mapping is not an object of sizes; write the file again")
    tp, pp = values.get("tp_size", 1), values.get("pp_size", 1)
    sizes = {"tp_size": tp, "pp_size": pp, "world_size": values.get("world_size", 1)}
    for key, size in sizes.items():
        if type(size) is not int or size < 1:
            raise CheckpointError(
                f"{where}: mapping.{key} {size!r} is not a number of ranks; write the file again"
            )
    if sizes["world_size"] != tp * pp or values.get("cp_size", 1) != 1:
        raise CheckpointError(
            f"{where}: mapping {values} is not tensor times pipeline parallelism; convert the "
            "model again with --tp_size and --pp_size only"
        )
    return Mapping(tp * pp, 0, tp, pp)


def read_quant(values: Names[str, Any], where: str) -> QuantConfig:
    """What a `quantization` section means for an engine that is built already.

    CheckpointError for an algorithm that this program has no name for.
    """
    name, kv_name = values.get("quant_algo"), values.get("kv_cache_quant_algo")
    modes = {text: QuantConfig(algorithm) for algorithm, text in ALGORITHMS.items()}
    modes |= {
        text: QuantConfig(Algorithm.W8A8_SQ, per_token=per_token, per_channel=per_channel)
        for (per_token, per_channel), text in SMOOTH_QUANT.items()
    }
    modes |= {
        "NO_QUANT": QuantConfig(),
        SMOOTHED_EVERYWHERE: QuantConfig(Algorithm.W8A8_SQ, per_channel=True),
    }
    storages = {text: storage for storage, text in KV_ALGORITHMS.items()}
    if name not in modes or kv_name not in storages:
        raise CheckpointError(
            f"{where}: quant_algo {name!r} with kv_cache_quant_algo {kv_name!r} is not supported; "
            "run the engine with TensorRT-LLM's own scripts"
        )
    quant = modes[name]
    group_size = values.get("group_size") or DEFAULT_GROUP_SIZE
    is_grouped = quant.algorithm in GROUPED
    return replace(quant, kv=storages[kv_name], group_size=group_size if is_grouped else 0)
