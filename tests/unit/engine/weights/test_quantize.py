"""What becomes of linear weights in each mode, and SmoothQuant's factors."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from engine.config import ModelConfig, Rope
from engine.errors import CheckpointError, UserError
from engine.mapping import Mapping, Span
from engine.quant import Algorithm, QuantConfig
from engine.weights import numerics
from engine.weights.deferred import Deferred, defer
from engine.weights.quantize import (
    quantize,
    quantize_fp8,
    smooth,
    smooth_norm,
    smooth_weight,
)
from engine.weights.shard import Shard, shard_linear
from engine.weights.types import Dense, Fp8, Int4, Int4Groups, Int8, Lazy, LinearWeights
from tests.unit.engine.weights.test_types import Memory

GROUPED = QuantConfig(Algorithm.W4A16_GPTQ, group_size=32)
ROUNDED = {
    Algorithm.W8A16: (Int8, numerics.int8_rows),
    Algorithm.W4A16: (Int4, numerics.int4_rows),
    Algorithm.FP8: (Fp8, numerics.fp8_rows),
}


def matrix(outputs: int, inputs: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0)).to(dtype)


def dense(w: Tensor) -> Dense:
    return Dense(Lazy.whole(Memory(w)))


def join(weights: LinearWeights | Deferred) -> LinearWeights:
    """All blocks of rows as one."""
    blocks = list(defer(weights).blocks())
    rows = {
        name: torch.cat([getattr(block, name) for block in blocks])
        for name in ("codes_NK", "scale_N", "scale_NR", "zero_NR")
        if isinstance(getattr(blocks[0], name, None), Tensor)
    }
    return dataclasses.replace(blocks[0], **rows)


@pytest.mark.parametrize("algorithm", ROUNDED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_precision_is_rounded(
    algorithm: Algorithm, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = matrix(21, 64, dtype)
    source = Memory(w)
    monkeypatch.setattr(Lazy.blocks, "__defaults__", (4 * w[0].nbytes,))
    deferred = quantize(Dense(Lazy.whole(source)), QuantConfig(algorithm))
    assert isinstance(deferred, Deferred)
    assert (deferred.outputs, deferred.inputs) == (21, 64)
    assert source.read_bytes == []
    kind, round_rows = ROUNDED[algorithm]
    codes, scale = round_rows(w)
    found = join(deferred)
    assert isinstance(found, kind) and isinstance(deferred.sketch, kind)
    assert torch.equal(found.codes_NK.float(), codes.float())
    assert torch.equal(found.scale_N, scale)
    assert deferred.sketch.codes_NK.dtype == codes.dtype
    assert deferred.sketch.codes_NK.is_meta and deferred.sketch.scale_N.shape == (21,)
    # Each row is read once, a few at a time.
    assert sum(source.read_bytes) == w.nbytes and len(source.read_bytes) == 6


@pytest.mark.parametrize("algorithm", ROUNDED)
def test_scales_do_not_depend_on_ranks(algorithm: Algorithm) -> None:
    config = ModelConfig(
        vocab_size=8,
        hidden_size=16,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        intermediate_size=64,
        max_positions=8,
        rms_norm_eps=1e-5,
        hidden_act="silu",
        tie_word_embeddings=False,
        rope=Rope(),
    )
    w = matrix(16, 64)
    whole = join(quantize(dense(w), QuantConfig(algorithm)))
    for rank in range(4):
        mapping = Mapping(world=4, rank=rank, tp=4)
        deferred = quantize(dense(w), QuantConfig(algorithm))
        part = join(shard_linear(deferred, Shard.FFN_IN, mapping, config))
        cols = slice(rank * 16, rank * 16 + 16)
        assert torch.equal(part.codes_NK.float(), whole.codes_NK[:, cols].float())
        assert torch.equal(part.scale_N, whole.scale_N)
        part = join(shard_linear(deferred, Shard.HEADS, mapping, config))
        rows = slice(rank * 4, rank * 4 + 4)
        assert torch.equal(part.codes_NK.float(), whole.codes_NK[rows].float())
        assert torch.equal(part.scale_N, whole.scale_N[rows])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("algorithm", ROUNDED)
def test_weights_that_no_engine_holds_are_refused(algorithm: Algorithm, bad: float) -> None:
    w = matrix(4, 64)
    w[2, 3] = bad
    deferred = quantize(dense(w), QuantConfig(algorithm))
    with pytest.raises(CheckpointError, match="memory: tensor w holds NaN or infinite values"):
        join(deferred)


def test_full_precision_stays_without_quantisation() -> None:
    weights = dense(matrix(4, 8))
    assert quantize(weights, QuantConfig()) is weights


@pytest.mark.parametrize(
    "quant, remedy",
    [
        (QuantConfig(Algorithm.W8A8_SQ, per_token=True), "hf_yi_convert.py --smoothquant"),
        (QuantConfig(Algorithm.W4A16_AWQ, group_size=128), "name an AWQ checkpoint"),
        (GROUPED, "name a GPTQ checkpoint"),
    ],
)
def test_modes_that_need_calibration_are_refused(quant: QuantConfig, remedy: str) -> None:
    with pytest.raises(UserError, match=remedy):
        quantize(dense(matrix(4, 128)), quant)


CODES = torch.zeros(4, 64, dtype=torch.int8)
NIBBLES = torch.zeros(4, 64, dtype=torch.uint8)
ONE = torch.ones(4)
INT8 = Int8(CODES, ONE)
STATIC_INT8 = Int8(CODES, ONE, 0.5)
SMOOTHED_INT8 = Int8(CODES, ONE, None, torch.ones(64))
INT4 = Int4(NIBBLES, ONE)
GROUPS = Int4Groups(NIBBLES, torch.ones(4, 2), 32)
AWQ = dataclasses.replace(GROUPS, pre_scale_K=torch.ones(64))
FP8 = Fp8(CODES.to(torch.float8_e4m3fn), ONE)

PER_TOKEN = QuantConfig(Algorithm.W8A8_SQ, per_token=True)


@pytest.mark.parametrize(
    "weights, quant",
    [
        (INT8, QuantConfig(Algorithm.W8A16)),
        (INT8, PER_TOKEN),
        (SMOOTHED_INT8, PER_TOKEN),
        (STATIC_INT8, QuantConfig(Algorithm.W8A8_SQ)),
        (INT4, QuantConfig(Algorithm.W4A16)),
        (GROUPS, GROUPED),
        (GROUPS, QuantConfig(Algorithm.W4A16_AWQ, group_size=32)),
        (AWQ, QuantConfig(Algorithm.W4A16_AWQ, group_size=32)),
        (FP8, QuantConfig(Algorithm.FP8)),
        (Fp8(FP8.codes_NK, ONE, 0.5), QuantConfig(Algorithm.FP8)),
    ],
)
def test_quantised_weights_that_fit_are_passed_on(
    weights: LinearWeights, quant: QuantConfig
) -> None:
    assert quantize(weights, quant) is weights
    later = defer(weights)
    assert quantize(later, quant) is later


@pytest.mark.parametrize(
    "weights, quant, found, wanted",
    [
        (GROUPS, QuantConfig(Algorithm.W8A16), "int4 in groups of 32", "w8a16"),
        (AWQ, GROUPED, "int4 in groups of 32 with AWQ's scales of the input", "w4a16_gptq g32"),
        (
            GROUPS,
            QuantConfig(Algorithm.W4A16_GPTQ, group_size=128),
            "int4 in groups of 32",
            "w4a16_gptq g128",
        ),
        (INT8, QuantConfig(), "int8", "none"),
        (INT8, QuantConfig(Algorithm.W8A8_SQ), "int8", "w8a8_sq"),
        (SMOOTHED_INT8, QuantConfig(Algorithm.W8A16), "int8 smoothed by SmoothQuant", "w8a16"),
        (STATIC_INT8, PER_TOKEN, "int8 with a calibrated scale of the input", "w8a8_sq per-token"),
        (FP8, QuantConfig(Algorithm.W4A16), "FP8", "w4a16"),
        (INT4, GROUPED, "int4 per-channel", "w4a16_gptq g32"),
    ],
)
def test_quantised_weights_that_do_not_fit_are_refused(
    weights: LinearWeights, quant: QuantConfig, found: str, wanted: str
) -> None:
    with pytest.raises(UserError) as error:
        quantize(weights, quant)
    assert str(error.value) == (
        f"the checkpoint's linear layers are {found} but the quantisation flags ask for "
        f"'{wanted}'; leave these flags out to build what the checkpoint is, or name the "
        "full-precision checkpoint it was made from"
    )


@pytest.mark.parametrize("weight_scale", [None, 0.01])
def test_calibrated_fp8(weight_scale: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    w = matrix(21, 64)
    source = Memory(w)
    monkeypatch.setattr(Lazy.blocks, "__defaults__", (4 * w[0].nbytes,))
    deferred = quantize_fp8(Dense(Lazy.whole(source), 0.25, weight_scale))
    assert source.read_bytes == []
    found = join(deferred.narrow_outputs(Span(3, 20)))
    scale = w.abs().max() / 448 if weight_scale is None else torch.tensor(weight_scale)
    expected = (w / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert isinstance(found, Fp8) and found.input_scale == 0.25
    assert torch.allclose(found.scale_N, scale.expand(17))
    assert torch.equal(found.codes_NK.float(), expected[3:20].float())


def test_smoother_by_hand() -> None:
    ranges = torch.tensor([16.0, 1.0, 0.0])
    q, k = torch.tensor([[1.0, -4.0, 0.0]]), torch.tensor([[-4.0, 1.0, 0.0]])
    found = smooth(ranges, [q, k], 0.5)
    # sqrt(16) / sqrt(4), sqrt(1) / sqrt(4), and the floor where both are zero.
    assert found.smoother_K.tolist() == pytest.approx([2.0, 0.5, 1e-5])
    assert found.ranges_K.tolist() == pytest.approx([8.0, 2.0, 0.0])
    assert smooth(ranges, [q, k], 0.0).smoother_K[:2].tolist() == pytest.approx([1 / 4, 1 / 4])
    assert smooth(ranges, [q, k], 1.0).smoother_K[:2].tolist() == pytest.approx([16.0, 1.0])


def test_a_column_of_zeros_has_a_finite_smoother() -> None:
    found = smooth(torch.tensor([100.0]), [torch.zeros(3, 1)], 0.8)
    # 100^0.8 / 0.00001^0.2
    assert found.smoother_K.tolist() == pytest.approx([398.107])
    assert torch.isfinite(found.ranges_K).all()


def test_smoothing_changes_no_product() -> None:
    x, norm = matrix(5, 32).double(), matrix(1, 32)[0].abs() + 0.1
    weights = [matrix(6, 32), matrix(3, 32, torch.bfloat16)]
    found = smooth((x * norm).abs().amax(0), weights, 0.7)
    smoothed_norm = smooth_norm(norm, found.smoother_K)
    assert torch.allclose((x * smoothed_norm).abs().amax(0).float(), found.ranges_K)
    for w in weights:
        before = (x * norm) @ w.double().T
        after = (x * smoothed_norm) @ smooth_weight(w, found.smoother_K).double().T
        assert torch.allclose(before, after, rtol=1e-5, atol=1e-6)
