"""From build.py's flags to a BuildPlan. Every refusal that needs no weights happens here."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from collections.abc import Mapping as Names
from dataclasses import astuple, fields, replace
from pathlib import Path
from typing import Any

from engine.backends import get_backend
from engine.backends.ahead import check_targets
from engine.backends.base import BuildPlan, BuildReport
from engine.checkpoint.base import Checkpoint
from engine.checkpoint.open import Paths
from engine.config import ModelConfig, Rope, from_flags
from engine.engine_file import CONFIG_NAME
from engine.errors import UserError
from engine.limits import BuildLimits
from engine.mapping import Mapping
from engine.plugins import SWITCHES, without_effect
from engine.quant import Algorithm, KVStorage, QuantConfig
from engine.record import EngineRecord
from engine.weights.pack import LAYOUT_VERSION
from engine.weights.quantize import quantize
from utils.hub import resolve_model_dir
from weight import WeightSource

__all__ = ["export_checkpoint", "get_backend", "plan_build"]

QUANT_FLAGS = (
    "use_weight_only",
    "weight_only_precision",
    "use_smooth_quant",
    "per_token",
    "per_channel",
    "enable_fp8",
    "int8_kv_cache",
    "fp8_kv_cache",
    "group_size",
    "quantize_lm_head",
)
# Flag → field of ModelConfig that it must agree with when a checkpoint is given.
SHAPE_FIELDS = {
    "vocab_size": "vocab_size",
    "n_layer": "num_layers",
    "n_positions": "max_positions",
    "n_embd": "hidden_size",
    "n_head": "num_heads",
    "n_kv_head": "num_kv_heads",
    "inter_size": "intermediate_size",
    "hidden_act": "hidden_act",
    "rms_norm_eps": "rms_norm_eps",
}
# Flags whose capability this version does not have, and what that is.
LATER = {
    "use_inflight_batching": "in-flight batching",
    "max_prompt_embedding_table_size": "prompt tuning",
    "use_lora_plugin": "LoRA",
    "hf_lora_dir": "LoRA",
    "moe_num_experts": "mixture of experts",
    "moe_top_k": "mixture of experts",
    "moe_tp_mode": "mixture of experts",
    "moe_renorm_mode": "mixture of experts",
}
FIRST_LINEAR = "model.layers.0.self_attn.q_proj"
# What an engine directory takes along so that run.py needs no --tokenizer_dir.
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
)


def plan_build(flags: Names[str, Any], defaults: Names[str, Any]) -> BuildPlan:
    """The build that build.py's `flags` ask for; `defaults` are the values of flags not given.

    Raises UserError for flags that contradict each other, the checkpoint or this version, and
    CheckpointError for a checkpoint that cannot be built; no weight has been read then.
    """
    for flag, what in LATER.items():
        if flags[flag] != defaults[flag]:
            raise UserError(f"--{flag}: {what} is not available in this version; leave it out")
    targets = _targets(flags)
    if flags["export_checkpoint"] is None:
        get_backend(flags["backend"])
        _check_output(Path(flags["output_dir"]))
    asked = QuantConfig.from_flags(**{name: flags[name] for name in QUANT_FLAGS})
    limits = BuildLimits(**{f.name: flags[f.name] for f in fields(BuildLimits)})
    mapping = _mapping(flags)
    embedding_dim = flags["embedding_sharding_dim"] if flags["use_parallel_embedding"] else None
    source = _source(flags, asked)
    with source.open() as checkpoint:
        quant = _settle_quant(
            asked,
            checkpoint,
            is_group_given=flags["group_size"] is not None,
            is_dummy=source.dummy is not None,
        )
        config = _configure(checkpoint, flags, is_dummy=source.dummy is not None)
        generation = dict(checkpoint.generation)
        notes = _quant_notes(quant, checkpoint)
    mapping.check(config, embedding_dim=embedding_dim)
    record = EngineRecord(
        config=config,
        dtype=flags["dtype"],
        quant=quant,
        mapping=mapping,
        limits=limits,
        layout_version=LAYOUT_VERSION,
        backend=flags["backend"],
        embedding_dim=embedding_dim,
        generation=generation,
        source=str(source),
        is_dummy=source.dummy is not None,
    )
    return BuildPlan(
        record=record,
        output_dir=Path(flags["output_dir"]),
        open_checkpoint=source.open,
        parallel=flags["parallel_build"],
        switches={switch.flag: flags[switch.flag] for switch in SWITCHES},
        ignored=without_effect(flags, defaults) if flags["backend"] == "torch" else (),
        companions=_companions(source),
        timing_cache=_timing_cache(flags, defaults),
        targets=targets,
        warnings=notes,
    )


def export_checkpoint(
    plan: BuildPlan, folder: str, progress: Callable[[int, int], None]
) -> BuildReport:
    """Write `plan`'s weights as TensorRT-LLM's unified checkpoint; see
    engine/backends/unified_export.py."""
    from engine.backends.trtllm import find_preprocess
    from engine.backends.unified_export import export_checkpoint as write

    preprocess = None
    if plan.record.quant.algorithm is Algorithm.W4A16_GPTQ:
        preprocess = find_preprocess()
    return write(plan, Path(folder), progress, preprocess=preprocess)


def _settle_quant(
    asked: QuantConfig, checkpoint: Checkpoint, *, is_group_given: bool, is_dummy: bool
) -> QuantConfig:
    """The engine's quantisation: the flags, completed by what the checkpoint is.

    Raises UserError for weights that do not fit it, and for an INT8 cache without calibrated
    scales, whose output would be noise.
    """
    quant = asked.joined(checkpoint.quant, is_group_given=is_group_given)
    if quant.algorithm is Algorithm.FP8 and checkpoint.quant is None:
        is_calibrated = checkpoint.is_calibrated or is_dummy
        quant = replace(quant, per_token=not is_calibrated, per_channel=not is_calibrated)
    if quant.kv is KVStorage.INT8 and checkpoint.cache_scales(0, quant.kv) is None:
        raise UserError(
            "--int8_kv_cache needs calibrated scales, which this checkpoint does not have; make "
            "them with hf_yi_convert.py --calibrate-kv-cache and name its N-gpu folder as "
            "--ft_model_dir"
        )
    # What does not fit is refused now, by the first layer, and not after the others are planned.
    quantize(checkpoint.lazy_linear(FIRST_LINEAR), quant, is_dummy=is_dummy)
    return quant


def _quant_notes(quant: QuantConfig, checkpoint: Checkpoint) -> tuple[str, ...]:
    """What the user should know of scales that are missing."""
    notes = []
    if quant.algorithm is Algorithm.FP8 and quant.per_token and checkpoint.quant is None:
        notes.append(
            "no FP8 scales were given (--quantized_fp8_model_path): weights get a scale per output "
            "and activations one per token at run time"
        )
    if quant.kv is KVStorage.FP8 and checkpoint.cache_scales(0, quant.kv) is None:
        notes.append(
            "no calibrated scales for the FP8 KV cache were given, 1.0 is used; "
            "quantize.py --qformat fp8 or hf_yi_convert.py --calibrate-kv-cache makes them"
        )
    return tuple(notes)


def _mapping(flags: Names[str, Any]) -> Mapping:
    tp, pp = flags["tp_size"], flags["pp_size"]
    return Mapping(world=flags["world_size"] or tp * pp, rank=0, tp=tp, pp=pp)


def _source(flags: Names[str, Any], quant: QuantConfig) -> WeightSource:
    paths = Paths(**{field.name: flags[field.name] for field in fields(Paths)})
    if paths.model_dir is not None:
        folder = resolve_model_dir(paths.model_dir, "--model_dir")
        paths = replace(paths, model_dir=str(folder))
    if any(value is not None for value in astuple(paths)):
        return WeightSource(paths, quant)
    names = [*SHAPE_FIELDS, "multiple_of", "ffn_dim_multiplier"]
    shape = from_flags(**{name: flags[name] for name in names})
    return WeightSource(quant=quant, dummy=shape)


def _check_output(output_dir: Path) -> None:
    """Raise UserError if the engine's config.json would replace a checkpoint's."""
    try:
        config = json.loads((output_dir / CONFIG_NAME).read_text())
    except (OSError, ValueError):
        return
    marks = ("architectures", "model_type", "architecture")
    if isinstance(config, dict) and any(mark in config for mark in marks):
        raise UserError(
            f"--output_dir {output_dir} holds a checkpoint, whose {CONFIG_NAME} the engine's would "
            "replace; choose another directory"
        )


def _configure(checkpoint: Checkpoint, flags: Names[str, Any], *, is_dummy: bool) -> ModelConfig:
    """The checkpoint's configuration with the RoPE overrides; shape flags must agree with it."""
    config = checkpoint.config
    for flag, field in SHAPE_FIELDS.items():
        given, found = flags[flag], getattr(config, field)
        if not is_dummy and given is not None and given != found:
            raise UserError(
                f"--{flag} {given} differs from the checkpoint's {found} ({checkpoint.where}); "
                "shape flags are for builds without a checkpoint, leave it out"
            )
    if not checkpoint.is_rope_known and flags["rotary_base"] is None:
        raise UserError(
            f"--checkpoint_dir {checkpoint.where}: its config.json has no rotary_base, which some "
            "exporters leave out; give the base model's rope_theta as --rotary_base (5000000 for "
            "Yi)"
        )
    rope = config.rope
    if flags["rotary_base"] is not None:
        rope = replace(rope, theta=flags["rotary_base"])
    if flags["rotary_scaling"] is not None:
        rope = _scaled(rope, *flags["rotary_scaling"], config.max_positions)
    return replace(config, rope=rope)


