"""An `N-gpu` folder as a whole: what its config.ini says, and how it takes its place."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from configparser import ConfigParser
from pathlib import Path
from typing import Any

from engine.checkpoint.ft_files import CONFIG_FILE, SECTION
from engine.config import ModelConfig, Rope
from engine.engine_file import write_error
from engine.errors import UserError

OUT_FLAG = "--out-dir"
# Fields of a checkpoint's configuration that say how its files are packed, not what the model is.
PACKING = ("quantization_config", "compression_config")


def choose_target(out_dir: Path, tp: int) -> Path:
    """The folder to make; UserError if what is there already may not be replaced."""
    target = out_dir / f"{tp}-gpu"
    if target.exists() and not _is_replaceable(target):
        raise UserError(
            f"{OUT_FLAG} {out_dir}: {target} holds other files than a conversion's; choose "
            "another directory or remove it"
        )
    return target


def commit(
    staging: Path, target: Path, fields: Mapping[str, Any], companions: Iterable[Path]
) -> None:
    """Add copies of `companions` and, last, config.ini to `staging` and let it become `target`.

    UserError if that fails; an earlier `target` is then as it was.
    """
    try:
        for path in companions:
            shutil.copyfile(path, staging / path.name)
        _write_ini(staging / CONFIG_FILE, fields)
        _swap(staging, target)
    except OSError as error:
        raise write_error(target, error, OUT_FLAG) from None


def _swap(staging: Path, target: Path) -> None:
    # Named like a staging directory, so that what a killed process leaves is removed as one.
    old = target.with_name(f".building-old-{os.getpid()}")
    had_one = target.exists()
    if had_one:
        target.rename(old)
    try:
        staging.rename(target)
    except BaseException:
        if had_one:
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def make_fields(
    flags: Mapping[str, Any], raw: Mapping[str, Any], config: ModelConfig
) -> dict[str, Any]:
    """What config.ini says: the converter's `flags`, the fields `raw` of the checkpoint's own
    configuration, and under the same names every number of `config`, so that none is left to a
    reader's default."""
    own = {name: value for name, value in raw.items() if name not in PACKING}
    return {
        **flags,
        **own,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.rms_norm_eps,
        "hidden_act": config.hidden_act,
        "tie_word_embeddings": config.tie_word_embeddings,
        "rope_theta": config.rope.theta,
        "rope_scaling": _scaling(config.rope),
        "weight_data_type": flags["storage_type"],
        "multi_query_mode": config.num_kv_heads != config.num_heads,
    }


def _scaling(rope: Rope) -> dict[str, Any] | None:
    if rope.type == "default":
        return None
    values = {
        "rope_type": rope.type,
        "factor": rope.factor,
        "original_max_position_embeddings": rope.original_max_positions,
        "low_freq_factor": rope.low_freq_factor,
        "high_freq_factor": rope.high_freq_factor,
        "beta_fast": rope.beta_fast,
        "beta_slow": rope.beta_slow,
        "attention_factor": rope.attention_factor,
        "mscale": rope.mscale,
        "mscale_all_dim": rope.mscale_all_dim,
        "truncate": rope.truncate,
    }
    return {name: value for name, value in values.items() if value is not None}


def _write_ini(path: Path, fields: Mapping[str, Any]) -> None:
    parser = ConfigParser(interpolation=None)
    parser[SECTION] = {name: str(value) for name, value in fields.items()}
    with open(path, "w", encoding="utf-8") as file:
        parser.write(file)


def _is_replaceable(target: Path) -> bool:
    """Whether `target` is a folder of an earlier conversion, or an empty one."""
    return target.is_dir() and ((target / CONFIG_FILE).exists() or not any(target.iterdir()))
