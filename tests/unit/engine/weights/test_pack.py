"""Packing: joined parts, casts, and values that an engine must not hold."""

from __future__ import annotations

import math

import pytest
import torch

from engine.errors import CheckpointError
from engine.weights.pack import pack_dense, pack_plain
from engine.weights.types import Dense, Lazy
from tests.unit.engine.weights.test_types import MATRIX, Memory


def pack(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    source = Memory(tensor)
    source.name, source.origin = "model.norm.weight", "here/model.safetensors"
    [packed] = pack_plain([Lazy.whole(source)], dtype)
    assert (packed.suffix, packed.dtype, packed.shape) == ("weight", dtype, tuple(tensor.shape))
    return torch.cat(list(packed.blocks()))


def test_parts_are_joined_in_order():
    parts = [Dense(Lazy.whole(Memory(MATRIX + shift))) for shift in (0, 100, 200)]
    [packed] = pack_dense(parts, torch.float32)
    assert packed.shape == (21, 5)
    assert torch.equal(
        torch.cat(list(packed.blocks())), torch.cat([MATRIX, MATRIX + 100, MATRIX + 200])
    )


@pytest.mark.parametrize("position", [0, 5, -1])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nan_and_infinity_are_refused(value, dtype, position):
    tensor = MATRIX.clone()
    tensor.view(-1)[position] = value
    message = "^here/model.safetensors: tensor model.norm.weight holds NaN or infinite values"
    with pytest.raises(CheckpointError, match=message):
        pack(tensor, dtype)


def test_infinities_of_both_signs_are_refused():
    with pytest.raises(CheckpointError, match="holds NaN or infinite values"):
        pack(torch.tensor([math.inf, 1.0, -math.inf]), torch.float32)


# The largest finite values: float16 65504, bfloat16 3.3895e38, float32 3.4028e38.
OVERFLOWS = [
    (torch.bfloat16, 1e5, torch.float16, "values up to 9.98e.04, more than --dtype float16"),
    (torch.float32, -65520.0, torch.float16, "values up to 6.55e.04, more than --dtype float16"),
    (torch.float32, 3.4e38, torch.bfloat16, "values up to 3.4e.38, more than --dtype bfloat16"),
    (torch.float64, 1e39, torch.float32, "values up to 1e.39, more than --dtype float32"),
]


@pytest.mark.parametrize("stored, value, dtype, message", OVERFLOWS)
def test_overflow_of_the_engines_type_is_refused(stored, value, dtype, message):
    tensor = torch.tensor([0.5, value, 1.0], dtype=stored)
    with pytest.raises(CheckpointError, match=f"tensor model.norm.weight has {message}"):
        pack(tensor, dtype)


@pytest.mark.parametrize("value", [65504.0, -65504.0, 65519.0])
def test_largest_float16_is_accepted(value):
    assert pack(torch.tensor([value]), torch.float16).item() == math.copysign(65504.0, value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finite_values_whose_sum_overflows_are_accepted(dtype):
    tensor = torch.full((8,), 3e38)
    assert torch.equal(pack(tensor, dtype), tensor.to(dtype))
