"""Shapes by name, and build.py's flags for them."""

from __future__ import annotations

from dataclasses import replace

import pytest

import build
from engine.config import ModelConfig
from engine.errors import UserError
from engine.quant import Algorithm, KVStorage
from tools.make_checkpoint import PRESETS as CHECKPOINTS
from utils.benchmarking.dummy import KV_FLAGS, PRESETS, QUANT_FLAGS, DummyEngine, name_shape
from utils.benchmarking.workload import Workload
from utils.build_plan import plan_build

ALGORITHMS = {
    "none": Algorithm.NONE,
    "int8": Algorithm.W8A16,
    "int4": Algorithm.W4A16,
    "int4_awq": Algorithm.W4A16_AWQ,
    "int4_gptq": Algorithm.W4A16_GPTQ,
    "sq": Algorithm.W8A8_SQ,
    "fp8": Algorithm.FP8,
}


def plan(dummy, *works, tp=1):
    parser = build.make_parser()
    flags = dummy.build_flags(works, tp=tp, output_dir="/nowhere/at/all")
    return plan_build(vars(parser.parse_args(flags)), vars(parser.parse_args([])))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_the_checkpoints_of_the_same_name(name):
    assert PRESETS[name] == ModelConfig.from_hf(CHECKPOINTS[name], name)


@pytest.mark.parametrize("quant", QUANT_FLAGS)
def test_every_mode_can_be_built(quant):
    record = plan(DummyEngine("tiny", 2, quant, dtype="float16"), Workload(1, 8, 8)).record
    assert record.quant.algorithm is ALGORITHMS[quant]
    assert record.config == replace(PRESETS["tiny"], num_layers=2)
    assert (record.is_dummy, record.dtype) == (True, "float16")


@pytest.mark.parametrize("kv", KV_FLAGS)
def test_every_cache_can_be_built(kv):
    record = plan(DummyEngine("tiny", kv=kv), Workload(1, 8, 8)).record
    assert record.quant.kv is KVStorage(kv)


@pytest.mark.parametrize("quant", QUANT_FLAGS)
def test_the_head_can_be_quantised_in_every_mode(quant):
    dummy = DummyEngine("tiny", quant=quant, quantize_lm_head=True)
    record = plan(dummy, Workload(1, 8, 8)).record
    assert (record.quant.algorithm, record.quant.head) == (ALGORITHMS[quant], Algorithm.W8A16)


def test_the_engine_fits_all_workloads():
    record = plan(DummyEngine("tiny"), Workload(1, 5000, 8), Workload(64, 100, 200), tp=2).record
    limits = record.limits
    assert (limits.max_batch_size, limits.max_input_len, limits.max_output_len) == (64, 5000, 200)
    assert record.config.max_positions == 5008
    assert record.mapping.tp == 2


def test_a_shape_can_only_be_cut():
    with pytest.raises(UserError, match=r"--layers 33 exceeds the 32 layers of yi-6b; a shape can"):
        DummyEngine("yi-6b", layers=33)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (ModelConfig(), "yi-6b"),
        (ModelConfig(num_layers=8, max_positions=200_000), "yi-6b, 8 of 32 layers"),
        (ModelConfig(num_layers=48), "yi-9b"),
        (ModelConfig(num_layers=40), "yi-9b, 40 of 48 layers"),
        (ModelConfig(num_layers=49), "9 B parameters"),
    ],
)
def test_shapes_have_names(config, name):
    assert name_shape(config) == name
