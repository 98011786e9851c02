"""config.ini keeps the network's numbers, whatever a model's own configuration looks like."""

from __future__ import annotations

import pytest

from engine.checkpoint.ft import open_ft
from engine.config import ModelConfig
from engine.quant import QuantConfig
from tests.ft_golden import Shape, golden_files, write_folder
from utils.ft_directory import commit, make_fields

FLAGS = {
    "storage_type": "fp32",
    "tensor_parallelism": 1,
    "out_dir": "100%/[x]",
    "smoothquant": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "mscale": 0.7,
    "mscale_all_dim": 1.0,
    "truncate": False,
}
CONFIGURATIONS = {
    "plain": {},
    "linear": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "llama3": {"rope_scaling": LLAMA3},
    "yarn": {"rope_scaling": YARN},
    "transformers 5": {"rope_theta": None, "rope_parameters": {**YARN, "rope_theta": 7e6}},
    "length beside the scaling": {"rope_scaling": YARN, "original_max_position_embeddings": 24},
    "packed": {"quantization_config": {"quant_method": "compressed-tensors"}},
    "eps": {"rms_norm_eps": 1e-06, "tie_word_embeddings": True},
}


@pytest.mark.parametrize("changes", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_the_network_survives(tmp_path, changes):
    shape = Shape(layers=1)
    raw = shape.hf() | changes
    config = ModelConfig.from_hf(raw, "raw")
    weights = shape.weights()
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    staging = write_folder(tmp_path / "s", golden_files(shape, weights, shape.ranges()), {})
    fields = make_fields(FLAGS, raw, config)
    assert "quantization_config" not in fields
    commit(staging, tmp_path / "1-gpu", fields, [])
    with open_ft(tmp_path / "1-gpu", quant=QuantConfig()) as checkpoint:
        checkpoint.check()
        assert checkpoint.config == config
