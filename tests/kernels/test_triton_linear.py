"""Triton's linear layers against arithmetic in fp64: on the GPU, or in the interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels import triton_mode
from tests.kernels.assembly import pack_bytes, run_assembly
from tests.kernels.helpers import DTYPES, assert_close, random
from tests.kernels.quantized import (
    Layer,
    fp8_layer,
    groups_layer,
    int4_layer,
    int8_layer,
    to_device,
)
from tests.kernels.triton_mode import DEVICE, IS_INTERPRETED

triton_mode.prepare_interpreter()

from engine.kernels.triton import (  # noqa: E402
    _matmul,
    _tactics,
    _tuning,
    _weights,
    _widen,
    _words,
)
from engine.kernels.triton._launch import processors  # noqa: E402
from engine.kernels.triton._product import Product  # noqa: E402
from engine.kernels.triton._tactics import GEMV, LIBRARY, TILES, Config  # noqa: E402

HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
# Tiles for small matrices: two of K, or a part of one; three or more of N.
SMALL_TILES = Config(TILES, rows=32, inputs=64, warps=4, stages=2, tokens=16)
SMALL_GEMV = Config(GEMV, rows=8, inputs=128, warps=1)
EPS = 1e-5


def dense_layer(outputs: int, inputs: int, dtype: torch.dtype) -> Layer:
    w = random(outputs, inputs, dtype=dtype, seed=5)
    return Layer((w,), w.double())


def make(op: str, outputs: int, inputs: int, dtype: torch.dtype) -> Layer:
    """Groups are of 64, of 96 where that alone divides K, or of 32."""
    group = next(size for size in (64, 96, 32) if inputs % size == 0)
    return {
        "linear": lambda: dense_layer(outputs, inputs, dtype),
        "linear_int8": lambda: int8_layer(outputs, inputs),
        "linear_int4": lambda: int4_layer(outputs, inputs),
        "linear_int4_groups": lambda: groups_layer(
            outputs, inputs, group, torch.float16, has_zero=outputs % 2 == 1
        ),
        "linear_w8a8": lambda: int8_layer(outputs, inputs),
        "linear_fp8": lambda: fp8_layer(outputs, inputs),
    }[op]()


def bound(op: str, layer: Layer, input_scale: float | None = None) -> Any:
    arrays = layer.arrays
    if op in _tactics.ACTIVATION_CODES:
        arrays = (*arrays, None if input_scale is None else torch.tensor([input_scale]))
    module = import_module(f"engine.kernels.triton.{op}")
    return module.BOUND[op](*to_device(arrays, DEVICE))


WEIGHT_ONLY = pytest.mark.parametrize(
    "op", ["linear", "linear_int8", "linear_int4", "linear_int4_groups"]
)


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """New memory holds NaN, or the least integer: results must not depend on it."""
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        tensor = empty(*args, **kwargs)
        if tensor.dtype in (torch.float32, torch.float16, torch.bfloat16):
            return tensor.fill_(torch.nan)
        bits = tensor.view(torch.int8) if tensor.element_size() == 1 else tensor
        bits.fill_(-1)
        return tensor

    monkeypatch.setattr(torch, "empty", poisoned)
    yield


@WEIGHT_ONLY
@DTYPES
@pytest.mark.parametrize("outputs, inputs", [(1, 64), (17, 192), (130, 64)])
def test_one_token(op: str, dtype: torch.dtype, outputs: int, inputs: int) -> None:
    layer, x = make(op, outputs, inputs, dtype), random(1, inputs, dtype=dtype)
    y = bound(op, layer).run(x.to(DEVICE), SMALL_GEMV)
    assert y.dtype == dtype
    assert_close(y, x.double() @ layer.matrix.T)


@pytest.mark.parametrize("op", ["linear", "linear_int8"])
@pytest.mark.parametrize("inputs", [1, 33, 501])
def test_one_token_of_any_width(op: str, inputs: int) -> None:
    layer, x = make(op, 5, 64, torch.float16), random(1, inputs, dtype=torch.float16)
    w = layer.arrays[0][:, :1].repeat(1, inputs)
    narrow = Layer((w, *layer.arrays[1:]), layer.matrix[:, :1].repeat(1, inputs))
    assert_close(bound(op, narrow).run(x.to(DEVICE), SMALL_GEMV), x.double() @ narrow.matrix.T)


@WEIGHT_ONLY
@HALVES
@pytest.mark.parametrize("tokens", [1, 3, 17])
@pytest.mark.parametrize("splits", [1, 2])
def test_tiles(op: str, dtype: torch.dtype, tokens: int, splits: int) -> None:
    layer, x = make(op, 67, 192, dtype), random(tokens, 192, dtype=dtype)
    product, config = bound(op, layer), SMALL_TILES._replace(splits=splits)
    for _ in range(2):  # the counters of arrivals are as they were
        y = product.run(x.to(DEVICE), config)
        assert y.dtype == dtype
        assert_close(y, x.double() @ layer.matrix.T)


@pytest.mark.parametrize("inputs, group", [(96, 32), (288, 96), (256, 128)])
@pytest.mark.parametrize("has_zero", [True, False])
@pytest.mark.parametrize("config", [SMALL_GEMV, SMALL_TILES], ids=lambda c: c.kind)
def test_groups_of_any_size(inputs: int, group: int, has_zero: bool, config: Config) -> None:
    layer = groups_layer(33, inputs, group, torch.float16, has_zero=has_zero)
    x = random(1, inputs, dtype=torch.float16)
    y = bound("linear_int4_groups", layer).run(x.to(DEVICE), config)
    assert_close(y, x.double() @ layer.matrix.T)


@pytest.mark.parametrize("op", ["linear_int8", "linear_int4", "linear_int4_groups"])
@DTYPES
def test_many_tokens_take_widened_weights(op: str, dtype: torch.dtype) -> None:
    layer, x = make(op, 33, 192, dtype), random(140, 192, dtype=dtype)
    assert_close(bound(op, layer)(x.to(DEVICE)), x.double() @ layer.matrix.T)


def codes_truth(op: str, x: Tensor, input_scale: float | None) -> Tensor:
    """Tokens as the contract rounds them, in fp64."""
    limit = 127 if op == "linear_w8a8" else 448
    step = x.float().abs().amax(1, keepdim=True).clamp(min=1e-6) / limit
    step = step if input_scale is None else torch.tensor(input_scale)
    codes = (x.float() / step).clamp(-limit, limit)
    codes = codes.round() if op == "linear_w8a8" else codes.to(torch.float8_e4m3fn)
    return codes.double() * step.double()


@WEIGHT_ONLY
@DTYPES
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_token_that_is_not_finite(op: str, dtype: torch.dtype, bad: float) -> None:
    layer, x = make(op, 5, 192, dtype), random(1, 192, dtype=dtype)
    x[0, 100] = bad
    assert not bound(op, layer).run(x.to(DEVICE), SMALL_GEMV).isfinite().any()


@WEIGHT_ONLY
def test_one_token_with_an_outlier(op: str) -> None:
    """One value far above the others, and chunks of nothing but zeros, cost no accuracy."""
    layer, x = make(op, 33, 384, torch.float16), random(1, 384, dtype=torch.float16)
    x[0, 100], x[0, 200:300] = 20000, 0
    y = bound(op, layer).run(x.to(DEVICE), SMALL_GEMV)
    assert_close(y, x.double() @ layer.matrix.T)


@pytest.mark.parametrize("op", ["linear_w8a8", "linear_fp8"])
@DTYPES
@pytest.mark.parametrize(
    "tokens, config",
    [
        (1, SMALL_GEMV),
        (1, SMALL_TILES),
        (3, SMALL_TILES._replace(splits=2)),
        (17, SMALL_TILES),
    ],
    ids=["gemv", "1", "3", "17"],
)
@pytest.mark.parametrize("input_scale", [None, 0.01])
def test_codes(
    op: str, dtype: torch.dtype, tokens: int, config: Config, input_scale: float | None
) -> None:
    layer, x = make(op, 67, 192, dtype), random(tokens, 192, dtype=dtype)
    product = bound(op, layer, input_scale)
    y = product.run(x.to(DEVICE), config)
    assert y.dtype == dtype
    assert_close(y, codes_truth(op, x, input_scale) @ layer.matrix.T)


def test_fp8_without_its_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ampere multiplies float8 as fp16."""
    monkeypatch.setattr(_matmul, "has_float8", lambda device: False)
    layer, x = fp8_layer(40, 192), random(3, 192, dtype=torch.bfloat16)
    y = bound("linear_fp8", layer).run(x.to(DEVICE), SMALL_TILES)
    assert_close(y, codes_truth("linear_fp8", x, None) @ layer.matrix.T)


