"""EngineRecord: what config.json keeps, and damaged sections."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from engine.config import ModelConfig, Rope
from engine.engine_file import FileRecord
from engine.errors import EngineError
from engine.limits import BuildLimits
from engine.mapping import Mapping
from engine.quant import Algorithm, KVStorage, QuantConfig
from engine.record import DUMMY_NOTE, EngineRecord

RECORD = EngineRecord(
    config=ModelConfig(rope=Rope(theta=1e4, type="yarn", factor=4.0, original_max_positions=4096)),
    dtype="bfloat16",
    quant=QuantConfig(),
    mapping=Mapping(world=4, rank=0, tp=2, pp=2),
    limits=BuildLimits(max_batch_size=2, max_num_tokens=512),
    layout_version=1,
    embedding_dim=1,
    generation={"eos_token_id": [2, 7], "temperature": 0.6},
    source="a/checkpoint",
    files=tuple(FileRecord(f"yi_rank{rank}.engine", 4096 * rank, "ab") for rank in range(4)),
)


def test_round_trip_through_json():
    section = json.loads(json.dumps(RECORD.to_dict()))
    assert EngineRecord.from_dict(section, "config.json") == RECORD


@pytest.mark.parametrize("key", sorted(set(RECORD.to_dict()) - {"schema_version"}))
def test_missing_key_is_a_damaged_section(key):
    section = RECORD.to_dict()
    del section[key]
    with pytest.raises(EngineError, match="^here: the 'engine' section is damaged .*build the eng"):
        EngineRecord.from_dict(section, "here")


@pytest.mark.parametrize(
    "key, value",
    [
        ("model", {"hidden": 1}),
        ("model", None),
        ("quantization", {"algorithm": "w3a16", "kv": "none"}),
        ("mapping", {"world": 4}),
        ("limits", {"max_batch": 1}),
        ("files", [{"name": "a"}]),
        ("files", 3),
    ],
)
def test_senseless_value_is_a_damaged_section(key, value):
    with pytest.raises(EngineError, match="^here: the 'engine' section is damaged"):
        EngineRecord.from_dict(RECORD.to_dict() | {key: value}, "here")


def test_rank_files_must_be_as_many_as_ranks():
    section = RECORD.to_dict()
    section["files"] = section["files"][:3]
    with pytest.raises(EngineError, match="^here: the 'engine' section is damaged"):
        EngineRecord.from_dict(section, "here")


def test_dummy_engines_say_so():
    assert RECORD.notes == ()
    assert replace(RECORD, is_dummy=True).notes == (DUMMY_NOTE,)
    assert "DUMMY" in DUMMY_NOTE


BUILDER = {
    "name": "yi",
    "precision": "bfloat16",
    "tensor_parallel": 2,
    "pipeline_parallel": 2,
    "parallel_build": True,
    "use_refit": False,
    "int8": False,
    "fp8": False,
    "num_layers": 32,
    "num_heads": 32,
    "num_kv_heads": 4,
    "hidden_size": 4096,
    "inter_size": 11008,
    "vocab_size": 64000,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rotary_base": 1e4,
    "rms_norm_eps": 1e-5,
    "max_batch_size": 2,
    "max_input_len": 2048,
    "max_output_len": 512,
    "max_num_tokens": 512,
    "max_beam_width": 1,
    "quant_mode": 0,
    "group_size": 0,
    "max_prompt_embedding_table_size": 0,
    "gather_all_token_logits": False,
}


def test_builder_config():
    assert RECORD.builder_config(parallel_build=True) == BUILDER


@pytest.mark.parametrize(
    "quant, expected",
    [
        (QuantConfig(Algorithm.W8A16), {"int8": True, "quant_mode": 2}),
        (QuantConfig(Algorithm.W4A16), {"int8": False, "quant_mode": 1}),
        (QuantConfig(Algorithm.W4A16_AWQ, 64), {"quant_mode": 33, "group_size": 64}),
        (QuantConfig(Algorithm.W8A8_SQ), {"int8": True, "quant_mode": 6}),
        (QuantConfig(Algorithm.FP8, kv=KVStorage.FP8), {"fp8": True, "quant_mode": 384}),
        (QuantConfig(kv=KVStorage.INT8), {"int8": True, "quant_mode": 64}),
        (QuantConfig(kv=KVStorage.FP8), {"fp8": True, "quant_mode": 128}),
    ],
)
def test_builder_config_of_quantised_engines(quant, expected):
    record = replace(RECORD, quant=quant)
    assert record.builder_config(parallel_build=True) == BUILDER | expected
