from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from engine.checkpoint.gptq_file import open_gptq_file
from engine.checkpoint.hf import open_hf
from engine.errors import CheckpointError, UserError
from engine.quant import Algorithm, QuantConfig
from tests.unit.engine.checkpoint.gptq_makers import SHAPE, make_state
from tests.unit.engine.checkpoint.makers import tiny_state, write_folder
from tests.unit.engine.checkpoint.quantised_makers import BLOCK, DATA, dequantise


@pytest.fixture
def base(tmp_path):
    folder = write_folder(tmp_path / "base", tiny_state(seed=5, **SHAPE), **SHAPE)
    with open_hf(folder) as checkpoint:
        yield checkpoint


def write_file(path, state):
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


def only_linears(state):
    return {name: tensor for name, tensor in state.items() if "_proj." in name}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("with_index", [True, False])
def test_a_file_with_everything(tmp_path, base, suffix, with_index):
    state, weights = make_state(32)
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
    if not with_index:
        state = {name: tensor for name, tensor in state.items() if not name.endswith("g_idx")}
    path = write_file(tmp_path / f"yi-4bit{suffix}", state)
    with open_gptq_file(path, base, 32) as checkpoint:
        checkpoint.check()
        assert checkpoint.quant == QuantConfig(Algorithm.W4A16_GPTQ, group_size=32)
        assert checkpoint.where == str(path)
        assert checkpoint.dropped == ("model.layers.0.self_attn.rotary_emb.inv_freq",)
        for stem, weight_NK in weights.items():
            linear = checkpoint.linear(stem)
            assert linear.zero_NR is not None
            assert torch.equal(dequantise(linear), weight_NK)
        for name in (
            "model.embed_tokens.weight",
            "lm_head.weight",
            BLOCK + "input_layernorm.weight",
        ):
            assert torch.equal(checkpoint.tensors[name].read(), state[name])


def test_the_base_lends_what_the_file_lacks(tmp_path, base):
    state, weights = make_state(-1)
    linears = only_linears(state)
    linears["model.norm.weight"] = torch.full((64,), 3.0)
    path = write_file(tmp_path / "yi.safetensors", linears)
    with open_gptq_file(path, base, -1) as checkpoint:
        checkpoint.check()
        stem = BLOCK + "mlp.down_proj"
        assert torch.equal(dequantise(checkpoint.linear(stem)), weights[stem])
        embedding = "model.embed_tokens.weight"
        assert torch.equal(checkpoint.tensors[embedding].read(), base.tensors[embedding].read())
        assert (checkpoint.tensors["model.norm.weight"].read() == 3).all()
        assert checkpoint.generation == base.generation


def test_tied_embeddings_come_from_one_place(tmp_path):
    shape = {**SHAPE, "tie_word_embeddings": True}
    state, _ = make_state(32)
    lent = tiny_state(seed=5, **shape)
    del lent["lm_head.weight"]
    folder = write_folder(tmp_path / "tied", lent, **shape)
    del state["lm_head.weight"]
    state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"].half()
    path = write_file(tmp_path / "yi.safetensors", state)
    with open_gptq_file(path, open_hf(folder), 32) as checkpoint:
        checkpoint.check()
        for name in ("lm_head.weight", "model.embed_tokens.weight"):
            assert torch.equal(checkpoint.tensors[name].read(), state["model.embed_tokens.weight"])


def test_another_group_size(tmp_path, base):
    path = write_file(tmp_path / "yi.safetensors", make_state(32)[0])
    message = "--group_size 64 .*does not divide the 96 inputs"
    with pytest.raises(UserError, match=message):
        open_gptq_file(path, base, 64)
    path = write_file(tmp_path / "yi.safetensors", make_state(-1)[0])
    message = (
        f"--group_size 32 differs from the 64 inputs per group of {path}; give --group_size 64"
    )
    with pytest.raises(UserError, match=message):
        open_gptq_file(path, base, 32)


def test_activation_order_is_refused(tmp_path, base):
    state, _ = make_state(32)
    stem = BLOCK + "self_attn.q_proj"
    state[stem + ".g_idx"] = state[stem + ".g_idx"].flip(0)
    path = write_file(tmp_path / "yi.safetensors", state)
    with (
        open_gptq_file(path, base, 32) as checkpoint,
        pytest.raises(CheckpointError, match="q_proj.g_idx does not assign 32 consecutive inputs"),
    ):
        checkpoint.check()


def test_what_is_no_such_file(tmp_path, base):
    def refused(path, message):
        with pytest.raises(CheckpointError, match=message):
            open_gptq_file(path, base, 32)

    refused(tmp_path / "none.pt", "--quant_ckpt_path .*none.pt does not exist; give the path")
    refused(tmp_path / "base", "is not a file of GPTQ-for-LLaMa .* given as --model_dir alone")
    (tmp_path / "x.npz").write_bytes(b"")
    refused(tmp_path / "x.npz", "x.npz is not a file of GPTQ-for-LLaMa")
    path = write_file(tmp_path / "plain.safetensors", tiny_state(**SHAPE))
    refused(path, r"has no tensor model.layers.0.self_attn.q_proj.scales, so it is not a file of")


def test_a_quantised_base_is_refused(tmp_path):
    path = write_file(tmp_path / "yi.safetensors", make_state(32)[0])
    with (
        open_hf(DATA / "gptqmodel-gptq") as base,
        pytest.raises(CheckpointError, match="cannot be combined with .* quantised already; name"),
    ):
        open_gptq_file(path, base, 32)
