"""config.json of TensorRT-LLM's checkpoint: what is written is read back, what is not is said."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine import unified
from engine.config import ModelConfig, Rope
from engine.errors import CheckpointError, UserError
from engine.mapping import Mapping
from engine.quant import Algorithm, KVStorage, QuantConfig

YI_34B = ModelConfig(
    hidden_size=7168,
    num_layers=60,
    num_heads=56,
    num_kv_heads=8,
    intermediate_size=20480,
    max_positions=200000,
)
LLAMA3 = Rope(
    theta=5e5,
    type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_positions=8192,
)


def write(config: ModelConfig = YI_34B, quant: QuantConfig | None = None, **options):
    quant = quant or QuantConfig()
    name = unified.algorithm_name(quant)
    given = {"embedding_dim": None, "algorithm": name, **options}
    return unified.write_config(config, "bfloat16", quant, Mapping(4, 0, 2, 2), **given)


@pytest.mark.parametrize(
    "rope",
    [Rope(), Rope(type="linear", factor=4.0, original_max_positions=200000), LLAMA3],
    ids=lambda rope: rope.type,
)
def test_model_and_ranks_are_read_back(rope):
    config = replace(YI_34B, rope=rope)
    raw = write(config)
    assert unified.read_model(raw, "config.json") == config
    assert unified.read_mapping(raw, "config.json") == Mapping(4, 0, 2, 2)


def test_rope_scaling_the_library_lacks():
    config = replace(YI_34B, rope=Rope(type="yarn", factor=4.0, original_max_positions=4096))
    with pytest.raises(UserError, match="rope scaling 'yarn' is not one of TensorRT-LLM's"):
        write(config)


QUANTS = {
    "W4A16_AWQ": QuantConfig(Algorithm.W4A16_AWQ, group_size=64),
    "W4A16_GPTQ": QuantConfig(Algorithm.W4A16_GPTQ, group_size=128),
    "W8A8_SQ_PER_TENSOR_PER_TOKEN_PLUGIN": QuantConfig(Algorithm.W8A8_SQ, per_token=True),
    "FP8": QuantConfig(Algorithm.FP8, kv=KVStorage.FP8),
}


@pytest.mark.parametrize("name", QUANTS)
def test_quantisation(name):
    section = write(quant=QUANTS[name])["quantization"]
    assert section["quant_algo"] == name
    assert section["group_size"] == (QUANTS[name].group_size or 128)
    assert section["pre_quant_scale"] == (name == "W4A16_AWQ")
    assert section["has_zero_point"] == (name == "W4A16_GPTQ")
    assert unified.read_quant(section, "config.json") == QUANTS[name]


def test_embedding_cut():
    assert write()["use_parallel_embedding"] is False
    cut = write(embedding_dim=1)
    assert (cut["use_parallel_embedding"], cut["embedding_sharding_dim"]) == (True, 1)


@pytest.mark.parametrize("key", ["vocab_size", "norm_epsilon", "num_hidden_layers"])
def test_missing_fields_are_named(key):
    raw = write()
    del raw[key]
    with pytest.raises(CheckpointError, match=f"config.json: field '{key}' is missing"):
        unified.read_model(raw, "config.json")


@pytest.mark.parametrize(
    "mapping, message",
    [
        ({"world_size": 4, "tp_size": 2, "pp_size": 1}, "is not tensor times pipeline"),
        ({"world_size": 2, "tp_size": 2, "pp_size": 1, "cp_size": 2}, "is not tensor times"),
        ({"world_size": 1, "tp_size": "1", "pp_size": 1}, "mapping.tp_size '1' is not a number"),
        ([2], "mapping is not an object"),
    ],
)
def test_senseless_ranks(mapping, message):
    with pytest.raises(CheckpointError, match=message):
        unified.read_mapping({"mapping": mapping}, "config.json")


def test_foreign_models_and_modes():
    with pytest.raises(CheckpointError, match="architecture 'GPTForCausalLM' is not supported"):
        unified.read_model(write() | {"architecture": "GPTForCausalLM"}, "config.json")
    with pytest.raises(CheckpointError, match="attention_bias True is a feature"):
        unified.read_model(write() | {"attn_bias": True}, "config.json")
    with pytest.raises(CheckpointError, match="quant_algo 'W4A8_AWQ' .* is not supported"):
        unified.read_quant({"quant_algo": "W4A8_AWQ"}, "config.json")
