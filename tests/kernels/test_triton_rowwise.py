"""Triton's row-wise kernels: on the GPU, or in the interpreter, against plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.cache import LayerCache
from engine.kernels import reference
from tests.kernels.helpers import DTYPES, assert_close, poisoned, random
from tests.kernels.test_write_kv import ROUNDED, code_layer, decode
from tests.kernels.triton_mode import DEVICE, prepare_interpreter, run_compiled

prepare_interpreter()

from engine.kernels.triton._norm import MAX_WIDTH, row_block  # noqa: E402
from engine.kernels.triton.embedding import embedding  # noqa: E402
from engine.kernels.triton.rms_norm import rms_norm  # noqa: E402
from engine.kernels.triton.rope import rope  # noqa: E402
from engine.kernels.triton.rope_write_kv import rope_write_kv  # noqa: E402
from engine.kernels.triton.silu_mul import silu_mul  # noqa: E402
from engine.kernels.triton.write_kv import write_kv  # noqa: E402

EPS = 1e-5
SIZES = pytest.mark.parametrize("tokens, width", [(0, 8), (1, 64), (3, 1001), (5, 4096)])
# The cache's type, and scales that make values of a unit normal reach past its largest code.
STORED = pytest.mark.parametrize(
    "codes, scale", [(None, None), (torch.int8, 0.02), (torch.float8_e4m3fn, 0.006)], ids=str
)


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel leaves unwritten is NaN, or the least integer."""
    empty = torch.empty

    def filled(*shape: object, **options: object) -> Tensor:
        tensor = empty(*shape, **options)  # type: ignore[call-overload]
        return tensor.fill_(torch.nan if tensor.is_floating_point() else -(2**7))

    monkeypatch.setattr(torch, "empty", filled)


@DTYPES
@SIZES
def test_rms_norm(dtype: torch.dtype, tokens: int, width: int) -> None:
    x = random(tokens, width + 3, dtype=dtype, device=DEVICE)[:, :width]
    weight = random(width, dtype=dtype, device=DEVICE, seed=1)
    y = rms_norm(x, weight, EPS)
    assert y.shape == x.shape
    if tokens:
        wide = x.double()
        mean = (wide * wide).sum(-1, keepdim=True) / width
        assert_close(y, wide / torch.sqrt(mean + EPS) * weight.double())


def test_a_norm_rounds_before_the_weight() -> None:
    """1.01171875 (= 1 + 3/256) is half-way in bf16: rounding first or last differ by a bit."""
    x = torch.full((1, 64), 3.0, dtype=torch.bfloat16, device=DEVICE)
    x[:, ::2] = 3.0625
    weight = torch.full((64,), 1.3359375, dtype=torch.bfloat16, device=DEVICE)
    assert torch.equal(rms_norm(x, weight, EPS), reference.rms_norm(x, weight, EPS))


def test_rows_wider_than_a_program_are_refused() -> None:
    assert row_block(MAX_WIDTH) == (MAX_WIDTH, 16)
    with pytest.raises(AssertionError, match="32769"):
        row_block(MAX_WIDTH + 1)


@pytest.mark.parametrize("codes", list(ROUNDED), ids=str)
def test_codes_are_rounded_half_to_even_and_saturate(codes: torch.dtype) -> None:
    """Infinities included."""
    rounded = ROUNDED[codes]
    layer = code_layer(codes, blocks=1, block_tokens=4, head_dim=len(rounded), device=DEVICE)
    values_D = torch.tensor(list(rounded), device=DEVICE)
    k_TGD, v_TGD = (
        (sign * values_D * scale_G[:, None])[None]
        for sign, scale_G in ((1, layer.k_scale_G), (-1, layer.v_scale_G))
    )
    write_kv(k_TGD, v_TGD, layer, torch.zeros(1, dtype=torch.int64, device=DEVICE))
    expected = [float(code) for code in rounded.values()]
    assert decode(layer.k.cpu()[0, 0, 0]).tolist() == expected
    assert decode(layer.v.cpu()[0, 0, 0]).tolist() == [-code for code in expected]


@DTYPES
@pytest.mark.parametrize("tokens, width", [(0, 8), (1, 64), (3, 1501)])
def test_silu_mul(dtype: torch.dtype, tokens: int, width: int) -> None:
    gate_up = random(tokens, 2 * width, dtype=dtype, device=DEVICE)
    y = silu_mul(gate_up)
    assert y.shape == (tokens, width)
    if tokens:
        gate, up = gate_up.double().split(width, dim=-1)
        assert_close(y, gate / (1 + torch.exp(-gate)) * up)


@DTYPES
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("width", [24, 1030])
def test_embedding(dtype: torch.dtype, id_dtype: torch.dtype, width: int) -> None:
    table = random(7, width, dtype=dtype, device=DEVICE)
    tokens = torch.tensor([9, 10, 16, 17, 0, 12], dtype=id_dtype, device=DEVICE)
    x = embedding(tokens, table, 10)
    assert torch.equal(x[[1, 2, 5]], table[[0, 6, 2]])
    assert x[[0, 3, 4]].eq(0).all()
    assert embedding(tokens[:0], table).shape == (0, width)