def test_fp8_of_one_scale_and_many_tokens() -> None:
    """cuBLAS' case on a GPU that has float8."""
    codes, _ = fp8_layer(64, 192).arrays
    layer = Layer((codes, torch.full((64,), 0.02)), codes.double() * 0.02)
    x = random(130, 192, dtype=torch.bfloat16)
    y = bound("linear_fp8", layer, 0.01)(x.to(DEVICE))
    assert_close(y, codes_truth("linear_fp8", x, 0.01) @ layer.matrix.T)


def norm_truth(x: Tensor, weight: Tensor | None) -> Tensor:
    x = x.double()
    if weight is None:
        return x
    return x / torch.sqrt((x * x).mean(1, keepdim=True) + EPS) * weight.double()


def in_steps(x: Tensor, weight: Tensor | None) -> Tensor:
    """The norm with the roundings of api.rms_norm, which codes are made of."""
    if weight is None:
        return x
    normed = x.float() * torch.rsqrt((x.float() ** 2).mean(1, keepdim=True) + EPS)
    return (normed.to(x.dtype).float() * weight.float()).to(x.dtype)


def gate_truth(y: Tensor, is_gated: bool, residual: Tensor | None) -> Tensor:
    if is_gated:
        gate, up = y.chunk(2, dim=1)
        y = gate / (1 + torch.exp(-gate)) * up
    return y if residual is None else y + residual.double()


