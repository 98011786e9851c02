"""Truth: golden.safetensors, which compressed-tensors itself dequantised (`python
make_compressed_tensors.py` in tests/data/quantized), and words written out by hand.
"""

from __future__ import annotations

import copy
import json

import pytest
import torch

from engine.checkpoint.compressed_tensors import unpack_inputs
from engine.checkpoint.hf import open_hf
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
    word,
)

K_PROJ = BLOCK + "self_attn.k_proj"
W4A16_GROUP = QuantConfig(Algorithm.W4A16_GPTQ, group_size=128)
W8A8 = QuantConfig(Algorithm.W8A8_SQ, per_token=True, per_channel=True, kv=KVStorage.INT8)

# Sample -> what it is, its kind of weights, and the error of rounding that its bits allow.
SAMPLES = {
    "w4a16": (W4A16_GROUP, Int4Groups, 0.15),
    "w4a16-asym": (W4A16_GROUP, Int4Groups, 0.15),
    "w4a16-channel": (W4A16_GROUP, Int4Groups, 0.15),
    "w8a8": (W8A8, Int8, 0.01),
    "fp8-dynamic": (QuantConfig(Algorithm.FP8, per_token=True, per_channel=True), Fp8, 0.03),
    "fp8-static": (QuantConfig(Algorithm.FP8, kv=KVStorage.FP8), Fp8, 0.03),
}


def opened(folder):
    checkpoint = open_hf(folder)
    try:
        checkpoint.check()
    except CheckpointError:
        checkpoint.close()
        raise
    return checkpoint


@pytest.mark.parametrize("name", SAMPLES)
def test_samples_of_llm_compressor(name):
    quant, kind, error = SAMPLES[name]
    sample = f"compressed-tensors-{name}"
    with opened(DATA / sample) as checkpoint, open_hf(DATA / "base") as base:
        assert checkpoint.quant == quant
        for stem in LINEARS:
            linear = checkpoint.linear(BLOCK + stem)
            assert isinstance(linear, kind)
            truth_NK = dequantise(base.linear(BLOCK + stem))
            assert relative_error(dequantise(linear), truth_NK) < error
            if kind is not Int4Groups:
                assert (linear.input_scale is None) == quant.per_token
        # The tool computes in bfloat16, of which the exact product is rounded to the same value.
        found = dequantise(checkpoint.linear(K_PROJ)).bfloat16()
        assert torch.equal(found, golden()[sample])


@pytest.mark.parametrize("name", ["w8a8", "fp8-static"])
def test_kv_scales(name):
    """The base model has one KV head, so a scale per head is one value, too."""
    with opened(DATA / f"compressed-tensors-{name}") as checkpoint:
        k_scale, v_scale = checkpoint.kv_scales(0)
        for found, letter in ((k_scale, "k"), (v_scale, "v")):
            assert found.dtype == torch.float32 and found.shape == (1,)
            assert 0.001 < found.item() < 0.1, letter
        assert k_scale != v_scale
        assert not any("scale" in tensor for tensor in checkpoint.tensors)
    with opened(DATA / "compressed-tensors-fp8-dynamic") as checkpoint:
        assert checkpoint.kv_scales(0) is None


def test_words_and_zero_points():
    words_NW = torch.tensor([[0x76543210, word(8, 9, 10, 11, 12, 13, 14, 15)]], dtype=torch.int32)
    assert unpack_inputs(words_NW).tolist() == [list(range(16))]


def test_zero_points_are_packed_along_the_outputs(tmp_path):
    def change(state) -> None:
        # Outputs 8…15 in the second of the two groups, inputs 128…135 of output 9.
        state[K_PROJ + ".weight_zero_point"][1, 1] = word(0, 15, 8, 7, 1, 2, 3, 4)
        state[K_PROJ + ".weight_packed"][9, 16] = word(0, 15, 8, 7, 1, 2, 3, 4)
        state[K_PROJ + ".weight_scale"][9, 1] = 0.5

    folder = copy_sample(tmp_path, "compressed-tensors-w4a16-asym", tensors=change)
    with opened(folder) as checkpoint:
        linear = checkpoint.linear(K_PROJ)
    assert linear.zero_NR[8:16, 1].tolist() == [0, 15, 8, 7, 1, 2, 3, 4]
    # Output 9 has zero 15, so its weights are (code - 15) · ½.
    expected = [-7.5, 0, -3.5, -4, -7, -6.5, -6, -5.5]
    assert dequantise(linear)[9, 128:136].tolist() == expected


