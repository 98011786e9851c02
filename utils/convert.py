"""From hf_yi_convert.py's flags to a folder of calibrated weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from engine.checkpoint.base import Checkpoint
from engine.checkpoint.files import read_json
from engine.checkpoint.ft_files import STORAGE_TYPES
from engine.checkpoint.hf import CONFIG_FILE
from engine.checkpoint.linear_layers import linear_shapes
from engine.checkpoint.meta import PARAMS_FILE
from engine.checkpoint.open import open_checkpoint
from engine.config import ModelConfig
from engine.engine_file import EngineWriter
from engine.errors import UserError
from engine.mapping import Mapping as Ranks
from utils import log
from utils.build_plan import TOKENIZER_FILES
from utils.calibration import calibrate
from utils.datasets import calibration_texts
from utils.ft_directory import OUT_FLAG, choose_target, commit, make_fields
from utils.ft_export import Export, write_layer, write_tables
from utils.hub import resolve_model_dir
from utils.tokenizer import load_tokenizer

# Flags that shared code names in its refusals -> what this script calls them.
OWN_FLAGS = {
    "--model_dir": "--in-file",
    "--meta_ckpt_dir": "--in-file",
    "--tokenizer_dir": "--in-file",
    "--tp_size": "--tensor-parallelism",
    "--dataset_path": "--calib_dataset",
}


def convert(flags: Mapping[str, Any]) -> Path:
    """Calibrate and write what the flags ask for; the folder that was written.

    Raises UserError for flags that contradict each other, the checkpoint or the texts, and
    CheckpointError for a checkpoint that cannot be read. Nothing is left behind then.
    """
    if not flags["calibrate_kv_cache"] and flags["smoothquant"] is None:
        raise UserError(
            "there is nothing to calibrate: give --calibrate-kv-cache, --smoothquant ALPHA or "
            "both; full-precision engines are built from the checkpoint itself, without conversion"
        )
    with own_flag_names():
        folder = resolve_model_dir(flags["in_file"], "--in-file")
        with _open(folder) as checkpoint:
            return _convert(checkpoint, folder, flags)


def _convert(checkpoint: Checkpoint, folder: Path, flags: Mapping[str, Any]) -> Path:
    config, tp = checkpoint.config, flags["tensor_parallelism"]
    Ranks(tp, 0, tp).check(config)
    if checkpoint.quant is not None and flags["smoothquant"] is not None:
        raise UserError(
            f"--smoothquant needs full-precision weights, and those of {folder} are quantised "
            f"({checkpoint.quant}); name the checkpoint they were made from as --in-file"
        )
    samples = _read_samples(folder, config, flags)
    raw = read_json(folder / CONFIG_FILE) if (folder / CONFIG_FILE).exists() else {}
    companions = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    out_dir = Path(flags["out_dir"])
    target = choose_target(out_dir, tp)
    with EngineWriter(out_dir, OUT_FLAG) as writer:
        dtype = STORAGE_TYPES[flags["storage_type"]]
        export = Export(writer.staging, config, dtype, tp, flags["smoothquant"])
        writer.require_space(_count_bytes(export))
        _write(checkpoint, samples, export, flags)
        commit(writer.staging, target, make_fields(flags, raw, config), companions)
    return target


def _write(
    checkpoint: Checkpoint, samples: list[list[int]], export: Export, flags: Mapping[str, Any]
) -> None:
    is_on_cpu = flags["load_model_on_cpu"] or not torch.cuda.is_available()
    device = torch.device("cpu" if is_on_cpu else "cuda")
    log.info(
        f"calibrating on {device.type} with {len(samples)} texts of "
        f"{sum(map(len, samples))} tokens in all"
    )
    write_tables(checkpoint, export)
    with (
        log.ProgressBar("calibrating", unit="layer") as bar,
        ThreadPoolExecutor(flags["processes"], thread_name_prefix="write") as pool,
    ):
        layers = calibrate(
            checkpoint, samples, device=device, spill_dir=export.folder, progress=bar.update_to
        )
        for calibrated in layers:
            write_layer(calibrated, export, pool)
            del calibrated  # else it would stay while the next layer is read


@contextmanager
def own_flag_names() -> Iterator[None]:
    """Let refusals of shared code name this script's flags."""
    try:
        yield
    except UserError as error:
        text = str(error)
        for theirs, ours in OWN_FLAGS.items():
            text = text.replace(theirs, ours)
        raise type(error)(text) from None


def _open(folder: Path) -> Checkpoint:
    is_meta = (folder / PARAMS_FILE).exists() and not (folder / CONFIG_FILE).exists()
    return open_checkpoint(meta_ckpt_dir=str(folder)) if is_meta else open_checkpoint(str(folder))


def _read_samples(folder: Path, config: ModelConfig, flags: Mapping[str, Any]) -> list[list[int]]:
    """The first tokens of the first texts, so that two conversions choose the same."""
    tokenizer = load_tokenizer(folder)
    texts = calibration_texts(
        flags["calib_dataset"],
        size=flags["calib_size"],
        cache_dir=flags["dataset_cache_dir"],
        flag="--calib_dataset",
    )
    limit = min(flags["calib_max_length"], config.max_positions)
    encoded = (tokenizer.encode(text, add_special_tokens=True)[:limit] for text in texts)
    samples = [ids for ids in encoded if ids]
    largest = max((max(ids) for ids in samples), default=-1)
    if largest >= config.vocab_size:
        raise UserError(
            f"--in-file {folder}: its tokenizer gives the id {largest} but the model's vocabulary "
            f"(vocab_size) has {config.vocab_size} entries; use the files of one checkpoint"
        )
    if not samples:
        raise UserError(
            f"--in-file {folder}: its tokenizer makes no tokens of the texts; check that its "
            "tokenizer files are whole"
        )
    return samples


def _count_bytes(export: Export) -> int:
    """What the large files take, without the copies of KV heads."""
    linear = sum(outputs * inputs for outputs, inputs in linear_shapes(export.config).values())
    int8 = 2 * linear if export.alpha is not None else 0
    return export.config.num_parameters * export.dtype.itemsize + int8
