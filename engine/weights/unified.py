"""The weight stream in the form of TensorRT-LLM's unified checkpoint.

The same sources, cuts and modes as an engine's, under other names and in plain layouts: rows of
outputs, [out, in], without anything that belongs to one GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine import unified
from engine.checkpoint.base import Checkpoint
from engine.config import ModelConfig
from engine.errors import UserError
from engine.mapping import Mapping
from engine.quant import Algorithm, KVStorage
from engine.weights.convert import Piece, StorePlan
from engine.weights.deferred import Deferred
from engine.weights.pack import Packed, pack_plain
from engine.weights.quantize import describe, quantize
from engine.weights.shard import shard_linear, shard_tensor
from engine.weights.table import YI, Source, Stage, WeightSpec
from engine.weights.types import Dense, Int4Groups, Int8, Lazy, LinearWeights
from engine.weights.unified_pack import STORES, Preprocess, Store, store_gptq, store_smoothed

# Row of the architecture → the names of its parts here.
NAMES: dict[str, tuple[str, ...]] = {
    "embed": (unified.EMBEDDING,),
    "blocks.{i}.attn_norm": (unified.ATTENTION_NORM,),
    "blocks.{i}.attn.qkv": (unified.QKV,),
    "blocks.{i}.attn.out": (unified.DENSE,),
    "blocks.{i}.mlp_norm": (unified.MLP_NORM,),
    "blocks.{i}.mlp.gate_up": (unified.FC, unified.GATE),
    "blocks.{i}.mlp.down": (unified.PROJ,),
    "norm": (unified.FINAL_NORM,),
    "head": (unified.HEAD,),
}
FIRST_LINEAR = "model.layers.0.self_attn.q_proj"
# Modes that TensorRT-LLM rounds itself when it finds full-precision weights.
LAZY = (Algorithm.W8A16, Algorithm.W4A16)


@dataclass(frozen=True)
class Row:
    """A tensor, or the tensors of a linear layer: `name` in its block, and its sources."""

    name: str
    sources: tuple[Source, ...]
    stage: Stage
    linear: bool

    def prefix(self, slot: int) -> str:
        """What comes before the name."""
        return unified.LAYER.format(i=slot) if self.stage is Stage.EVERY_LAYER else ""


def _rows_of(spec: WeightSpec) -> Iterator[Row]:
    names = NAMES[spec.target]
    each = [spec.sources] if len(names) == 1 else [(source,) for source in spec.sources]
    for name, sources in zip(names, each, strict=True):
        yield Row(name, sources, spec.stage, spec.linear)


TABLE = tuple(row for spec in YI for row in _rows_of(spec))


def find_algorithm(checkpoint: Checkpoint, plan: StorePlan) -> str | None:
    """The library's name of the mode; UserError for weights that its checkpoint has no form for.

    Reads no weights.
    """
    quant, sketch = plan.quant, _sketch(checkpoint)
    is_smoothed = isinstance(sketch, Int8) and sketch.smoother_K is not None
    if quant.algorithm in LAZY and not isinstance(sketch, Dense):
        raise UserError(
            f"'{quant}' is rounded by TensorRT-LLM itself from full precision and these weights "
            f"are {describe(sketch)}; name the checkpoint they were made from"
        )
    if quant.algorithm is Algorithm.FP8 and quant.per_token:
        raise UserError(
            "TensorRT-LLM's FP8 needs calibrated scales and these weights have none; make them "
            "with quantize.py --qformat fp8 and name its file as --quantized_fp8_model_path"
        )
    if quant.algorithm is Algorithm.W4A16_AWQ and _has_zeros(sketch):
        raise UserError(
            "TensorRT-LLM's W4A16_AWQ has symmetric codes and these weights have zero points; "
            "quantise the model with quantize.py --qformat int4_awq instead"
        )
    if is_smoothed and (quant.per_token or not quant.per_channel):
        raise UserError(
            f"'{quant}' with a smoothed input of q, k and v has no form in TensorRT-LLM's "
            "checkpoint; make the weights with hf_yi_convert.py --smoothquant, which folds it"
        )
    return unified.algorithm_name(quant, is_smoothed_everywhere=is_smoothed)


def has_symmetric_codes(checkpoint: Checkpoint) -> bool:
    """Whether 4-bit weights in groups have no zero points."""
    return not _has_zeros(_sketch(checkpoint))


def _sketch(checkpoint: Checkpoint) -> LinearWeights:
    weights = checkpoint.lazy_linear(FIRST_LINEAR)
    return weights.sketch if isinstance(weights, Deferred) else weights


def _has_zeros(sketch: LinearWeights) -> bool:
    return isinstance(sketch, Int4Groups) and sketch.zero_NR is not None


def stream_unified(
    checkpoint: Checkpoint,
    plan: StorePlan,
    ranks: Sequence[Mapping],
    *,
    preprocess: Preprocess | None = None,
) -> Iterator[Piece]:
    """Every tensor of the given ranks' files, in file order; nothing is read before `blocks()`.

    As in an engine's stream the ranks alternate, row by row of the table. `preprocess` is needed
    for GPTQ only.
    """
    store = _find_store(checkpoint, plan, preprocess)
    for row, layer in _rows(plan.config):
        for mapping in ranks:
            slot = _slot(mapping, row, layer, plan.config)
            if slot is None:
                continue
            for name, packed in _tensors(checkpoint, plan, row, mapping, layer, store):
                full = row.prefix(slot) + name
                yield Piece(mapping.rank, full, packed.dtype, packed.shape, packed.blocks)


def _find_store(checkpoint: Checkpoint, plan: StorePlan, preprocess: Preprocess | None) -> Store:
    if find_algorithm(checkpoint, plan) == unified.SMOOTHED_EVERYWHERE:
        return store_smoothed
    if plan.quant.algorithm is Algorithm.W4A16_GPTQ:
        assert preprocess is not None, "GPTQ is written with the library's op only"
        return lambda parts, plan, name: store_gptq(parts, preprocess)
    return STORES[plan.quant.algorithm]


def _rows(config: ModelConfig) -> Iterator[tuple[Row, int]]:
    """Every row with its layer (0 outside the layers), in the order of the network."""
    yield from ((row, 0) for row in TABLE if row.stage is Stage.FIRST)
    for layer in range(config.num_layers):
        yield from ((row, layer) for row in TABLE if row.stage is Stage.EVERY_LAYER)
    yield from ((row, 0) for row in TABLE if row.stage is Stage.LAST)


def _slot(mapping: Mapping, row: Row, layer: int, config: ModelConfig) -> int | None:
    """The row's layer as its pipeline stage counts; None where another stage holds the row."""
    if row.stage is Stage.FIRST:
        return 0 if mapping.is_first_stage else None
    if row.stage is Stage.LAST:
        return 0 if mapping.is_last_stage else None
    span = mapping.layer_span(config)
    return layer - span.start if span.start <= layer < span.stop else None


