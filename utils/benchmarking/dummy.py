"""Engines of Yi's shapes with random weights, so that one command measures a shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from engine.config import ModelConfig
from engine.errors import UserError
from utils.benchmarking.workload import Workload

PRESETS = {
    "tiny": ModelConfig(
        vocab_size=4096,
        hidden_size=256,
        num_layers=6,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        intermediate_size=768,
    ),
    "yi-6b": ModelConfig(),
    "yi-9b": ModelConfig(num_layers=48),
    "yi-34b": ModelConfig(
        hidden_size=7168,
        num_layers=60,
        num_heads=56,
        num_kv_heads=8,
        intermediate_size=20480,
    ),
}
_WEIGHT_ONLY = ("--use_weight_only", "--weight_only_precision")
# Names of modes → build.py's flags.
QUANT_FLAGS: Mapping[str, tuple[str, ...]] = {
    "none": (),
    "int8": (*_WEIGHT_ONLY, "int8"),
    "int4": (*_WEIGHT_ONLY, "int4"),
    "int4_awq": (*_WEIGHT_ONLY, "int4_awq"),
    "int4_gptq": (*_WEIGHT_ONLY, "int4_gptq"),
    "sq": ("--use_smooth_quant", "--per_token", "--per_channel"),
    "fp8": ("--enable_fp8",),
}
KV_FLAGS = {"none": (), "int8": ("--int8_kv_cache",), "fp8": ("--fp8_kv_cache",)}
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class DummyEngine:
    """Which engine to build: a preset, cut to `layers` of its layers (None: all)."""

    preset: str
    layers: int | None = None
    quant: str = "none"
    kv: str = "none"
    dtype: str = "bfloat16"
    quantize_lm_head: bool = False

    def __post_init__(self) -> None:
        most = PRESETS[self.preset].num_layers
        if self.layers is not None and self.layers > most:
            raise UserError(
                f"--layers {self.layers} exceeds the {most} layers of {self.preset}; a shape can "
                "only be cut"
            )

    @property
    def config(self) -> ModelConfig:
        config = PRESETS[self.preset]
        return replace(config, num_layers=self.layers or config.num_layers)

    def build_flags(self, works: Sequence[Workload], *, tp: int, output_dir: str) -> list[str]:
        """build.py's, for an engine that all of `works` fit."""
        config = self.config
        longest = max(work.input_len + work.output_len for work in works)
        sizes = {
            "n_layer": config.num_layers,
            "n_embd": config.hidden_size,
            "n_head": config.num_heads,
            "n_kv_head": config.num_kv_heads,
            "inter_size": config.intermediate_size,
            "vocab_size": config.vocab_size,
            "n_positions": max(config.max_positions, longest),
            "max_batch_size": max(work.batch for work in works),
            "max_input_len": max(work.input_len for work in works),
            "max_output_len": max(work.output_len for work in works),
            "tp_size": tp,
        }
        named = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
        quant = [*QUANT_FLAGS[self.quant], *KV_FLAGS[self.kv]]
        quant += ["--quantize_lm_head"] if self.quantize_lm_head else []
        return [*named, "--dtype", self.dtype, *quant, "--output_dir", output_dir]


def name_shape(config: ModelConfig) -> str:
    """'yi-6b', 'yi-6b, 8 of 32 layers', or for other shapes the number of parameters."""
    for name, preset in PRESETS.items():
        cut = replace(config, num_layers=preset.num_layers, max_positions=preset.max_positions)
        cut = replace(cut, rope=preset.rope, rms_norm_eps=preset.rms_norm_eps)
        if cut == preset and config.num_layers <= preset.num_layers:
            layers = f", {config.num_layers} of {preset.num_layers} layers"
            return name + (layers if config.num_layers < preset.num_layers else "")
    return f"{config.num_parameters / 1e9:.3g} B parameters"
