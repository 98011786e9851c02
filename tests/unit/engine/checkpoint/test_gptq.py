from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from engine.checkpoint.gptq import Gptq, unpack_nibbles
from engine.checkpoint.hf import open_hf
from engine.checkpoint.quant_groups import Groups
from engine.checkpoint.quantised import StoredLinear
from engine.errors import CheckpointError
from engine.quant import Algorithm, QuantConfig
from engine.weights.types import Int4Groups
from tests.unit.engine.checkpoint.gptq_makers import SHAPE, make_state
from tests.unit.engine.checkpoint.makers import write_folder
from tests.unit.engine.checkpoint.quantised_makers import (
    BLOCK,
    DATA,
    LINEARS,
    Held,
    copy_sample,
    dequantise,
    relative_error,
    word,
)

SAMPLE = "gptqmodel-gptq"
SETTINGS = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}


def opened(folder):
    checkpoint = open_hf(folder)
    try:
        checkpoint.check()
    except CheckpointError:
        checkpoint.close()
        raise
    return checkpoint


def write_gptq(folder, state, **settings):
    return write_folder(folder, state, **SHAPE, quantization_config={**SETTINGS, **settings})


def unpack_one(zero_word: int, code_words: list[int], *, bias: int, sym: bool) -> Int4Groups:
    """A layer of 8 outputs and 32 inputs in one group, all of whose rows of words are given."""
    tensors = {
        "qweight": torch.tensor([code_words] * 4, dtype=torch.int32),
        "qzeros": torch.tensor([[zero_word]], dtype=torch.int32),
        "scales": torch.ones(1, 8, dtype=torch.float16),
    }
    held = {name: Held(name, values) for name, values in tensors.items()}
    return Gptq(Groups(32, 32), bias, sym=sym).unpack(StoredLinear("q", 8, 32, held, (held,)))


def test_the_lowest_nibble_comes_first():
    assert word(0, 1, 2, 3, 4, 5, 6, 7) == 0x76543210
    words = torch.tensor([[0x76543210, -0x01234568]], dtype=torch.int32)
    # -0x01234568 is 0xfedcba98.
    assert unpack_nibbles(words).tolist() == [list(range(16))]


@pytest.mark.parametrize(
    "bias, zeros",
    [
        # A stored zero is one less than the real one, so that a stored 15 means 16.
        (1, [1, 2, 7, 8, 9, 15, 16, 10]),
        (0, [0, 1, 6, 7, 8, 14, 15, 9]),
    ],
)
def test_zero_points(bias, zeros):
    stored = word(0, 1, 6, 7, 8, 14, 15, 9)
    codes = [word(*[value] * 8) for value in (0, 3, 15, 8, 9, 1, 2, 7)]
    linear = unpack_one(stored, codes, bias=bias, sym=False)
    assert linear.zero_NR.flatten().tolist() == zeros
    assert linear.codes_NK[:, 0].tolist() == [0, 3, 15, 8, 9, 1, 2, 7]
    expected = [code - zero for code, zero in zip((0, 3, 15, 8, 9, 1, 2, 7), zeros, strict=True)]
    assert dequantise(linear)[:, 31].tolist() == expected


def test_symmetric_zeros_are_left_out_and_checked():
    linear = unpack_one(0x77777777, [0] * 8, bias=1, sym=True)
    assert linear.zero_NR is None
    assert (dequantise(linear) == -8).all()
    with pytest.raises(CheckpointError, match="qzeros holds zero points other than 8 although"):
        unpack_one(0x77777776, [0] * 8, bias=1, sym=True)


