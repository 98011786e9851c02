"""Truth: golden.safetensors, where ModelOpt's own quantisers rounded a matrix (`python
make_modelopt.py` in tests/data/quantized), and bytes written out by hand.
"""

from __future__ import annotations

import json

import pytest
import torch

from engine.checkpoint.hf import open_hf
from engine.checkpoint.modelopt import unpack_rows
from engine.errors import CheckpointError
from engine.quant import Algorithm, KVStorage, QuantConfig
from engine.weights.types import Dense, Fp8, Int4Groups, Int8
from tests.unit.engine.checkpoint.quantised_makers import (
    BLOCK,
    DATA,
    LINEARS,
    copy_sample,
    dequantise,
    golden,
    relative_error,
)

O_PROJ = BLOCK + "self_attn.o_proj"

# Sample -> what it is, its kind of weights, the error of rounding that its bits allow (more where
# smoothing makes the columns unequal), and the
# distance to ModelOpt's own result (the export divides in bfloat16, so some values move a step).
SAMPLES = {
    "modelopt-fp8-kv": (QuantConfig(Algorithm.FP8, kv=KVStorage.FP8), Fp8, 0.03, 0.02),
    "modelopt-int4-awq": (QuantConfig(Algorithm.W4A16_AWQ, group_size=128), Int4Groups, 0.15, 0.01),
    "modelopt-int8-sq": (QuantConfig(Algorithm.W8A8_SQ, per_channel=True), Int8, 0.04, 0.001),
}
NORMS = {f"self_attn.{name}_proj": "input_layernorm" for name in "qkv"} | {
    f"mlp.{name}_proj": "post_attention_layernorm" for name in ("gate", "up")
}
SETTINGS_FILE = {"file": "hf_quant_config.json", "section": "quantization"}


def opened(folder):
    checkpoint = open_hf(folder)
    try:
        checkpoint.check()
    except CheckpointError:
        checkpoint.close()
        raise
    return checkpoint


def smoothed(linear) -> torch.Tensor:
    """The stored matrix, without the factor of the input."""
    weight_NK = dequantise(linear)
    if isinstance(linear, Int4Groups) and linear.pre_scale_K is not None:
        return weight_NK / linear.pre_scale_K
    return weight_NK * linear.smoother_K if isinstance(linear, Int8) else weight_NK


@pytest.mark.parametrize("name", SAMPLES)
def test_samples_of_modelopt(name):
    quant, kind, rounding, distance = SAMPLES[name]
    with opened(DATA / name) as checkpoint, open_hf(DATA / "base") as base:
        assert checkpoint.quant == quant
        for stem in LINEARS:
            linear = checkpoint.linear(BLOCK + stem)
            assert isinstance(linear, kind)
            weight_NK = dequantise(linear)
            if stem in NORMS:
                # A norm may have taken the factor of the inputs behind it.
                norm = f"{BLOCK}{NORMS[stem]}.weight"
                weight_NK *= checkpoint.tensors[norm].read() / base.tensors[norm].read().float()
            assert relative_error(weight_NK, dequantise(base.linear(BLOCK + stem))) < rounding
        assert relative_error(smoothed(checkpoint.linear(O_PROJ)), golden()[name]) < distance


def test_static_scales():
    with opened(DATA / "modelopt-int8-sq") as checkpoint:
        linears = [checkpoint.linear(BLOCK + name) for name in LINEARS]
    # ModelOpt scales the inputs to a range of 1, so their scale is 1/127.
    for linear in linears:
        assert linear.input_scale == pytest.approx(1 / 127, rel=1e-6)
        assert linear.smoother_K.shape == (linear.inputs,)
    assert torch.equal(linears[0].smoother_K, linears[2].smoother_K)


def test_kv_scales_are_amax_by_448():
    k_amax, v_amax = golden()["modelopt-fp8-kv.kv_amax"]
    with opened(DATA / "modelopt-fp8-kv") as checkpoint:
        k_scale, v_scale = checkpoint.kv_scales(0)
    assert k_scale.shape == (1,) and k_scale.dtype == torch.float32
    assert k_scale.item() == pytest.approx(k_amax.item() / 448, rel=1e-6)
    assert v_scale.item() == pytest.approx(v_amax.item() / 448, rel=1e-6)
    with opened(DATA / "modelopt-int4-awq") as checkpoint:
        assert checkpoint.kv_scales(0) is None


def test_where_awq_left_a_factor():
    """Norms took the factors of q, k, v, gate and up; the other two keep theirs."""
    with opened(DATA / "modelopt-int4-awq") as checkpoint:
        factors = {name: checkpoint.linear(BLOCK + name).pre_scale_K for name in LINEARS}
        expected_K = checkpoint.linear(O_PROJ).pre_scale_K
    kept = {name for name, factor_K in factors.items() if factor_K is not None}
    assert kept == {"self_attn.o_proj", "mlp.down_proj"}
    assert expected_K.dtype == torch.float32 and expected_K.shape == (128,)


def test_a_byte_holds_two_rows():
    # 0x7f: even row -1 (15 in two's complement), odd row 7. 0x80: even row 0, odd row -8.
    packed_MK = torch.tensor([[0x7F, 0x80, 0x19], [0x00, 0xF8, 0x21]], dtype=torch.uint8)
    values = unpack_rows(packed_MK).int() - 8
    assert values.tolist() == [[-1, 0, -7], [7, -8, 1], [0, -8, 1], [0, -1, 2]]


def test_settings_in_config_json_alone(tmp_path):
    for name in SAMPLES:
        folder = copy_sample(tmp_path / name, name)
        (folder / "hf_quant_config.json").unlink()
        with opened(folder) as checkpoint:
            assert checkpoint.quant == SAMPLES[name][0]


