"""What all formats share; the formats have tests of their own."""

from __future__ import annotations

import os
import struct

import pytest
import torch

from engine.checkpoint.hf import open_hf
from engine.checkpoint.linear_layers import find_peers, linear_shapes
from engine.checkpoint.quant_groups import Groups
from engine.errors import CheckpointError
from engine.weights.types import Dense
from tests.unit.engine.checkpoint.quantised_makers import BLOCK, DATA, LINEARS, copy_sample


def test_a_full_precision_checkpoint_has_dense_linears():
    with open_hf(DATA / "base") as checkpoint:
        assert checkpoint.quant is None
        assert checkpoint.kv_scales(0) is None
        for name in LINEARS:
            linear = checkpoint.linear(BLOCK + name)
            assert isinstance(linear, Dense)
            expected = checkpoint.tensors[f"{BLOCK}{name}.weight"].read()
            assert torch.equal(linear.weight_NK.read(), expected)


def test_linear_layers_of_a_network():
    with open_hf(DATA / "base") as checkpoint:
        shapes = linear_shapes(checkpoint.config)
    assert list(shapes) == [BLOCK + name for name in LINEARS]
    assert shapes[BLOCK + "self_attn.v_proj"] == (64, 256)
    assert shapes[BLOCK + "mlp.down_proj"] == (256, 128)


def test_which_layers_share_their_input():
    attention, mlp = "model.layers.12.self_attn.", "model.layers.12.mlp."
    joined = (attention + "q_proj", attention + "k_proj", attention + "v_proj")
    assert all(find_peers(stem) == joined for stem in joined)
    assert find_peers(mlp + "up_proj") == (mlp + "gate_proj", mlp + "up_proj")
    for alone in (attention + "o_proj", mlp + "down_proj"):
        assert find_peers(alone) == (alone,)


def test_groups_of_a_file_become_groups_of_the_engine():
    values_NR = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert Groups(64, 32).count(128) == 2
    assert Groups(64, 32).spread(values_NR, 128).tolist() == [[1, 1, 2, 2], [3, 3, 4, 4]]
    assert Groups(64, 64).spread(values_NR, 128).tolist() == values_NR.tolist()
    assert Groups(-1, 128).count(512) == 1
    assert Groups(-1, 128).spread(values_NR[:, :1], 512).tolist() == [[1] * 4, [3] * 4]


@pytest.mark.parametrize("name", ["gptqmodel-awq", "modelopt-fp8-kv", "compressed-tensors-w8a8"])
def test_opening_and_checking_reads_no_weights(name, monkeypatch):
    path = DATA / name / "model.safetensors"
    (header_bytes,) = struct.unpack("<Q", path.read_bytes()[:8])
    ends, preadv = [], os.preadv

    def watched(descriptor, views, offset):
        ends.append(offset + sum(len(view) for view in views))
        return preadv(descriptor, views, offset)

    monkeypatch.setattr(os, "preadv", watched)
    with open_hf(DATA / name) as checkpoint:
        checkpoint.check()
        assert max(ends) == 8 + header_bytes
        checkpoint.linear(BLOCK + "mlp.up_proj")
        assert max(ends) > 8 + header_bytes


def test_one_layer_without_kv_scales(tmp_path):
    """Two layers, only the first with scales: neither an INT8 nor an FP8 cache may do so."""

    def change(state) -> None:
        for name in [name for name in state if name.startswith(BLOCK)]:
            if not name.endswith(("k_scale", "v_scale")):
                state[name.replace("layers.0", "layers.1")] = state[name].clone()

    for name in ("modelopt-fp8-kv", "compressed-tensors-w8a8"):
        folder = copy_sample(tmp_path / name, name, tensors=change)
        text = (folder / "config.json").read_text()
        config = text.replace('"num_hidden_layers": 1', '"num_hidden_layers": 2')
        assert config != text
        (folder / "config.json").write_text(config)
        with (
            open_hf(folder) as checkpoint,
            pytest.raises(CheckpointError, match="but the scales of layer 1 .* are not both there"),
        ):
            checkpoint.check()
