"""The C++ kernels in every variant that this CPU runs, and how they are compiled."""

from __future__ import annotations

import ctypes
import math
from functools import cache
from pathlib import Path

import pytest
import torch

from engine import env
from engine.cache import LayerCache
from engine.kernels import cpu, cpu_int4, cpu_int8, reference
from engine.kernels.native import compiled, dense, int4, int8, rowwise
from engine.kernels.native.attention import attend_last
from tests.kernels.helpers import DTYPES, TOLERANCES, Shape, assert_close, make_scene, random
from tests.kernels.quantized import groups_layer, int4_layer, int8_layer

# What the compiler is told → what the CPU must have.
VARIANTS = {"own": ("-march=native", ""), "avx2": ("-mavx2 -mfma", "avx2 fma"), "plain": ("", "")}
COMPILER = env.cxx_compiler()
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")


@cache
def cpu_flags() -> frozenset[str]:
    return frozenset(Path("/proc/cpuinfo").read_text().split())


@pytest.fixture(scope="module", params=VARIANTS)
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """Name → its library of this variant."""
    target, needs = VARIANTS[request.param]
    if not cpu_flags().issuperset(needs.split()):
        pytest.skip("not on this machine")
    folder = tmp_path_factory.mktemp(request.param)
    return lambda name: ctypes.CDLL(str(compiled.build(name, COMPILER, target.split(), folder)))


INT4_LAYERS = {
    "groups of 128": groups_layer(48, 256, 128, torch.float16, has_zero=True),
    "short blocks, odd rows": groups_layer(33, 96, 32, torch.float16, has_zero=True),
    "fp32 scales, no zeros": groups_layer(17, 320, 64, torch.float32, has_zero=False),
    "one row": groups_layer(1, 64, 64, torch.float16, has_zero=False),
}


@pytest.mark.parametrize("layer", INT4_LAYERS.values(), ids=INT4_LAYERS)
def test_int4_products(library, layer) -> None:
    product = int4.pack(library("int4"), *layer.arrays)
    for dtype in TOLERANCES:
        x = random(19, layer.matrix.shape[1], dtype=dtype)
        together = product(x)
        assert_close(together, x.double() @ layer.matrix.T)
        for tokens in (1, 2, 7, 16):
            parts = torch.cat([product(part) for part in x.split(tokens)])
            assert torch.equal(parts, together), "depends on the batch"
    assert product(x[:0]).shape == (0, len(layer.matrix))


def test_int4_of_one_group_and_long_rows_does_not_overflow(library) -> None:
    codes, scale = int4_layer(3, 20480).arrays
    codes.fill_(0xFF)
    x = torch.full((1, 20480), 3.0)
    y = int4.pack(library("int4"), codes, scale[:, None], None, 64)(x)
    assert torch.allclose(y[0], 7 * 3 * 20480 * scale, rtol=1e-5)


def test_int4_keeps_what_outliers_leave_of_a_token(library) -> None:
    """15 bits below the largest value are finer than the rounding of the result."""
    layer = groups_layer(256, 1024, 128, torch.float16, has_zero=True)
    x = random(2, 1024, dtype=torch.bfloat16)
    x[:, 7] = 1000
    y = int4.pack(library("int4"), *layer.arrays)(x)
    truth = x.double() @ layer.matrix.T
    assert (y.double() - truth).norm() < truth.norm() * torch.finfo(x.dtype).eps


