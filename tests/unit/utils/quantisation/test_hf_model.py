"""Truth: transformers' own loading of the same checkpoint."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from engine.checkpoint.hf import open_hf
from engine.config import ModelConfig, Rope
from tests.unit.engine.checkpoint.makers import tiny_model, tiny_state, write_folder
from utils.quantisation.hf_model import llama_config, load_layer, load_model

CPU = torch.device("cpu")
TOKENS = torch.arange(24).reshape(2, 12)

SCALINGS = {
    "plain": {"rope_theta": 10000.0},
    "linear": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "llama3": {
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "yarn": {
        "rope_scaling": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16,
        }
    },
}  # fmt: skip


@torch.inference_mode()
def logits_of(model: LlamaForCausalLM) -> torch.Tensor:
    return model(TOKENS).logits


@pytest.mark.parametrize("scaling", SCALINGS)
def test_logits_are_those_of_from_pretrained(tmp_path, scaling):
    folder = write_folder(tmp_path, tiny_state(), **SCALINGS[scaling])
    truth = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with open_hf(folder) as checkpoint:
        model = load_model(checkpoint, torch.float32, CPU)
    torch.testing.assert_close(logits_of(model), logits_of(truth), rtol=1e-5, atol=1e-6)


def test_a_tied_head(tmp_path):
    state = tiny_state(tie_word_embeddings=True)
    del state["lm_head.weight"]
    folder = write_folder(tmp_path, state, tie_word_embeddings=True)
    with open_hf(folder) as checkpoint:
        model = load_model(checkpoint, torch.float32, CPU)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    truth = logits_of(tiny_model(tie_word_embeddings=True).eval())
    torch.testing.assert_close(logits_of(model), truth, rtol=1e-5, atol=1e-6)


def test_the_names_of_the_first_yi_repositories(tmp_path):
    """ln1 and ln2, which transformers would leave at ones."""
    folder = write_folder(tmp_path, tiny_state())
    state = {
        name.replace("post_attention_layernorm", "ln2").replace("input_layernorm", "ln1"): tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    folder = write_folder(tmp_path / "yi", None, architectures=["YiForCausalLM"], model_type="Yi")
    save_file(state, folder / "model.safetensors")
    with open_hf(folder) as checkpoint:
        model = load_model(checkpoint, torch.float32, CPU)
    torch.testing.assert_close(logits_of(model), logits_of(tiny_model().eval()))


def test_one_layer(tmp_path):
    with open_hf(write_folder(tmp_path, tiny_state())) as checkpoint:
        layer = load_layer(checkpoint, llama_config(checkpoint), 1, torch.bfloat16, CPU)
    truth = tiny_model().model.layers[1].to(torch.bfloat16).state_dict()
    found = layer.state_dict()
    assert found.keys() == truth.keys()
    assert all(torch.equal(found[name], truth[name]) for name in truth)


@pytest.mark.parametrize(
    "rope",
    [
        Rope(theta=1e4),
        Rope(type="linear", factor=4.0, original_max_positions=4096),
        Rope(type="dynamic", factor=2.0, original_max_positions=2048),
        Rope(type="llama3", factor=8.0, original_max_positions=1024, low_freq_factor=2.0),
        Rope(type="yarn", factor=2.0, original_max_positions=64, beta_fast=16.0, mscale=0.5,
             mscale_all_dim=0.25, truncate=False),
    ],
)  # fmt: skip
def test_exports_say_the_same_of_the_network(rope):
    """What is written into an export's config.json is read as the network it came from."""
    config = replace(ModelConfig(), rope=rope, tie_word_embeddings=True)
    checkpoint = SimpleNamespace(config=config, generation={"eos_token_id": [2, 7]})
    made = llama_config(checkpoint)
    assert ModelConfig.from_hf(made.to_dict(), "config.json") == config
    assert made.eos_token_id == [2, 7]
