"""What the linear layers of all modes have in common: one operation whose weights are fixed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


class BoundLinear:
    """y [T, N] = product(x [T, K]).

    `fused` is the product with a block's norm, gate or residual in the same pass, where the
    chosen implementation has one: see `Projection` in linear.py.
    """

    def __init__(self, product: Callable[[Tensor], Tensor]):
        self._product = product

    @property
    def product(self) -> Callable[[Tensor], Tensor]:
        return self._product

    def __call__(self, x_TK: Tensor) -> Tensor:
        return self._product(x_TK)

    @property
    def fused(self) -> Callable[..., Tensor | None] | None:
        found: Any = getattr(self._product, "fused", None)
        return found
