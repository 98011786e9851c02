"""The converter's files, one by one, against those that numpy computes from the format."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.checkpoint.base import Checkpoint
from engine.checkpoint.open import open_checkpoint
from engine.config import ModelConfig
from engine.errors import UserError
from tests.ft_golden import Shape, cache_files, golden_files
from tests.unit.engine.checkpoint.makers import write_folder, write_json
from utils.calibration import CalibratedLayer, LayerRanges
from utils.ft_export import Export, write_layer, write_tables

PARENTS = {"q_proj": "self_attn", "k_proj": "self_attn", "v_proj": "self_attn"}
PARENTS |= {"o_proj": "self_attn", "gate_proj": "mlp", "up_proj": "mlp", "down_proj": "mlp"}

SHAPES = {
    "tp 1": Shape(),
    "tp 2": Shape(tp=2),
    "tp above kv heads": Shape(tp=4),
    "no groups": Shape(kv_heads=8, tp=2),
    "Yi-6B": Shape(32, 4, 128, 24, 32, 10, 1, 8),
    "Yi-34B": Shape(56, 8, 128, 24, 32, 10, 1, 4),
}


def open_weights(folder: Path, shape: Shape, weights) -> Checkpoint:
    tensors = {name: torch.from_numpy(array) for name, array in weights.items()}
    write_folder(folder, tensors)
    write_json(folder / "config.json", shape.hf())
    return open_checkpoint(str(folder))


def calibrated_layers(shape: Shape, weights, ranges) -> list[CalibratedLayer]:
    layers = []
    for layer, found in enumerate(ranges):
        prefix = f"model.layers.{layer}."
        own = {
            name.removeprefix(prefix).removesuffix(".weight"): torch.from_numpy(array)
            for name, array in weights.items()
            if name.startswith(prefix)
        }
        inputs, outputs = (
            {f"{PARENTS[n]}.{n}": torch.as_tensor(value) for n, value in found[key].items()}
            for key in "xy"
        )
        k, v = torch.from_numpy(found["k"]), torch.from_numpy(found["v"])
        layers.append(CalibratedLayer(layer, own, LayerRanges(inputs, outputs, k, v)))
    return layers


def export_all(folder: Path, shape: Shape, alpha: float | None, dtype=torch.float32, threads=2):
    weights, ranges = shape.weights(), shape.ranges()
    target = folder / "out"
    target.mkdir(parents=True)
    config = ModelConfig.from_hf(shape.hf(), "golden")
    export = Export(target, config, dtype, shape.tp, alpha)
    with (
        open_weights(folder / "hf", shape, weights) as checkpoint,
        ThreadPoolExecutor(threads) as pool,
    ):
        write_tables(checkpoint, export)
        for calibrated in calibrated_layers(shape, weights, ranges):
            write_layer(calibrated, export, pool)
    return target


@pytest.mark.parametrize("alpha", [None, 0.5, 0.8])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_file(tmp_path, shape, alpha):
    target = export_all(tmp_path, shape, alpha)
    ranges = shape.ranges()
    expected = golden_files(shape, shape.weights(), ranges, alpha) | cache_files(ranges)
    assert {path.name for path in target.iterdir()} == set(expected)
    for name, array in expected.items():
        found = np.fromfile(target / name, array.dtype)
        assert found.size == array.size, name
        found = found.reshape(array.shape)
        if array.dtype == np.int8:
            # A power that differs in its last bit may turn over a tie.
            difference = np.abs(found.astype(int) - array.astype(int))
            assert difference.max() <= (0 if alpha is None else 1), name
            assert (difference > 0).mean() < 5e-3, name
        elif alpha is None and ".weight." in name:
            assert np.array_equal(found, array), name
        else:
            np.testing.assert_allclose(found, array, rtol=1e-5, err_msg=name)


def test_scales_of_one_layer_by_hand(tmp_path):
    """y = x · w with xmax 20, wmax 2 and ymax 10: (20 / 127) · (2 / 127) a step of the sum."""
    config = ModelConfig.from_hf(Shape(1, 1, 2, 2, 2, 3, 1).hf(), "hand")
    eye = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    names = [f"{parent}.{name}" for name, parent in PARENTS.items()]
    weights = dict.fromkeys(names, eye) | {
        name: torch.ones(2) for name in ("input_layernorm", "post_attention_layernorm")
    }
    inputs = dict.fromkeys(names, torch.tensor([20.0, 5.0]))
    outputs = dict.fromkeys(names, torch.tensor(10.0))
    ranges = LayerRanges(inputs, outputs, torch.tensor([254.0]), torch.tensor([0.0]))
    with ThreadPoolExecutor(1) as pool:
        export = Export(tmp_path, config, torch.float32)
        write_layer(CalibratedLayer(0, weights, ranges), export, pool)

    def read(name: str, dtype=np.float32) -> list[float]:
        path = tmp_path / f"model.layers.0.attention.{name}.bin"
        return np.fromfile(path, dtype).tolist()

    qkv = "query_key_value"
    assert read(f"{qkv}.weight.0") == [2, 0, 2, 0, 2, 0, 0, 1, 0, 1, 0, 1]
    assert read(f"{qkv}.weight.int8.col.0", np.int8) == [127, 0] * 3 + [0, 127] * 3
    assert read(f"{qkv}.weight.int8.0", np.int8) == [127, 0] * 3 + [0, 64] * 3
    assert read(f"{qkv}.scale_x_orig_quant") == pytest.approx([127 / 20])
    assert read(f"{qkv}.scale_y_quant_orig") == pytest.approx([10 / 127])
    assert read(f"{qkv}.scale_w_quant_orig.0") == pytest.approx([2 / 127] * 6)
    assert read(f"{qkv}.scale_w_quant_orig.col.0") == pytest.approx([2 / 127, 1 / 127] * 3)
    steps = 20 / 127 * 2 / 127 / (10 / 127)
    assert read(f"{qkv}.scale_y_accum_quant.0") == pytest.approx([steps] * 6)
    assert read("k_cache.scale_quant_orig") == [2.0]
    # No scale is zero, not even that of values which are.
    assert read("v_cache.scale_quant_orig.head") == pytest.approx([1e-6 / 127])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_storage_types_are_raw_values(tmp_path, dtype):
    shape = Shape(layers=1)
    target = export_all(tmp_path, shape, None, dtype)
    data = bytearray((target / "model.layers.0.mlp.proj.weight.0.bin").read_bytes())
    stored = torch.frombuffer(data, dtype=dtype).view(shape.ffn, shape.hidden)
    expected = torch.from_numpy(shape.weights()["model.layers.0.mlp.down_proj.weight"])
    assert torch.equal(stored, expected.T.to(dtype))


def test_threads_do_not_change_a_byte(tmp_path):
    one, many = (export_all(tmp_path / str(n), Shape(tp=2), 0.5, threads=n) for n in (1, 4))
    for path in one.iterdir():
        assert path.read_bytes() == (many / path.name).read_bytes(), path.name


def test_values_beyond_half_precision(tmp_path):
    shape = Shape(layers=1)
    weights = shape.weights()
    weights["model.norm.weight"][3] = 1e5
    export = Export(tmp_path, ModelConfig.from_hf(shape.hf(), "x"), torch.float16)
    message = "--storage-type: model.norm.weight has NaN or values too large for float16; use bf16"
    with (
        open_weights(tmp_path / "hf", shape, weights) as checkpoint,
        pytest.raises(UserError, match=message),
    ):
        write_tables(checkpoint, export)