def _scaled(rope: Rope, kind: str, factor: str, max_positions: int) -> Rope:
    try:
        value = float(factor)
    except ValueError:
        value = 0.0
    if kind not in ("linear", "dynamic") or not 1 < value < math.inf:
        raise UserError(
            f"--rotary_scaling {kind} {factor}: the type is linear or dynamic and the factor a "
            "number above 1, for example --rotary_scaling dynamic 2.0"
        )
    return Rope(rope.theta, kind, factor=value, original_max_positions=max_positions)


def _targets(flags: Names[str, Any]) -> tuple[str, ...]:
    """The GPU architectures to compile kernels for."""
    names = tuple(dict.fromkeys(flags["target"]))
    if names and (flags["backend"] != "torch" or flags["export_checkpoint"] is not None):
        raise UserError(
            f"--target {' '.join(names)} compiles kernels of the torch backend's engines, and none "
            "is built; leave it out"
        )
    check_targets(names)
    return names


def _timing_cache(flags: Names[str, Any], defaults: Names[str, Any]) -> Path | None:
    """The file of measured kernels that the flag names; one that is not there yet is none."""
    if flags["timing_cache"] == defaults["timing_cache"]:
        return None
    path = Path(flags["timing_cache"])
    return path if path.is_file() else None


def _companions(source: WeightSource) -> tuple[Path, ...]:
    folder = getattr(source.paths, source.paths.weights_flag)
    if folder is None:
        return ()
    paths = (Path(folder) / name for name in TOKENIZER_FILES)
    return tuple(path for path in paths if path.is_file())