def test_prompts_of_one_digit_are_rounded_by_groups(library) -> None:
    """The tokens' codes by hand, a group at a time; few tokens are written exactly."""
    layer = groups_layer(48, 256, 64, torch.float16, has_zero=True)
    one = {torch.bfloat16: 1}
    product = int4.pack(library("int4"), *layer.arrays, prompt_digits=one)
    x = random(40, 256, dtype=torch.bfloat16)
    x[:, 3] = 100
    groups = x.double().unflatten(1, (4, 64))
    steps = groups.abs().amax(-1, keepdim=True) / 127
    rounded = ((groups / steps).round() * steps).flatten(1)
    error = (product(x).double() - rounded @ layer.matrix.T).norm()
    assert error < (rounded @ layer.matrix.T).norm() * 3e-3
    assert (x.double() - rounded).norm() > x.double().norm() * 3e-3
    assert_close(product(x[:15]), x[:15].double() @ layer.matrix.T)
    assert torch.equal(product(x[:15]), int4.pack(library("int4"), *layer.arrays)(x[:15]))


def test_the_environment_asks_for_rounded_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of weights in groups and 16-bit tokens; nothing else changes."""
    layer = groups_layer(48, 256, 64, torch.float16, has_zero=True)
    exact = cpu_int4.bind_groups(*layer.arrays)
    monkeypatch.setenv(env.INT4_PROMPTS, "int8")
    rounded = cpu_int4.bind_groups(*layer.arrays)
    for dtype in TOLERANCES:
        x = random(40, 256, dtype=dtype)
        assert torch.equal(rounded(x), exact(x)) == (dtype == torch.float32)
        assert torch.equal(rounded(x[:4]), exact(x[:4]))


def test_int4_tokens_of_zeros_and_of_nan(library) -> None:
    layer = groups_layer(20, 64, 32, torch.float16, has_zero=True)
    x = random(4, 64, dtype=torch.bfloat16)
    x[0] = 0
    x[1, 5], x[2, 6] = torch.nan, torch.inf
    y = int4.pack(library("int4"), *layer.arrays)(x)
    assert torch.equal(y[0], torch.zeros(20, dtype=x.dtype))
    assert y[1:3].isnan().all()
    assert y[3].isfinite().all()


@pytest.mark.parametrize("outputs, inputs", [(48, 256), (33, 83), (1, 5001), (17, 1)])
def test_int8_products(library, outputs: int, inputs: int) -> None:
    layer = int8_layer(outputs, inputs)
    product = int8.pack_weights(library("int8"), *layer.arrays)
    for dtype in TOLERANCES:
        x = random(19, inputs, dtype=dtype)
        together = product(x)
        assert_close(together, x.double() @ layer.matrix.T)
        for tokens in (1, 2, 7, 16):
            parts = torch.cat([product(part) for part in x.split(tokens)])
            assert torch.equal(parts, together), "depends on the batch"
    assert product(x[:0]).shape == (0, outputs)


def test_int8_sums_of_the_largest_codes_are_exact(library) -> None:
    """Instructions that add pairs of byte products in 16 bits would cut them off."""
    codes = torch.full((34, 4100), 127, dtype=torch.int8)
    codes[1], codes[2, ::2], codes[3, ::3] = -127, -127, 0
    x = torch.full((5, 4100), 127.0)
    x[1], x[2, ::2], x[3, ::4] = -127, -127, 3
    product = int8.pack_activations(library("int8"), codes, torch.ones(34), torch.ones(1))
    assert torch.equal(product(x).double(), (x.double() @ codes.double().T).float().double())


def test_int8_codes_of_tokens_are_those_of_the_contract(library) -> None:
    """Ties go to even, values beyond the given range to its ends; a token of zeros has a range."""
    product = int8.pack_activations(
        library("int8"), torch.eye(16, dtype=torch.int8), torch.ones(16), torch.tensor([0.5])
    )
    x = torch.tensor([0.25, 0.75, -0.25, -1.25, 63.5, 64.0, -80.0, torch.inf]).repeat(1, 2)
    codes = torch.tensor([0.0, 2, 0, -2, 127, 127, -127, 127]).repeat(1, 2)
    assert torch.equal(product(x), codes * 0.5)
    own_scale = int8.pack_activations(
        library("int8"), torch.eye(16, dtype=torch.int8), torch.ones(16), None
    )
    x = torch.zeros(2, 16)
    x[1, :3] = torch.tensor([1e-7, 5e-9, -3e-9])
    steps = torch.tensor(1e-6) / 127
    assert torch.equal(own_scale(x), (x / steps).round() * steps)


@pytest.mark.parametrize("input_scale", [None, 0.01])
def test_int8_tokens_of_nan(library, input_scale: float | None) -> None:
    given = None if input_scale is None else torch.tensor([input_scale])
    product = int8.pack_activations(library("int8"), *int8_layer(20, 66).arrays, given)
    x = random(4, 66, dtype=torch.bfloat16)
    x[1, 65] = torch.nan
    y = product(x)
    assert y[1].isnan().all() and y[[0, 2, 3]].isfinite().all()


FUSED_LAYERS = {
    "int8": (int8.pack_weights, int8_layer(96, 144)),
    "int4": (int4.pack, groups_layer(96, 128, 64, torch.float16, has_zero=True)),
}


@pytest.mark.parametrize("tokens", [0, 1, 19])
@pytest.mark.parametrize("pack, layer", FUSED_LAYERS.values(), ids=FUSED_LAYERS)
@DTYPES
def test_products_with_what_is_around_them(
    library, dtype: torch.dtype, pack, layer, tokens: int
) -> None:
    product, inputs = (
        pack(library("int8" if pack is not int4.pack else "int4"), *layer.arrays),
        layer.matrix.shape[1],
    )
    x, weight = random(tokens, inputs, dtype=dtype) * 3, random(inputs, dtype=dtype, seed=1)
    residual = random(tokens, 48, dtype=dtype, seed=2)
    y = product.fused(x, norm=(weight, 1e-5), is_gated=True, residual_TN=residual)
    wide = x.double()
    normed = wide / torch.sqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5) * weight.double()
    gate, up = (normed @ layer.matrix.T).chunk(2, dim=1)
    truth = gate / (1 + torch.exp(-gate)) * up + residual.double()
    assert y.dtype == dtype and y.shape == truth.shape
    if tokens:
        assert_close(y, truth)
        parts = [
            product.fused(a, norm=(weight, 1e-5), is_gated=True, residual_TN=b)
            for a, b in zip(x.split(3), residual.split(3), strict=True)
        ]
        assert torch.equal(torch.cat(parts), y), "depends on the batch"


def test_gates_far_from_zero(library) -> None:
    """silu by hand: 0 far below zero, the gate itself far above, NaN of NaN."""
    codes = torch.zeros(32, 16, dtype=torch.int8)
    codes[:16], codes[16:, 0] = torch.eye(16), 1
    product = int8.pack_weights(library("int8"), codes, torch.ones(32))
    for gate, silu in ((-1e4, 0.0), (-100.0, 0.0), (-1.0, -1 / (1 + math.e)), (1e4, 1e4)):
        x = torch.zeros(1, 16)
        x[0, :2] = torch.tensor([1.0, gate])
        y = product.fused(x, is_gated=True)
        assert y[0, 1].item() == pytest.approx(silu, rel=1e-5, abs=1e-30)
    assert product.fused(x * torch.nan, is_gated=True).isnan().all()


def test_norm_in_the_product_is_the_norm_before_it(library, monkeypatch) -> None:
    """Bit by bit, so that an engine's codes do not depend on what is fused."""
    libraries = {name: library(name) for name in ("int8", "rowwise")}
    monkeypatch.setattr(rowwise.compiled, "load", libraries.get)
    codes, scale = int8_layer(20, 256).arrays
    product = int8.pack_activations(libraries["int8"], codes, scale, None)
    for dtype in TOLERANCES:
        x, weight = random(5, 256, dtype=dtype), random(256, dtype=dtype, seed=1)
        y = product.fused(x, norm=(weight, 1e-5))
        assert torch.equal(y, product(rowwise.rms_norm(x, weight, 1e-5)))