FUSED = pytest.mark.parametrize(
    "has_norm, is_gated, has_residual",
    [(True, False, False), (True, True, False), (False, False, True), (True, True, True)],
)


@pytest.mark.parametrize("op", _tactics.OPS)
@FUSED
@pytest.mark.parametrize("dtype, tokens", [(torch.float16, 1), (torch.bfloat16, 3)], ids=str)
def test_fused(
    op: str, dtype: torch.dtype, has_norm: bool, is_gated: bool, has_residual: bool, tokens: int
) -> None:
    outputs, inputs = 36, 192
    layer, x = make(op, outputs, inputs, dtype), random(tokens, inputs, dtype=dtype)
    weight = random(inputs, dtype=dtype, seed=7) if has_norm else None
    width = outputs // (2 if is_gated else 1)
    residual = random(tokens, width, dtype=dtype, seed=8) if has_residual else None
    kinds = (TILES,) if tokens > 1 else (GEMV, TILES)
    # A scale that is known before lets the product's kernel round a token.
    input_scale = 0.01 if op == "linear_fp8" else None
    normed = norm_truth(x, weight)
    if op in _tactics.ACTIVATION_CODES:
        normed = codes_truth(op, in_steps(x, weight), input_scale)
    truth = gate_truth(normed @ layer.matrix.T, is_gated, residual)
    for config in (c for c in (SMALL_GEMV, SMALL_TILES._replace(splits=2)) if c.kind in kinds):
        product = bound(op, layer, input_scale)
        y = product.run(
            x.to(DEVICE),
            config,
            None if weight is None else (weight.to(DEVICE), EPS),
            is_gated,
            None if residual is None else residual.to(DEVICE),
        )
        assert y.shape == truth.shape and y.dtype == dtype
        assert_close(y, truth)


