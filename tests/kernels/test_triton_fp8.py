"""Prompts through layers of codes: cuBLAS' float8 products, the kernels that scale, gate and add
after them, and int8 ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels import triton_mode
from tests.kernels.helpers import assert_close, random
from tests.kernels.quantized import Layer, fp8_layer, int8_layer
from tests.kernels.triton_mode import DEVICE

triton_mode.prepare_interpreter()

from engine.comm import Solo  # noqa: E402
from engine.kernels.triton._quantize import Codes, quantize_gated  # noqa: E402
from engine.kernels.triton._scale import scale_sums  # noqa: E402
from engine.kernels.triton._tactics import FEW_TOKENS, TILES, Config  # noqa: E402
from engine.kernels.triton.linear_fp8 import LinearFp8  # noqa: E402
from engine.kernels.triton.linear_w8a8 import LinearW8A8  # noqa: E402
from engine.layers import smooth  # noqa: E402
from engine.layers.bound import BoundLinear  # noqa: E402
from engine.layers.linear import Norm, Projection  # noqa: E402
from engine.layers.mlp import MLP  # noqa: E402

TOKENS = FEW_TOKENS + 3
EPS = 1e-5
HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
SCALES = pytest.mark.parametrize("input_scale", [None, 0.01])


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory holds NaN, or codes of it."""
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        tensor = empty(*args, **kwargs)
        if tensor.dtype == torch.float8_e4m3fn:
            tensor.view(torch.uint8).fill_(0x7F)
            return tensor
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)


def make(layer: Layer, input_scale: float | None) -> LinearFp8:
    given = None if input_scale is None else torch.tensor([input_scale], device=DEVICE)
    return LinearFp8(*(array.to(DEVICE) for array in layer.arrays), given)


def rounded(x: Tensor, input_scale: float | None) -> Tensor:
    """Tokens as the contract of `linear_fp8` rounds them, in fp64."""
    step = x.float().abs().amax(1, keepdim=True).clamp(min=1e-6) / 448
    step = step if input_scale is None else torch.tensor(input_scale)
    codes = (x.float() / step).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes.double() * step.double()


