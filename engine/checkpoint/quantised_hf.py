"""Finds out how a Hugging Face directory is quantised, from its settings files alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from engine.checkpoint.awq import read_awq
from engine.checkpoint.compressed_tensors import read_compressed_tensors
from engine.checkpoint.files import read_json
from engine.checkpoint.gptq import read_gptq
from engine.checkpoint.modelopt import read_modelopt
from engine.checkpoint.quant_settings import Settings
from engine.checkpoint.quantised import LinearFormat
from engine.config import ModelConfig
from engine.errors import CheckpointError

CONFIG_FILE = "config.json"
MODELOPT_FILE = "hf_quant_config.json"
# Files of older AutoGPTQ and AutoAWQ, whose config.json says nothing.
GPTQ_FILE = "quantize_config.json"
AWQ_FILE = "quant_config.json"
AWQ_KEYS = {"w_bit": "bits", "q_group_size": "group_size"}

READERS: dict[str, Callable[[Settings, ModelConfig], LinearFormat]] = {
    "awq": read_awq,
    "gptq": read_gptq,
    "compressed-tensors": read_compressed_tensors,
    "modelopt": read_modelopt,
}


def read_linear_format(
    folder: Path, raw: Mapping[str, Any], config: ModelConfig
) -> LinearFormat | None:
    """How the linear layers are stored; None for a directory that declares no quantisation.

    `raw` is its config.json. Raises CheckpointError for every method and setting that the engine
    does not have.
    """
    found = _find_settings(folder, raw)
    if found is None:
        return None
    method, settings = found
    if method not in READERS:
        raise CheckpointError(
            f"{settings.file}: quant_method {method!r} is not supported (supported: "
            f"{', '.join(READERS)}); name the full-precision checkpoint the weights were made from"
        )
    return READERS[method](settings, config)


def _find_settings(folder: Path, raw: Mapping[str, Any]) -> tuple[str | None, Settings] | None:
    """The method and its settings, from config.json first, then from the tools' own files."""
    for key, default in (
        ("quantization_config", None),
        ("compression_config", "compressed-tensors"),
    ):
        if raw.get(key) is not None:
            settings = Settings(str(folder / CONFIG_FILE), raw).section(key)
            method = settings.get("quant_method", default)
            if method == "modelopt" and (folder / MODELOPT_FILE).exists():
                break
            return method, settings
    if (folder / MODELOPT_FILE).exists():
        whole = Settings(str(folder / MODELOPT_FILE), read_json(folder / MODELOPT_FILE))
        if not whole.section("quantization").values:
            raise whole.refusal("quantization", "ModelOpt's settings", "export the model again")
        return "modelopt", whole.section("quantization")
    if (folder / GPTQ_FILE).exists():
        settings = Settings(str(folder / GPTQ_FILE), read_json(folder / GPTQ_FILE))
        return settings.get("quant_method", "gptq"), settings
    if (folder / AWQ_FILE).exists():
        values = {AWQ_KEYS.get(k, k): v for k, v in read_json(folder / AWQ_FILE).items()}
        return values.get("quant_method", "awq"), Settings(str(folder / AWQ_FILE), values)
    return None
