"""Random quantised layers with their true products, in fp64 and written out by hand."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.kernels.helpers import random


class Layer(NamedTuple):
    """The arrays of one operation, and the fp64 [N, K] matrix that they mean."""

    arrays: tuple[Any, ...]
    matrix: Tensor


def integers(low: int, high: int, *shape: int, seed: int = 0) -> Tensor:
    """Uniform in low … high, both included."""
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed))


def scales(*shape: int, seed: int = 1) -> Tensor:
    return random(*shape, seed=seed).abs() * 0.01 + 0.001


def interleave(codes_NK: Tensor, block: int) -> Tensor:
    """Nibble by nibble: of each block, byte j holds input j and input block/2 + j."""
    outputs, inputs = codes_NK.shape
    packed = torch.zeros(outputs, inputs // 2, dtype=torch.uint8)
    for first in range(0, inputs, block):
        for j in range(block // 2):
            low, high = codes_NK[:, first + j], codes_NK[:, first + block // 2 + j]
            packed[:, first // 2 + j] = low + 16 * high
    return packed


def int8_layer(outputs: int, inputs: int) -> Layer:
    codes = integers(-127, 127, outputs, inputs)
    scale_N = scales(outputs)
    return Layer((codes.to(torch.int8), scale_N), codes.double() * scale_N.double()[:, None])


def int4_layer(outputs: int, inputs: int) -> Layer:
    codes = integers(0, 15, outputs, inputs)
    scale_N = scales(outputs)
    matrix = (codes.double() - 8) * scale_N.double()[:, None]
    return Layer((interleave(codes, 64), scale_N), matrix)


def groups_layer(
    outputs: int, inputs: int, group: int, dtype: torch.dtype, *, has_zero: bool
) -> Layer:
    codes, groups = integers(0, 15, outputs, inputs), inputs // group
    scale_NR = scales(outputs, groups).to(dtype)
    zero_NR = integers(0, 16, outputs, groups, seed=2) if has_zero else torch.tensor(8)
    zeros = zero_NR.expand(outputs, groups).repeat_interleave(group, dim=1)
    matrix = (codes.double() - zeros) * scale_NR.double().repeat_interleave(group, dim=1)
    block = 64 if group % 64 == 0 else 32
    zero = zero_NR.to(torch.uint8) if has_zero else None
    return Layer((interleave(codes, block), scale_NR, zero, block), matrix)


def fp8_layer(outputs: int, inputs: int) -> Layer:
    codes = (random(outputs, inputs) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
    # The largest value, the smallest normal and the smallest subnormal one, and both zeros.
    codes[0, :5] = torch.tensor([448, 2**-6, 2**-9, 0.0, -0.0]).to(torch.float8_e4m3fn)
    scale_N = scales(outputs)
    return Layer((codes, scale_N), codes.double() * scale_N.double()[:, None])


def to_device(arrays: tuple[Any, ...], device: str) -> tuple[Any, ...]:
    return tuple(a.to(device) if isinstance(a, Tensor) else a for a in arrays)
