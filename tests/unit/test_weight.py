"""The scripts' weight loading: sources, and the stream of one rank."""

from __future__ import annotations

import pickle

import pytest
import torch

from engine.checkpoint.open import Paths
from engine.config import ModelConfig
from engine.errors import CheckpointError
from engine.mapping import Mapping
from engine.quant import QuantConfig
from engine.weights.convert import StorePlan
from weight import WeightSource, load_rank


def plan_for(config: ModelConfig) -> StorePlan:
    return StorePlan(config, torch.float32, QuantConfig())


def test_rank_is_streamed_in_file_order(tmp_path, write_hf):
    tensors = write_hf(tmp_path)
    with WeightSource(Paths(model_dir=str(tmp_path))).open() as checkpoint:
        stream = load_rank(checkpoint, plan_for(checkpoint.config), Mapping(2, 1, 2, 1))
        loaded = {name: torch.cat(list(blocks)) for name, blocks in stream}
    names = list(loaded)
    assert (names[0], names[-2:]) == ("embed.weight", ["norm.weight", "head.weight"])
    assert len(names) == 1 + 3 * 6 + 2
    assert torch.equal(loaded["embed.weight"], tensors["model.embed_tokens.weight"])
    down = tensors["model.layers.2.mlp.down_proj.weight"]
    assert torch.equal(loaded["blocks.2.mlp.down.weight"], down[:, 48:])


def test_stage_holds_its_layers_only(tmp_path, write_hf):
    tensors = write_hf(tmp_path)
    with WeightSource(Paths(model_dir=str(tmp_path))).open() as checkpoint:
        stream = load_rank(checkpoint, plan_for(checkpoint.config), Mapping(3, 1, 1, 3))
        loaded = {name: torch.cat(list(blocks)) for name, blocks in stream}
    assert len(loaded) == 6
    norm = tensors["model.layers.1.input_layernorm.weight"]
    assert torch.equal(loaded["blocks.0.attn_norm.weight"], norm)


def test_sources_travel_to_other_processes(tmp_path, write_hf):
    write_hf(tmp_path)
    for source in (WeightSource(Paths(model_dir=str(tmp_path))), WeightSource(dummy=ModelConfig())):
        open_again = pickle.loads(pickle.dumps(source.open))
        with open_again() as checkpoint, source.open() as original:
            assert checkpoint.config == original.config


@pytest.mark.parametrize(
    "source, text",
    [
        (WeightSource(Paths(model_dir="a/b")), "a/b"),
        (WeightSource(Paths(meta_ckpt_dir="c")), "c"),
        (WeightSource(Paths(model_dir="a", quant_ckpt_path="q.pt")), "a with q.pt"),
        (WeightSource(dummy=ModelConfig()), "dummy weights"),
    ],
)
def test_text(source, text):
    assert str(source) == text


def test_missing_directory_is_a_checkpoint_error(tmp_path):
    with pytest.raises(CheckpointError, match="^--model_dir .*gone does not exist"):
        WeightSource(Paths(model_dir=str(tmp_path / "gone"))).open()
