from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from engine.checkpoint.awq import unpack_outputs
from engine.checkpoint.hf import open_hf
from engine.errors import CheckpointError
from engine.quant import Algorithm, QuantConfig
from engine.weights.types import Int4Groups
from tests.unit.engine.checkpoint.quantised_makers import (
    BLOCK,
    DATA,
    LINEARS,
    copy_sample,
    dequantise,
    relative_error,
    word,
)

SAMPLE = "gptqmodel-awq"


def opened(folder):
    checkpoint = open_hf(folder)
    try:
        checkpoint.check()
    except CheckpointError:
        checkpoint.close()
        raise
    return checkpoint


def test_nibbles_of_a_word_are_columns_0_2_4_6_1_3_5_7():
    # Written out: nibbles, lowest first, that hold the values of columns 0, 2, 4, 6, 1, 3, 5, 7.
    assert word(0, 2, 4, 6, 1, 3, 5, 7) == 0x75316420
    packed_KW = torch.tensor([[0x75316420]], dtype=torch.int32)
    assert unpack_outputs(packed_KW).tolist() == [[0], [1], [2], [3], [4], [5], [6], [7]]
    # Columns 8, 9, ... 15 of one input; the highest nibble (column 7) makes the word negative.
    packed_KW = torch.tensor([[word(8, 10, 12, 14, 9, 11, 13, 15)]], dtype=torch.int32)
    assert packed_KW.item() < 0
    assert unpack_outputs(packed_KW).T.tolist() == [[8, 9, 10, 11, 12, 13, 14, 15]]


def test_words_follow_the_outputs_and_rows_the_inputs():
    rows = [[word(*[n] * 8) for n in (1, 2)], [word(*[n] * 8) for n in (3, 4)], [0, -1]]
    codes_NK = unpack_outputs(torch.tensor(rows, dtype=torch.int32))
    assert codes_NK.shape == (16, 3) and codes_NK.dtype == torch.uint8
    assert codes_NK[:8].tolist() == [[1, 3, 0]] * 8
    assert codes_NK[8:].tolist() == [[2, 4, 15]] * 8


def test_weight_is_code_minus_zero_times_scale(tmp_path):
    """One input row and its zeros and scales replaced by values that can be checked by hand."""

    def change(state) -> None:
        stem = BLOCK + "self_attn.k_proj."
        state[stem + "qweight"][130, 0] = word(0, 15, 9, 3, 8, 7, 1, 2)
        state[stem + "qzeros"][1, 0] = word(0, 0, 15, 8, 8, 7, 1, 0)
        state[stem + "scales"][1, :8] = torch.tensor([1, 2, 4, 0.5, 1, 1, 1, 3])

    with opened(copy_sample(tmp_path, SAMPLE, tensors=change)) as checkpoint:
        linear = checkpoint.linear(BLOCK + "self_attn.k_proj")
    # Columns 0…7: (0-0)·1, (8-8)·2, (15-0)·4, (7-7)·½, (9-15)·1, (1-1)·1, (3-8)·1, (2-0)·3
    assert dequantise(linear)[:8, 130].tolist() == [0, 0, 60, 0, -6, 0, -5, 6]


def test_sample_of_gptqmodel():
    base = load_file(DATA / "gptqmodel-base.safetensors")
    with opened(DATA / SAMPLE) as checkpoint:
        assert checkpoint.quant == QuantConfig(Algorithm.W4A16_AWQ, group_size=128)
        assert checkpoint.kv_scales(0) is None
        assert set(checkpoint.tensors) == {
            "model.embed_tokens.weight",
            BLOCK + "input_layernorm.weight",
            BLOCK + "post_attention_layernorm.weight",
            "model.norm.weight",
            "lm_head.weight",
        }
        # Smoothing divided the norm by what it multiplied the columns with.
        norm = BLOCK + "input_layernorm.weight"
        folded_K = checkpoint.tensors[norm].read().float() / base[norm].float()
        for name in ("q_proj", "k_proj", "o_proj"):
            linear = checkpoint.linear(BLOCK + "self_attn." + name)
            assert isinstance(linear, Int4Groups) and linear.pre_scale_K is None
            assert linear.zero_NR is not None and linear.zero_NR.dtype == torch.uint8
            truth_NK = base[f"{BLOCK}self_attn.{name}.weight"]
            factor_K = 1 if name == "o_proj" else folded_K
            assert relative_error(dequantise(linear) * factor_K, truth_NK) < 0.13
            swapped = Int4Groups(
                linear.codes_NK.unflatten(0, (-1, 8))[:, [0, 4, 1, 5, 2, 6, 3, 7]].flatten(0, 1),
                linear.scale_NR,
                linear.group_size,
                linear.zero_NR,
            )
            assert relative_error(dequantise(swapped) * factor_K, truth_NK) > 1


def test_every_linear_has_its_sizes():
    with opened(DATA / SAMPLE) as checkpoint:
        sizes = {n: checkpoint.linear(BLOCK + n) for n in LINEARS}
    assert [(w.outputs, w.inputs) for w in sizes.values()] == [
        (256, 256),
        (64, 256),
        (64, 256),
        (256, 256),
        (768, 256),
        (768, 256),
        (256, 768),
    ]