@DTYPES
def test_factors_of_tokens(library, dtype: torch.dtype) -> None:
    """A multiplied token is rounded to its dtype, a divided one to its codes alone."""
    x, factor = random(5, 70, dtype=dtype), random(70, seed=1).abs() + 0.1
    codes, scale = int8_layer(20, 70).arrays
    divided = int8.pack_activations(library("int8"), codes, scale, None)
    divided.divide_by(factor)
    plain = int8.pack_activations(library("int8"), codes, scale, None)
    assert torch.equal(divided(x), plain(x.float() / factor).to(dtype))
    layer = groups_layer(20, 64, 32, torch.float16, has_zero=True)
    multiplied, plain = (int4.pack(library("int4"), *layer.arrays) for _ in range(2))
    multiplied.multiply_by(factor[:64])
    assert torch.equal(multiplied(x[:, :64]), plain((x[:, :64] * factor[:64]).to(dtype)))


def test_factors_of_a_product_that_is_being_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_libraries", {})
    factor, x = random(128, seed=1).abs() + 0.1, random(3, 128)
    bound = cpu_int8.bind_activations(*int8_layer(32, 128).arrays, None)
    bound.divide_by(factor)
    truth = cpu_int8.TorchInt8Activations(*int8_layer(32, 128).arrays, None)(x / factor)
    assert_close(bound(x), truth.double())
    layer = groups_layer(32, 128, 64, torch.float16, has_zero=True)
    groups = cpu_int4.bind_groups(*layer.arrays)
    groups.multiply_by(factor)
    assert_close(groups(x), (x * factor).double() @ layer.matrix.T)