def _tensors(
    checkpoint: Checkpoint, plan: StorePlan, row: Row, mapping: Mapping, layer: int, store: Store
) -> Iterator[tuple[str, Packed]]:
    """(name in its block, tensor) of everything that a row of the table is on one rank."""
    names = [(source.stem.format(i=layer), source.shard) for source in row.sources]
    if not row.linear:
        lazies = [(Lazy.whole(checkpoint.tensors[f"{name}.weight"]), rule) for name, rule in names]
        parts = [
            shard_tensor(lazy, rule, mapping, plan.config, plan.embedding_dim)
            for lazy, rule in lazies
        ]
        yield from _named(row.name, pack_plain(parts, plan.dtype))
        return
    weights = [(checkpoint.lazy_linear(name), rule) for name, rule in names]
    if plan.quant.algorithm not in LAZY:
        weights = [(quantize(whole, plan.quant), rule) for whole, rule in weights]
    parts = [shard_linear(whole, rule, mapping, plan.config) for whole, rule in weights]
    yield from _named(row.name, store(parts, plan, row.name))
    if row.name == unified.QKV and plan.quant.kv is not KVStorage.NONE:
        yield unified.KV_SCALE, _cache_scale(checkpoint, plan, layer)


def _named(name: str, tensors: Sequence[Packed]) -> Iterator[tuple[str, Packed]]:
    for packed in tensors:
        # SmoothQuant's scales of inputs belong to the module that makes the input.
        is_input = packed.suffix in unified.TO_INT8.values()
        yield packed.suffix if is_input else f"{name}.{packed.suffix}", packed


def _cache_scale(checkpoint: Checkpoint, plan: StorePlan, layer: int) -> Packed:
    """One scale fp32 [1] for keys and values, the largest of theirs, as all versions read it;
    1 without a calibration, which only an FP8 cache can do with."""

    def blocks() -> Iterator[Tensor]:
        pair = checkpoint.cache_scales(layer, plan.quant.kv) or (torch.ones(1), torch.ones(1))
        yield torch.cat(pair).amax().reshape(1)

    return Packed(unified.KV_SCALE, torch.float32, (1,), blocks)