def test_sample_of_gptqmodel():
    base = load_file(DATA / "gptqmodel-base.safetensors")
    with opened(DATA / SAMPLE) as checkpoint:
        assert checkpoint.quant == QuantConfig(Algorithm.W4A16_GPTQ, group_size=128)
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj"):
            linear = checkpoint.linear(BLOCK + name)
            assert linear.zero_NR is None and linear.pre_scale_K is None
            truth_NK = base[f"{BLOCK}{name}.weight"]
            assert linear.codes_NK.shape == truth_NK.shape
            assert relative_error(dequantise(linear), truth_NK) < 0.15
            # The order of AWQ's words, taken by mistake.
            swapped = linear.codes_NK.unflatten(1, (-1, 8))[..., [0, 4, 1, 5, 2, 6, 3, 7]]
            wrong = Int4Groups(swapped.flatten(1), linear.scale_NR, linear.group_size)
            assert relative_error(dequantise(wrong), truth_NK) > 1


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize(
    "group, checkpoint_format, bias",
    [(32, "gptq", 1), (32, "gptq_v2", 0), (32, None, 1), (-1, "gptq", 1)],
)
def test_every_linear_of_a_tiny_model(tmp_path, group, checkpoint_format, bias, sym):
    state, weights = make_state(group, sym=sym, bias=bias)
    write_gptq(tmp_path, state, group_size=group, checkpoint_format=checkpoint_format, sym=sym)
    with opened(tmp_path) as checkpoint:
        # A whole row is stored as groups of the engine, all with the row's scale.
        assert checkpoint.quant.group_size == 32
        for stem, weight_NK in weights.items():
            linear = checkpoint.linear(stem)
            assert (linear.zero_NR is None) == sym
            assert linear.scale_NR.shape == (linear.outputs, linear.inputs // 32)
            assert torch.equal(dequantise(linear), weight_NK), stem


def test_a_long_group_becomes_several_of_the_engine(tmp_path):
    shape = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 128}
    state, weights = make_state(256, **shape)
    config = {**SHAPE, **shape}
    write_folder(tmp_path, state, **config, quantization_config={**SETTINGS, "group_size": 256})
    with opened(tmp_path) as checkpoint:
        assert checkpoint.quant.group_size == 128
        stem = BLOCK + "mlp.down_proj"
        assert torch.equal(dequantise(checkpoint.linear(stem)), weights[stem])


def test_layers_are_told_apart(tmp_path):
    state, weights = make_state(32, num_hidden_layers=2)
    config = {**SHAPE, "num_hidden_layers": 2}
    write_folder(tmp_path, state, **config, quantization_config=SETTINGS)
    stems = [f"model.layers.{layer}.mlp.down_proj" for layer in (0, 1)]
    assert not torch.equal(weights[stems[0]], weights[stems[1]])
    with opened(tmp_path) as checkpoint:
        for stem in stems:
            assert torch.equal(dequantise(checkpoint.linear(stem)), weights[stem])


def test_settings_of_older_autogptq(tmp_path):
    """quantize_config.json and nothing in config.json; no group index in the weights."""
    state, weights = make_state(32)
    write_folder(tmp_path, {n: t for n, t in state.items() if not n.endswith("g_idx")}, **SHAPE)
    (tmp_path / "quantize_config.json").write_text(
        json.dumps({"bits": 4, "group_size": 32, "damp_percent": 0.01, "desc_act": False})
    )
    stem = BLOCK + "mlp.up_proj"
    with opened(tmp_path) as checkpoint:
        assert torch.equal(dequantise(checkpoint.linear(stem)), weights[stem])


def test_activation_order(tmp_path):
    state, weights = make_state(32)
    stem = BLOCK + "self_attn.o_proj"
    write_gptq(tmp_path, state, desc_act=True)
    with opened(tmp_path) as checkpoint:
        assert torch.equal(dequantise(checkpoint.linear(stem)), weights[stem])
    state[stem + ".g_idx"] = state[stem + ".g_idx"].roll(1)
    for desc_act in (True, False):
        write_gptq(tmp_path, state, desc_act=desc_act)
        message = "o_proj.g_idx does not assign 32 consecutive .* desc_act false, or with static"
        with pytest.raises(CheckpointError, match=message):
            opened(tmp_path)


