"""Quantisation arithmetic against numbers worked out by hand, and bounds that always hold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.mapping import Span
from engine.weights import numerics
from engine.weights.types import Dense, Fp8, Int4, Int4Groups, Int8, Lazy
from tests.unit.engine.weights.test_types import Memory

# Rows of Yi's widths after a tp cut are among these, and odd ones.
SHAPES = [(3, 4096), (5, 11008), (2, 7168), (7, 33), (1, 1), (300, 2752)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def weights(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 0.02).to(dtype)


def test_int8_rows_by_hand() -> None:
    w = torch.tensor([[127.0, -127.0, 1.4, 0.0], [0.5, -2.54, 0.03, 0.05]])
    codes, scale = numerics.int8_rows(w)
    assert codes.dtype == torch.int8 and scale.dtype == torch.float32
    # Steps of 1 and of 0.02; 0.03 and 0.05 lie between codes (1.5 and 2.5 steps).
    assert codes[0].tolist() == [127, -127, 1, 0]
    assert codes[1, :2].tolist() == [25, -127]
    assert scale.tolist() == pytest.approx([1.0, 0.02])


@pytest.mark.parametrize("name", ["int8_rows", "int8_tensor"])
def test_int8_rounds_halves_to_even(name: str) -> None:
    codes, scale = getattr(numerics, name)(torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]]))
    assert scale.tolist() == [1.0]
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2]]


def test_int8_tensor_by_hand() -> None:
    w = torch.tensor([[254.0, -4.0], [2.0, 3.1]])
    codes, scale = numerics.int8_tensor(w)
    assert scale.tolist() == [2.0, 2.0]
    assert codes.tolist() == [[127, -2], [1, 2]]
    codes, scale = numerics.int8_tensor(w, 1.0)
    assert codes.tolist() == [[127, -4], [2, 3]]


def test_int4_groups_by_hand() -> None:
    w = torch.tensor([[7.0, -7.0, 3.6, -0.4, 0.0, 14.0, -3.0, 2.2]])
    codes, scale = numerics.int4_groups(w, 4)
    assert codes.dtype == torch.uint8
    assert scale.tolist() == [[1.0, 2.0]]
    assert codes.tolist() == [[15, 1, 12, 8, 8, 15, 6, 9]]
    # A given range of 3.5 halves the steps; what lies outside clips, downwards to -8.
    codes, scale = numerics.int4_groups(w, 4, torch.tensor([[3.5, 14.0]]))
    assert scale.tolist() == [[0.5, 2.0]]
    assert codes.tolist() == [[15, 0, 15, 7, 8, 15, 6, 9]]


def test_int4_clip_is_the_best_of_the_grid() -> None:
    w = weights(4, 512)
    codes, scale = numerics.int4_rows(w)
    for row in range(4):
        errors = {}
        for ratio in numerics.CLIP_RATIOS:
            step = w[row].abs().max() * ratio / 7
            rounded = (w[row] / step).round().clamp(-8, 7) * step
            errors[ratio] = ((rounded - w[row]).double() ** 2).sum().item()
        found = (codes[row].double() - 8) * scale[row].double() - w[row].double()
        assert (found**2).sum().item() == pytest.approx(min(errors.values()), rel=1e-4)
        assert min(errors, key=errors.__getitem__) < 1


def test_int4_keeps_whole_steps_exactly() -> None:
    """Weights on a grid of 15 values have no error without clipping, so nothing is clipped."""
    w = torch.arange(-7.0, 8.0).repeat(4)[None] * 0.25
    codes, scale = numerics.int4_rows(w)
    assert scale.tolist() == [0.25]
    assert torch.equal((codes.float() - 8) * 0.25, w)


def test_fp8_by_hand() -> None:
    # Steps between 256 and 448 are 32, between 1 and 2 they are 1/8; 1.0625 is a tie.
    w = torch.tensor([[448.0, -271.0, 1.05, 1.0625, 1.1875, 0.001]])
    codes, scale = numerics.fp8_rows(w)
    assert codes.dtype == torch.float8_e4m3fn
    assert scale.tolist() == [1.0]
    assert codes.float().tolist() == [[448.0, -256.0, 1.0, 1.0, 1.25, 2**-9]]


def test_fp8_saturates_with_a_given_scale() -> None:
    codes, scale = numerics.fp8_tensor(torch.tensor([[1000.0, -1e30], [2.0, 0.0]]), 0.5)
    assert scale.tolist() == [0.5, 0.5]
    assert codes.float().tolist() == [[448.0, -448.0], [4.0, 0.0]]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_bounds(shape: tuple[int, int], dtype: torch.dtype) -> None:
    w = weights(*shape, dtype=dtype)
    wide = w.float()
    amax_N = wide.abs().amax(1, keepdim=True)

    codes, scale = numerics.int8_rows(w)
    assert codes.min() >= -127
    error = (numerics.dequantize(Int8(codes, scale)) - wide).abs()
    assert (error <= amax_N / 254 * 1.0001).all()

    codes, scale = numerics.int8_tensor(w)
    error = (numerics.dequantize(Int8(codes, scale)) - wide).abs()
    assert (error <= amax_N.max() / 254 * 1.0001).all()
    assert len(scale) == shape[0] and scale.unique().numel() == 1

    codes, scale = numerics.int4_rows(w)
    assert codes.max() <= 15
    value = numerics.dequantize(Int4(codes, scale))
    inside = (wide / scale[:, None] >= -8.5) & (wide / scale[:, None] <= 7.5)
    assert ((value - wide).abs() <= scale[:, None] * 0.5001)[inside].all()

    codes, scale = numerics.fp8_rows(w)
    error = (numerics.dequantize(Fp8(codes, scale)) - wide).abs()
    assert (error <= wide.abs() / 16 + scale[:, None] * 2**-10 * 1.001).all()


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_group_error_bounds(group_size: int) -> None:
    w = weights(6, 384)
    codes, scale = numerics.int4_groups(w, group_size)
    assert scale.shape == (6, 384 // group_size)
    error = (numerics.dequantize(Int4Groups(codes, scale, group_size)) - w).abs()
    assert (error.unflatten(1, (-1, group_size)) <= scale[..., None] * 0.5001).all()


@pytest.mark.parametrize(
    "quantise",
    [
        numerics.int8_rows,
        numerics.int8_tensor,
        numerics.int4_rows,
        lambda w: numerics.int4_groups(w, 32),
        numerics.fp8_rows,
        numerics.fp8_tensor,
    ],
)
@pytest.mark.parametrize("value", [0.0, 1e-44, 3.0, -3.0])
def test_constant_rows(quantise, value: float) -> None:
    codes, scale = quantise(torch.full((3, 64), value))
    assert torch.isfinite(scale).all() and (scale > 0).all()
    assert (codes.float() == codes.float()[0, 0]).all()
    offset = 8 if codes.dtype == torch.uint8 else 0
    back = (codes.double() - offset) * scale.double().reshape(3, -1)[:, :1]
    assert back.flatten().tolist() == pytest.approx([value] * 192, rel=1e-6, abs=1e-43)


@pytest.mark.parametrize("name", ["int8_rows", "int4_rows", "fp8_rows"])
def test_rows_do_not_depend_on_others(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    w = weights(9, 100)
    whole = getattr(numerics, name)(w)
    monkeypatch.setattr(numerics, "CHUNK", 250)
    for parts in (getattr(numerics, name)(w), getattr(numerics, name)(w[4:])):
        for part, all_rows in zip(parts, whole, strict=True):
            assert torch.equal(part.float(), all_rows[-len(part) :].float())


def test_dequantize_folds_the_factor_of_the_input() -> None:
    codes = torch.tensor([[1, 2], [3, -4]], dtype=torch.int8)
    smoother = torch.tensor([2.0, 0.5])
    w = numerics.dequantize(Int8(codes, torch.tensor([1.0, 10.0]), 0.1, smoother))
    assert w.tolist() == [[0.5, 4.0], [15.0, -80.0]]
    codes4 = torch.tensor([[0, 15, 8, 9]], dtype=torch.uint8)
    zero = torch.tensor([[16, 1]], dtype=torch.uint8)
    grouped = Int4Groups(codes4, torch.tensor([[2.0, 3.0]]), 2, zero, torch.tensor([1.0, 1, 1, 5]))
    assert numerics.dequantize(grouped).tolist() == [[-32.0, -2.0, 21.0, 120.0]]


def test_dequantize_dense() -> None:
    w = weights(4, 6, dtype=torch.bfloat16)
    lazy = Lazy.whole(Memory(w)).narrow_rows(Span(1, 3))
    assert torch.equal(numerics.dequantize(Dense(lazy)), w[1:3].float())


@pytest.mark.parametrize(
    "fake, largest, step_at_one",
    [(numerics.fake_int8, 127, 1 / 127), (numerics.fake_fp8, 448, 1 / 8)],
)
def test_fake_activations_by_token(fake, largest: int, step_at_one: float) -> None:
    x = weights(5, 64) * 50
    x[1] = 0
    rounded = fake(x)
    assert rounded[1].tolist() == [0.0] * 64
    amax = x.abs().amax(1)
    assert torch.allclose(rounded.abs().amax(1), amax)
    assert ((rounded - x).abs().amax(1) <= amax * step_at_one / 2 * 1.001).all()
    for token in range(5):
        assert torch.equal(fake(x[token : token + 1])[0], rounded[token])


def test_fake_activations_with_a_scale_by_hand() -> None:
    x = torch.tensor([[0.24, 0.25, 0.75, 100.0, -100.0]])
    assert numerics.fake_int8(x, 0.5).tolist() == [[0.0, 0.0, 1.0, 63.5, -63.5]]
    x = torch.tensor([[1.05, 900.0, -1e9]])
    assert numerics.fake_fp8(x, 2.0).tolist() == [[1.0, 896.0, -896.0]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_fake_activations_keep_the_dtype(dtype: torch.dtype) -> None:
    x = weights(3, 7, dtype=dtype)
    assert numerics.fake_int8(x).dtype == numerics.fake_fp8(x).dtype == dtype


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_amax_shows_what_no_engine_can_hold(bad: float) -> None:
    w = weights(3, 5)
    assert numerics.amax_tensor(w) == w.abs().max()
    w[1, 2] = bad
    assert not torch.isfinite(numerics.amax_tensor(w))
