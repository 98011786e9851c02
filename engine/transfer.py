"""Numbers of the host on their way to a device, without the host waiting. Knows no meaning."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

import torch
from torch import Tensor


def longs(values: Iterable[int]) -> Tensor:
    """int64 on the CPU; `torch.tensor` takes several times as long for many of them."""
    buffer = array("q", values)
    return torch.frombuffer(buffer, dtype=torch.int64) if buffer else torch.empty(0).long()


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """`x`, from the CPU, on `device`.

    From pinned memory: a copy from other memory would wait for all that the GPU has to do first.
    """
    if torch.device(device).type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)
