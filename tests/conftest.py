"""Fixtures that several test files share: small checkpoints, and a quiet environment."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import tests.kernels.triton_mode  # noqa: F401  before anything imports Triton

# A test that reached for the hub would wait for a network that need not be there.
os.environ["HF_HUB_OFFLINE"] = "1"

ROOT = Path(__file__).resolve().parent.parent

SMALL_HF = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@contextmanager
def log_as_before() -> Iterator[None]:
    """A script that is run in this process sets the level of the log: for that run alone."""
    logger = logging.getLogger("yi")
    before = logger.level, logger.propagate, list(logger.handlers)
    try:
        yield
    finally:
        logger.setLevel(before[0])
        logger.propagate, logger.handlers[:] = before[1], before[2]


@pytest.fixture(autouse=True)
def quiet_again() -> Iterator[None]:
    with log_as_before():
        yield


WriteHF = Callable[..., dict[str, torch.Tensor]]


@pytest.fixture(scope="session")
def write_hf() -> WriteHF:
    """write_hf(folder, dtype=…, seed=…, **config) makes a Hugging Face checkpoint of 97 tokens,
    3 layers, 8:2 heads of 8 and returns its tensors by name."""
    return _write_hf


def _write_hf(
    folder: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any
) -> dict[str, torch.Tensor]:
    config = SMALL_HF | changes
    tensors = _random_tensors(config, dtype, seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


def _random_tensors(
    config: dict[str, Any], dtype: torch.dtype, seed: int
) -> dict[str, torch.Tensor]:
    width, ffn = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or width // heads
    q_rows, kv_rows = heads * head_dim, config["num_key_value_heads"] * head_dim
    shapes = {"model.embed_tokens": (config["vocab_size"], width), "model.norm": (width,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head"] = (config["vocab_size"], width)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.input_layernorm": (width,),
            f"{prefix}.self_attn.q_proj": (q_rows, width),
            f"{prefix}.self_attn.k_proj": (kv_rows, width),
            f"{prefix}.self_attn.v_proj": (kv_rows, width),
            f"{prefix}.self_attn.o_proj": (width, q_rows),
            f"{prefix}.post_attention_layernorm": (width,),
            f"{prefix}.mlp.gate_proj": (ffn, width),
            f"{prefix}.mlp.up_proj": (ffn, width),
            f"{prefix}.mlp.down_proj": (width, ffn),
        }
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{stem}.weight": torch.randn(shape, generator=generator).mul(0.1).to(dtype)
        for stem, shape in shapes.items()
    }