def test_a_bias_must_be_zero(tmp_path):
    state, weights = make_state(32)
    stem = BLOCK + "self_attn.v_proj"
    state[stem + ".bias"] = torch.zeros(32, dtype=torch.float16)
    write_gptq(tmp_path, state)
    with opened(tmp_path) as checkpoint:
        assert torch.equal(dequantise(checkpoint.linear(stem)), weights[stem])
    state[stem + ".bias"][3] = 0.5
    write_gptq(tmp_path, state)
    with opened(tmp_path) as checkpoint, pytest.raises(CheckpointError, match="bias' is a bias"):
        checkpoint.linear(stem)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"bits": 8}, r"bits 8 is not supported \(supported: 4\); quantise the model again"),
        ({"bits": 3}, "bits 3 is not supported"),
        ({"bits": 2}, "bits 2 is not supported"),
        ({"checkpoint_format": "marlin"}, r"checkpoint_format 'marlin' .* \(supported: gptq, gptq"),
        ({"checkpoint_format": None, "format": "bitblas"}, "format 'bitblas' is not supported"),
        ({"is_marlin_format": True}, "is_marlin_format True is not supported"),
        ({"pack_dtype": "int64"}, "pack_dtype 'int64' is not supported"),
        ({"lm_head": True}, "lm_head True is not supported .* without lm_head"),
        ({"sym": 1}, "sym 1 is not supported"),
        ({"dynamic": {"-:.*k_proj": {}}}, "dynamic '-:.*k_proj' treats some linear layers"),
        ({"dynamic": {r"+:.*\.0\.": {"bits": 8}}}, "treats some linear layers differently"),
        ({"dynamic": {"-:(": {}}}, r"dynamic holds '\(', which is not a regular expression"),
        ({"dynamic": ["-:x"]}, r"dynamic .* \(supported: an object of settings\)"),
        (
            {"modules_in_block_to_quantize": [["self_attn.q_proj"], ["mlp.up_proj"]]},
            "modules_in_block_to_quantize leaves model.layers.0.self_attn.k_proj .* alike",
        ),
        ({"modules_in_block_to_quantize": "mlp"}, r"\(supported: a list\)"),
        ({"group_size": 100}, "group_size 100 does not divide the 256 inputs"),
        ({"group_size": 64}, r"qzeros' has shape \[2, 32\] but the config needs \[4, 32\]"),
        ({"group_size": -2}, "group_size -2 must be above zero, or -1 for whole rows"),
    ],
)
def test_settings_that_are_refused(tmp_path, settings, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        opened(copy_sample(tmp_path, SAMPLE, settings=settings))
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"dynamic": {"-:lm_head": {}}},
        {"modules_in_block_to_quantize": [[name] for name in LINEARS]},
        {"checkpoint_format": None, "format": None},
    ],
)
def test_settings_that_change_nothing(tmp_path, settings):
    opened(copy_sample(tmp_path, SAMPLE, settings=settings)).close()


def test_sizes_that_cannot_be_packed(tmp_path):
    state, _ = make_state(32)
    config = {**SHAPE, "intermediate_size": 100}
    write_folder(tmp_path, state, **config, quantization_config=SETTINGS)
    with pytest.raises(CheckpointError, match="gate_proj with 100 outputs and 64 inputs cannot be"):
        open_hf(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), 0.0, -1.0])
def test_scales_that_cannot_be_right(tmp_path, value):
    def change(state) -> None:
        state[BLOCK + "mlp.gate_proj.scales"][0, 3] = value

    with (
        opened(copy_sample(tmp_path, SAMPLE, tensors=change)) as checkpoint,
        pytest.raises(CheckpointError, match=f"gate_proj.scales' holds {value:g} where only"),
    ):
        checkpoint.linear(BLOCK + "mlp.gate_proj")
