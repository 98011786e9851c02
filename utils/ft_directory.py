"""Makes an `N-gpu` folder aside and moves it into place in one go, with its config.ini."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from configparser import ConfigParser
from pathlib import Path
from typing import Any

from engine.checkpoint.ft_files import CONFIG_FILE, SECTION
from engine.config import ModelConfig
from engine.engine_file import remove_abandoned, write_error
from engine.errors import UserError

FLAG = "--out-dir"
# Fields of a checkpoint's configuration that say how its files are packed, not what the model is.
PACKING = ("quantization_config", "compression_config")


class FtWriter:
    """The folder `{out_dir}/{tp}-gpu`, made in `staging`.

    Use as a context manager: without `commit`, nothing of the new folder remains and one that was
    there before is untouched.
    """

    def __init__(self, out_dir: Path, tp: int):
        self.out_dir = out_dir
        self.target = out_dir / f"{tp}-gpu"
        self.staging = out_dir / f".building-{os.getpid()}"
        self._created = False

    def __enter__(self) -> FtWriter:
        if self.target.exists() and not _is_replaceable(self.target):
            raise UserError(
                f"{FLAG} {self.out_dir}: {self.target} holds other files than a conversion's; "
                "choose another directory or remove it"
            )
        try:
            self._created = not self.out_dir.exists()
            self.out_dir.mkdir(parents=True, exist_ok=True)
            remove_abandoned(self.out_dir)
            self.staging.mkdir()
        except OSError as error:
            raise UserError(
                f"{FLAG} {self.out_dir} cannot be written ({error.strerror}); choose a directory "
                "you may write to"
            ) from None
        return self

    def __exit__(self, *failure: object) -> None:
        shutil.rmtree(self.staging, ignore_errors=True)
        if self._created and failure[0] is not None and not any(self.out_dir.iterdir()):
            self.out_dir.rmdir()

    def require_space(self, needed: int) -> None:
        """Raise UserError unless the file system has room for `needed` bytes."""
        free = shutil.disk_usage(self.staging).free
        if free < needed:
            raise UserError(
                f"{FLAG} {self.out_dir} has {free / 1e9:.2f} GB free and the conversion needs "
                f"{needed / 1e9:.2f} GB; free some space or choose another directory"
            )

    def commit(self, fields: Mapping[str, Any], companions: Iterable[Path]) -> None:
        """Add copies of `companions` and, last, config.ini; then let the folder take its place."""
        try:
            for path in companions:
                shutil.copyfile(path, self.staging / path.name)
            _write_ini(self.staging / CONFIG_FILE, fields)
            self._swap()
        except OSError as error:
            raise write_error(self.target, error, FLAG) from None

    def _swap(self) -> None:
        old = self.out_dir / f".building-old-{os.getpid()}"
        had_one = self.target.exists()
        if had_one:
            self.target.rename(old)
        try:
            self.staging.rename(self.target)
        except BaseException:
            if had_one:
                old.rename(self.target)
            raise
        shutil.rmtree(old, ignore_errors=True)


def make_fields(
    flags: Mapping[str, Any], raw: Mapping[str, Any], config: ModelConfig
) -> dict[str, Any]:
    """What config.ini says: the converter's `flags`, the fields `raw` of the checkpoint's own
    configuration, and under the same names every number of `config`, so that none is left to a
    reader's default."""
    rope = config.rope
    scaling = {
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
    known = {name: value for name, value in scaling.items() if value is not None}
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
        "rope_theta": rope.theta,
        "rope_scaling": None if rope.type == "default" else known,
        "weight_data_type": flags["storage_type"],
        "multi_query_mode": config.num_kv_heads != config.num_heads,
    }


def _write_ini(path: Path, fields: Mapping[str, Any]) -> None:
    parser = ConfigParser(interpolation=None)
    parser[SECTION] = {name: str(value) for name, value in fields.items()}
    with open(path, "w", encoding="utf-8") as file:
        parser.write(file)


def _is_replaceable(target: Path) -> bool:
    """Whether `target` is a folder of an earlier conversion, or an empty one."""
    return target.is_dir() and ((target / CONFIG_FILE).exists() or not any(target.iterdir()))