def test_layers_with_one_input_share_the_largest_scale(tmp_path):
    def change(state) -> None:
        for value, name in enumerate(("q", "k", "v"), start=1):
            state[f"{BLOCK}self_attn.{name}_proj.input_scale"][:] = value
        state[BLOCK + "self_attn.o_proj.input_scale"][:] = 0.25

    folder = copy_sample(tmp_path, "compressed-tensors-fp8-static", tensors=change)
    with opened(folder) as checkpoint:
        scales = [checkpoint.linear(f"{BLOCK}self_attn.{n}_proj").input_scale for n in "qkvo"]
    assert scales == [3, 3, 3, 0.25]


def edit_config(folder, sample, edit):
    copy_sample(folder, f"compressed-tensors-{sample}")
    values = json.loads((folder / "config.json").read_text())
    edit(values["quantization_config"])
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def in_group(**parts):
    """An edit of the one group's parts; a dict updates that part."""

    def edit(settings) -> None:
        [group] = settings["config_groups"].values()
        for key, value in parts.items():
            if isinstance(value, dict) and group.get(key):
                group[key].update(value)
            else:
                group[key] = value

    return edit


def at_top(**values):
    return lambda settings: settings.update(values)


def add_group(settings) -> None:
    settings["config_groups"]["group_1"] = copy.deepcopy(settings["config_groups"]["group_0"])


