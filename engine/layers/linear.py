"""Which class runs a linear layer of each quantisation mode, and how a block calls it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

from torch import Tensor

from engine.kernels import api as ops
from engine.layers.dense import Dense
from engine.layers.fp8 import Fp8
from engine.layers.groupwise import GroupwiseInt4
from engine.layers.smooth import SmoothInt8
from engine.layers.weight_only import WeightOnlyInt4, WeightOnlyInt8
from engine.quant import Algorithm


class Linear(Protocol):
    """x [T, K] → y [T, N], both in the engine's dtype; N and K are local to the rank. `product` is
    the operation with its weights."""

    @property
    def product(self) -> Callable[[Tensor], Tensor]: ...

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


class Norm(NamedTuple):
    """RMSNorm: weight [E] and epsilon."""

    weight_E: Tensor
    eps: float

    def __call__(self, x_TE: Tensor) -> Tensor:
        return ops.rms_norm(x_TE, self.weight_E, self.eps)


class Use(NamedTuple):
    """A linear layer's operation, and what the model has around it: see `Projection`."""

    product: Callable[[Tensor], Tensor]
    norm: Norm | None = None
    is_gated: bool = False
    has_residual: bool = False


class Projection:
    """A linear layer with what a block does around it.

    y = linear(norm(x)), halved by SwiGLU where `is_gated`, added to the residual where one is
    given, whose memory y may take over. A layer that does it all in one pass is asked first and
    may decline; its result differs from the steps' by roundings of the engine's dtype.
    """

    def __init__(self, linear: Linear):
        self._linear = linear
        self._fused = getattr(linear, "fused", None)

    @property
    def product(self) -> Callable[[Tensor], Tensor]:
        return self._linear.product

    def __call__(
        self,
        x_TK: Tensor,
        *,
        norm: Norm | None = None,
        is_gated: bool = False,
        residual_TN: Tensor | None = None,
    ) -> Tensor:
        if self._fused is not None:
            y = self._fused(x_TK, norm=norm, is_gated=is_gated, residual_TN=residual_TN)
            if y is not None:
                return y
        y = self._linear(x_TK if norm is None else norm(x_TK))
        y = ops.silu_mul(y) if is_gated else y
        return y if residual_TN is None else residual_TN + y


class Arrays:
    """The tensors of an engine file below one name prefix."""

    def __init__(self, tensors: Mapping[str, Tensor], algorithm: Algorithm, prefix: str = ""):
        self._tensors, self._algorithm, self._prefix = tensors, algorithm, prefix

    def at(self, name: str) -> Arrays:
        return Arrays(self._tensors, self._algorithm, f"{self._prefix}{name}.")

    def tensor(self, name: str) -> Tensor:
        return self._tensors[self._prefix + name]

    def linear(self, name: str, algorithm: Algorithm | None = None) -> Projection:
        """The linear layer stored under `name`, in the engine's quantisation mode or in another."""
        prefix = f"{self._prefix}{name}."
        arrays = {
            key.removeprefix(prefix): tensor
            for key, tensor in self._tensors.items()
            if key.startswith(prefix)
        }
        return Projection(LINEARS[algorithm or self._algorithm](arrays))

    def __contains__(self, name: str) -> bool:
        return self._prefix + name in self._tensors
