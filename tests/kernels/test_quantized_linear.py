"""Quantised products of every implementation against arithmetic in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.kernels import api, registry
from engine.kernels.registry import Implementation
from tests.kernels.helpers import DTYPES, assert_close, cases, random
from tests.kernels.quantized import (
    Layer,
    fp8_layer,
    groups_layer,
    int4_layer,
    int8_layer,
    to_device,
)

# None, one, an odd number, more than one pass or path of the CPU's.
TOKENS = pytest.mark.parametrize("tokens", [0, 1, 5, 67])


# These compute fp16 tokens in bf16, the dtype whose products CPUs are fast with.
IN_BF16 = ("linear_int4-cpu", "linear_int4_groups-cpu", "linear_fp8-cpu")


def check(impl: Implementation, device: str, layer: Layer, x: Tensor, truth: Tensor) -> None:
    y = impl(x.to(device), *to_device(layer.arrays, device))
    assert y.dtype == x.dtype and y.shape == truth.shape
    if x.dtype == torch.float16 and str(impl) in IN_BF16:
        y = y.bfloat16()
    if len(x):
        assert_close(y, truth)


@cases("linear_int8")
@DTYPES
@TOKENS
@pytest.mark.parametrize("outputs, inputs", [(64, 64), (97, 33), (1, 5001), (1001, 1)])
def test_int8(
    impl: Implementation, device: str, dtype: torch.dtype, tokens: int, outputs: int, inputs: int
) -> None:
    layer, x = int8_layer(outputs, inputs), random(tokens, inputs, dtype=dtype)
    check(impl, device, layer, x, x.double() @ layer.matrix.T)


@cases("linear_int4")
@DTYPES
@TOKENS
@pytest.mark.parametrize("outputs, inputs", [(64, 64), (97, 192), (16, 2752), (1, 128)])
def test_int4(
    impl: Implementation, device: str, dtype: torch.dtype, tokens: int, outputs: int, inputs: int
) -> None:
    layer, x = int4_layer(outputs, inputs), random(tokens, inputs, dtype=dtype)
    check(impl, device, layer, x, x.double() @ layer.matrix.T)


@cases("linear_int4_groups")
@DTYPES
@TOKENS
@pytest.mark.parametrize("has_zero", [True, False])
@pytest.mark.parametrize(
    "outputs, inputs, group", [(64, 128, 128), (97, 384, 64), (80, 96, 32), (16, 288, 96)]
)
def test_int4_groups(
    impl: Implementation,
    device: str,
    dtype: torch.dtype,
    tokens: int,
    has_zero: bool,
    outputs: int,
    inputs: int,
    group: int,
) -> None:
    scale_dtype = torch.float32 if dtype == torch.float32 else torch.float16
    layer = groups_layer(outputs, inputs, group, scale_dtype, has_zero=has_zero)
    x = random(tokens, inputs, dtype=dtype)
    check(impl, device, layer, x, x.double() @ layer.matrix.T)


def rounded_int8(x: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """Codes and scale in the fp32 arithmetic of the contract, a token at a time."""
    codes, steps = [], []
    for token in x.float():
        step = token.abs().max().clamp(min=1e-6) / 127 if scale is None else torch.tensor(scale)
        codes.append((token / step).round().clamp(-127, 127))
        steps.append(step)
    return torch.stack(codes).double(), torch.stack(steps).double()[:, None]


@cases("linear_w8a8")
@DTYPES
@pytest.mark.parametrize("tokens", [1, 5, 67])
@pytest.mark.parametrize("input_scale", [None, 0.015])
@pytest.mark.parametrize("outputs, inputs", [(64, 64), (97, 33), (1, 5001), (1001, 1)])
def test_w8a8(
    impl: Implementation,
    device: str,
    dtype: torch.dtype,
    tokens: int,
    input_scale: float | None,
    outputs: int,
    inputs: int,
) -> None:
    codes, scale = int8_layer(outputs, inputs).arrays
    x = random(tokens, inputs, dtype=dtype)
    x[-1] = 0
    given = None if input_scale is None else torch.tensor([input_scale])
    x_codes, x_scale = rounded_int8(x, input_scale)
    exact = x_codes @ codes.double().T
    y = impl(x.to(device), *to_device((codes, scale, given), device))
    # Whole sums, then two factors: a few roundings of fp32 and one to the dtype.
    truth = exact * x_scale * scale.double()
    unit = torch.finfo(dtype).eps / 2 + 4 * torch.finfo(torch.float32).eps
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert y.dtype == dtype
    assert ((y.cpu().double() - truth).abs() <= unit * truth.abs() + smallest).all()


@cases("linear_fp8")
@DTYPES
@pytest.mark.parametrize("tokens", [1, 5, 67])
@pytest.mark.parametrize("input_scale", [None, 0.004])
@pytest.mark.parametrize("outputs, inputs", [(64, 64), (97, 33), (3, 5001), (1001, 5)])
def test_fp8(
    impl: Implementation,
    device: str,
    dtype: torch.dtype,
    tokens: int,
    input_scale: float | None,
    outputs: int,
    inputs: int,
) -> None:
    layer = fp8_layer(outputs, inputs)
    x = random(tokens, inputs, dtype=dtype)
    given = None if input_scale is None else torch.tensor([input_scale])
    x_rounded = torch.empty(x.shape, dtype=torch.float64)
    for token, target in zip(x.float(), x_rounded, strict=True):
        step = token.abs().max() / 448 if input_scale is None else torch.tensor(input_scale)
        codes = (token / step).clamp(-448, 448).to(torch.float8_e4m3fn)
        target.copy_(codes.double() * step.double())
    layer = Layer((*layer.arrays, given), layer.matrix)
    check(impl, device, layer, x, x_rounded @ layer.matrix.T)


OPERATIONS = {
    "linear_int8": int8_layer(48, 128).arrays,
    "linear_int4": int4_layer(48, 128).arrays,
    "linear_int4_groups": groups_layer(48, 128, 64, torch.float16, has_zero=True).arrays,
    "linear_w8a8": (*int8_layer(48, 128).arrays, None),
    "linear_fp8": (*fp8_layer(48, 128).arrays, None),
}


@pytest.mark.parametrize("device", registry.present_devices())
@pytest.mark.parametrize("op", OPERATIONS)
def test_bound_weights_give_what_the_operation_gives(op: str, device: str) -> None:
    arrays = to_device(OPERATIONS[op], device)
    x = random(3, 128, dtype=torch.bfloat16, device=device)
    for name in {impl.name for impl in registry.implementations(op, [device])}:
        with registry.override(name, op):
            expected = getattr(api, op)(x, *arrays)
            assert torch.equal(registry.bind(op, *arrays)(x), expected)


@pytest.mark.parametrize("op", ["linear_int8", "linear_w8a8"])
@DTYPES
def test_cpu_results_do_not_depend_on_the_batch(op: str, dtype: torch.dtype) -> None:
    product = registry.bind(op, *OPERATIONS[op])
    x = random(70, 128, dtype=dtype)
    together = product(x)
    for tokens in (1, 2, 9, 33):
        parts = torch.cat([product(part) for part in x.split(tokens)])
        assert torch.equal(parts, together)


@pytest.mark.parametrize("op", ["linear_int4", "linear_int4_groups"])
def test_cpu_int4_results_do_not_depend_on_the_batch_of_few(op: str) -> None:
    product = registry.bind(op, *OPERATIONS[op])
    x = random(47, 128, dtype=torch.bfloat16)
    together = product(x)
    for tokens in (1, 2, 9, 33):
        parts = torch.cat([product(part) for part in x.split(tokens)])
        assert torch.equal(parts, together)
