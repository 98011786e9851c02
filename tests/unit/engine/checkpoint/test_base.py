from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.checkpoint.base import Checkpoint, TensorSource, canonical_shapes
from engine.config import ModelConfig
from engine.errors import CheckpointError
from tests.unit.engine.checkpoint.makers import CONFIG, tiny_state


class Held(TensorSource):
    """A tensor in memory that counts how often it is read."""

    def __init__(self, name: str, tensor: Tensor) -> None:
        self.name, self.tensor, self.reads = name, tensor, 0
        self.shape, self.dtype, self.origin = tuple(tensor.shape), tensor.dtype, "x.safetensors"

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        self.reads += 1
        start, stop = self.row_span(start, stop)
        return self.tensor[start:stop].clone()


def held(tensors: dict[str, Tensor]) -> dict[str, Held]:
    return {name: Held(name, tensor) for name, tensor in tensors.items()}


def make(tensors: dict[str, Tensor], **overrides) -> Checkpoint:
    config = ModelConfig.from_hf({**CONFIG, **overrides}, where="config.json")
    return Checkpoint("folder", config, held(tensors))


def test_expected_shapes_are_those_of_transformers(state):
    checkpoint = make(state)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert canonical_shapes(checkpoint.config) == shapes
    checkpoint.check()
    assert checkpoint.tensors.keys() == state.keys()
    assert all(source.reads == 0 for source in checkpoint.tensors.values())


def test_dtype_is_that_of_most_bytes(state):
    halves = {name: t.float() if "norm" in name else t.half() for name, t in state.items()}
    assert make(halves).dtype == torch.float16


Q = "model.layers.1.self_attn.q_proj.weight"
FOREIGN = {
    "model.layers.0.self_attn.q_proj.bias": "is a bias, .* use a checkpoint without biases",
    "model.layers.0.block_sparse_moe.gate.weight": "mixture of experts",
    "model.layers.0.mlp.experts.3.down_proj.weight": "mixture of experts",
    "model.layers.0.self_attn.q_norm.weight": "is a query/key norm",
    "base.model.layers.0.self_attn.q_proj.lora_A.weight": "merge the adapter",
    "model.layers.2.mlp.up_proj.weight": "belongs to layer 2 but the config says 2 layers",
    "model.extra.weight": "has no place in a Llama network",
}


@pytest.mark.parametrize("name, message", FOREIGN.items())
def test_leftovers_are_refused_by_name(state, name, message):
    with pytest.raises(CheckpointError, match=f"x.safetensors: tensor '{name}' .*{message}"):
        make({**state, name: torch.ones(2)}).check()


def test_missing_misshapen_and_integer_tensors(state):
    def refused(tensors: dict[str, Tensor], message: str, **overrides) -> None:
        with pytest.raises(CheckpointError, match=message):
            make(tensors, **overrides).check()

    refused({n: t for n, t in state.items() if n != Q}, f"folder: tensor {Q} is missing")
    refused(state, r"tensor model.layers.2.* \(and 8 more\) is missing", num_hidden_layers=3)
    refused({**state, Q: state[Q].t()[:3]}, rf"'{Q}' has shape \[3, 32\] but .* needs \[32, 32\]")
    refused({**state, Q: state[Q].to(torch.int8)}, f"'{Q}' is stored as int8, not as float64")
    refused(state, r"k_proj.weight' has shape \[16, 32\] .* \[8, 32\]", num_key_value_heads=1)


def test_head_missing_from_an_untied_checkpoint(state):
    tensors = {name: tensor for name, tensor in state.items() if name != "lm_head.weight"}
    with pytest.raises(CheckpointError, match="no lm_head.weight .* set it to true if the head"):
        make(tensors).check()


@pytest.mark.parametrize("dropped", ["lm_head.weight", "model.embed_tokens.weight", None])
def test_tied_head_is_the_embedding(dropped):
    tensors = tiny_state(tie_word_embeddings=True)
    truth = tensors["model.embed_tokens.weight"].clone()
    tensors = {name: tensor for name, tensor in tensors.items() if name != dropped}
    checkpoint = make(tensors, tie_word_embeddings=True)
    checkpoint.check()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(checkpoint.tensors[name].rows(3, 40), truth[3:40])
    assert not checkpoint.leftovers


def test_tied_head_that_differs_is_refused_when_it_is_read(state):
    checkpoint = make(state, tie_word_embeddings=True)
    checkpoint.check()
    with pytest.raises(CheckpointError, match="'lm_head.weight' differs from 'model.embed_tokens"):
        checkpoint.tensors["lm_head.weight"].read()
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' with shape \[4, 32\] .* cannot"):
        make({**state, "lm_head.weight": torch.ones(4, 32)}, tie_word_embeddings=True)
