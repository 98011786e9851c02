"""Truth: transformers' model with hooks, on the original weights and on the refined ones."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM

from engine.checkpoint.awq_file import open_awq_file
from engine.checkpoint.hf import open_hf
from tests.unit.engine.checkpoint.makers import tiny_model, tiny_state, write_folder
from tests.unit.engine.checkpoint.quantised_makers import dequantise
from utils.quantisation.awq_model import refine, watch_inputs

GROUP = 32
SHAPE = {
    "vocab_size": 24,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}
PEERS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
STEMS = [f"model.layers.{layer}.{name}" for layer in range(2) for names in PEERS for name in names]
WEIGHT, AMAX, FACTOR = "weight", "weight_quantizer._amax", "input_quantizer._pre_quant_scale"


def spreads() -> dict[str, torch.Tensor]:
    """Stem -> how much larger the weights [N, K] of some inputs are: alike for layers that share
    their input."""
    generator = torch.Generator().manual_seed(3)
    spread = {}
    for layer in range(2):
        for names in PEERS:
            inputs = SHAPE["intermediate_size" if names[0] == "mlp.down_proj" else "hidden_size"]
            spread_K = torch.exp(torch.randn(inputs, generator=generator))
            spread |= {f"model.layers.{layer}.{name}": spread_K for name in names}
    return spread


def make_state() -> dict[str, torch.Tensor]:
    state = tiny_state(**SHAPE)
    for stem, spread_K in spreads().items():
        state[f"{stem}.{WEIGHT}"] *= spread_K
    return state


def make_model(state: dict[str, torch.Tensor]) -> LlamaForCausalLM:
    model = tiny_model(**SHAPE).eval()
    model.load_state_dict({name: state[name] for name in model.state_dict()})
    return model


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "model", make_state(), **SHAPE)


@pytest.fixture
def tokens_BS() -> torch.Tensor:
    return torch.randint(0, 24, (8, 30), generator=torch.Generator().manual_seed(1))


def searched_state(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What a search without clipping gives: a factor of its own for every layer."""
    generator = torch.Generator().manual_seed(2)
    state = {name: tensor.to(dtype) for name, tensor in make_state().items()}
    for stem, spread_K in spreads().items():
        weight_NK = state[f"{stem}.{WEIGHT}"]
        noise_K = torch.exp(0.1 * torch.randn(len(spread_K), generator=generator))
        state[f"{stem}.{FACTOR}"] = (spread_K * noise_K).to(dtype)
        weight_NK.copy_(weight_NK.float() / state[f"{stem}.{FACTOR}"].float())
        state[f"{stem}.{AMAX}"] = weight_NK.reshape(-1, GROUP).abs().amax(1, keepdim=True)
    return state


def refined(folder, tokens_BS, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    state = searched_state(dtype)
    model = make_model(make_state()).to(dtype)
    with open_hf(folder) as checkpoint:
        with watch_inputs(model, checkpoint.config, GROUP) as hessians, torch.no_grad():
            model(tokens_BS)
        refine(state, checkpoint, hessians)
    return state


def smoothed_model(state: dict[str, torch.Tensor]) -> LlamaForCausalLM:
    """The network with the state's weights, its inputs multiplied by the state's factors."""
    model = make_model(state)
    for stem in STEMS:
        factor_K = state[f"{stem}.{FACTOR}"]
        model.get_submodule(stem).register_forward_pre_hook(
            lambda module, args, factor_K=factor_K: (args[0] * factor_K,)
        )
    return model


@torch.no_grad()
def test_the_network_computes_the_same(folder, tokens_BS):
    truth = make_model(make_state())(tokens_BS).logits
    state = refined(folder, tokens_BS)
    torch.testing.assert_close(smoothed_model(state)(tokens_BS).logits, truth, rtol=1e-4, atol=1e-5)
    assert all((state[f"{stem}.{FACTOR}"] != 1).any() for stem in STEMS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reader_rounds_to_the_ranges_of_the_file(tmp_path, folder, tokens_BS, dtype):
    state = refined(folder, tokens_BS, dtype)
    path = tmp_path / "yi.pt"
    torch.save(state, path)
    with open_awq_file(path, open_hf(folder), GROUP) as found:
        found.check()
        for stem in STEMS:
            linear = found.linear(stem)
            scale_NR = state[f"{stem}.{AMAX}"].view(len(linear.codes_NK), -1) / 7
            steps_NK = state[f"{stem}.{WEIGHT}"].float() / scale_NR.repeat_interleave(GROUP, 1)
            assert torch.equal(linear.scale_NR, scale_NR)
            assert torch.equal(linear.codes_NK.float() - 8, steps_NK.round().clamp(-8, 7))
            assert torch.equal(linear.pre_scale_K, state[f"{stem}.{FACTOR}"].float())
    for layer in range(2):
        for names in PEERS:
            factors = [state[f"model.layers.{layer}.{name}.{FACTOR}"] for name in names]
            assert all(torch.equal(factor_K, factors[0]) for factor_K in factors)
            assert all(factor_K.dtype == dtype for factor_K in factors)


@torch.no_grad()
def test_outputs_change_less_than_without_clipping(tmp_path, folder, tokens_BS):
    """Of every layer on its own inputs, against what the reader makes of the search's state."""
    files = {"searched": searched_state(torch.float32), "refined": refined(folder, tokens_BS)}
    errors = {}
    model = make_model(make_state())
    for name, state in files.items():
        path = tmp_path / f"{name}.pt"
        torch.save(state, path)
        with open_awq_file(path, open_hf(folder), GROUP) as found:
            errors[name] = output_errors(model, tokens_BS, found)
    assert len(errors["refined"]) == len(STEMS)
    for stem, error in errors["refined"].items():
        assert error < 0.95 * errors["searched"][stem], stem


def output_errors(model: LlamaForCausalLM, tokens_BS, checkpoint) -> dict[str, float]:
    """Stem -> squared change of the layer's outputs by the checkpoint's rounded weights."""
    errors = {}

    def compare(stem):
        def hook(module, args, output):
            change = output - args[0] @ dequantise(checkpoint.linear(stem)).T
            errors[stem] = change.square().sum().item()

        return hook

    handles = [model.get_submodule(stem).register_forward_hook(compare(stem)) for stem in STEMS]
    model(tokens_BS)
    for handle in handles:
        handle.remove()
    return errors


@torch.no_grad()
def test_inputs_are_watched_once_for_layers_that_share_them(folder, tokens_BS):
    model, seen = make_model(make_state()), []
    hook = model.get_submodule(STEMS[3]).register_forward_pre_hook(
        lambda module, args: seen.append(args[0].flatten(0, 1))
    )
    with (
        open_hf(folder) as checkpoint,
        watch_inputs(model, checkpoint.config, GROUP) as hessians,
    ):
        model(tokens_BS)
    hook.remove()
    layers = [
        tuple(f"model.layers.{i}.{name}" for name in names) for i in (0, 1) for names in PEERS
    ]
    assert list(hessians) == layers
    found_RGG = hessians[(STEMS[3],)].sum_RGG.clone()
    whole_KK = seen[0].T @ seen[0]
    blocks = [whole_KK[start : start + GROUP, start : start + GROUP] for start in (0, GROUP)]
    torch.testing.assert_close(found_RGG, torch.stack(blocks))
    model(tokens_BS)
    assert torch.equal(hessians[(STEMS[3],)].sum_RGG, found_RGG)