def test_settings_of_older_autoawq(tmp_path):
    """quant_config.json with its own words, and nothing in config.json."""
    copy_sample(tmp_path, SAMPLE)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="already quantised, as tensor .* shows, but config"):
        open_hf(tmp_path)
    old = {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"}
    (tmp_path / "quant_config.json").write_text(json.dumps(old))
    stem = BLOCK + "mlp.down_proj"
    with opened(tmp_path) as checkpoint, opened(DATA / SAMPLE) as expected:
        assert checkpoint.quant == expected.quant
        assert torch.equal(checkpoint.linear(stem).codes_NK, expected.linear(stem).codes_NK)
    (tmp_path / "quant_config.json").write_text(json.dumps({**old, "w_bit": 3}))
    with pytest.raises(CheckpointError, match="quant_config.json: bits 3 is not supported"):
        open_hf(tmp_path)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"version": "gemv"}, r"version 'gemv' is not supported \(supported: gemm\); quantise"),
        ({"version": "gemv_fast"}, "version 'gemv_fast' is not supported"),
        ({"version": "marlin"}, "version 'marlin' is not supported"),
        ({"version": "ipex"}, "version 'ipex' is not supported"),
        ({"version": "exllama"}, "version 'exllama' is not supported"),
        ({"version": None, "checkpoint_format": "gemv"}, "checkpoint_format 'gemv' is not"),
        ({"bits": 8}, r"bits 8 is not supported \(supported: 4\)"),
        ({"bits": None}, "bits None is not supported"),
        ({"zero_point": False}, r"zero_point False is not supported \(supported: True\)"),
        ({"modules_to_not_convert": ["q_proj"]}, "leaves model.layers.0.self_attn.q_proj .* alike"),
        ({"modules_to_not_convert": ["model"]}, "modules_to_not_convert .* is not supported"),
        ({"modules_to_not_convert": "lm_head"}, r"\(supported: a list of names\)"),
        ({"group_size": 48}, "group_size 48 does not divide the 256 inputs"),
        ({"group_size": 16}, "group_size 16 is not supported: a group must be a multiple of 32"),
        ({"group_size": 0}, "group_size 0 must be above zero"),
        ({"group_size": "128"}, r"group_size '128' .* \(supported: a whole number\)"),
        ({"group_size": 64}, r"qzeros' has shape \[2, 32\] but the config needs \[4, 32\]"),
        ({"quant_method": "aqlm"}, r"quant_method 'aqlm' .* \(supported: awq, gptq, compressed-"),
        ({"quant_method": None}, "quant_method None is not supported"),
    ],
)
def test_settings_that_are_refused(tmp_path, settings, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        opened(copy_sample(tmp_path, SAMPLE, settings=settings))
    assert str(tmp_path) in str(caught.value)


def test_lm_head_may_be_left_out(tmp_path):
    settings = {"modules_to_not_convert": ["lm_head"]}
    opened(copy_sample(tmp_path, SAMPLE, settings=settings)).close()


STEM = BLOCK + "self_attn.v_proj."


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop(STEM + "qzeros"), "v_proj.qzeros is missing from the weight files"),
        (
            lambda s: s.update({STEM + "qweight": s[STEM + "qweight"][:, :4]}),
            r"v_proj.qweight' has shape \[256, 4\] but the config needs \[256, 8\]",
        ),
        (
            lambda s: s.update({STEM + "scales": s[STEM + "scales"].to(torch.int32)}),
            "v_proj.scales' is stored as int32 where its format needs float16 or bfloat16",
        ),
        (
            lambda s: s.update({STEM + "weight": torch.ones(64, 256)}),
            "v_proj.weight' is a linear layer in full precision while the others are w4a16_awq",
        ),
        (
            lambda s: s.update({STEM + "g_idx": torch.ones(256)}),
            "v_proj.g_idx' has no place in a Llama network",
        ),
        (
            lambda s: s.update({"lm_head.qweight": torch.ones(256, 4)}),
            "lm_head.qweight' says that lm_head.weight is quantised, which only linear layers",
        ),
        (
            lambda s: s.update({"model.layers.1.mlp.up_proj.scales": torch.ones(2, 768)}),
            "belongs to layer 1 but the config says 1 layers",
        ),
        (lambda s: s.pop("model.norm.weight"), "model.norm.weight is missing"),
    ],
)
def test_checking_is_total(tmp_path, change, message):
    with pytest.raises(CheckpointError, match=message):
        opened(copy_sample(tmp_path, SAMPLE, tensors=change))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -0.5])
def test_scales_that_cannot_be_right(tmp_path, value):
    def change(state) -> None:
        state[STEM + "scales"][1, 5] = value

    with opened(copy_sample(tmp_path, SAMPLE, tensors=change)) as checkpoint:
        checkpoint.linear(BLOCK + "self_attn.k_proj")
        with pytest.raises(
            CheckpointError, match=f"v_proj.scales' holds {value:g} where"
        ) as caught:
            checkpoint.linear(BLOCK + "self_attn.v_proj")
        assert "model.safetensors" in str(caught.value)
