"""From quantize.py's flags to a QuantisePlan. What the flags alone show is refused here."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.quant import DEFAULT_GROUP_SIZE
from utils.hub import resolve_model_dir


@dataclass(frozen=True)
class Format:
    """What a --qformat is: the file it writes (its suffix and its name in a directory; none for a
    whole checkpoint directory), and what it takes.

    calib_size   texts to calibrate with unless the user says another number; 0: none are needed
    memory       bytes held per byte of the weights in the dtype computed in; 0: one layer at a time
    bits         of a weight on disk; 0: it writes no weights
    """

    calib_size: int
    memory: float
    bits: int
    suffix: str = ""
    file_name: str = ""
    is_grouped: bool = False

    @property
    def needs_modelopt(self) -> bool:
        return self.memory > 0


# ModelOpt holds the model, and an export its quantised copy as well.
FORMATS = {
    "fp8": Format(512, 1.1, 0, ".npz", "llama_tp1_rank0.npz"),
    "int4_awq": Format(32, 1.2, 16, ".pt", "llama_int4_awq.pt", is_grouped=True),
    "int8_sq": Format(512, 1.5, 8),
    "int8_wo": Format(0, 1.5, 8),
    "int4_wo": Format(0, 1.4, 5, is_grouped=True),
    "int4_gptq": Format(
        128, 0.0, 5, ".safetensors", "llama_int4_gptq.safetensors", is_grouped=True
    ),
}
FILE_SUFFIXES = (".npz", ".pt", ".pth", ".bin", ".safetensors")
# What fp16 costs on a CPU: kernels that are slow, and a range that activations leave.
CPU_DTYPES = {"float16": "bfloat16"}


@dataclass(frozen=True)
class Calibration:
    """Which texts to run the model on, and how."""

    dataset: str | None
    cache_dir: str | None
    size: int
    batch_size: int
    max_length: int
    seed: int | None


@dataclass(frozen=True)
class QuantisePlan:
    """What one call of quantize.py is to do.

    `dtype` is what is computed in and `build_dtype` what the user asked for; `output` is a file,
    or a directory where the format's `file_name` is empty; `notes` are for the user's eyes.
    """

    model_name: str
    model_dir: Path
    qformat: str
    dtype: str
    build_dtype: str
    device: str
    group_size: int
    calibration: Calibration
    output: Path
    notes: tuple[str, ...] = ()

    @property
    def format(self) -> Format:
        return FORMATS[self.qformat]


def plan_quantise(flags: Mapping[str, Any]) -> QuantisePlan:
    """The work that `flags` ask for; UserError for flags that contradict each other, a package
    that is missing, and a place that cannot be written to."""
    if flags["quantize_lm_head"]:
        raise UserError(
            "--quantize_lm_head belongs to build.py, which rounds the head of any checkpoint; "
            "leave it out here and add it to the build"
        )
    qformat = flags["qformat"]
    kind = FORMATS[qformat]
    group_size = _group_size(qformat, flags["group_size"])
    if kind.needs_modelopt:
        _require_modelopt(qformat)
    output = _output(Path(flags["export_path"]).expanduser(), qformat)
    device = _device(flags["device"])
    dtype = CPU_DTYPES.get(flags["dtype"], flags["dtype"]) if device == "cpu" else flags["dtype"]
    notes = ()
    if dtype != flags["dtype"]:
        notes = (f"--dtype {flags['dtype']} is slow on a CPU; the calibration computes in {dtype}",)
    if kind.calib_size == 0 and flags["calib_size"] is not None:
        notes += (f"--qformat {qformat} needs no calibration; --calib_size is ignored",)
    return QuantisePlan(
        model_name=flags["model_dir"],
        model_dir=resolve_model_dir(flags["model_dir"], "--model_dir"),
        qformat=qformat,
        dtype=dtype,
        build_dtype=flags["dtype"],
        device=device,
        group_size=group_size,
        calibration=Calibration(
            dataset=flags["calib_dataset"],
            cache_dir=flags["cache_dir"],
            size=flags["calib_size"] or kind.calib_size,
            batch_size=flags["batch_size"],
            max_length=flags["calib_max_length"],
            seed=flags["seed"],
        ),
        output=output,
        notes=notes,
    )


def _group_size(qformat: str, given: int | None) -> int:
    """Inputs of a group; 0 for a format without groups."""
    if not FORMATS[qformat].is_grouped:
        if given is not None:
            grouped = ", ".join(name for name, kind in FORMATS.items() if kind.is_grouped)
            raise UserError(
                f"--group_size {given} belongs to {grouped}, not to --qformat {qformat}; leave it "
                "out"
            )
        return 0
    return given or DEFAULT_GROUP_SIZE


def _require_modelopt(qformat: str) -> None:
    if importlib.util.find_spec("modelopt") is None:
        raise UserError(
            f"--qformat {qformat} needs NVIDIA ModelOpt, which is not installed; install it with "
            "'pip install nvidia-modelopt' (int4_gptq does without)"
        )


def _device(name: str) -> str:
    import torch

    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise UserError("--device cuda: no GPU that torch can use was found; use --device cpu")
    return name if name != "auto" else "cuda" if has_gpu else "cpu"


def _output(path: Path, qformat: str) -> Path:
    """The file or directory to write; UserError if it cannot be that."""
    kind = FORMATS[qformat]
    if path.suffix in FILE_SUFFIXES and path.suffix != kind.suffix and not path.is_dir():
        wanted = f"a {kind.suffix} file or a directory" if kind.suffix else "a directory"
        raise UserError(
            f"--export_path {path} is not what --qformat {qformat} writes; name {wanted}"
        )
    if kind.suffix:
        is_file = path.suffix == kind.suffix and not path.is_dir()
        return path if is_file else path / kind.file_name
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(
            f"--export_path {path} exists and is not an empty directory; --qformat {qformat} "
            "writes a checkpoint of its own, name a new directory"
        )
    return path
