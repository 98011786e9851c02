"""Reads quantisation scales safely."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from engine.checkpoint.base import TensorSource
from engine.errors import CheckpointError

SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def read_scale(source: TensorSource) -> Tensor:
    """A scale tensor as fp32; CheckpointError unless all values are finite and above zero."""
    scale = source.read().float()
    is_sound = torch.isfinite(scale) & (scale > 0)
    if not is_sound.all():
        bad = scale[~is_sound].flatten()[0].item()
        raise CheckpointError(
            f"{source.origin}: scale tensor {source.name!r} holds {bad:g} where only finite "
            "values above zero make sense; the file is damaged or the quantisation failed, get a "
            "sound copy"
        )
    return scale


def read_largest(sources: Iterable[TensorSource]) -> float:
    """The largest value of some one-element scales."""
    return max(read_scale(source).item() for source in sources)
