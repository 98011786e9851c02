"""Tokens as int8 digits, and products of them with int8 codes and nibbles."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels import triton_mode
from tests.kernels.assembly import pack_bytes, run_assembly
from tests.kernels.helpers import assert_close, random
from tests.kernels.quantized import Layer, groups_layer, int4_layer, int8_layer, to_device
from tests.kernels.triton_mode import DEVICE

triton_mode.prepare_interpreter()

from engine.kernels.triton import _digits, _matmul_digits  # noqa: E402
from engine.kernels.triton._around import PLAIN, Around  # noqa: E402
from engine.kernels.triton._tactics import TILES, Config  # noqa: E402
from engine.kernels.triton._weights import Weights  # noqa: E402

HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
TILE = Config(TILES, rows=32, inputs=64, warps=4, stages=2, tokens=16)


def joined(digits: _digits.Digits) -> Tensor:
    upper, lower = digits.digits_2TK.double()
    return (128 * upper + lower) * digits.step_T.double()[:, None]


@HALVES
def test_digits_leave_half_a_step(dtype: torch.dtype) -> None:
    x = random(5, 200, dtype=dtype, seed=2)
    x[1, 7] = 300.0
    x[2] = 0.0
    x[3] = x[3].abs().max() * torch.tensor([1.0, -1.0]).repeat(100)
    digits = _digits.write_digits(x.to(DEVICE), PLAIN)
    error = (joined(digits).cpu() - x.double()).abs()
    largest = x.double().abs().amax(1)
    assert torch.allclose(digits.step_T.cpu().double() * 16319, largest, rtol=1e-6, atol=1e-29)
    # fp32 divisions leave a little more than half.
    assert (error <= 0.501 / 16319 * largest[:, None]).all()


def test_digits_for_nibbles_have_the_low_ones_first() -> None:
    x = torch.arange(1.0, 129.0).repeat(2, 1).half()
    plain = joined(_digits.write_digits(x.to(DEVICE), PLAIN)).cpu()
    halves = joined(_digits.write_digits(x.to(DEVICE), PLAIN, half=32)).cpu()
    low = torch.cat([torch.arange(32), torch.arange(64, 96)])
    assert torch.equal(halves, plain[:, torch.cat([low, low + 32])])


def test_factors_and_norms_come_before_the_digits() -> None:
    x, factor = random(3, 96, dtype=torch.bfloat16), random(96, seed=3).abs() + 0.5
    scaled = joined(_digits.write_digits(x.to(DEVICE), Around(factor_K=factor.to(DEVICE)))).cpu()
    assert_close(scaled.half(), x.double() * factor.double())
    normed = joined(_digits.write_digits(x.to(DEVICE), Around((factor.to(DEVICE), 1e-5)))).cpu()
    truth = x.double() * (x.double() ** 2).mean(1, keepdim=True).add(1e-5).rsqrt()
    assert_close(normed.to(torch.bfloat16), truth * factor.double())


LAYERS = {
    "int8": lambda: int8_layer(40, 256),
    "int4": lambda: int4_layer(40, 256),
    "groups": lambda: groups_layer(40, 256, 128, torch.float16, has_zero=False),
    "groups, zeros": lambda: groups_layer(40, 256, 64, torch.float16, has_zero=True),
}


def weights_of(layer: Layer) -> Weights:
    codes, *rest = to_device(layer.arrays, DEVICE)
    if codes.dtype == torch.int8:
        return Weights(codes, *rest)
    scale, zero = rest[0], rest[1] if len(rest) > 1 else None
    return Weights(codes, scale, zero, _matmul_digits.BLOCK)


@HALVES
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("splits", [1, 2])
def test_products_of_tokens_with_outliers(name: str, dtype: torch.dtype, splits: int) -> None:
    layer, x = LAYERS[name](), random(19, 256, dtype=dtype, seed=4)
    x[4, 100] = 60.0
    weights = weights_of(layer)
    assert _matmul_digits.suits_digits(weights)
    y = _matmul_digits.multiply_digits(x.to(DEVICE), weights, TILE._replace(splits=splits))
    assert y.dtype == dtype
    assert_close(y, x.double() @ layer.matrix.T)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_token_that_is_not_finite_spoils_no_other(name: str, value: float) -> None:
    layer, x = LAYERS[name](), random(3, 256, dtype=torch.bfloat16)
    x[1, 5] = value
    y = _matmul_digits.multiply_digits(x.to(DEVICE), weights_of(layer), TILE)
    assert not y[1].isfinite().any()
    assert_close(y[::2], (x.double() @ layer.matrix.T)[::2])


@pytest.mark.parametrize("group", [32, 96])
def test_groups_that_are_no_whole_blocks_do_not_suit(group: int) -> None:
    layer = groups_layer(8, 192, group, torch.float16, has_zero=False)
    codes, scale = layer.arrays[:2]
    block = 32 if group % 64 else 64
    assert not _matmul_digits.suits_digits(Weights(codes, scale, None, block))


def test_assembly_spreads_nibbles() -> None:
    """For all codes and zeros, worked out by the instructions' meaning."""
    for first in range(0, 256, 4):
        codes = [first, first + 1, first + 2, first + 3]
        for zeros in ([0, 16, 8, 15], [8, 8, 8, 8], [1, 2, 3, 4]):
            text = _matmul_digits.SPREAD.value
            low, high = run_assembly(text, 2, pack_bytes(codes), pack_bytes(zeros))
            pairs = list(zip(codes, zeros, strict=True))
            assert low == pack_bytes([(code & 15) - zero for code, zero in pairs])
            assert high == pack_bytes([(code >> 4) - zero for code, zero in pairs])


def test_kernels_compile() -> None:
    """Others: `python -m tests.kernels.triton_compile tests.kernels.linear_digits_cases`."""
    output = triton_mode.run_compiled(
        "tests.kernels.triton_compile", "tests.kernels.linear_digits_cases", "90", "--first=5"
    )
    assert output.count(" 0 bytes spilled") == len(output.splitlines()) == 5