def test_the_cache_in_config_json_alone(tmp_path):
    folder = copy_sample(
        tmp_path, "modelopt-fp8-kv", settings={"kv_cache_scheme": {"num_bits": 4, "type": "float"}}
    )
    (folder / "hf_quant_config.json").unlink()
    with pytest.raises(CheckpointError, match="kv_cache_scheme.num_bits 4 is not supported"):
        opened(folder)


def test_settings_in_hf_quant_config_alone(tmp_path):
    """As older versions export."""
    folder = copy_sample(tmp_path, "modelopt-int4-awq")
    values = json.loads((folder / "config.json").read_text())
    del values["quantization_config"]
    (folder / "config.json").write_text(json.dumps(values))
    with opened(folder) as checkpoint:
        assert checkpoint.quant == SAMPLES["modelopt-int4-awq"][0]
    (folder / "hf_quant_config.json").write_text("{}")
    with pytest.raises(
        CheckpointError, match=r"quantization None .*supported: ModelOpt's settings"
    ):
        open_hf(folder)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"quant_algo": "NVFP4"}, r"quantization.quant_algo 'NVFP4' .*supported: null, FP8, W4A16"),
        ({"quant_algo": "W4A8_AWQ"}, "quant_algo 'W4A8_AWQ' is not supported"),
        ({"quant_algo": "FP8_PB_WO"}, "quant_algo 'FP8_PB_WO' is not supported"),
        ({"quant_algo": "MIXED_PRECISION"}, "quant_algo 'MIXED_PRECISION' is not supported"),
        ({"kv_cache_quant_algo": "NVFP4"}, "kv_cache_quant_algo 'NVFP4' is not supported"),
        ({"has_zero_point": True}, "has_zero_point True is not supported"),
        ({"exclude_modules": ["*.mlp.*"]}, "exclude_modules leaves .*mlp.gate_proj .* alike"),
        ({"exclude_modules": [BLOCK + "mlp"]}, "exclude_modules leaves model.layers.0.mlp.gate"),
        ({"exclude_modules": "lm_head"}, r"exclude_modules .*supported: a list of names\)"),
        ({"group_size": 64}, r"weight_scale' has shape \[128, 2\] but the config needs \[128, 4\]"),
        ({"group_size": 1.5}, r"quantization.group_size 1.5 .*a whole number"),
        ({"quant_algo": "FP8"}, "pre_quant_scale' has no place in a Llama network"),
        ({"quant_algo": None}, "has no place in a Llama network"),
    ],
)
def test_settings_that_are_refused(tmp_path, settings, message):
    folder = copy_sample(tmp_path, "modelopt-int4-awq", settings=settings, **SETTINGS_FILE)
    with pytest.raises(CheckpointError, match=message) as caught:
        opened(folder)
    assert str(tmp_path) in str(caught.value)


def test_only_the_cache_is_quantised(tmp_path):
    with open_hf(DATA / "base") as base:
        weights = {name: source.read() for name, source in base.tensors.items()}

    def change(state) -> None:
        scales = {name: t for name, t in state.items() if name.endswith(("k_scale", "v_scale"))}
        state.clear()
        state.update(weights | scales)

    settings = {"quant_algo": None}
    folder = copy_sample(
        tmp_path, "modelopt-fp8-kv", tensors=change, settings=settings, **SETTINGS_FILE
    )
    with opened(folder) as checkpoint:
        assert checkpoint.quant == QuantConfig(kv=KVStorage.FP8)
        assert isinstance(checkpoint.linear(O_PROJ), Dense)
        assert checkpoint.kv_scales(0) is not None


@pytest.mark.parametrize("sample", ["modelopt-int8-sq", "modelopt-int4-awq"])
def test_factors_that_cannot_be_joined(tmp_path, sample):
    stems = [f"{BLOCK}self_attn.{name}_proj" for name in "qkv"]

    def change(state) -> None:
        for stem in stems:
            state[stem + ".pre_quant_scale"] = torch.ones(256, dtype=torch.bfloat16)

    def differ(state) -> None:
        change(state)
        state[stems[1] + ".pre_quant_scale"][7] = 2

    with opened(copy_sample(tmp_path, sample, tensors=change)) as checkpoint:
        checkpoint.linear(stems[0])
    message = "layers that share the input of .*q_proj do not share its pre_quant_scale .*export"
    with (
        opened(copy_sample(tmp_path, sample, tensors=differ)) as checkpoint,
        pytest.raises(CheckpointError, match=message),
    ):
        checkpoint.linear(stems[0])


def test_a_factor_that_only_one_layer_has(tmp_path):
    def change(state) -> None:
        state[BLOCK + "mlp.up_proj.pre_quant_scale"] = torch.ones(256, dtype=torch.bfloat16)

    with opened(copy_sample(tmp_path, "modelopt-int4-awq", tensors=change)) as checkpoint:
        for name in ("gate_proj", "up_proj"):
            with pytest.raises(CheckpointError, match="do not share its pre_quant_scale"):
                checkpoint.linear(f"{BLOCK}mlp.{name}")


@pytest.mark.parametrize("value", [float("inf"), 0.0, -1.0])
@pytest.mark.parametrize("suffix", ["weight_scale", "pre_quant_scale"])
def test_scales_that_cannot_be_right(tmp_path, suffix, value):
    def change(state) -> None:
        state[f"{O_PROJ}.{suffix}"].view(-1)[3] = value

    with (
        opened(copy_sample(tmp_path, "modelopt-int4-awq", tensors=change)) as checkpoint,
        pytest.raises(CheckpointError, match=f"o_proj.{suffix}' holds {value:g} where only"),
    ):
        checkpoint.linear(O_PROJ)
