"""The one door to checkpoints: chooses the reader and turns wrong paths into a sentence."""

from __future__ import annotations

from pathlib import Path

from engine.checkpoint.base import Checkpoint
from engine.checkpoint.hf import CONFIG_FILE, open_hf
from engine.checkpoint.meta import PARAMS_FILE, open_meta
from engine.errors import CheckpointError, UserError

# What else users pass as a checkpoint: pattern of a file in it -> what it is and where it goes.
OTHER_DIRECTORIES = (
    (PARAMS_FILE, "a checkpoint in Meta's format; pass it as --meta_ckpt_dir"),
    ("config.ini", "a directory written by hf_yi_convert.py; pass it as --ft_model_dir"),
    ("[0-9]*-gpu/config.ini", "the output of hf_yi_convert.py; pass N-gpu in it as --ft_model_dir"),
    ("*.gguf", "a GGUF file's directory; use the safetensors checkpoint of the same model"),
)


def open_checkpoint(model_dir: str | None = None, meta_ckpt_dir: str | None = None) -> Checkpoint:
    """Open the checkpoint that one of the two flags names and check that it is whole.

    Reads configuration and tensor headers only. Raises UserError for the flags and
    CheckpointError for everything in the directory; the caller closes the result.
    """
    if (model_dir is None) == (meta_ckpt_dir is None):
        given = "both are" if model_dir is not None else "neither is"
        raise UserError(
            f"exactly one of --model_dir and --meta_ckpt_dir must be given but {given}; "
            "name one checkpoint directory"
        )
    if model_dir is not None:
        folder = _find_directory("--model_dir", model_dir)
        _refuse_other(folder)
        checkpoint = open_hf(folder)
    else:
        assert meta_ckpt_dir is not None
        folder = _find_directory("--meta_ckpt_dir", meta_ckpt_dir)
        if not (folder / PARAMS_FILE).exists():
            hint = "pass it as --model_dir" if (folder / CONFIG_FILE).exists() else "correct it"
            raise CheckpointError(
                f"--meta_ckpt_dir {meta_ckpt_dir} has no {PARAMS_FILE}, so it is not in Meta's "
                f"format; {hint}"
            )
        checkpoint = open_meta(folder)
    return _checked(checkpoint)


def _checked(checkpoint: Checkpoint) -> Checkpoint:
    try:
        checkpoint.check()
    except CheckpointError:
        checkpoint.close()
        raise
    return checkpoint


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
    if (folder / CONFIG_FILE).exists():
        return
    for pattern, meaning in OTHER_DIRECTORIES:
        if any(folder.glob(pattern)):
            raise CheckpointError(f"--model_dir {folder} is {meaning}")
    raise CheckpointError(
        f"--model_dir {folder} has no {CONFIG_FILE}; give a Hugging Face checkpoint directory "
        "(config.json with safetensors or pytorch_model.bin files)"
    )
