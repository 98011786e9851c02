"""build.py's TensorRT switches: what config.json says of them."""

from __future__ import annotations

import pytest

from engine.plugins import (
    SWITCHES,
    builder_switches,
    plugin_config,
    wants_one_shot,
    without_effect,
)

# The keys of plugin_config in an engine directory of TensorRT-LLM 0.6.
KEYS = {
    "attention_qk_half_accumulation",
    "bert_attention_plugin",
    "context_fmha_type",
    "gemm_plugin",
    "gpt_attention_plugin",
    "identity_plugin",
    "layernorm_plugin",
    "layernorm_quantization_plugin",
    "lookup_plugin",
    "multi_block_mode",
    "nccl_plugin",
    "paged_kv_cache",
    "quantize_per_token_plugin",
    "quantize_tensor_plugin",
    "remove_input_padding",
    "rmsnorm_plugin",
    "rmsnorm_quantization_plugin",
    "smooth_quant_gemm_plugin",
    "tokens_per_block",
    "use_custom_all_reduce",
    "weight_only_groupwise_quant_matmul_plugin",
    "weight_only_quant_matmul_plugin",
}


def test_keys_are_tensorrts():
    assert set(plugin_config({}, "float16", 1)) == KEYS


@pytest.mark.parametrize(
    "flags, key, value",
    [
        ({"use_gpt_attention_plugin": "bfloat16"}, "gpt_attention_plugin", "bfloat16"),
        ({"use_gemm_plugin": "float16"}, "gemm_plugin", "float16"),
        ({"use_rmsnorm_plugin": "float32"}, "rmsnorm_plugin", "float32"),
        ({"multi_block_mode": True}, "multi_block_mode", True),
        ({"remove_input_padding": True}, "remove_input_padding", True),
        ({"use_custom_all_reduce": True}, "use_custom_all_reduce", True),
        ({"paged_kv_cache": True}, "paged_kv_cache", True),
        ({"tokens_per_block": 128}, "tokens_per_block", 128),
        ({"enable_context_fmha": False}, "context_fmha_type", 0),
        ({"enable_context_fmha": True}, "context_fmha_type", 1),
        ({"enable_context_fmha_fp32_acc": True}, "context_fmha_type", 2),
    ],
)
def test_flags_are_recorded(flags, key, value):
    plain = plugin_config({}, "float16", 1)
    assert plugin_config(flags, "float16", 1) == plain | {key: value}


@pytest.mark.parametrize("tp, plugin", [(1, False), (2, "bfloat16")])
def test_nccl_plugin_is_for_several_ranks(tp, plugin):
    assert plugin_config({}, "bfloat16", tp)["nccl_plugin"] == plugin


def test_builder_switches():
    flags = {"use_fused_mlp": True, "strongly_typed": False, "builder_opt": 3, "gpus_per_node": 8}
    assert builder_switches(flags) == {
        "use_fused_mlp": True,
        "strongly_typed": False,
        "opt_level": 3,
    }


DEFAULTS = {"use_gemm_plugin": False, "paged_kv_cache": False, "gpus_per_node": 8}


@pytest.mark.parametrize(
    "changes, reported",
    [
        ({}, []),
        ({"use_gemm_plugin": "float16"}, ["--use_gemm_plugin"]),
        ({"gpus_per_node": 4}, ["--gpus_per_node"]),
        ({"paged_kv_cache": True}, []),
        ({"use_gemm_plugin": "float16", "gpus_per_node": 2}, ["--use_gemm_plugin", "--gpus_per_"]),
    ],
)
def test_only_given_flags_without_effect_are_reported(changes, reported):
    sentences = without_effect(DEFAULTS | changes, DEFAULTS)
    assert len(sentences) == len(reported)
    for sentence, flag in zip(sentences, reported, strict=True):
        assert sentence.startswith(flag)
        assert sentence.endswith(")")


def test_flags_are_unique():
    assert len({switch.flag for switch in SWITCHES}) == len(SWITCHES)


@pytest.mark.parametrize("flag", [True, False])
def test_custom_all_reduce_is_asked_of_the_run(flag):
    switches = {"use_custom_all_reduce": flag}
    assert wants_one_shot({"plugin_config": plugin_config(switches, "float16", 2)}) is flag
    assert without_effect(switches, {"use_custom_all_reduce": False}) == ()


@pytest.mark.parametrize("config", [{}, {"plugin_config": 5}, {"plugin_config": {}}])
def test_an_engine_without_switches_asks_for_nothing(config):
    assert wants_one_shot(config) is False
