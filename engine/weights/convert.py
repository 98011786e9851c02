"""The weight stream: checkpoint → table row → cut per rank → packed arrays, nothing held whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.checkpoint.base import Checkpoint
from engine.config import ModelConfig
from engine.mapping import Mapping
from engine.quant import Algorithm, KVStorage, QuantConfig
from engine.weights.pack import PACKS, Packed, pack_plain
from engine.weights.quantize import quantize
from engine.weights.shard import shard_linear, shard_tensor
from engine.weights.table import HEAD, YI, Stage, WeightSpec
from engine.weights.types import Dense, Lazy


@dataclass(frozen=True)
class StorePlan:
    """How a model is stored: engine dtype, quantisation, and the embedding's cut.

    `embedding_dim`: 0 cuts the table by vocabulary, 1 by hidden size, None keeps it whole.
    `is_dummy`: the weights are random, so modes that need calibration do without.
    """

    config: ModelConfig
    dtype: torch.dtype
    quant: QuantConfig
    embedding_dim: int | None = None
    is_dummy: bool = False


@dataclass(frozen=True)
class Piece:
    """One array of one rank's engine file; `blocks()` yields its rows in order."""

    rank: int
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[Tensor]]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def stream_pieces(
    checkpoint: Checkpoint, plan: StorePlan, ranks: Sequence[Mapping]
) -> Iterator[Piece]:
    """Every array of the given ranks, in file order; no weight is read before `blocks()` is.

    Ranks of one pipeline stage alternate row by row of the table, so that a tensor's bytes are
    still in the page cache when the next rank cuts its part from them.
    """
    for spec in YI:
        if spec.stage is not Stage.EVERY_LAYER:
            yield from _row_pieces(checkpoint, plan, spec, _holders(spec, ranks, plan.config))
            if spec.stage is Stage.FIRST:
                yield from _layer_pieces(checkpoint, plan, ranks)


def _layer_pieces(
    checkpoint: Checkpoint, plan: StorePlan, ranks: Sequence[Mapping]
) -> Iterator[Piece]:
    for layer in range(plan.config.num_layers):
        holders = [
            (mapping, layer - mapping.layer_span(plan.config).start)
            for mapping in ranks
            if layer in range(*mapping.layer_span(plan.config))
        ]
        for spec in YI:
            if spec.stage is Stage.EVERY_LAYER:
                yield from _row_pieces(checkpoint, plan, spec, holders, layer)
        if plan.quant.kv is not KVStorage.NONE:
            for mapping, slot in holders:
                yield _cache_scales(checkpoint, plan, mapping, slot, layer)


def _cache_scales(
    checkpoint: Checkpoint, plan: StorePlan, mapping: Mapping, slot: int, layer: int
) -> Piece:
    """Scales fp32 [2, kv heads of the rank] of a quantised cache: keys, then values.

    Without a calibration they are 1, which only an FP8 cache can do with.
    """
    heads = mapping.kv_head_span(plan.config)

    def blocks() -> Iterator[Tensor]:
        pair = checkpoint.cache_scales(layer, plan.quant.kv) or (torch.ones(1), torch.ones(1))
        rows = [scale_G.expand(plan.config.num_kv_heads)[slice(*heads)] for scale_G in pair]
        yield torch.stack(rows)

    name = f"blocks.{slot}.attn.kv_scale"
    return Piece(mapping.rank, name, torch.float32, (2, heads.size), blocks)


def _holders(
    spec: WeightSpec, ranks: Sequence[Mapping], config: ModelConfig
) -> list[tuple[Mapping, int]]:
    """Ranks that store a row outside the layers, each with a slot of 0."""

    def holds(mapping: Mapping) -> bool:
        if spec.stage is Stage.FIRST:
            return mapping.is_first_stage
        return mapping.is_last_stage

    return [(mapping, 0) for mapping in ranks if holds(mapping)]


def _row_pieces(
    checkpoint: Checkpoint,
    plan: StorePlan,
    spec: WeightSpec,
    holders: Sequence[tuple[Mapping, int]],
    layer: int = 0,
) -> Iterator[Piece]:
    for mapping, slot in holders:
        if spec.target == HEAD and shares_embedding(plan, mapping):
            continue
        prefix = spec.target.format(i=slot)
        for packed in _packed(checkpoint, plan, spec, mapping, layer):
            name = f"{prefix}.{packed.suffix}"
            yield Piece(mapping.rank, name, packed.dtype, packed.shape, packed.blocks)


def _packed(
    checkpoint: Checkpoint, plan: StorePlan, spec: WeightSpec, mapping: Mapping, layer: int
) -> list[Packed]:
    names = [(source.stem.format(i=layer), source.shard) for source in spec.sources]
    if spec.linear:
        whole = [
            quantize(checkpoint.lazy_linear(stem), plan.quant, is_dummy=plan.is_dummy)
            for stem, _ in names
        ]
        parts = [
            shard_linear(weights, rule, mapping, plan.config)
            for weights, (_, rule) in zip(whole, names, strict=True)
        ]
        return PACKS[plan.quant.algorithm](parts, plan.dtype)
    lazies = [(Lazy.whole(checkpoint.tensors[f"{stem}.weight"]), rule) for stem, rule in names]
    tensors = [
        shard_tensor(lazy, rule, mapping, plan.config, plan.embedding_dim) for lazy, rule in lazies
    ]
    if spec.target == HEAD:
        return _pack_head([Dense(lazy) for lazy in tensors], plan)
    return pack_plain(tensors, plan.dtype)


def _pack_head(parts: Sequence[Dense], plan: StorePlan) -> list[Packed]:
    """One rank's rows of the output head. Each is rounded by itself, so that those of padding are
    zeros and the others do not depend on the number of ranks."""
    quantised = [quantize(part, QuantConfig(plan.quant.head)) for part in parts]
    return PACKS[plan.quant.head](quantised, plan.dtype)


def shares_embedding(plan: StorePlan, mapping: Mapping) -> bool:
    """Whether a rank's output head is a view of its embedding table and so is not stored.

    True for tied models where the rank holds both, and the head is neither quantised nor made of
    other rows than the table.
    """
    whole_rows = plan.embedding_dim != 1 and plan.config.vocab_size % mapping.tp == 0
    return (
        plan.config.tie_word_embeddings
        and plan.quant.head is Algorithm.NONE
        and mapping.is_first_stage
        and mapping.is_last_stage
        and whole_rows
    )