def normed(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm in the contract's order of roundings."""
    wide = x.float()
    factor = torch.rsqrt((wide * wide).mean(1, keepdim=True) + EPS)
    return (wide * factor).to(x.dtype) * weight


def gated(y: Tensor) -> Tensor:
    gate, up = y.chunk(2, dim=1)
    return gate / (1 + torch.exp(-gate)) * up


@HALVES
@pytest.mark.parametrize(
    "input_scale, is_gated, has_residual", [(None, False, True), (0.01, True, False)]
)
def test_prompts(
    dtype: torch.dtype, input_scale: float | None, is_gated: bool, has_residual: bool
) -> None:
    """Sums are rounded twice, which the dtype's tolerance has room for."""
    layer, x = fp8_layer(96, 64), random(TOKENS, 64, dtype=dtype)
    weight = random(64, dtype=dtype, seed=3)
    wide = random(TOKENS, 100, dtype=dtype, seed=4)
    residual = wide[:, : 48 if is_gated else 96] if has_residual else None
    y = make(layer, input_scale).fused(
        x.to(DEVICE),
        norm=(weight.to(DEVICE), EPS),
        is_gated=is_gated,
        residual_TN=None if residual is None else residual.to(DEVICE),
    )
    truth = rounded(normed(x, weight), input_scale) @ layer.matrix.T
    truth = gated(truth) if is_gated else truth
    assert isinstance(y, Tensor) and y.dtype == dtype
    assert_close(y, truth if residual is None else truth + residual.double())


def test_sums_of_the_largest_codes_stay_in_fp16() -> None:
    """K · 448² = 38 million, 589 times what fp16 holds; the scale brings it back to 1."""
    codes = torch.full((16, 192), 448.0).to(torch.float8_e4m3fn)
    layer = Layer((codes, torch.full((16,), 1 / (192 * 448))), torch.full((16, 192), 1 / 192.0))
    x = torch.ones(TOKENS, 192, dtype=torch.float16)
    x[:, 0] = -1
    assert_close(make(layer, 1 / 448)(x.to(DEVICE)), x.double() @ layer.matrix.double().T)


@pytest.mark.parametrize("tokens, width", [(0, 16), (1, 16), (5, 4112)])
@SCALES
def test_gated_codes_are_those_of_two_steps(
    tokens: int, width: int, input_scale: float | None
) -> None:
    sums = random(tokens, 2 * width, dtype=torch.bfloat16, seed=1) * 100
    scale, x_scale = random(2 * width, seed=2).abs() / 64, random(tokens, seed=3).abs() + 0.1
    given = None if input_scale is None else torch.tensor([input_scale], device=DEVICE)
    kind, unit = torch.float8_e4m3fn, 2.0**-3
    arguments = [array.to(DEVICE) for array in (sums, scale, x_scale)]
    codes, step, dtype = quantize_gated(*arguments, kind, given=given, unit=unit)
    assert codes.shape == (tokens, width) and dtype == torch.bfloat16
    if not tokens:
        return
    y = gated(sums.double() * unit * x_scale.double()[:, None] * scale.double())
    # A value on the border between two codes may go either way.
    ours = codes.cpu().double() * step.cpu().double().view(-1, 1)
    truth = rounded(y.float(), input_scale)
    is_same = (ours - truth).abs() <= 1e-6 * truth.abs()
    assert is_same.float().mean() >= 0.99
    assert ((ours - truth).abs() <= truth.abs() / 7 + step.cpu().view(-1, 1) / 256).all()
    assert scale_sums(*arguments, unit=unit, is_gated=True).shape == (tokens, width)


class Weights:
    """What an MLP reads of an engine."""

    def __init__(self, **products: LinearFp8):
        self._products = products

    def linear(self, name: str) -> Projection:
        return Projection(BoundLinear(self._products[name]))


@pytest.mark.parametrize("input_scale", [None, 0.2])
def test_an_mlp_hands_codes_on(input_scale: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    gate_up, down = fp8_layer(96, 64), fp8_layer(64, 48)
    products = {"gate_up": make(gate_up, 0.01), "down": make(down, input_scale)}
    handed = []
    multiply = products["down"].multiply
    monkeypatch.setattr(
        products["down"], "multiply", lambda x, *rest: handed.append(x) or multiply(x, *rest)
    )
    weight = random(64, dtype=torch.bfloat16, seed=5)
    norm = Norm(weight.to(DEVICE), EPS)
    mlp = MLP(Weights(**products), norm, Solo())  # type: ignore[arg-type]
    h = random(TOKENS, 64, dtype=torch.bfloat16)
    y = mlp(h.to(DEVICE))
    a = gated(rounded(normed(h, weight), 0.01) @ gate_up.matrix.T)
    truth = h.double() + rounded(a.to(h.dtype), input_scale) @ down.matrix.T
    # Where rounding a sum once more moves a value across the border of two codes, one of 48 inputs
    # of `down` is a sixteenth off.
    assert (y.cpu().double() - truth).norm() <= 0.01 * truth.norm()
    assert len(handed) == 1 and isinstance(handed[0], Codes)
    assert mlp(h[:2].to(DEVICE)).shape == (2, 64)


def test_tiles_in_groups_of_tokens_cover_all() -> None:
    """Ten tiles of tokens and three of rows: a whole group and a part of one."""
    layer, x = int8_layer(67, 64), random(150, 64, dtype=torch.float16)
    product = LinearW8A8(*(array.to(DEVICE) for array in layer.arrays), None)
    y = product.run(x.to(DEVICE), Config(TILES, rows=32, inputs=64, tokens=16))
    step = x.float().abs().amax(1, keepdim=True) / 127
    codes = (x.float() / step).round().double()
    assert isinstance(y, Tensor)
    assert_close(y, codes * step.double() @ layer.matrix.T)


@SCALES
def test_the_smoother_divides_before_tokens_are_rounded(
    input_scale: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = int8_layer(40, 64), random(3, 64, dtype=torch.bfloat16)
    smoother, residual = random(64, seed=6).abs() + 0.5, random(3, 40, dtype=x.dtype, seed=7)
    monkeypatch.setattr(smooth, "bind", lambda op, *arrays: LinearW8A8(*arrays))
    codes, scale = layer.arrays
    arrays = {"codes": codes, "scale": scale, "smoother": smoother}
    if input_scale is not None:
        arrays["input_scale"] = torch.tensor([input_scale])
    linear = smooth.SmoothInt8({name: array.to(DEVICE) for name, array in arrays.items()})
    wide = x.float() / smoother
    step = wide.abs().amax(1, keepdim=True) / 127 if input_scale is None else input_scale
    truth = ((wide / step).round().clamp(-127, 127) * step).double() @ layer.matrix.T
    assert_close(linear(x.to(DEVICE)), truth)
    assert linear.fused is not None
    y = linear.fused(x.to(DEVICE), residual_TN=residual.to(DEVICE))
    assert y is not None
    assert_close(y, truth + residual.double())


def test_what_follows_a_product_compiles_without_spills() -> None:
    """All: `python -m tests.kernels.triton_compile tests.kernels.linear_fp8_cases`."""
    output = triton_mode.run_compiled(
        "tests.kernels.triton_compile", "tests.kernels.linear_fp8_cases", "90", "--first=4"
    )
    assert output.count(" 0 bytes spilled") == len(output.splitlines()) == 4
