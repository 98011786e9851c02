"""Ranges against those that hooks on the whole transformers model see."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from engine.checkpoint.base import Checkpoint
from engine.checkpoint.linear_layers import linear_shapes
from engine.checkpoint.open import open_checkpoint
from engine.errors import CheckpointError, UserError
from engine.weights.numerics import dequantize
from tests.conftest import ROOT
from tests.unit.engine.checkpoint.makers import tiny_model, tiny_state, write_folder
from utils import calibration
from utils.calibration import CalibratedLayer, calibrate
from utils.tokenizer import load_tokenizer

CPU = torch.device("cpu")
TINY_YI = ROOT / "models/tiny-yi"
TEXTS = (
    "def mean(values):\n    return sum(values) / len(values)\n",
    "import os",
    "class Stack:\n    def push(self, item):\n        self.items.append(item)\n" * 3,
    "for i in range(10):\n    print(i)",
    "import re",
)


@contextmanager
def watched(model: LlamaForCausalLM) -> Iterator[dict[str, Any]]:
    """Largest magnitudes that hooks on the linear layers of `model` see, by (stem, what)."""
    found: dict[Any, Tensor] = {}

    def widen(key: Any, amax: Tensor) -> None:
        found[key] = torch.maximum(found[key], amax) if key in found else amax

    def note(stem: str, inputs: Tensor, outputs: Tensor) -> None:
        widen((stem, "x"), inputs.abs().flatten(0, -2).amax(0))
        widen((stem, "y"), outputs.abs().max())
        dim = model.config.head_dim
        heads = outputs.unflatten(-1, (-1, dim)).transpose(1, 2)
        if stem.endswith("v_proj"):
            widen((stem, "cached"), heads.abs().amax((0, 2, 3)))
        if stem.endswith("k_proj"):
            cos, sin = model.model.rotary_emb(outputs, torch.arange(outputs.shape[1])[None])
            turned, _ = apply_rotary_pos_emb(heads, heads, cos, sin)
            widen((stem, "cached"), turned.abs().amax((0, 2, 3)))

    hooks = [
        module.register_forward_hook(lambda m, args, y, stem=stem: note(stem, args[0], y))
        for stem, module in model.named_modules()
        if stem.endswith("_proj")
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def expected_ranges(model: LlamaForCausalLM, samples: Sequence[Sequence[int]]) -> dict[Any, Tensor]:
    with torch.no_grad(), watched(model) as found:
        for ids in samples:
            model(torch.tensor([ids]))
    return found


def collect(checkpoint: Checkpoint, samples, spill: Path, **settings) -> list[CalibratedLayer]:
    return list(calibrate(checkpoint, samples, device=CPU, spill_dir=spill, **settings))


def check(layers: list[CalibratedLayer], expected: dict[Any, Tensor]) -> None:
    assert [calibrated.layer for calibrated in layers] == list(range(len(layers)))
    assert len(expected) == len(layers) * (7 * 2 + 2)
    for calibrated in layers:
        prefix, ranges = f"model.layers.{calibrated.layer}.", calibrated.ranges
        found = {(prefix + name, "x"): amax for name, amax in ranges.inputs.items()}
        found |= {(prefix + name, "y"): amax for name, amax in ranges.outputs.items()}
        found[prefix + "self_attn.k_proj", "cached"] = ranges.keys_G
        found[prefix + "self_attn.v_proj", "cached"] = ranges.values_G
        for key, amax in found.items():
            torch.testing.assert_close(
                amax, expected[key], rtol=1e-4, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}"
            )


@pytest.fixture(scope="module")
def tiny_yi() -> tuple[list[list[int]], dict[Any, Tensor]]:
    """Token ids of some texts, two of them of one length, and what transformers makes of them."""
    tokenizer = load_tokenizer(TINY_YI)
    samples = [tokenizer.encode(text) for text in TEXTS]
    assert len(samples[1]) == len(samples[4]) != len(samples[0])
    model = LlamaForCausalLM.from_pretrained(TINY_YI, dtype=torch.float32)
    return samples, expected_ranges(model, samples)


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return tiny_state()


@pytest.mark.parametrize("tokens", [4096, 5], ids=["large batches", "small batches"])
@pytest.mark.parametrize("spill", [1 << 30, 0], ids=["memory", "file"])
def test_ranges_are_those_of_transformers(tmp_path, monkeypatch, tiny_yi, tokens, spill):
    monkeypatch.setattr(calibration, "BATCH_TOKENS", tokens)
    monkeypatch.setattr(calibration, "SPILL_BYTES", spill)
    samples, expected = tiny_yi
    seen: list[tuple[int, int]] = []
    with open_checkpoint(str(TINY_YI)) as checkpoint:
        layers = collect(
            checkpoint, samples, tmp_path, progress=lambda done, total: seen.append((done, total))
        )
    check(layers, expected)
    assert seen == [(n, 6) for n in range(1, 7)]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "dynamic", "factor": 2.0},
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ],
    ids=["dynamic", "yarn"],
)
def test_keys_are_rotated_as_they_are_cached(tmp_path, scaling):
    model = tiny_model(rope_scaling=scaling | {"rope_theta": 5e6})
    write_folder(tmp_path, dict(model.state_dict()), rope_scaling=scaling)
    samples = [[3, 5, 8, 9, 1, 60] * 5, [7, 7, 2]]
    with open_checkpoint(str(tmp_path)) as checkpoint:
        layers = collect(checkpoint, samples, tmp_path)
    check(layers, expected_ranges(model, samples))


def test_weights_are_those_of_the_checkpoint(tmp_path, state):
    with open_checkpoint(str(write_folder(tmp_path, state))) as checkpoint:
        layers = collect(checkpoint, [[1, 2]], tmp_path)
    for calibrated in layers:
        assert len(calibrated.weights) == 9
        for name, weight in calibrated.weights.items():
            assert torch.equal(weight, state[f"model.layers.{calibrated.layer}.{name}.weight"])


def test_quantised_checkpoints_calibrate_as_what_they_are(tmp_path):
    folder = ROOT / "tests/data/quantized/compressed-tensors-w4a16"
    with open_checkpoint(str(folder)) as checkpoint:
        layers = collect(checkpoint, [[1, 5, 9, 3]], tmp_path)
        weights = {name: source.read().float() for name, source in checkpoint.tensors.items()}
        for stem in linear_shapes(checkpoint.config):
            weights[f"{stem}.weight"] = dequantize(checkpoint.linear(stem))
    config = LlamaConfig.from_pretrained(folder)
    del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(weights)
    check(layers, expected_ranges(model, [[1, 5, 9, 3]]))


def test_one_layer_is_in_memory(tmp_path, state, monkeypatch):
    """When a layer is read, the one before is gone."""
    alive: list[int] = []
    known: list[weakref.ref[Tensor]] = []
    read_layer = calibration._read_layer

    def counted(checkpoint: Checkpoint, layer: int) -> dict[str, Tensor]:
        alive.append(sum(reference() is not None for reference in known))
        weights = read_layer(checkpoint, layer)
        known.extend(weakref.ref(weight) for weight in weights.values())
        return weights

    monkeypatch.setattr(calibration, "_read_layer", counted)
    with open_checkpoint(str(write_folder(tmp_path, state))) as checkpoint:
        for calibrated in calibrate(checkpoint, [[1, 2]], device=CPU, spill_dir=tmp_path):
            assert calibrated.weights
            del calibrated
    assert alive == [0, 0]


def test_damaged_weights_are_refused(tmp_path, state):
    broken = {**state}
    name = "model.layers.1.mlp.up_proj"
    broken[f"{name}.weight"] = broken[f"{name}.weight"].clone()
    broken[f"{name}.weight"][2, 3] = torch.nan
    write_folder(tmp_path, broken)
    with (
        open_checkpoint(str(tmp_path)) as checkpoint,
        pytest.raises(CheckpointError, match=f"output of {name} has NaN or infinite values while"),
    ):
        collect(checkpoint, [[1, 2]], tmp_path)


def test_no_room_for_activations(tmp_path, state, monkeypatch):
    monkeypatch.setattr(calibration, "SPILL_BYTES", 0)
    spill = tmp_path / "gone"
    write_folder(tmp_path, state)
    message = "--out-dir .*gone cannot hold the 0.0 GB of activations .* lower --calib_size"
    with (
        open_checkpoint(str(tmp_path)) as checkpoint,
        pytest.raises(UserError, match=message),
    ):
        collect(checkpoint, [[1, 2]], spill)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_ranges_on_a_gpu(tmp_path, tiny_yi):
    samples, expected = tiny_yi
    with open_checkpoint(str(TINY_YI)) as checkpoint:
        layers = list(
            calibrate(checkpoint, samples, device=torch.device("cuda"), spill_dir=tmp_path)
        )
    check(layers, expected)


def test_batches_hold_texts_of_one_length(monkeypatch):
    monkeypatch.setattr(calibration, "BATCH_TOKENS", 6)
    plan = [(rows.start, rows.stop, n) for rows, n in calibration._plan_batches([2, 3, 3, 3, 9])]
    assert plan == [(0, 2, 2), (2, 8, 3), (8, 11, 3), (11, 20, 9)]
