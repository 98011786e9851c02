"""Laying weights out for a CPU in threads beside the loading of others."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")

# Weights widened or rearranged at a time: what is made of them stays in the third-level cache.
BLOCK_WEIGHTS = 2**20


def start(make: Callable[..., Result], *arguments: Any) -> Future[Result]:
    """`make` in a thread of its own; the constructors of other layers do not wait for it."""
    return _packers().submit(make, *arguments)


@cache
def _packers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="pack")
