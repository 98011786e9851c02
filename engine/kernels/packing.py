"""Laying weights out for a CPU in threads beside the loading of others."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")

# Weights widened or rearranged at a time: what is made of them stays in the third-level cache.
BLOCK_WEIGHTS = 2**20


def start(make: Callable[..., Result], *arguments: Any) -> Future[Result]:
    """`make` in a thread of its own; the constructors of other layers do not wait for it."""
    return _packers().submit(make, *arguments)


class Packing:
    """A native product (see native/product.py) that is being made; factors come before calls."""

    def __init__(self, make: Callable[..., Any], *arguments: Any):
        self._pending = start(make, *arguments)

    @cached_property
    def product(self) -> Any:
        """The product itself; waits for it."""
        return self._pending.result()

    def multiply_by(self, factor_K: Tensor) -> None:
        self._pending = start(_adjusted, self._pending, "multiply_by", factor_K)

    def divide_by(self, divisor_K: Tensor) -> None:
        self._pending = start(_adjusted, self._pending, "divide_by", divisor_K)

    def __call__(self, x_TK: Tensor) -> Tensor:
        y_TN: Tensor = self.product(x_TK)
        return y_TN

    def fused(self, x_TK: Tensor, **around: Any) -> Tensor | None:
        y_TN: Tensor | None = self.product.fused(x_TK, **around)
        return y_TN


def _adjusted(pending: Future[Any], method: str, factor_K: Tensor) -> Any:
    # Packers take what is older first, so that nothing waits for what has not begun.
    product = pending.result()
    getattr(product, method)(factor_K)
    return product


@cache
def _packers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="pack")