def test_what_a_product_does_not_fuse(library) -> None:
    product = int8.pack_weights(library("int8"), *int8_layer(40, 40).arrays)
    x, weight = random(2, 40, dtype=torch.bfloat16), random(40, dtype=torch.bfloat16)
    assert product.fused(x, norm=(weight, 1e-5)) is None
    assert product.fused(x, is_gated=True) is None
    assert product.fused(x, residual_TN=random(2, 40)) is None
    assert torch.equal(product.fused(x), product(x))


@pytest.mark.parametrize("outputs, inputs", [(64, 256), (37, 83), (3, 7), (5, 4096)])
@DTYPES
def test_dense_products(library, dtype: torch.dtype, outputs: int, inputs: int) -> None:
    w, x = random(outputs, inputs, dtype=dtype, seed=1), random(11, inputs, dtype=dtype)
    # The smallest normal and subnormal values of fp16, and both zeros.
    w[0, :5] = torch.tensor([2**-14, 2**-24, 0.0, -0.0, -8.0])
    together = dense.multiply(library("dense"), x, w)
    assert_close(together, x.double() @ w.double().T)
    for tokens in (1, 2, 3):
        parts = torch.cat([dense.multiply(library("dense"), p, w) for p in x.split(tokens)])
        assert torch.equal(parts, together), "depends on the batch"


def test_fp16_weights_are_read_exactly(library) -> None:
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    w = bits[bits.isfinite()].reshape(-1, 1024)
    y = dense.multiply(library("dense"), torch.eye(1024)[:8], w)
    assert torch.equal(y, w.T[:8])


@pytest.fixture
def rowwise_library(library, monkeypatch: pytest.MonkeyPatch) -> None:
    found = library("rowwise")
    monkeypatch.setattr(rowwise.compiled, "load", lambda name: found)


@pytest.mark.usefixtures("rowwise_library")
@pytest.mark.parametrize("tokens", [0, 1, 19])
@DTYPES
def test_rms_norm(dtype: torch.dtype, tokens: int) -> None:
    x, weight = random(tokens, 4096, dtype=dtype), random(4096, dtype=dtype, seed=1)
    y = rowwise.rms_norm(x, weight, 1e-5)
    wide = x.double()
    truth = wide / torch.sqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5) * weight.double()
    assert y.dtype == dtype and y.shape == x.shape
    if tokens:
        assert_close(y, truth)


