"""What the CPU's quantised products promise beyond their results."""

from __future__ import annotations

import pytest
import torch

from engine.kernels import cpu_int4, cpu_int8, cpu_integer, packing, quantized_cpu
from tests.kernels.helpers import DTYPES, assert_close, random
from tests.kernels.quantized import (
    fp8_layer,
    groups_layer,
    int4_layer,
    int8_layer,
    integers,
)

PRODUCTS = [cpu_integer.fbgemm_product, cpu_integer.onednn_product, cpu_integer.widened_product]


@pytest.mark.parametrize("pack", PRODUCTS)
@pytest.mark.parametrize("outputs, inputs", [(64, 64), (97, 33), (1, 1001), (300, 20480)])
def test_integer_products_are_exact(pack, outputs: int, inputs: int) -> None:
    if not cpu_integer.is_exact(pack):
        pytest.skip("not on this machine")
    codes = integers(-127, 127, outputs, inputs).to(torch.int8)
    for rows in (1, 2, 7, 40):
        x = integers(-128, 127, rows, inputs, seed=rows).float()
        sums = x.double() @ codes.double().T
        # Beyond 2^24 the result is the sum rounded to fp32.
        assert (pack(codes)(x).double() - sums).abs().max() <= sums.abs().max() * 2**-23
        if inputs <= 64:
            assert torch.equal(pack(codes)(x).double(), sums)


def test_widened_product_goes_by_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_integer, "WIDENED_WEIGHTS", 100)
    codes = integers(-127, 127, 11, 33).to(torch.int8)
    x = integers(-128, 127, 3, 33).float()
    assert torch.equal(cpu_integer.widened_product(codes)(x), x @ codes.float().T)


def test_a_product_that_saturates_is_not_used() -> None:
    def saturating(codes_NK):
        """Pairs of byte products added in 16 bits, as CPUs without VNNI do it."""

        def multiply(x_MK):
            pairs = ((x_MK + 128)[:, None] * codes_NK.float()).unflatten(-1, (-1, 2)).sum(-1)
            offsets = 128 * codes_NK.float().sum(1)
            return pairs.clamp(-(2**15), 2**15 - 1).sum(-1) - offsets

        return multiply

    def absent(codes_NK):
        raise RuntimeError("no such engine")

    assert cpu_integer.is_exact(cpu_integer.widened_product)
    assert not cpu_integer.is_exact(saturating)
    assert not cpu_integer.is_exact(absent)


@pytest.mark.parametrize("count, unit", [(2, 1 / 254), (4, 1 / 254**3)])
def test_digits_of_a_token(count: int, unit: float) -> None:
    x = random(9, 65)
    x[0] = 0
    x[1] *= 1e20
    x[2] *= 1e-20
    x[3, 0] = 1000
    digits, step = cpu_int8.split_digits(x, count)
    assert digits.shape == (count, 9, 65) and step.shape == (9, 1)
    assert torch.equal(digits, digits.round()) and digits.abs().max() == 127
    value = sum(digit.double() / 254**place for place, digit in enumerate(digits)) * step.double()
    # Half a unit of the last digit, and the roundings of step and of x / step to fp32.
    limit = step.double() * unit / 2 + x.double().abs() * 2**-22
    assert ((value - x.double()).abs() <= limit).all()


WEIGHTS = pytest.mark.parametrize("bind", [cpu_int8.bind_weights, cpu_int8.TorchInt8Weights])
BIND_ACTIVATIONS = (cpu_int8.bind_activations, cpu_int8.TorchInt8Activations)


@WEIGHTS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_two_digits_are_finer_than_the_dtype(bind, dtype: torch.dtype) -> None:
    """Even where one value outweighs all others, the case in which fixed steps are coarsest."""
    codes, scale = int8_layer(256, 4096).arrays
    x = random(4, 4096, dtype=dtype)
    x[:, 7] = 1000
    product = bind(codes, scale)
    truth = x.double() @ (codes.double() * scale.double()[:, None]).T
    error, unit = (product(x).double() - truth).norm(), truth.norm() * torch.finfo(dtype).eps
    assert error < unit
    assert (product(x.float()).double() - truth).norm() < truth.norm() * 1e-6


@pytest.mark.parametrize("tokens", [0, 1, 13])
@DTYPES
def test_int8_of_pytorch(dtype: torch.dtype, tokens: int) -> None:
    layer, x = int8_layer(33, 70), random(tokens, 70, dtype=dtype)
    y = cpu_int8.TorchInt8Weights(*layer.arrays)(x)
    assert y.dtype == dtype and y.shape == (tokens, 33)
    if tokens:
        assert_close(y, x.double() @ layer.matrix.T)


@pytest.mark.parametrize("input_scale", [None, 0.02])
@DTYPES
def test_int8_activations_of_pytorch_and_of_the_own_kernel(
    dtype: torch.dtype, input_scale: float | None
) -> None:
    given = None if input_scale is None else torch.tensor([input_scale])
    x = random(13, 70, dtype=dtype)
    first, second = (bind(*int8_layer(33, 70).arrays, given)(x) for bind in BIND_ACTIVATIONS)
    assert_close(first, second.double())


def test_nan_tokens_stay_nan() -> None:
    arrays = int8_layer(8, 32).arrays
    x = random(3, 32)
    x[1, 5] = torch.nan
    products = (cpu_int8.bind_weights(*arrays), cpu_int8.TorchInt8Weights(*arrays))
    for product in (*products, *(bind(*arrays, None) for bind in BIND_ACTIVATIONS)):
        y = product(x)
        assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


def test_fp8_codes_are_widened_exactly() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    wide = quantized_cpu.widen_fp8(codes)
    is_number = ~codes.float().isnan()
    assert is_number.sum() == 254
    assert torch.equal(wide.double()[is_number] * 256, codes.double()[is_number])


def test_fp8_without_memory_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays, x = (*fp8_layer(70, 200).arrays, None), random(4, 200, dtype=torch.bfloat16)
    expected = quantized_cpu.linear_fp8(x, *arrays)
    monkeypatch.setattr(quantized_cpu, "_memory_bytes", lambda: (10**9, 4 * 10**9))
    monkeypatch.setattr(packing, "BLOCK_WEIGHTS", 16 * 200)
    assert torch.equal(quantized_cpu.linear_fp8(x, *arrays), expected)


@pytest.mark.parametrize("block_weights", [1, 2**20])
def test_int4_paths_of_pytorch_agree(block_weights: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs beyond one packed block, and both sides of the number of tokens."""
    monkeypatch.setattr(packing, "BLOCK_WEIGHTS", block_weights)
    layer = groups_layer(208, 256, 128, torch.float16, has_zero=True)
    product = cpu_int4.TorchInt4Groups(*layer.arrays)
    for tokens in (cpu_int4.INT4_TOKENS - 1, cpu_int4.INT4_TOKENS):
        x = random(tokens, 256, dtype=torch.bfloat16)
        assert_close(product(x), x.double() @ layer.matrix.T)


@DTYPES
def test_int4_rows_of_pytorch(dtype: torch.dtype) -> None:
    layer = int4_layer(48, 192)
    x = random(3, 192, dtype=dtype)
    y = cpu_int4.TorchInt4Rows(*layer.arrays)(x)
    # But for fp32 the products are bf16's.
    assert_close(y if dtype == torch.float32 else y.bfloat16(), x.double() @ layer.matrix.T)


def test_memory_is_read_from_the_machine() -> None:
    available, total = quantized_cpu._memory_bytes()
    assert 0 < available <= total
