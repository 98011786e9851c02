"""plan_build: flags to record. Its refusals are tested through the script, in tests/cli."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import build
from engine.config import ModelConfig, Rope
from engine.errors import UserError
from engine.limits import BuildLimits
from engine.mapping import Mapping
from engine.quant import QuantConfig
from utils.build_plan import LATER, QUANT_FLAGS, SHAPE_FIELDS, plan_build

DEFAULTS = vars(build.make_parser().parse_args([]))
# tests/conftest.py's small checkpoint, by hand.
SMALL = ModelConfig(
    vocab_size=97,
    hidden_size=64,
    num_layers=3,
    num_heads=8,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=96,
    max_positions=256,
)


def plan(**flags):
    assert set(flags) <= set(DEFAULTS)
    return plan_build(DEFAULTS | flags, DEFAULTS)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, write_hf) -> str:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_hf(folder)
    for name in ("tokenizer.model", "tokenizer_config.json", "pytorch_model.txt"):
        (folder / name).write_text("{}")
    return str(folder)


def test_plan_of_a_checkpoint(checkpoint):
    made = plan(model_dir=checkpoint, output_dir="out")
    record = made.record
    assert record.config == SMALL
    assert (record.dtype, record.backend) == ("bfloat16", "torch")
    assert record.quant == QuantConfig()
    assert record.mapping == Mapping(1, 0, 1, 1)
    assert record.limits == BuildLimits()
    assert record.embedding_dim is None
    assert record.generation == {"bos_token_id": 1, "eos_token_id": 2}
    assert (record.source, record.is_dummy, record.files) == (checkpoint, False, ())
    assert made.output_dir == Path("out")
    assert [path.name for path in made.companions] == ["tokenizer.model", "tokenizer_config.json"]
    assert (made.parallel, made.ignored) == (False, ())


def test_plan_without_a_checkpoint():
    made = plan(n_layer=2, n_embd=96, n_head=4, vocab_size=50)
    assert made.record.is_dummy
    assert made.record.source == "dummy weights"
    assert made.record.config == replace(
        ModelConfig(),
        num_layers=2,
        hidden_size=96,
        num_heads=4,
        num_kv_heads=4,
        head_dim=24,
        intermediate_size=256,
        vocab_size=50,
    )
    assert made.companions == ()
    with made.open_checkpoint() as dummy:
        assert dummy.config == made.record.config


def test_no_flags_mean_a_dummy_yi_6b():
    assert plan().record.config == ModelConfig()


def test_limits_and_layout(checkpoint):
    made = plan(
        model_dir=checkpoint,
        tp_size=4,
        pp_size=3,
        max_batch_size=2,
        max_input_len=10,
        max_output_len=20,
        max_beam_width=3,
        max_num_tokens=64,
        paged_kv_cache=True,
        tokens_per_block=16,
        gather_all_token_logits=True,
        parallel_build=True,
    )
    assert made.record.mapping == Mapping(12, 0, 4, 3)
    assert made.record.limits == BuildLimits(2, 10, 20, 3, 64, True, 16, True)
    assert made.parallel


@pytest.mark.parametrize(
    "use, dim, expected", [(False, 0, None), (False, 1, None), (True, 0, 0), (True, 1, 1)]
)
def test_sharding_dim_counts_only_with_a_parallel_embedding(checkpoint, use, dim, expected):
    made = plan(
        model_dir=checkpoint, tp_size=2, use_parallel_embedding=use, embedding_sharding_dim=dim
    )
    assert made.record.embedding_dim == expected


def test_shape_flags_that_agree_are_accepted(checkpoint):
    agreeing = {flag: getattr(SMALL, field) for flag, field in SHAPE_FIELDS.items()}
    assert plan(model_dir=checkpoint, **agreeing).record.config == SMALL


@pytest.mark.parametrize(
    "flags, rope",
    [
        ({}, Rope(5e6)),
        ({"rotary_base": 1e4}, Rope(1e4)),
        (
            {"rotary_scaling": ["linear", "2"]},
            Rope(5e6, "linear", factor=2.0, original_max_positions=256),
        ),
        (
            {"rotary_base": 1e6, "rotary_scaling": ["dynamic", "4.5"]},
            Rope(1e6, "dynamic", factor=4.5, original_max_positions=256),
        ),
    ],
)
def test_rope_flags_override_the_checkpoint(checkpoint, flags, rope):
    assert plan(model_dir=checkpoint, **flags).record.config.rope == rope


def test_rope_flags_shape_a_dummy_too():
    config = plan(n_layer=1, rotary_base=1e4, rotary_scaling=["linear", "2"]).record.config
    assert config.rope == Rope(1e4, "linear", factor=2.0, original_max_positions=4096)


def test_ignored_switches_are_listed(checkpoint):
    made = plan(
        model_dir=checkpoint, use_gemm_plugin="float16", paged_kv_cache=True, visualize=True
    )
    assert [sentence.split()[0] for sentence in made.ignored] == [
        "--use_gemm_plugin",
        "--visualize",
    ]
    assert made.switches["use_gemm_plugin"] == "float16"


def test_a_timing_cache_is_taken_along_if_it_is_there(checkpoint, tmp_path):
    path = tmp_path / "other.cache"
    assert plan(model_dir=checkpoint).timing_cache is None
    assert plan(model_dir=checkpoint, timing_cache=str(path)).timing_cache is None
    path.write_text("{}")
    assert plan(model_dir=checkpoint, timing_cache=str(path)).timing_cache == path


@pytest.mark.parametrize("flag", LATER)
def test_later_capabilities_are_refused_by_name(flag):
    with pytest.raises(UserError, match=f"^--{flag}: .* is not available in this version"):
        plan(**{flag: "something"})


def test_tables_name_real_flags():
    assert set(QUANT_FLAGS) | set(SHAPE_FIELDS) | set(LATER) <= set(DEFAULTS)
