"""Reads the `N-gpu` folder that hf_yi_convert.py, or TensorRT-LLM's own converter, wrote.

For full precision SmoothQuant's factors are divided out where no norm holds their inverse, so that
the network is the one that was converted.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from engine.checkpoint.base import Checkpoint, TensorSource
from engine.checkpoint.ft_files import DENSE, LINEARS, QUERY_KEY_VALUE, RawFile, cache_scale
from engine.checkpoint.ft_folder import FtFolder, Table, open_folder
from engine.checkpoint.hf import read_generation
from engine.checkpoint.quant_scales import read_scale
from engine.checkpoint.quantised import Field, LinearFormat, QuantisedCheckpoint, StoredLinear, meta
from engine.config import ModelConfig
from engine.errors import CheckpointError
from engine.quant import Algorithm, KVStorage, QuantConfig
from engine.weights.types import Int8

# The largest code of a matrix with one scale is 127; TensorRT-LLM's codes for models with grouped
# queries were rounded with the inverse scale and are next to nothing.
LEAST_PEAK = 64


class Unsmoothed(TensorSource):
    """A matrix whose input SmoothQuant divides, for the input as it is: fp32 [N, K]."""

    def __init__(self, weight: TensorSource, smoother: TensorSource) -> None:
        self.name, self.shape, self.origin = weight.name, weight.shape, weight.origin
        self.dtype = torch.float32
        self.weight, self.smoother = weight, smoother

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        return self.weight.rows(start, stop).float() / read_scale(self.smoother).reshape(-1)


class FtInt8(LinearFormat):
    """Int8 codes with scales per output or per matrix, which q, k and v each have of their own."""

    def __init__(self, quant: QuantConfig) -> None:
        self.quant = quant

    def fields(self, outputs: int, inputs: int) -> dict[str, Field]:
        fields = {
            "weight": Field(((outputs, inputs),), (torch.int8,)),
            "scale": Field(((outputs, 1), (1, 1)), (torch.float32,)),
            "smoother": Field(((1, inputs),), (torch.float32,), is_required=False),
        }
        if not self.quant.per_token:
            fields["input_scale"] = Field(((1, 1),), (torch.float32,))
        return fields

    def unpack(self, linear: StoredLinear) -> Int8:
        codes_NK = linear.read("weight")
        if not self.quant.per_channel:
            _refuse_flat(linear.tensors["weight"], codes_NK)
        scale_N = read_scale(linear.tensors["scale"]).reshape(-1)
        input_scale, smoother_K = None, None
        if not self.quant.per_token:
            # The files hold what the input is multiplied by, 127 / largest.
            input_scale = 1 / read_scale(linear.tensors["input_scale"]).item()
        if "smoother" in linear.tensors:
            smoother_K = read_scale(linear.tensors["smoother"]).reshape(-1)
        scale_N = scale_N.expand(linear.outputs).contiguous()
        return Int8(codes_NK, scale_N, input_scale, smoother_K)

    def sketch(self, linear: StoredLinear) -> Int8:
        codes_NK = meta(linear.outputs, linear.inputs, dtype=torch.int8)
        smoother_K = meta(linear.inputs) if "smoother" in linear.tensors else None
        input_scale = None if self.quant.per_token else 1.0
        return Int8(codes_NK, meta(linear.outputs), input_scale, smoother_K)


def open_ft(folder: Path, *, quant: QuantConfig) -> Checkpoint:
    """Open an N-gpu folder: int8 weights where `quant` is SmoothQuant, else full precision.

    Raises CheckpointError for what is missing, damaged or of the wrong size; reads no weights.
    """
    found = open_folder(folder)
    is_int8 = quant.algorithm is Algorithm.W8A8_SQ
    sources = found.plain()
    for layer in range(found.config.num_layers):
        sources |= _int8_sources(found, layer, quant) if is_int8 else _dense_sources(found, layer)
    generation = read_generation(folder, found.raw)
    if not is_int8:
        return Checkpoint(str(folder), found.config, sources, generation=generation)
    linear_format = FtInt8(replace(quant, kv=KVStorage.NONE))
    return QuantisedCheckpoint(
        str(folder), found.config, sources, linear_format, generation=generation
    )


def read_ft_kv_scales(folder: Path, config: ModelConfig) -> list[tuple[Tensor, Tensor]]:
    """(keys, values) of each layer, fp32 [kv heads] or [1]: cached value = code · scale, for INT8.

    Taken are scales per head, else those per layer, else the one that TensorRT-LLM stores for
    queries, keys and values together. CheckpointError if a layer has none of them.
    """
    layers = [_layer_kv_scales(folder, config, layer) for layer in range(config.num_layers)]
    beyond = config.num_layers
    for name in _kv_names(beyond):
        if (folder / name).exists():
            raise CheckpointError(
                f"{folder / name}: belongs to layer {beyond} but the model has {beyond} layers; "
                "give the folder that was converted from this model as --ft_model_dir"
            )
    return layers


def _kv_names(layer: int) -> tuple[str, str, str]:
    merged = f"model.layers.{layer}.{QUERY_KEY_VALUE}.scale_y_quant_orig.bin"
    return cache_scale(layer, "k", "head.bin"), cache_scale(layer, "k"), merged


def _layer_kv_scales(folder: Path, config: ModelConfig, layer: int) -> tuple[Tensor, Tensor]:
    per_head, per_layer, merged = _kv_names(layer)
    if (folder / per_head).exists():
        names, size = (per_head, cache_scale(layer, "v", "head.bin")), config.num_kv_heads
    elif (folder / per_layer).exists():
        names, size = (per_layer, cache_scale(layer, "v")), 1
    elif (folder / merged).exists():
        names, size = (merged, merged), 1
    else:
        raise CheckpointError(
            f"{folder}: has no scales for the KV cache of layer {layer} ({merged}); make them with "
            "hf_yi_convert.py --calibrate-kv-cache"
        )
    files = [RawFile(folder / name, torch.float32, (size,)) for name in names]
    for file in files:
        file.check()
    k_scale, v_scale = (read_scale(Table(file)) for file in files)
    return k_scale, v_scale


def _dense_sources(found: FtFolder, layer: int) -> dict[str, TensorSource]:
    sources: dict[str, TensorSource] = {}
    for row in LINEARS:
        weights = found.matrices(row, f"{row.stem(layer)}.weight", found.dtype)
        for source, weight in weights.items():
            if row.is_row_parallel and found.is_smoothed:
                weight = Unsmoothed(weight, found.smoother(row, layer))
            sources[f"model.layers.{layer}.{source}.weight"] = weight
    return sources


def _int8_sources(found: FtFolder, layer: int, quant: QuantConfig) -> dict[str, TensorSource]:
    kind = "weight.int8.col" if quant.per_channel else "weight.int8"
    if not (found.path / f"{DENSE.stem(layer)}.{kind}.0.bin").exists():
        raise CheckpointError(
            f"--use_smooth_quant: {found.path} has no int8 weights "
            f"({DENSE.stem(layer)}.{kind}.0.bin); convert the model with hf_yi_convert.py "
            "--smoothquant"
        )
    sources: dict[str, TensorSource] = {}
    for row in LINEARS:
        codes = found.matrices(row, f"{row.stem(layer)}.{kind}", torch.int8)
        scales = found.scales(row, layer, per_channel=quant.per_channel)
        for source in row.sources:
            stem = f"model.layers.{layer}.{source}"
            sources |= {f"{stem}.weight": codes[source], f"{stem}.scale": scales[source]}
            if not quant.per_token:
                sources[f"{stem}.input_scale"] = found.input_scale(row, layer)
            if row.is_row_parallel:
                sources[f"{stem}.smoother"] = found.smoother(row, layer)
    return sources


def _refuse_flat(source: TensorSource, codes_NK: Tensor) -> None:
    low, high = torch.aminmax(codes_NK)
    if max(-int(low), int(high)) < LEAST_PEAK:
        raise CheckpointError(
            f"{source.origin}: no code is larger than {max(-int(low), int(high))} where one should "
            "be 127, a fault of TensorRT-LLM's converter with grouped queries; convert the model "
            "again with hf_yi_convert.py, or add --per_channel"
        )
