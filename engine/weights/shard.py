"""One rule per kind of tensor-parallel cut. Knows no file format and no quantisation."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

from engine.config import ModelConfig
from engine.mapping import Mapping, Span
from engine.weights.deferred import Deferred
from engine.weights.types import Lazy, LinearWeights


class Shard(Enum):
    """What a cut follows. The members ending in _IN cut the inputs, the others the outputs."""

    NONE = "whole on every rank"
    EMBED = "embedding table, cut as --embedding_sharding_dim says"
    VOCAB = "vocabulary rows, padded to a multiple of tp"
    HEADS = "query heads"
    KV_HEADS = "key and value heads, repeated when tp exceeds them"
    HEADS_IN = "query heads as inputs"
    FFN = "MLP channels"
    FFN_IN = "MLP channels as inputs"


def _heads(mapping: Mapping, config: ModelConfig) -> Span:
    return _times(mapping.head_span(config), config.head_dim)


def _kv_heads(mapping: Mapping, config: ModelConfig) -> Span:
    return _times(mapping.kv_head_span(config), config.head_dim)


def _ffn(mapping: Mapping, config: ModelConfig) -> Span:
    return mapping.even_span(config.intermediate_size)


def _vocab(mapping: Mapping, config: ModelConfig) -> Span:
    return mapping.even_span(config.vocab_size)


def _times(span: Span, factor: int) -> Span:
    return Span(span.start * factor, span.stop * factor)


_OUTPUT_SPANS: dict[Shard, Callable[[Mapping, ModelConfig], Span]] = {
    Shard.VOCAB: _vocab,
    Shard.HEADS: _heads,
    Shard.KV_HEADS: _kv_heads,
    Shard.FFN: _ffn,
}
_INPUT_SPANS: dict[Shard, Callable[[Mapping, ModelConfig], Span]] = {
    Shard.HEADS_IN: _heads,
    Shard.FFN_IN: _ffn,
}


def shard_linear(
    weights: LinearWeights | Deferred, rule: Shard, mapping: Mapping, config: ModelConfig
) -> LinearWeights | Deferred:
    """The part of a linear layer's weights that `mapping`'s rank holds."""
    if rule in _OUTPUT_SPANS:
        return weights.narrow_outputs(_OUTPUT_SPANS[rule](mapping, config))
    if rule in _INPUT_SPANS:
        return weights.narrow_inputs(_INPUT_SPANS[rule](mapping, config))
    assert rule is Shard.NONE, rule
    return weights


def shard_tensor(
    tensor: Lazy, rule: Shard, mapping: Mapping, config: ModelConfig, embedding_dim: int | None
) -> Lazy:
    """The part of a plain tensor; `embedding_dim` is 0 (vocabulary), 1 (hidden) or None (whole)."""
    if rule is Shard.VOCAB or (rule is Shard.EMBED and embedding_dim == 0):
        return tensor.narrow_rows(_vocab(mapping, config))
    if rule is Shard.EMBED and embedding_dim == 1:
        return tensor.narrow_cols(mapping.even_span(config.hidden_size))
    assert rule in (Shard.NONE, Shard.EMBED), rule
    return tensor