REFUSED = [
    ("w4a16", in_group(format="marlin-24"), "group_0.format 'marlin-24' is not supported"),
    ("w4a16", in_group(format="nvfp4-pack-quantized"), "format 'nvfp4-pack-quantized' is not"),
    ("w4a16", in_group(format="float-quantized"), "input_activations None is not supported"),
    ("w4a16", in_group(weights={"num_bits": 8}), r"group_0.weights.num_bits 8 .*supported: 4"),
    ("w4a16", in_group(weights={"actorder": "group"}), "weights.actorder 'group' is not"),
    ("w4a16", in_group(weights={"actorder": "dynamic"}), "weights.actorder 'dynamic' is not"),
    ("w4a16", in_group(weights={"strategy": "tensor_group"}), "strategy 'tensor_group' is not"),
    ("w4a16", in_group(weights={"group_size": 48}), "weights.group_size 48 does not divide"),
    ("w4a16", in_group(weights={"group_size": None}), "weights.group_size None is not supported"),
    ("w4a16", in_group(input_activations={"num_bits": 8}), "input_activations .* is not support"),
    ("w4a16", in_group(output_activations={"num_bits": 8}), "output_activations .* is not supp"),
    ("w4a16", in_group(targets=["re:.*q_proj"]), "targets leaves model.layers.0.self_attn.k_proj"),
    ("w4a16", in_group(targets=["re:("]), r"targets holds '\(', which is not a regular"),
    (
        "w4a16",
        at_top(ignore=["lm_head", "re:.*down_proj"]),
        "ignore leaves .*mlp.down_proj .* alike",
    ),
    ("w4a16", at_top(ignore=[BLOCK + "mlp.up_proj"]), "ignore leaves model.layers.0.mlp.up_proj"),
    ("w4a16", at_top(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config .* is not"),
    ("w4a16", at_top(transform_config={"config_groups": {}}), "transform_config .* is not support"),
    ("w4a16", at_top(quantization_status="frozen"), "quantization_status 'frozen' is not"),
    ("w4a16", at_top(config_groups=[]), "config_groups .*supported: an object of settings"),
    ("w4a16", add_group, r"config_groups has 2 groups \(group_0, group_1\).*with one scheme"),
    ("w8a8", in_group(weights={"strategy": "group"}), "weights.strategy 'group' is not supported"),
    ("w8a8", in_group(weights={"symmetric": False}), "weights.symmetric False is not supported"),
    ("w8a8", in_group(input_activations={"symmetric": False}), "activations.symmetric False is"),
    ("w8a8", in_group(input_activations={"dynamic": "local"}), "dynamic 'local' is not supported"),
    ("w8a8", in_group(input_activations={"strategy": "tensor"}), r"strategy 'tensor' .*: token\)"),
    ("fp8-static", in_group(weights={"strategy": "block"}), "weights.strategy 'block' is not"),
    ("fp8-static", in_group(weights={"type": "int"}), r"weights.type 'int' .*supported: float\)"),
    ("fp8-static", at_top(kv_cache_scheme={"num_bits": 4}), "kv_cache_scheme.num_bits 4 is not"),
    (
        "fp8-static",
        at_top(kv_cache_scheme={"num_bits": 8, "type": "float", "dynamic": True}),
        "kv_cache_scheme.dynamic True is not supported",
    ),
    ("fp8-static", at_top(kv_cache_scheme=None), "k_scale' has no place in a Llama network"),
    (
        "fp8-dynamic",
        in_group(weights={"strategy": "tensor"}),
        r"\[128, 1\] but the config needs \[1\]",
    ),
]


@pytest.mark.parametrize("sample, edit, message", REFUSED)
def test_settings_that_are_refused(tmp_path, sample, edit, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        opened(edit_config(tmp_path, sample, edit))
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "edit",
    [
        in_group(format=None),
        in_group(targets=["re:.*_proj$"]),
        in_group(targets=[BLOCK + name for name in LINEARS]),
        in_group(weights={"actorder": None}),
        at_top(sparsity_config={"format": "dense"}, ignore=["re:.*lm_head"]),
    ],
)
def test_settings_that_change_nothing(tmp_path, edit):
    with opened(edit_config(tmp_path, "w4a16", edit)) as checkpoint:
        found = dequantise(checkpoint.linear(K_PROJ)).bfloat16()
        assert torch.equal(found, golden()["compressed-tensors-w4a16"])


def test_names_of_older_versions(tmp_path):
    """compression_config instead of quantization_config, and output_scale on the projections."""

    def change(state) -> None:
        for name in "kv":
            old = f"{BLOCK}self_attn.{name}_proj.output_scale"
            state[old] = state.pop(f"{BLOCK}self_attn.{name}_scale")

    copy_sample(tmp_path, "compressed-tensors-w8a8", tensors=change)
    values = json.loads((tmp_path / "config.json").read_text())
    values["compression_config"] = values.pop("quantization_config")
    del values["compression_config"]["quant_method"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    with opened(tmp_path) as checkpoint, opened(DATA / "compressed-tensors-w8a8") as expected:
        for found, scale in zip(checkpoint.kv_scales(0), expected.kv_scales(0), strict=True):
            assert torch.equal(found, scale)


@pytest.mark.parametrize("is_ignored", [True, False])
def test_only_the_cache_is_quantised(tmp_path, is_ignored):
    """Full-precision linear layers, left out by name or without any scheme."""

    def edit(settings) -> None:
        if is_ignored:
            settings["ignore"] = ["re:.*"]
        else:
            settings["config_groups"] = {}

    with open_hf(DATA / "base") as base:
        weights = {name: source.read() for name, source in base.tensors.items()}

    def change(state) -> None:
        scales = {name: t for name, t in state.items() if name.endswith(("k_scale", "v_scale"))}
        state.clear()
        state.update(weights | scales)

    folder = edit_config(tmp_path, "fp8-static", edit)
    values = (folder / "config.json").read_text()
    copy_sample(folder, "compressed-tensors-fp8-static", tensors=change)
    (folder / "config.json").write_text(values)
    with opened(folder) as checkpoint:
        assert checkpoint.quant == QuantConfig(kv=KVStorage.FP8)
        linear = checkpoint.linear(K_PROJ)
        assert isinstance(linear, Dense)
        assert torch.equal(linear.weight_NK.read(), weights[K_PROJ + ".weight"])
        assert checkpoint.kv_scales(0) is not None


def drop(*names):
    return lambda state: [state.pop(f"{BLOCK}self_attn.{name}") for name in names]


@pytest.mark.parametrize(
    "sample, change, message",
    [
        (
            "w8a8",
            drop("k_scale", "v_scale"),
            "cache is quantised to int8 but the scales of layer 0",
        ),
        ("w8a8", drop("v_scale"), "k_scale and v_scale. are not both there"),
        ("fp8-static", drop("k_scale"), "cache is quantised to fp8 but the scales of layer 0"),
        (
            "fp8-static",
            lambda s: s.update({BLOCK + "self_attn.k_scale": torch.ones(3)}),
            r"k_scale' has shape \[3\] but the config needs \[1\]",
        ),
        (
            "w4a16",
            lambda s: s[K_PROJ + ".weight_shape"].fill_(64),
            r"k_proj.weight_shape says \[64, 64\] but the config needs \[64, 256\]",
        ),
        (
            "fp8-static",
            lambda s: s.update({K_PROJ + ".weight": s[K_PROJ + ".weight"].bfloat16()}),
            "k_proj.weight' is stored as bfloat16 where its format needs float8_e4m3fn",
        ),
        (
            "w4a16",
            lambda s: s.update({K_PROJ + ".weight_g_idx": torch.zeros(256)}),
            "weight_g_idx' has no place",
        ),
    ],
)
def test_checking_is_total(tmp_path, sample, change, message):
    with pytest.raises(CheckpointError, match=message):
        opened(copy_sample(tmp_path, f"compressed-tensors-{sample}", tensors=change))


def test_an_fp8_cache_may_come_without_scales(tmp_path):
    folder = copy_sample(
        tmp_path, "compressed-tensors-fp8-static", tensors=drop("k_scale", "v_scale")
    )
    with opened(folder) as checkpoint:
        assert checkpoint.quant.kv is KVStorage.FP8
        assert checkpoint.kv_scales(0) is None


@pytest.mark.parametrize("suffix", ["weight_scale", "input_scale"])
@pytest.mark.parametrize("value", [float("nan"), 0.0, -2.0])
def test_scales_that_cannot_be_right(tmp_path, suffix, value):
    def change(state) -> None:
        state[f"{K_PROJ}.{suffix}"][:] = value

    folder = copy_sample(tmp_path, "compressed-tensors-fp8-static", tensors=change)
    with (
        opened(folder) as checkpoint,
        pytest.raises(CheckpointError, match=f"k_proj.{suffix}' holds {value:g} where only finite"),
    ):
        checkpoint.linear(K_PROJ)


def test_codes_that_are_nan(tmp_path):
    def change(state) -> None:
        state[K_PROJ + ".weight"].view(torch.uint8)[5, 5] = 0xFF

    folder = copy_sample(tmp_path, "compressed-tensors-fp8-static", tensors=change)
    with opened(folder) as checkpoint, pytest.raises(CheckpointError, match="weight' holds NaN;"):
        checkpoint.linear(K_PROJ)


def test_static_int8_activations(tmp_path):
    """One calibrated scale per input instead of one per token."""

    def change(state) -> None:
        for name in LINEARS:
            state[f"{BLOCK}{name}.input_scale"] = torch.tensor([0.125], dtype=torch.bfloat16)

    edit = in_group(input_activations={"dynamic": False, "strategy": "tensor"})
    folder = edit_config(tmp_path, "w8a8", edit)
    values = (folder / "config.json").read_text()
    copy_sample(folder, "compressed-tensors-w8a8", tensors=change)
    (folder / "config.json").write_text(values)
    with opened(folder) as checkpoint:
        assert not checkpoint.quant.per_token and checkpoint.quant.per_channel
        assert checkpoint.linear(K_PROJ).input_scale == 0.125