@pytest.mark.parametrize("op", ["linear", "linear_int8"])
@DTYPES
@FUSED
def test_fused_around_a_library(
    op: str,
    dtype: torch.dtype,
    has_norm: bool,
    is_gated: bool,
    has_residual: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Weights are widened in three blocks of rows, the last one shorter.
    monkeypatch.setattr(_widen, "ROW_MULTIPLE", 16)
    monkeypatch.setattr(_widen, "WIDE_WEIGHTS", 16 * 64)
    layer, x = make(op, 36, 64, dtype), random(3, 64, dtype=dtype)
    weight = random(64, dtype=dtype, seed=7) if has_norm else None
    residual = random(3, 18 if is_gated else 36, dtype=dtype, seed=8) if has_residual else None
    truth = gate_truth(norm_truth(x, weight) @ layer.matrix.T, is_gated, residual)
    y = bound(op, layer).apply(
        x.to(DEVICE),
        Config(LIBRARY),
        None if weight is None else (weight.to(DEVICE), EPS),
        is_gated,
        None if residual is None else residual.to(DEVICE),
    )
    assert y.dtype == dtype
    assert_close(y, truth)


@DTYPES
@FUSED
@pytest.mark.parametrize("config", [SMALL_GEMV, SMALL_TILES, Config(LIBRARY)], ids=lambda c: c.kind)
def test_factors_of_the_inputs(
    dtype: torch.dtype, has_norm: bool, is_gated: bool, has_residual: bool, config: Config
) -> None:
    layer = groups_layer(12, 128, 64, torch.float16, has_zero=False)
    tokens = 1 if config.kind == GEMV else 3
    x, factor = random(tokens, 128, dtype=dtype), random(128, seed=3).abs() + 0.5
    weight = random(128, dtype=dtype, seed=7) if has_norm else None
    width = 6 if is_gated else 12
    residual = random(tokens, width, dtype=dtype, seed=8) if has_residual else None
    truth = norm_truth(x, weight) * factor.double() @ layer.matrix.T
    product = bound("linear_int4_groups", layer)
    product.multiply_by(factor.to(DEVICE))
    norm = None if weight is None else (weight.to(DEVICE), EPS)
    for _ in range(2):  # the norm's weight with the factors in it is kept
        given = None if residual is None else residual.to(DEVICE, copy=True)
        y = product.apply(x.to(DEVICE), config, norm, is_gated, given)
        assert y.dtype == dtype
        assert_close(y, gate_truth(truth, is_gated, residual))
    plain = product.apply(x.to(DEVICE), config)
    assert_close(plain, x.double() * factor.double() @ layer.matrix.T)


@pytest.mark.parametrize("op", ["linear", "linear_int8", "linear_w8a8"])
def test_no_tokens(op: str) -> None:
    product: Product = bound(op, make(op, 16, 64, torch.float16))
    assert product(torch.zeros(0, 64, dtype=torch.float16, device=DEVICE)).shape == (0, 16)


def test_measured_tactics_come_first_and_survive_json() -> None:
    config = next(
        c for c in _tactics.candidates("linear_int8", 5, 40, 64) if c.kind == TILES and c.warps == 8
    )
    _tactics.record("linear_int8", 5, 40, 64, config)
    try:
        saved = _tactics.measured()
        assert saved == {"linear_int8/8/40/64": list(config)}
        _tactics._table.clear()
        _tactics.load_tactics(saved)
        assert _tactics.choose("linear_int8", 7, 40, 64, 132) == config
        assert _tactics.choose("linear_int8", 9, 40, 64, 132) != config
    finally:
        _tactics._table.clear()


@pytest.mark.parametrize("op", ["linear", *_tactics.NIBBLES, "linear_int8", "linear_fp8"])
@pytest.mark.parametrize("tokens", [1, 2, 16, 64, 65, 128, 129, 4096])
def test_every_batch_has_a_default(op: str, tokens: int) -> None:
    config = _tactics.choose(op, tokens, 4096, 4096, 132)
    assert config.kind in (GEMV, TILES, LIBRARY)
    assert config.kind == LIBRARY or config.splits * config.inputs <= 4096
    assert config.kind != GEMV or tokens == 1


def test_k_is_split_where_outputs_are_few() -> None:
    few, many = (
        _tactics.choose("linear_w8a8", 2, outputs, 4096, 132).splits for outputs in (4096, 64000)
    )
    assert (few, many) == (4, 1)
    assert processors(torch.device("cpu")) > 0


@pytest.mark.skipif(IS_INTERPRETED, reason="times kernels on a GPU")
def test_tuning_keeps_a_candidate_that_is_right() -> None:
    layer, x = make("linear_int8", 96, 512, torch.float16), random(1, 512, dtype=torch.float16)
    products = [bound("linear_int8", layer) for _ in range(2)]
    try:
        key, there = ("linear_int8", 1, 96, 512), x.to(DEVICE)
        config = _tuning.tune(key, [lambda p=p: p(there) for p in products])
        assert config == products[0].choose(x.to(DEVICE))
        assert config in _tactics.candidates("linear_int8", 1, 96, 512)
        assert_close(products[0](x.to(DEVICE)), x.double() @ layer.matrix.T)
    finally:
        _tactics._table.clear()


@pytest.mark.parametrize(
    "text, dtype",
    [(_weights.UNPACK_BF16.value, torch.bfloat16), (_weights.UNPACK_FP16.value, torch.float16)],
    ids=["bf16", "fp16"],
)
def test_assembly_unpacks_nibbles(text: str, dtype: torch.dtype) -> None:
    """The interpreter has no assembly, so its meaning is worked out here for all codes."""
    for first in range(0, 256, 4):
        codes, zeros = [first, first + 1, first + 2, first + 3], [0, 16, 8, 15]
        packed = [int.from_bytes(bytes(four), "little") for four in (codes, zeros)]
        out = []
        for product in run_assembly(text, 4, *packed):
            halves = [
                torch.tensor([word & 0xFFFF, word >> 16]).to(torch.uint16).view(dtype)
                for word in product
            ]
            out += (halves[0].float() * halves[1].float() + halves[2].float()).tolist()
        pairs = list(zip(codes, zeros, strict=True))
        assert out[:4] == [(code & 15) - zero for code, zero in pairs]
        assert out[4:] == [(code >> 4) - zero for code, zero in pairs]


def test_assembly_multiplies_digits() -> None:
    """As above: four values become digits, whose products with codes add up to theirs."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        values = torch.randint(-32767, 32768, (8,), generator=generator).tolist()
        # What adding 1.5 · 2^23 leaves of whole numbers.
        bits = [0x4B400000 + value for value in values]
        low = run_assembly(_words.PACK.value, 2, *bits[:4])
        high = run_assembly(_words.PACK.value, 2, *bits[4:])
        codes = torch.randint(-128, 128, (4,), generator=generator).tolist()
        [found] = run_assembly(_words.BYTES.value, 1, pack_bytes(codes), *low)
        assert found == sum(c * v for c, v in zip(codes, values, strict=False))
        nibbles = torch.randint(0, 16, (8,), generator=generator).tolist()
        word = pack_bytes([a | b << 4 for a, b in zip(nibbles[:4], nibbles[4:], strict=True)])
        [found] = run_assembly(_words.NIBBLES.value, 1, word, *low, *high)
        assert found == sum(c * v for c, v in zip(nibbles, values, strict=True))


def test_kernels_compile_for_hopper_without_spills() -> None:
    """Other architectures: `python -m tests.kernels.triton_compile tests.kernels.linear_cases`."""
    output = triton_mode.run_compiled(
        "tests.kernels.triton_compile", "tests.kernels.linear_cases", "90"
    )
    assert output.count(" 0 bytes spilled") == len(output.splitlines()) > 20
    assert (DEVICE == "cpu") == IS_INTERPRETED
