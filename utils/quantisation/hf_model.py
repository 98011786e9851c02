"""A checkpoint as transformers' network, whole or one decoder layer of it.

Weights come through the engine's own readers, so every format that build.py takes works, and no
code of a checkpoint is run.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from engine.checkpoint.base import Checkpoint, canonical_shapes
from engine.config import ModelConfig, Rope

# The fields of Rope that each type of scaling has in transformers' configuration.
_LENGTH = "original_max_positions"
ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", _LENGTH),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _LENGTH),
    "yarn": (
        "factor",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "truncate",
        _LENGTH,
    ),
}
_RENAMED = {_LENGTH: "original_max_position_embeddings"}
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def llama_config(checkpoint: Checkpoint) -> LlamaConfig:
    """The network's configuration, with the token ids that were found beside the weights."""
    config = checkpoint.config
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_positions,
        rms_norm_eps=config.rms_norm_eps,
        hidden_act=config.hidden_act,
        tie_word_embeddings=config.tie_word_embeddings,
        rope_parameters=_rope_parameters(config.rope),
        attn_implementation="sdpa",
        **{name: checkpoint.generation.get(name) for name in TOKEN_IDS},
    )


def _rope_parameters(rope: Rope) -> dict[str, Any]:
    values = {name: getattr(rope, name) for name in ROPE_FIELDS[rope.type]}
    given = {_RENAMED.get(n, n): value for n, value in values.items() if value is not None}
    return {"rope_type": rope.type, "rope_theta": rope.theta, **given}


def load_model(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device
) -> LlamaForCausalLM:
    """The whole network in evaluation mode; each tensor is converted as it is read."""
    config = llama_config(checkpoint)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    _fill(model, checkpoint, "", canonical_shapes(checkpoint.config), dtype, device)
    model.tie_weights()
    # Its tables are computed, not stored, so the meta device has left them empty.
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(device)
    model.config.dtype = dtype
    return model.eval()


def load_layer(
    checkpoint: Checkpoint,
    config: LlamaConfig,
    layer: int,
    dtype: torch.dtype,
    device: torch.device,
) -> LlamaDecoderLayer:
    """One decoder layer in evaluation mode."""
    with torch.device("meta"):
        block = LlamaDecoderLayer(config, layer_idx=layer)
    prefix = f"model.layers.{layer}."
    names = _names_in(checkpoint.config, prefix)
    _fill(block, checkpoint, prefix, names, dtype, device)
    return block.eval()


def _names_in(config: ModelConfig, prefix: str) -> list[str]:
    return [n.removeprefix(prefix) for n in canonical_shapes(config) if n.startswith(prefix)]


def _fill(
    module: nn.Module,
    checkpoint: Checkpoint,
    prefix: str,
    names: Iterable[str],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    state = {
        name: checkpoint.tensors[prefix + name].read().to(device=device, dtype=dtype)
        for name in names
    }
    module.load_state_dict(state, assign=True)
    module.requires_grad_(False)
