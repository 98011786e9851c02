"""Truth: transformers' whole model with hooks, its matrices replaced one step after the other."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from transformers import LlamaForCausalLM

from engine.checkpoint.gptq_file import open_gptq_file
from engine.checkpoint.hf import open_hf
from engine.errors import CheckpointError, UserError
from tests.unit.engine.checkpoint.gptq_makers import SHAPE
from tests.unit.engine.checkpoint.makers import tiny_model, tiny_state, write_folder
from tests.unit.engine.checkpoint.quantised_makers import dequantise, word
from utils.quantisation import gptq_model
from utils.quantisation.gptq import Hessian, round_matrix
from utils.quantisation.gptq_file import pack_columns, plan_tensors
from utils.quantisation.gptq_model import make_tensors, read_half, round_layers
from utils.quantisation.hf_model import load_layer
from utils.quantisation.output import SafetensorsWriter

GROUP = 32
TWO_LAYERS = {**SHAPE, "num_hidden_layers": 2}
STAGES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


@pytest.fixture
def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, 30), (1, 30), (3, 17))
    return [torch.randint(0, SHAPE["vocab_size"], shape, generator=generator) for shape in shapes]


@pytest.fixture
def checkpoint(tmp_path):
    with open_hf(write_folder(tmp_path / "model", tiny_state(**TWO_LAYERS), **TWO_LAYERS)) as found:
        yield found


def run(checkpoint, batches):
    return round_layers(
        checkpoint, batches, group_size=GROUP, dtype=torch.float32, device=torch.device("cpu")
    )


@torch.inference_mode()
def inputs_of(model: LlamaForCausalLM, stem: str, batches) -> torch.Tensor:
    """What the layer `stem` reads, [T, K]."""
    seen = []
    linear = model.get_submodule(stem)
    handle = linear.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for tokens_BS in batches:
        model(tokens_BS)
    handle.remove()
    return torch.cat([x.flatten(0, 1) for x in seen])


def test_each_step_sees_what_the_rounded_ones_before_it_give(checkpoint, batches):
    model = tiny_model(**TWO_LAYERS).eval()
    for layer, rounded in enumerate(run(checkpoint, batches)):
        for names in STAGES:
            stems = {name: f"model.layers.{layer}.{name}" for name in names}
            inputs_TK = inputs_of(model, stems[names[0]], batches)
            hessian = Hessian(inputs_TK.shape[1], inputs_TK.device)
            hessian.add(inputs_TK)
            for name, stem in stems.items():
                linear = model.get_submodule(stem)
                truth = round_matrix(linear.weight.detach(), hessian.sum_KK, GROUP)
                # Sums in another order; where a value lies between two codes, it may fall apart.
                unlike = (truth.codes_NK != rounded[name].codes_NK).float().mean()
                assert unlike < 0.02, stem
                linear.weight.data = rounded[name].weight_NK


def test_one_layer_in_memory(monkeypatch, checkpoint, batches):
    """When a layer is read, those before it are gone."""
    made: list[weakref.ref[torch.nn.Module]] = []

    def load_and_watch(*args):
        gc.collect()
        assert all(layer() is None for layer in made)
        layer = load_layer(*args)
        made.append(weakref.ref(layer))
        return layer

    monkeypatch.setattr(gptq_model, "load_layer", load_and_watch)
    assert len(list(run(checkpoint, batches))) == len(made) == 2


def write(path, checkpoint, layers):
    with SafetensorsWriter(path, plan_tensors(checkpoint.config, GROUP)) as writer:
        for name, tensor in make_tensors(checkpoint, layers, GROUP):
            writer.write(name, tensor)
    return path


def test_the_file_holds_exactly_what_was_rounded(tmp_path, checkpoint, batches):
    layers = list(run(checkpoint, batches))
    path = write(tmp_path / "yi.safetensors", checkpoint, layers)
    with open_gptq_file(path, open_hf(tmp_path / "model"), GROUP) as found:
        found.check()
        for layer, rounded in enumerate(layers):
            assert len(rounded) == 7
            for name, matrix in rounded.items():
                weight_NK = dequantise(found.linear(f"model.layers.{layer}.{name}"))
                assert torch.equal(weight_NK, matrix.weight_NK)
        for name, source in found.tensors.items():
            assert torch.equal(source.read(), checkpoint.tensors[name].read().half())


def test_a_tied_head_is_not_stored(tmp_path, batches):
    shape = {**SHAPE, "tie_word_embeddings": True}
    state = tiny_state(**shape)
    del state["lm_head.weight"]
    with open_hf(write_folder(tmp_path / "tied", state, **shape)) as checkpoint:
        path = write(tmp_path / "x.safetensors", checkpoint, run(checkpoint, batches))
    with open_gptq_file(path, open_hf(tmp_path / "tied"), GROUP) as found:
        found.check()
        assert torch.equal(found.tensors["lm_head.weight"].read().float().half(),
                           state["model.embed_tokens.weight"].half())  # fmt: skip


def test_words_hold_eight_values_the_lowest_first():
    values = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 15, 0, 0, 0, 0, 0, 0, 0, 8], [9] + [0] * 15])
    assert pack_columns(values).tolist() == [
        [word(1, 2, 3, 4, 5, 6, 7, 15), word(0, 0, 0, 0, 0, 0, 0, 8)],
        [9, 0],
    ]


def test_numbers_that_are_not_finite(tmp_path, batches):
    state = tiny_state(**SHAPE)
    state["model.layers.0.input_layernorm.weight"][3] = float("inf")
    with (
        open_hf(write_folder(tmp_path, state, **SHAPE)) as checkpoint,
        pytest.raises(UserError, match="inputs that are not finite; use --dtype bfloat16"),
    ):
        list(run(checkpoint, batches))


def test_weights_that_half_precision_cannot_hold(tmp_path):
    state = tiny_state(**SHAPE)
    state["model.norm.weight"][0] = 1e5
    with (
        open_hf(write_folder(tmp_path, state, **SHAPE)) as checkpoint,
        pytest.raises(CheckpointError, match="model.norm.weight holds values that float16 cannot"),
    ):
        read_half(checkpoint, "model.norm.weight")
