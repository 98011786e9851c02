"""Help for the tests of quantised checkpoints: sample files, their copies with a change, and
dequantisation written out from the definitions in engine/weights/types.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.checkpoint.base import TensorSource
from engine.weights.types import Dense, Fp8, Int4Groups, Int8, LinearWeights

DATA = Path(__file__).parents[3] / "data" / "quantized"
BLOCK = "model.layers.0."
LINEARS = [f"self_attn.{name}_proj" for name in "qkvo"] + [
    f"mlp.{name}_proj" for name in ("gate", "up", "down")
]


def golden() -> dict[str, Tensor]:
    return load_file(DATA / "golden.safetensors")


def dequantise(linear: LinearWeights) -> Tensor:
    """The matrix fp32 [N, K] that multiplies the input as the network gives it."""
    if isinstance(linear, Dense):
        return linear.weight_NK.read().float()
    if isinstance(linear, Int4Groups):
        weight_NK = torch.empty(linear.codes_NK.shape)
        for column in range(linear.inputs):
            group = column // linear.group_size
            zero_N = 8 if linear.zero_NR is None else linear.zero_NR[:, group].float()
            codes_N = linear.codes_NK[:, column].float()
            weight_NK[:, column] = (codes_N - zero_N) * linear.scale_NR[:, group]
        return weight_NK if linear.pre_scale_K is None else weight_NK * linear.pre_scale_K
    assert isinstance(linear, Int8 | Fp8)
    weight_NK = linear.codes_NK.float() * linear.scale_N[:, None]
    smoother_K = linear.smoother_K if isinstance(linear, Int8) else None
    return weight_NK if smoother_K is None else weight_NK / smoother_K


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


def copy_sample(
    folder: Path,
    name: str,
    *,
    tensors: Callable[[dict[str, Tensor]], Any] | None = None,
    settings: dict[str, Any] | None = None,
    file: str = "config.json",
    section: str = "quantization_config",
) -> Path:
    """A copy of a sample checkpoint; `tensors` changes its dict, `settings` its `section`.

    A setting of None is left out of the copy.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in (DATA / name).glob("*.json"):
        (folder / path.name).write_text(path.read_text())
    values = json.loads((folder / file).read_text())
    for key, value in (settings or {}).items():
        values[section][key] = value
        if value is None:
            del values[section][key]
    (folder / file).write_text(json.dumps(values))
    state = load_file(DATA / name / "model.safetensors")
    if tensors is not None:
        tensors(state)
    save_file(
        {key: value.contiguous() for key, value in state.items()}, folder / "model.safetensors"
    )
    return folder


class Held(TensorSource):
    """A tensor in memory as a source."""

    def __init__(self, name: str, values: Tensor) -> None:
        self.name, self.values, self.origin = name, values, "memory"
        self.shape, self.dtype = tuple(values.shape), values.dtype

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        if not self.shape:
            return self.values.clone()
        start, stop = self.row_span(start, stop)
        return self.values[start:stop].clone()


def word(*nibbles: int) -> int:
    """Eight nibbles, the lowest first, as the int32 that holds them."""
    assert len(nibbles) == 8
    value = sum(nibble << (4 * place) for place, nibble in enumerate(nibbles))
    return value - 2**32 if value >= 2**31 else value
