"""Archives written by numpy itself; factors that tell which array they came from."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.checkpoint.fp8_scales import open_fp8_scales
from engine.checkpoint.hf import open_hf
from engine.checkpoint.open import Paths, open_source
from engine.errors import CheckpointError, UserError
from engine.quant import Algorithm, KVStorage, QuantConfig
from engine.weights.quantize import quantize
from engine.weights.types import Dense, Fp8
from tests.unit.engine.checkpoint.makers import tiny_state, write_folder
from tests.unit.engine.checkpoint.quantised_makers import DATA

LAYERS = 2
LINEARS = (
    "attention:qkv:q",
    "attention:qkv:k",
    "attention:qkv:v",
    "attention:dense",
    "mlp:fc",
    "mlp:gate",
    "mlp:proj",
)
FC = "_np:layers:0:mlp:fc:activation_scaling_factor"
K_CACHE = "_np:layers:{}:attention:k_cache_scaling_factor"
V_CACHE = "_np:layers:{}:attention:v_cache_scaling_factor"


def factors(layers: int = LAYERS) -> dict[str, np.ndarray]:
    """Inputs count up from 1, weights are a thousandth of that: 0.001, 0.002 …"""
    arrays = {}
    for layer in range(layers):
        for place, name in enumerate(LINEARS):
            value = np.float32(1 + place + 10 * layer)
            arrays[f"_np:layers:{layer}:{name}:activation_scaling_factor"] = np.array(value)
            arrays[f"_np:layers:{layer}:{name}:weights_scaling_factor"] = np.array(value / 1000)
    return arrays


def with_kv(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    for layer in range(LAYERS):
        arrays[K_CACHE.format(layer)] = np.array(0.25 + layer, dtype=np.float32)
        arrays[V_CACHE.format(layer)] = np.array([0.5 + layer], dtype=np.float32)
    return arrays


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "base", tiny_state())


@pytest.fixture
def opened(tmp_path, folder):
    """opened(arrays) is the checkpoint with them."""
    checkpoints = []

    def write_and_open(arrays, name="scales.npz"):
        np.savez(tmp_path / name, **arrays)
        checkpoints.append(open_hf(folder))
        checkpoints[-1] = open_fp8_scales(tmp_path / name, checkpoints[-1])
        return checkpoints[-1]

    yield write_and_open
    for checkpoint in checkpoints:
        checkpoint.close()


def test_layers_that_are_joined_share_the_largest_factor(opened):
    checkpoint = opened(factors())
    checkpoint.check()
    expected = {
        "self_attn.q_proj": (13.0, 0.013),
        "self_attn.k_proj": (13.0, 0.013),
        "self_attn.v_proj": (13.0, 0.013),
        "self_attn.o_proj": (14.0, 0.014),
        # One activation, but two matrices whose outputs keep scales of their own.
        "mlp.gate_proj": (16.0, 0.015),
        "mlp.up_proj": (16.0, 0.016),
        "mlp.down_proj": (17.0, 0.017),
    }
    for name, (input_scale, weight_scale) in expected.items():
        linear = checkpoint.linear(f"model.layers.1.{name}")
        assert isinstance(linear, Dense)
        assert linear.input_scale == input_scale
        assert linear.weight_scale == pytest.approx(weight_scale)
    assert checkpoint.is_calibrated


def test_weights_are_those_of_the_base(opened):
    checkpoint, state = opened(factors()), tiny_state()
    for name, source in checkpoint.tensors.items():
        assert torch.equal(source.read(), state[name])
    stem = "model.layers.0.mlp.up_proj"
    assert torch.equal(checkpoint.linear(stem).weight_NK.read(), state[stem + ".weight"])


def test_codes_are_weights_over_their_scale(opened):
    """value / scale, rounded to float8 with saturation at 448."""
    checkpoint = opened(factors())
    stem = "model.layers.0.self_attn.k_proj"
    quantised = quantize(checkpoint.lazy_linear(stem), QuantConfig(Algorithm.FP8))
    (block,) = quantised.blocks()
    assert isinstance(block, Fp8)
    truth_NK = (tiny_state()[stem + ".weight"] / 0.003).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(block.codes_NK.float(), truth_NK.float())
    assert block.input_scale == 3.0


def test_scales_of_the_cache(opened):
    checkpoint = opened(with_kv(factors()))
    k_scale, v_scale = checkpoint.cache_scales(1, KVStorage.FP8)
    assert (k_scale.tolist(), v_scale.tolist()) == ([1.25], [1.5])
    k_scale, _ = checkpoint.cache_scales(1, KVStorage.INT8)
    assert k_scale.item() == pytest.approx(1.25 * 448 / 127)
    assert opened(factors(), "without.npz").cache_scales(0, KVStorage.FP8) is None


def test_archives_of_ammo_hold_the_weights_as_well(opened):
    arrays = factors()
    arrays["_np:vocab_embedding:weight"] = np.zeros((98, 32), dtype=np.float16)
    arrays["_np:layers:0:attention:qkv:q:weight"] = np.zeros((32, 32), dtype=np.float16)
    arrays["_np:layers:0:input_layernorm:weight"] = np.zeros(32, dtype=np.float16)
    arrays |= {FC: arrays[FC].reshape(1)}
    checkpoint = opened(arrays)
    checkpoint.check()
    stem = "model.layers.0.self_attn.q_proj"
    assert torch.equal(checkpoint.linear(stem).weight_NK.read(), tiny_state()[stem + ".weight"])


def test_a_tied_head(tmp_path):
    state = tiny_state(tie_word_embeddings=True)
    del state["lm_head.weight"]
    folder = write_folder(tmp_path / "tied", state, tie_word_embeddings=True)
    np.savez(tmp_path / "scales.npz", **factors())
    with open_fp8_scales(tmp_path / "scales.npz", open_hf(folder)) as checkpoint:
        checkpoint.check()
        head = checkpoint.tensors["lm_head.weight"].read()
        assert torch.equal(head, state["model.embed_tokens.weight"])


def test_a_directory_with_one_archive(tmp_path, folder):
    (tmp_path / "fp8").mkdir()
    (tmp_path / "fp8" / "llama_tp1.json").write_text("{}")
    np.savez(tmp_path / "fp8" / "llama_tp1_rank0.npz", **factors())
    with open_fp8_scales(tmp_path / "fp8", open_hf(folder)) as checkpoint:
        assert checkpoint.where.endswith("fp8/llama_tp1_rank0.npz")
        assert checkpoint.linear("model.layers.0.mlp.down_proj").input_scale == 7


def test_the_door_opens_it(tmp_path, folder):
    np.savez(tmp_path / "scales.npz", **factors())
    paths = Paths(str(folder), quantized_fp8_model_path=str(tmp_path / "scales.npz"))
    with open_source(paths, QuantConfig(Algorithm.FP8)) as checkpoint:
        assert checkpoint.linear("model.layers.0.mlp.down_proj").input_scale == 7


def without(name):
    arrays = factors()
    del arrays[name]
    return arrays


@pytest.mark.parametrize(
    "arrays, message",
    [
        (factors(3), r"for 3 layers \(up to layer 2\) but the model has 2; run quantize.py"),
        (factors(1), r"for 1 layers \(up to layer 0\) but the model has 2"),
        ({"x": np.zeros(3)}, "holds no FP8 scaling factors; run quantize.py --qformat fp8 on"),
        (without(FC), f"has no array {FC}; run quantize.py"),
        (factors() | {FC: np.float32("nan")}, f"{FC}' holds nan where only finite values above"),
        (factors() | {FC: np.float32(0)}, f"{FC}' holds 0 where only finite values above zero"),
        (factors() | {FC: np.float32(-1)}, f"{FC}' holds -1 where"),
        (
            factors() | {FC: np.ones(2, np.float32)},
            rf"array {FC} is float32 \[2\] where one floating-point value is needed",
        ),
        (factors() | {FC: np.int32(1)}, rf"array {FC} is int32 \[\] where one floating"),
        (
            factors() | {"_np:layers:0:mlp:fc:weight": np.zeros((8, 32), np.float16)},
            r"mlp:fc:weight has shape \[8, 32\] but the model's model.layers.0.mlp.gate_proj has "
            r"\[48, 32\], so the file belongs to another model",
        ),
        (
            factors() | {"_np:model_sizes": np.array([98, 64, 48, 2, 4, 2, 8])},
            r"belongs to a model of the sizes \[98, 64, 48, .* but --model_dir is one of \[98, 32,",
        ),
        (
            factors() | {K_CACHE.format(0): np.float32(1)},
            "has no array _np:layers:0:attention:v_cache_scaling_factor",
        ),
    ],
)
def test_refusals(opened, arrays, message):
    with pytest.raises(CheckpointError, match=message):
        opened(arrays)


def test_paths_that_are_no_archive(tmp_path, folder):
    with open_hf(folder) as base:
        with pytest.raises(UserError, match="fp8_model_path .*none.npz does not exist; run quanti"):
            open_fp8_scales(tmp_path / "none.npz", base)
        (tmp_path / "empty").mkdir()
        with pytest.raises(UserError, match="holds 0 .npz files; give the one to read"):
            open_fp8_scales(tmp_path / "empty", base)
        (tmp_path / "damaged.npz").write_bytes(b"PK")
        with pytest.raises(UserError, match="damaged.npz: is not a zip archive"):
            open_fp8_scales(tmp_path / "damaged.npz", base)


def test_a_quantised_base_is_refused(tmp_path):
    np.savez(tmp_path / "scales.npz", **factors())
    with (
        open_hf(DATA / "modelopt-int4-awq") as base,
        pytest.raises(CheckpointError, match="cannot be combined with .* is quantised already"),
    ):
        open_fp8_scales(tmp_path / "scales.npz", base)