@pytest.mark.usefixtures("rowwise_library")
@DTYPES
def test_rotation_of_heads_among_others(dtype: torch.dtype) -> None:
    x = random(19, 6, 64, dtype=dtype)[:, 1:4]
    angle = random(19, 32, seed=2)
    y = rowwise.rotate(x, angle.cos(), angle.sin())
    pairs = torch.complex(*x.double().chunk(2, dim=-1))
    turned = pairs * torch.polar(torch.ones(()).double(), angle.double())[:, None]
    assert_close(y, torch.cat([turned.real, turned.imag], dim=-1))


@pytest.mark.usefixtures("rowwise_library")
@pytest.mark.parametrize("tokens", [1, 19])
@DTYPES
def test_rotation_into_the_cache(dtype: torch.dtype, tokens: int) -> None:
    """Against the plain text; no other place of the cache is touched, and padding nowhere."""
    qkv = random(tokens, 8 * 64, dtype=dtype)
    q, k, v = (x.unflatten(1, (-1, 64)) for x in qkv.split([4 * 64, 2 * 64, 2 * 64], dim=1))
    angle = random(tokens, 32, seed=2)
    around = (angle.cos(), angle.sin())
    slots = torch.randperm(40, generator=torch.Generator().manual_seed(3))[:tokens]
    slots[tokens // 2 + 1 :: 3] = -1
    stored, expected = (random(2, 5, 2, 8, 64, dtype=dtype, seed=4) for _ in range(2))
    y = rowwise.rotate_and_write(q, k, v, *around, (stored[0], stored[1]), slots)
    wanted = reference.rope_write_kv(q, k, v, *around, LayerCache(*expected), slots)
    assert_close(y, wanted.double())
    # Sums of two products are rounded once or twice.
    assert_close(stored, expected.double())
    untouched = torch.ones(5, 8, dtype=torch.bool)
    untouched.view(-1)[slots[slots >= 0]] = False
    before = random(2, 5, 2, 8, 64, dtype=dtype, seed=4).transpose(2, 3)
    assert torch.equal(stored.transpose(2, 3)[:, untouched], before[:, untouched])
    codes = torch.zeros(2, 5, 2, 8, 64, dtype=torch.int8)
    assert rowwise.rotate_and_write(q, k, v, *around, (codes[0], codes[1]), slots) is None


@pytest.mark.usefixtures("rowwise_library")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_results_are_rounded_as_pytorch_rounds(dtype: torch.dtype) -> None:
    """Every value of the dtype times numbers that make ties, overflows and subnormal values."""
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).view(-1, 1, 32)
    x = x.nan_to_num(1.0)
    for factor in (1.0, 1.5, 1 + 2**-12, 2.0, 2**-10):
        cos, sin = torch.full((len(x), 16), factor), torch.zeros(len(x), 16)
        expected = (x.float() * factor).to(dtype)
        assert torch.equal(rowwise.rotate(x, cos, sin), expected)
    x[0, 0, :2] = torch.tensor([torch.nan, -torch.inf])
    y = rowwise.rotate(x, cos, sin)
    assert y[0, 0, 0].isnan()
    assert y[0, 0, 1] == -torch.inf