def rotation(tokens: int, half: int) -> tuple[Tensor, Tensor]:
    angles = torch.arange(tokens)[:, None] * 37 / 5e6 ** (torch.arange(half) / half)
    return angles.cos().to(DEVICE), angles.sin().to(DEVICE)


@DTYPES
@pytest.mark.parametrize("heads, dim", [(9, 16), (1, 6), (7, 128)])
def test_rope_has_the_bits_of_torch(dtype: torch.dtype, heads: int, dim: int) -> None:
    fused = random(3, heads + 1, dim, dtype=dtype, device=DEVICE)
    cos, sin = rotation(3, dim // 2)
    ours = rope(fused[:, :heads], fused[:, heads:], cos, sin)
    truth = reference.rope(fused[:, :heads], fused[:, heads:], cos, sin)
    assert all(map(torch.equal, ours, truth))


def make_layer(dtype: torch.dtype, kv_heads: int, dim: int, scale: float | None) -> LayerCache:
    """Three blocks of 5 positions that hold poison."""
    stored = poisoned(2, 3, kv_heads, 5, dim, dtype=dtype).to(DEVICE)
    if scale is None:
        return LayerCache(*stored)
    scales = scale * (1 + torch.arange(2 * kv_heads).view(2, kv_heads) / 8)
    return LayerCache(*stored, *scales.to(DEVICE))


def bits(x: Tensor) -> Tensor:
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x.nan_to_num(77)


@DTYPES
@STORED
@pytest.mark.parametrize("group, kv_heads, dim", [(7, 2, 16), (8, 1, 6), (1, 3, 64)])
def test_rope_write_kv_is_rope_and_then_write_kv(
    dtype: torch.dtype,
    codes: torch.dtype | None,
    scale: float | None,
    group: int,
    kv_heads: int,
    dim: int,
) -> None:
    heads = group * kv_heads
    fused = random(5, heads + 2 * kv_heads, dim, dtype=dtype, device=DEVICE)
    q, k, v = fused.split([heads, kv_heads, kv_heads], dim=1)
    cos, sin = rotation(5, dim // 2)
    slots = torch.tensor([12, -1, 3, 0, 9], device=DEVICE)
    ours, split, truth = (make_layer(codes or dtype, kv_heads, dim, scale) for _ in range(3))
    rotated = rope_write_kv(q, k, v, cos, sin, ours, slots)
    true_q, true_k = reference.rope(q, k, cos, sin)
    reference.write_kv(true_k, v, truth, slots)
    write_kv(true_k, v, split, slots)
    assert torch.equal(rotated, true_q)
    for layer in (ours, split):
        assert torch.equal(bits(layer.k), bits(truth.k))
        assert torch.equal(bits(layer.v), bits(truth.v))


def test_no_token_is_no_launch() -> None:
    layer = make_layer(torch.float32, 2, 16, None)
    q, k = torch.zeros(0, 4, 16, device=DEVICE), torch.zeros(0, 2, 16, device=DEVICE)
    cos, slots = torch.zeros(0, 8, device=DEVICE), torch.zeros(0, dtype=torch.int64, device=DEVICE)
    assert rope_write_kv(q, k, k, cos, cos, layer, slots).shape == q.shape
    write_kv(k, k, layer, slots)
    assert rope(q, k, cos, cos)[1].shape == k.shape
    assert layer.k.isnan().all()


@pytest.mark.parametrize("codes", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_codes_round_to_even_and_saturate(codes: torch.dtype) -> None:
    """Every tie between neighbouring codes, values around it, and values past the largest."""
    if codes == torch.int8:
        numbers = torch.arange(-127, 128).float()
    else:
        numbers = torch.arange(256, dtype=torch.uint8).view(codes).float()
        numbers = numbers[numbers.isfinite()].sort().values
    ties = (numbers[1:] + numbers[:-1]) / 2
    ends = torch.tensor([numbers[-1] * 1.01, 1e30, -1e30, 0.0])
    values = torch.cat([numbers, ties, ties * (1 + 2e-7), ties * (1 - 2e-7), ends])
    values = torch.cat([values, values[: -len(values) % 32]]).view(-1, 1, 32).to(DEVICE)
    stored = torch.zeros(2, 1, 1, len(values), 32, dtype=codes, device=DEVICE)
    one = torch.ones(1, device=DEVICE)
    write_kv(values, values, LayerCache(*stored, one, one), torch.arange(len(values)).to(DEVICE))
    limit = numbers[-1].item()
    if codes == torch.int8:
        truth = values.double().round().clamp(-limit, limit).to(codes)
    else:
        truth = values.clamp(-limit, limit).to(codes)
    # A zero's sign has no meaning.
    assert torch.equal(stored[0, 0, 0].float(), truth[:, 0].float())


def test_kernels_compile_without_spills() -> None:
    """Other architectures: `python -m tests.kernels.triton_compile tests.kernels.rowwise_cases`."""
    lines = run_compiled(
        "tests.kernels.triton_compile", "tests.kernels.rowwise_cases", "90"
    ).splitlines()
    assert len(lines) == 10 and all(" 0 bytes spilled" in line for line in lines), lines
