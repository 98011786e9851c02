"""Bytes that a decode step reads and operations that a prompt takes, from sizes alone.

The counts are those of the algorithm: what an implementation reads twice or computes in vain makes
it slower than the count allows.
"""

from __future__ import annotations

from collections.abc import Mapping as Names
from dataclasses import dataclass

from engine.config import ModelConfig
from engine.mapping import Mapping
from engine.quant import KVStorage, QuantConfig
from utils.benchmarking.workload import Workload

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
EMBEDDING, HEAD = "embed.weight", "head."


@dataclass(frozen=True)
class Traffic:
    """Bytes of a decode step: all `weights`, and `kv` for each position of each sequence."""

    weights: int
    kv: int

    def __add__(self, other: Traffic) -> Traffic:
        """Of two ranks together."""
        return Traffic(self.weights + other.weights, self.kv + other.kv)

    def step_bytes(self, work: Workload) -> float:
        """Read in an average decode step of the whole batch."""
        return self.weights + work.batch * work.mean_context * self.kv

    def token_bytes(self, work: Workload) -> float:
        """Read for an average token."""
        return self.step_bytes(work) / work.batch


def rank_traffic(
    sizes: Names[str, int], config: ModelConfig, mapping: Mapping, dtype: str, quant: QuantConfig
) -> Traffic:
    """Of one rank, whose engine file has arrays of `sizes` bytes.

    Of the embedding table a token reads one row, which is not counted; where the table is the
    output head too, it is read whole.
    """
    weights = sum(sizes.values())
    has_head = any(name.startswith(HEAD) for name in sizes)
    is_head_too = mapping.is_last_stage and not has_head
    if EMBEDDING in sizes and not is_head_too:
        weights -= sizes[EMBEDDING]
    width = DTYPE_BYTES[dtype] if quant.kv is KVStorage.NONE else 1
    layers, heads = mapping.layer_span(config).size, mapping.local(config).kv_heads
    return Traffic(weights, 2 * layers * heads * config.head_dim * width)


def decode_flops(config: ModelConfig, work: Workload) -> float:
    """Operations (a multiplication and an addition are two) of an average decode step."""
    weights = _layer_weights(config) + _head_weights(config)
    attention = _attention_flops(config) * work.mean_context
    return work.batch * (2 * weights + attention)


def prefill_flops(config: ModelConfig, work: Workload) -> float:
    """Operations of the prompts up to the first new token's logits, attention being causal."""
    length = work.input_len
    linear = 2 * _layer_weights(config) * length + 2 * _head_weights(config)
    attention = _attention_flops(config) * length * (length + 1) / 2
    return work.batch * (linear + attention)


def _layer_weights(config: ModelConfig) -> int:
    heads = 2 * config.num_heads + 2 * config.num_kv_heads
    attention = config.hidden_size * config.head_dim * heads
    return config.num_layers * (attention + 3 * config.hidden_size * config.intermediate_size)


def _head_weights(config: ModelConfig) -> int:
    return config.vocab_size * config.hidden_size


def _attention_flops(config: ModelConfig) -> int:
    """For a query and a position it attends to, over all layers: q · k and p · v."""
    return 4 * config.num_layers * config.num_heads * config.head_dim