@pytest.mark.parametrize("kv_lens, block_tokens", [([1, 45], 16), ([300], 512), ([3, 0, 70], 8)])
@DTYPES
def test_attention_of_last_tokens(
    library,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    kv_lens: list[int],
    block_tokens: int,
) -> None:
    found, shape = library("attention"), Shape(6, 2, 80)
    monkeypatch.setattr(compiled, "load", lambda name: found)
    lens = [1 if length else 0 for length in kv_lens]
    scene = make_scene(lens, kv_lens, shape, block_tokens=block_tokens, dtype=dtype)
    q_BHD = random(len(kv_lens), 6, 80, dtype=dtype) * 4
    wide_table = torch.nn.functional.pad(scene.batch.block_table_BM, (0, 5), value=-1)
    tables = (wide_table[:, :-5], scene.batch.kv_lens_B)
    seen = (q_BHD, scene.layer.k, scene.layer.v, *tables)
    for window in (None, 1, 40):
        y_BHD = attend_last(*seen, window=window, scale=0.125)
        assert y_BHD.dtype == dtype
        for q_HD, y_HD, k_SGD, v_SGD in zip(q_BHD, y_BHD, scene.keys, scene.values, strict=True):
            if not len(k_SGD):
                assert not y_HD.any()
                continue
            first = max(0, len(k_SGD) - (window or len(k_SGD)))
            q_GRD = q_HD.double().unflatten(0, (2, 3))
            scores = torch.einsum("grd,sgd->grs", q_GRD, k_SGD[first:].double()) * 0.125
            truth = torch.einsum("grs,sgd->grd", scores.softmax(-1), v_SGD[first:].double())
            assert_close(y_HD, truth.flatten(0, 1))
    narrow = (q_BHD, *(t[..., :72] for t in seen[1:3]), *tables)
    assert attend_last(*narrow, window=None, scale=1.0) is None


@pytest.mark.parametrize("low", [0.0, -30.0, -1000.0])
def test_attention_weights_far_below_the_largest(low: float) -> None:
    """Softmax by hand: a position of score 0 and 40 of score `low`."""
    keys, values = torch.full((1, 1, 41, 16), low), torch.ones(1, 1, 41, 16)
    keys[:, :, 7], values[:, :, 7] = 0, 3
    q = torch.zeros(1, 16)
    q[0, 0] = 1
    table, lens = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([41], dtype=torch.int32)
    y = attend_last(q[None], keys, values, table, lens, window=None, scale=1.0)[0]
    rest = 40 * math.exp(low)
    assert torch.allclose(y, torch.tensor((3 + rest) / (1 + rest)), rtol=1e-6)


def test_rows_apart_are_multiplied_by_pytorch() -> None:
    w, x = random(9, 40, seed=1)[:, :33], random(2, 33)
    assert_close(cpu.linear(x, w), x.double() @ w.double().T)


def test_a_library_is_compiled_once(tmp_path: Path) -> None:
    path = compiled.build("dense", COMPILER, (), tmp_path)
    written = path.stat().st_mtime_ns
    assert compiled.build("dense", COMPILER, (), tmp_path) == path
    assert path.stat().st_mtime_ns == written
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No library is loaded yet, and none is in the cache."""
    monkeypatch.setattr(compiled, "_libraries", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_without_a_compiler_pytorch_computes(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "cxx_compiler", lambda: None)
    layer = groups_layer(32, 128, 64, torch.float16, has_zero=True)
    product = cpu_int4.bind_groups(*layer.arrays)
    assert isinstance(product, cpu_int4.TorchInt4Groups)
    assert isinstance(cpu_int4.bind_rows(*int4_layer(32, 128).arrays), cpu_int4.TorchInt4Rows)
    layer8 = int8_layer(32, 128)
    assert isinstance(cpu_int8.bind_weights(*layer8.arrays), cpu_int8.TorchInt8Weights)
    bound = cpu_int8.bind_activations(*layer8.arrays, None)
    assert isinstance(bound, cpu_int8.TorchInt8Activations)
    for dtype in TOLERANCES:
        x, w = random(1, 128, dtype=dtype), random(32, 128, dtype=dtype, seed=1)
        assert_close(cpu.linear(x, w), x.double() @ w.double().T)
    x = random(1, 128, dtype=torch.bfloat16)
    assert_close(product(x), x.double() @ layer.matrix.T)


def test_a_source_that_does_not_compile_is_reported(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compiled, "FOLDER", fresh)
    (fresh / "broken.cpp").write_text("int main( {")
    assert compiled.load("broken") is None and compiled.load("broken") is None
    [record] = caplog.records
    assert "broken was not compiled" in record.getMessage()
    assert "error" in record.getMessage()
