"""Writes calibrated layers as the files of an `N-gpu` folder, whose names are those of
engine/checkpoint/ft_files.py.

SmoothQuant's arithmetic is that of engine/weights/quantize.py. Scales: x_orig_quant = 127 / largest
input, w_quant_orig = largest weight / 127, y_quant_orig = largest output / 127, and y_accum_quant
turns sums of products of codes into codes of the output. Unlike TensorRT-LLM's converter, q, k and
v have a scale of their own each where there is one per matrix, with grouped queries, too.

Dimensions: N outputs   K inputs   G kv heads
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from engine.checkpoint.base import Checkpoint
from engine.checkpoint.ft_files import (
    LINEARS,
    NORMS,
    QUERY_KEY_VALUE,
    TABLES,
    FtLinear,
    cache_scale,
    cut,
)
from engine.config import ModelConfig
from engine.engine_file import write_error
from engine.errors import UserError
from engine.mapping import Mapping as Ranks
from engine.mapping import Span
from engine.weights import numerics
from engine.weights.quantize import Smoothed, smooth, smooth_norm, smooth_weight
from engine.weights.types import BLOCK_BYTES, Lazy
from utils.calibration import CalibratedLayer
from utils.ft_directory import OUT_FLAG

# The layers that share an input, and the norm before them that takes over its smoother.
SMOOTHED = (
    (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm"),
    (("self_attn.o_proj",), None),
    (("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm"),
    (("mlp.down_proj",), None),
)
# Floor of every range, so that no scale is zero or infinite.
MIN_RANGE = 1e-6

Job = Callable[[], None]


@dataclass(frozen=True)
class Export:
    """What is written: into `folder`, `dtype` for full precision, cut for `tp` ranks.

    `alpha` is SmoothQuant's; None leaves the network as it is and writes int8 weights for the
    joint layer of queries, keys and values only.
    """

    folder: Path
    config: ModelConfig
    dtype: torch.dtype
    tp: int = 1
    alpha: float | None = None

    @property
    def ranks(self) -> list[Ranks]:
        return list(Ranks(self.tp, 0, self.tp).ranks())


class Ranges(NamedTuple):
    """The largest magnitudes of a stored layer's input and output."""

    x: Tensor
    y: Tensor


def write_tables(checkpoint: Checkpoint, export: Export) -> None:
    """The files outside the layers, streamed: embedding, last norm and output head."""
    for name, canonical in TABLES.items():
        blocks = Lazy.whole(checkpoint.tensors[canonical]).blocks()
        path = export.folder / f"{name}.weight.bin"
        _write_blocks(path, (_store(block, export, canonical) for block in blocks))


def write_layer(calibrated: CalibratedLayer, export: Export, pool: Executor) -> None:
    """All files of a layer, by the threads of `pool`; its weights become the smoothed ones."""
    smoothed = _smooth(calibrated, export.alpha) if export.alpha is not None else {}
    jobs: list[Job] = [partial(_write_vectors, calibrated, export)]
    for row in LINEARS:
        jobs += _weight_jobs(row, calibrated, export)
        if export.alpha is not None or row.name == QUERY_KEY_VALUE:
            ranges = _ranges(row, calibrated, smoothed)
            jobs += _int8_jobs(row, calibrated, export, ranges)
    for row in (row for row in LINEARS if row.is_row_parallel and smoothed):
        smoother_K = smoothed[row.sources[0]].smoother_K
        jobs += _smoother_jobs(row, smoother_K, calibrated.layer, export)
    for future in [pool.submit(job) for job in jobs]:
        future.result()


def _smooth(calibrated: CalibratedLayer, alpha: float) -> dict[str, Smoothed]:
    """Replace the layer's weights and norms by smoothed ones; what was done to the input of each
    linear layer."""
    weights, found = calibrated.weights, {}
    for sources, norm in SMOOTHED:
        ranges_K = calibrated.ranges.inputs[sources[0]]
        smoothed = smooth(ranges_K, [weights[source] for source in sources], alpha)
        for source in sources:
            weights[source] = smooth_weight(weights[source], smoothed.smoother_K)
            found[source] = smoothed
        if norm is not None:
            weights[norm] = smooth_norm(weights[norm], smoothed.smoother_K)
    return found


def _ranges(row: FtLinear, calibrated: CalibratedLayer, smoothed: Mapping[str, Smoothed]) -> Ranges:
    found, first = calibrated.ranges, row.sources[0]
    x_K = smoothed[first].ranges_K if first in smoothed else found.inputs[first]
    y = torch.stack([found.outputs[source] for source in row.sources]).max()
    return Ranges(x_K.max().clamp(min=MIN_RANGE), y.clamp(min=MIN_RANGE))


def _write_vectors(calibrated: CalibratedLayer, export: Export) -> None:
    """The norms, and the scales of the KV cache."""
    layer, prefix = calibrated.layer, f"model.layers.{calibrated.layer}."
    for name, canonical in NORMS.items():
        stored = _store(calibrated.weights[canonical], export, prefix + canonical)
        _write_blocks(export.folder / f"{prefix}{name}.weight.bin", [stored])
    for which, range_G in (("k", calibrated.ranges.keys_G), ("v", calibrated.ranges.values_G)):
        scale_G = range_G.clamp(min=MIN_RANGE) / numerics.INT8_MAX
        _write_blocks(export.folder / cache_scale(layer, which), [scale_G.max()])
        _write_blocks(export.folder / cache_scale(layer, which, "head.bin"), [scale_G])


