"""The one door to checkpoints: chooses the reader and turns wrong paths into a sentence."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.checkpoint.awq_file import open_awq_file
from engine.checkpoint.base import Checkpoint
from engine.checkpoint.files import read_json
from engine.checkpoint.fp8_scales import open_fp8_scales
from engine.checkpoint.ft import open_ft, read_ft_kv_scales
from engine.checkpoint.gptq_file import open_gptq_file
from engine.checkpoint.hf import CONFIG_FILE, open_hf
from engine.checkpoint.meta import PARAMS_FILE, open_meta
from engine.checkpoint.unified import open_unified
from engine.errors import CheckpointError, UserError
from engine.quant import GROUPED, Algorithm, KVStorage, QuantConfig
from engine.unified import rank_file

UNIFIED_FILE = rank_file(0)
# What else users pass as a checkpoint: pattern of a file in it -> what it is and where it goes.
OTHER_DIRECTORIES = (
    (PARAMS_FILE, "a checkpoint in Meta's format; pass it as --meta_ckpt_dir"),
    ("config.ini", "a directory written by hf_yi_convert.py; pass it as --ft_model_dir"),
    ("[0-9]*-gpu/config.ini", "the output of hf_yi_convert.py; pass N-gpu in it as --ft_model_dir"),
    (UNIFIED_FILE, "TensorRT-LLM's unified checkpoint; pass it as --checkpoint_dir"),
    ("*.gguf", "a GGUF file's directory; use the safetensors checkpoint of the same model"),
)


# Files beside a checkpoint: flag, the modes that read it, and the flags that ask for these.
SCALE_FILES = (
    (
        "quant_ckpt_path",
        GROUPED,
        "--use_weight_only --weight_only_precision int4_awq (or int4_gptq)",
    ),
    ("quantized_fp8_model_path", (Algorithm.FP8,), "--enable_fp8"),
)


@dataclass(frozen=True)
class Paths:
    """The flags that say where weights and scales are; None for those that are not given."""

    model_dir: str | None = None
    meta_ckpt_dir: str | None = None
    ft_model_dir: str | None = None
    checkpoint_dir: str | None = None
    quant_ckpt_path: str | None = None
    quantized_fp8_model_path: str | None = None

    @property
    def weights_flag(self) -> str:
        """The flag whose directory holds the weights."""
        given = ("model_dir", "meta_ckpt_dir", "checkpoint_dir", "ft_model_dir")
        return next((flag for flag in given if getattr(self, flag) is not None), "model_dir")


def open_checkpoint(model_dir: str | None = None, meta_ckpt_dir: str | None = None) -> Checkpoint:
    """`open_source` of one directory with nothing beside it."""
    return open_source(Paths(model_dir, meta_ckpt_dir), QuantConfig())


def open_source(paths: Paths, quant: QuantConfig) -> Checkpoint:
    """Open what the flags name for a build that asks for `quant`, and check that it is whole.

    Reads configuration, tensor headers and scales only. Raises UserError for the flags and
    CheckpointError for everything in the files; the caller closes the result.
    """
    _check_flags(paths, quant)
    checkpoint = _open_weights(paths, quant)
    try:
        if paths.quant_ckpt_path is not None:
            opener = open_awq_file if quant.algorithm is Algorithm.W4A16_AWQ else open_gptq_file
            checkpoint = opener(Path(paths.quant_ckpt_path), checkpoint, quant.group_size)
        if paths.quantized_fp8_model_path is not None:
            checkpoint = open_fp8_scales(Path(paths.quantized_fp8_model_path), checkpoint)
        if paths.ft_model_dir is not None and quant.kv is not KVStorage.NONE:
            folder = _find_directory("--ft_model_dir", paths.ft_model_dir)
            scales = read_ft_kv_scales(folder, checkpoint.config)
            checkpoint.give_kv_scales(scales, KVStorage.INT8)
        checkpoint.check()
    except BaseException:
        checkpoint.close()
        raise
    return checkpoint


def _check_flags(paths: Paths, quant: QuantConfig) -> None:
    """Raise UserError for paths that contradict each other or the quantisation flags."""
    if paths.model_dir is not None and paths.meta_ckpt_dir is not None:
        raise UserError(
            f"--model_dir {paths.model_dir} and --meta_ckpt_dir {paths.meta_ckpt_dir} are both "
            "given; weights come from one of them, leave the other out"
        )
    if paths.checkpoint_dir is not None:
        _check_alone(paths)
    has_model = paths.model_dir is not None or paths.meta_ckpt_dir is not None
    for flag, algorithms, remedy in SCALE_FILES:
        path = getattr(paths, flag)
        if path is not None and quant.algorithm not in algorithms:
            raise UserError(
                f"--{flag} {path} is read with other quantisation flags than given; add {remedy}"
            )
        if path is not None and not has_model:
            raise UserError(
                f"--{flag} {path} needs the full-precision checkpoint it was made from; name it as "
                "--model_dir"
            )
    if paths.ft_model_dir is None or not has_model:
        return
    if quant.algorithm is Algorithm.W8A8_SQ:
        raise UserError(
            f"--use_smooth_quant takes its weights from --ft_model_dir {paths.ft_model_dir}; leave "
            f"--{paths.weights_flag} out"
        )
    if quant.kv is KVStorage.NONE:
        raise UserError(
            f"--ft_model_dir {paths.ft_model_dir} beside --{paths.weights_flag} gives the scales "
            "of a quantised KV cache; add --int8_kv_cache, or leave one of the two out"
        )


def _check_alone(paths: Paths) -> None:
    """A unified checkpoint holds weights, scales and configuration."""
    others = ("model_dir", "meta_ckpt_dir", "ft_model_dir", *(row[0] for row in SCALE_FILES))
    for flag in others:
        if getattr(paths, flag) is not None:
            raise UserError(
                f"--checkpoint_dir {paths.checkpoint_dir} holds everything a build needs and "
                f"--{flag} is given, too; leave one of them out"
            )


def _open_weights(paths: Paths, quant: QuantConfig) -> Checkpoint:
    """The reader of the directory that holds the weights."""
    if paths.model_dir is not None:
        folder = _find_directory("--model_dir", paths.model_dir)
        _refuse_other(folder)
        return open_hf(folder)
    if paths.meta_ckpt_dir is not None:
        folder = _find_directory("--meta_ckpt_dir", paths.meta_ckpt_dir)
        if not (folder / PARAMS_FILE).exists():
            hint = "pass it as --model_dir" if (folder / CONFIG_FILE).exists() else "correct it"
            raise CheckpointError(
                f"--meta_ckpt_dir {paths.meta_ckpt_dir} has no {PARAMS_FILE}, so it is not in "
                f"Meta's format; {hint}"
            )
        return open_meta(folder)
    if paths.checkpoint_dir is not None:
        return open_unified(_find_unified(paths.checkpoint_dir))
    if paths.ft_model_dir is not None:
        return open_ft(_find_directory("--ft_model_dir", paths.ft_model_dir), quant=quant)
    raise UserError("no checkpoint is given; name one as --model_dir")


def _find_unified(path: str) -> Path:
    folder = _find_directory("--checkpoint_dir", path)
    if (folder / CONFIG_FILE).exists():
        keys = read_json(folder / CONFIG_FILE)
        if "architecture" in keys:
            return folder
        if "architectures" in keys or "model_type" in keys:
            raise CheckpointError(
                f"--checkpoint_dir {path} is a Hugging Face checkpoint; pass it as --model_dir"
            )
    raise CheckpointError(
        f"--checkpoint_dir {path} is no checkpoint of TensorRT-LLM's ({CONFIG_FILE} with its "
        "'architecture', and rank0.safetensors); correct the path"
    )


def _find_directory(flag: str, path: str) -> Path:
    folder = Path(path)
    if not folder.exists():
        raise CheckpointError(
            f"{flag} {path} does not exist; give the path of the checkpoint directory"
        )
    if not folder.is_dir():
        raise CheckpointError(
            f"{flag} {path} is a file; give the directory that holds it and its configuration"
        )
    return folder


def _refuse_other(folder: Path) -> None:
    is_unified = (folder / UNIFIED_FILE).exists()
    if (folder / CONFIG_FILE).exists() and not is_unified:
        return
    for pattern, meaning in OTHER_DIRECTORIES:
        if any(folder.glob(pattern)):
            raise CheckpointError(f"--model_dir {folder} is {meaning}")
    raise CheckpointError(
        f"--model_dir {folder} has no {CONFIG_FILE}; give a Hugging Face checkpoint directory "
        "(config.json with safetensors or pytorch_model.bin files)"
    )
