"""Tiny checkpoints written by transformers, safetensors and torch themselves."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 98,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


def tiny_model(seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """A seeded float32 model whose norms differ from one another."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**CONFIG, **overrides}))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
    return model


def tiny_state(seed: int = 0, **overrides: Any) -> dict[str, Tensor]:
    """The model's own state dict; a tied head is in it under both names."""
    return {n: w.detach().clone() for n, w in tiny_model(seed, **overrides).state_dict().items()}


def write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values))


def write_folder(folder: Path, tensors: dict[str, Tensor] | None, **overrides: Any) -> Path:
    """config.json and, unless `tensors` is None, model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", {**CONFIG, **overrides})
    if tensors is not None:
        save_file(tensors, folder / "model.safetensors")
    return folder


def split_state(tensors: dict[str, Tensor], parts: int) -> list[dict[str, Tensor]]:
    names = sorted(tensors)
    return [{name: tensors[name] for name in names[part::parts]} for part in range(parts)]


def header_file(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file put together by hand; `header` is JSON-able or raw bytes."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path