def _weight_jobs(row: FtLinear, calibrated: CalibratedLayer, export: Export) -> Iterator[Job]:
    """One job per rank for the weights in full precision."""
    stem = row.stem(calibrated.layer)

    def store(block: Tensor) -> Tensor:
        return _store(block, export, stem)

    for rank in export.ranks:
        parts = [_cut(row, calibrated.weights[s], cut(s, export.config, rank)) for s in row.sources]
        path = export.folder / f"{stem}.weight.{rank.rank}.bin"
        yield partial(_write_transposed, path, parts, store)


def _int8_jobs(
    row: FtLinear, calibrated: CalibratedLayer, export: Export, ranges: Ranges
) -> Iterator[Job]:
    """One job for the codes and scales per matrix and one for those per output."""
    stem = export.folder / row.stem(calibrated.layer)
    x_scale, y_scale = numerics.INT8_MAX / ranges.x, ranges.y / numerics.INT8_MAX
    yield partial(_write_blocks, Path(f"{stem}.scale_x_orig_quant.bin"), [x_scale])
    yield partial(_write_blocks, Path(f"{stem}.scale_y_quant_orig.bin"), [y_scale])
    for per_channel in (False, True):
        yield partial(_write_int8, row, calibrated, export, ranges, per_channel=per_channel)


def _write_int8(
    row: FtLinear,
    calibrated: CalibratedLayer,
    export: Export,
    ranges: Ranges,
    *,
    per_channel: bool,
) -> None:
    """Codes and scales. Whole matrices are rounded, so that neither depends on the ranks."""
    quantise = numerics.int8_rows if per_channel else numerics.int8_tensor
    codes, scales = {}, {}
    for source in row.sources:
        codes[source], scales[source] = quantise(calibrated.weights[source])
    kind = "weight.int8.col" if per_channel else "weight.int8"
    for rank in export.ranks:
        parts = [_cut(row, codes[s], cut(s, export.config, rank)) for s in row.sources]
        path = export.folder / f"{row.stem(calibrated.layer)}.{kind}.{rank.rank}.bin"
        _write_transposed(path, parts, lambda block: block)
    for rank, scale_N in _cut_scales(row, scales, export, per_channel=per_channel):
        # (127 / ymax) / ((127 / xmax) · (127 / wmax))
        accumulated_N = ranges.x * scale_N / ranges.y
        for what, values_N in (
            ("scale_w_quant_orig", scale_N),
            ("scale_y_accum_quant", accumulated_N),
        ):
            name = row.scale(calibrated.layer, what, rank, per_channel=per_channel)
            _write_blocks(export.folder / name, [values_N])


def _cut_scales(
    row: FtLinear, scales: Mapping[str, Tensor], export: Export, *, per_channel: bool
) -> Iterator[tuple[int, Tensor]]:
    """(rank, the scales in its file); rank 0 stands for all where they have one file."""
    if row.is_scale_cut(per_channel=per_channel):
        for rank in export.ranks:
            parts = [scales[s][slice(*cut(s, export.config, rank))] for s in row.sources]
            yield rank.rank, torch.cat(parts)
    else:
        [scale_N] = scales.values()
        yield 0, scale_N if per_channel else scale_N[:1]


def _smoother_jobs(row: FtLinear, smoother_K: Tensor, layer: int, export: Export) -> Iterator[Job]:
    """The smoother of an input that no norm takes over, one file per rank."""
    for rank in export.ranks:
        part_K = smoother_K[slice(*cut(row.sources[0], export.config, rank))]
        path = export.folder / f"{row.stem(layer)}.smoother.{rank.rank}.bin"
        yield partial(_write_blocks, path, [part_K])


def _cut(row: FtLinear, matrix_NK: Tensor, span: Span) -> Tensor:
    return matrix_NK[:, slice(*span)] if row.is_row_parallel else matrix_NK[slice(*span)]


def _store(values: Tensor, export: Export, name: str) -> Tensor:
    """`values` in the storage type; UserError for what it cannot hold."""
    stored = values.to(export.dtype)
    if not torch.isfinite(numerics.amax_tensor(stored)):
        kind = str(export.dtype).removeprefix("torch.")
        raise UserError(
            f"--storage-type: {name} has NaN or values too large for {kind}; use bf16 or fp32, or "
            "get a sound copy of the checkpoint"
        )
    return stored


def _write_transposed(
    path: Path, parts: Sequence[Tensor], convert: Callable[[Tensor], Tensor]
) -> None:
    """Matrices [N, K] side by side as one of [K, total N], `convert`ed and written in blocks."""
    outputs, inputs = sum(len(part) for part in parts), parts[0].shape[1]
    step = max(1, BLOCK_BYTES // (4 * outputs))

    def blocks() -> Iterator[Tensor]:
        for start in range(0, inputs, step):
            # Transposing what lies in one piece is several times faster.
            cuts = [convert(part[:, start : start + step].contiguous()) for part in parts]
            yield torch.cat([cut_NK.T.contiguous() for cut_NK in cuts], dim=1)

    _write_blocks(path, blocks())


def _write_blocks(path: Path, blocks: Iterator[Tensor] | Sequence[Tensor]) -> None:
    try:
        with open(path, "wb") as file:
            for block in blocks:
                file.write(block.contiguous().reshape(-1).view(torch.uint8).numpy())
    except OSError as error:
        raise write_error(path, error, OUT_FLAG) from None
