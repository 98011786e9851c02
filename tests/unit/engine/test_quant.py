"""QuantConfig: flags to modes, TensorRT-LLM's mode integers, refusals."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest

from engine.errors import UserError
from engine.quant import Algorithm, KVStorage, QuantConfig

# Mode integers as TensorRT-LLM's QuantMode gives them for the same flags.
MODES = [
    ({}, Algorithm.NONE, 0, 0),
    ({"use_weight_only": True}, Algorithm.W8A16, 0, 2),
    ({"use_weight_only": True, "weight_only_precision": "int4"}, Algorithm.W4A16, 0, 1),
    ({"use_weight_only": True, "weight_only_precision": "int4_awq"}, Algorithm.W4A16_AWQ, 128, 33),
    (
        {"use_weight_only": True, "weight_only_precision": "int4_gptq", "group_size": 64},
        Algorithm.W4A16_GPTQ,
        64,
        33,
    ),
    ({"use_smooth_quant": True}, Algorithm.W8A8_SQ, 0, 6),
    ({"use_smooth_quant": True, "per_channel": True}, Algorithm.W8A8_SQ, 0, 14),
    ({"use_smooth_quant": True, "per_token": True}, Algorithm.W8A8_SQ, 0, 22),
    (
        {"use_smooth_quant": True, "per_token": True, "per_channel": True},
        Algorithm.W8A8_SQ,
        0,
        30,
    ),
    ({"enable_fp8": True}, Algorithm.FP8, 0, 256),
    ({"enable_fp8": True, "fp8_kv_cache": True}, Algorithm.FP8, 0, 384),
    ({"int8_kv_cache": True}, Algorithm.NONE, 0, 64),
    ({"use_weight_only": True, "int8_kv_cache": True}, Algorithm.W8A16, 0, 66),
    ({"enable_fp8": True, "quantize_lm_head": True}, Algorithm.FP8, 0, 256),
]


@pytest.mark.parametrize("flags, algorithm, group_size, mode", MODES)
def test_flags_become_a_mode(flags, algorithm, group_size, mode):
    config = QuantConfig.from_flags(**flags)
    assert (config.algorithm, config.group_size, config.quant_mode) == (algorithm, group_size, mode)


@pytest.mark.parametrize(
    "first, second",
    [
        *itertools.combinations(("use_smooth_quant", "use_weight_only", "enable_fp8"), 2),
        ("int8_kv_cache", "fp8_kv_cache"),
    ],
)
def test_contradictions_are_refused(first, second):
    with pytest.raises(UserError, match="^--.* and --.* cannot be combined") as refusal:
        QuantConfig.from_flags(**{first: True, second: True})
    assert f"--{first}" in str(refusal.value)
    assert f"--{second}" in str(refusal.value)


@pytest.mark.parametrize("flag", ["per_token", "per_channel"])
@pytest.mark.parametrize("other", [{}, {"use_weight_only": True}])
def test_smooth_quant_options_need_smooth_quant(flag, other):
    with pytest.raises(UserError, match=f"^--{flag} belongs to --use_smooth_quant"):
        QuantConfig.from_flags(**{flag: True}, **other)


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"weight_only_precision": "int4"}, "--weight_only_precision int4 belongs to --use_weight"),
        ({"group_size": 64}, "--group_size 64 belongs to --weight_only_precision int4_awq"),
        (
            {"use_weight_only": True, "weight_only_precision": "int4_awq", "group_size": 40},
            "--group_size 40 is no multiple of 32",
        ),
        ({"use_weight_only": True, "group_size": 64}, "--group_size 64 belongs to"),
    ],
)
def test_options_without_their_mode_are_refused(flags, message):
    with pytest.raises(UserError, match=f"^{message}"):
        QuantConfig.from_flags(**flags)


AWQ_64 = QuantConfig(Algorithm.W4A16_AWQ, 64)
AWQ = QuantConfig(Algorithm.W4A16_AWQ, 128)
DYNAMIC_FP8 = QuantConfig(Algorithm.FP8, per_token=True, per_channel=True)
INT8_KV = QuantConfig(kv=KVStorage.INT8)
INT8_HEAD = QuantConfig(head=Algorithm.W8A16)


@pytest.mark.parametrize(
    "asked, found, is_group_given, joined",
    [
        (AWQ, None, False, AWQ),
        (QuantConfig(), AWQ_64, False, AWQ_64),
        (AWQ, AWQ_64, False, AWQ_64),
        (AWQ, AWQ_64, True, AWQ),
        (QuantConfig(Algorithm.FP8), DYNAMIC_FP8, False, DYNAMIC_FP8),
        (INT8_KV, AWQ_64, False, replace(AWQ_64, kv=KVStorage.INT8)),
        (QuantConfig(Algorithm.W8A16), INT8_KV, False, replace(INT8_KV, algorithm=Algorithm.W8A16)),
        (QuantConfig(kv=KVStorage.FP8), INT8_KV, False, QuantConfig(kv=KVStorage.FP8)),
        (QuantConfig(Algorithm.W8A8_SQ), DYNAMIC_FP8, False, QuantConfig(Algorithm.W8A8_SQ)),
        (INT8_HEAD, None, False, INT8_HEAD),
        (INT8_HEAD, AWQ_64, False, replace(AWQ_64, head=Algorithm.W8A16)),
        (replace(AWQ, head=Algorithm.W8A16), AWQ, True, replace(AWQ, head=Algorithm.W8A16)),
        (
            QuantConfig(Algorithm.FP8, head=Algorithm.W8A16),
            DYNAMIC_FP8,
            False,
            replace(DYNAMIC_FP8, head=Algorithm.W8A16),
        ),
    ],
)
def test_flags_join_what_the_checkpoint_is(asked, found, is_group_given, joined):
    assert asked.joined(found, is_group_given=is_group_given) == joined


@pytest.mark.parametrize("flags", [flags for flags, *_ in MODES])
def test_dict_round_trip(flags):
    config = QuantConfig.from_flags(**flags)
    assert QuantConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("other", [{}, {"use_weight_only": True}, {"use_smooth_quant": True}])
def test_the_head_is_quantised_on_request_in_any_mode(given, other):
    config = QuantConfig.from_flags(**other, quantize_lm_head=given)
    assert config.head is (Algorithm.W8A16 if given else Algorithm.NONE)
    assert replace(config, head=Algorithm.NONE) == QuantConfig.from_flags(**other)


def test_engines_from_before_the_head_had_a_mode():
    values = AWQ.to_dict()
    assert values.pop("head") == "none"
    assert QuantConfig.from_dict(values) == AWQ


@pytest.mark.parametrize(
    "config, text",
    [
        (QuantConfig(), "none"),
        (QuantConfig(Algorithm.W4A16_AWQ, 128), "w4a16_awq g128"),
        (
            QuantConfig(Algorithm.W8A8_SQ, per_token=True, per_channel=True),
            "w8a8_sq per-token per-channel",
        ),
        (QuantConfig(kv=KVStorage.INT8), "none, int8 KV cache"),
        (replace(AWQ, head=Algorithm.W8A16), "w4a16_awq g128, w8a16 head"),
        (replace(INT8_KV, head=Algorithm.W8A16), "none, w8a16 head, int8 KV cache"),
    ],
)
def test_text(config, text):
    assert str(config) == text
