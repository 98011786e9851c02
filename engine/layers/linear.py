"""Which class runs a linear layer of each quantisation mode."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor

from engine.layers.dense import Dense
from engine.layers.fp8 import Fp8
from engine.layers.groupwise import GroupwiseInt4
from engine.layers.smooth import SmoothInt8
from engine.layers.weight_only import WeightOnlyInt4, WeightOnlyInt8
from engine.quant import Algorithm


class Linear(Protocol):
    """x [T, K] → y [T, N], both in the engine's dtype; N and K are local to the rank."""

    def __call__(self, x_TK: Tensor) -> Tensor: ...


LINEARS: dict[Algorithm, Callable[[Mapping[str, Tensor]], Linear]] = {
    Algorithm.NONE: Dense,
    Algorithm.W8A16: WeightOnlyInt8,
    Algorithm.W4A16: WeightOnlyInt4,
    Algorithm.W4A16_AWQ: GroupwiseInt4,
    Algorithm.W4A16_GPTQ: GroupwiseInt4,
    Algorithm.W8A8_SQ: SmoothInt8,
    Algorithm.FP8: Fp8,
}


class Arrays:
    """The tensors of an engine file below one name prefix."""

    def __init__(self, tensors: Mapping[str, Tensor], algorithm: Algorithm, prefix: str = ""):
        self._tensors, self._algorithm, self._prefix = tensors, algorithm, prefix

    def at(self, name: str) -> Arrays:
        return Arrays(self._tensors, self._algorithm, f"{self._prefix}{name}.")

    def tensor(self, name: str) -> Tensor:
        return self._tensors[self._prefix + name]

    def linear(self, name: str) -> Linear:
        """The linear layer stored under `name` in the engine's quantisation mode."""
        prefix = f"{self._prefix}{name}."
        arrays = {
            key.removeprefix(prefix): tensor
            for key, tensor in self._tensors.items()
            if key.startswith(prefix)
        }
        return LINEARS[self._algorithm](arrays)

    def __contains__(self, name: str) -> bool:
        return self._prefix + name in self._tensors
