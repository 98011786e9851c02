"""Checkpoints whose linear layers are quantised already.

Here is what all formats share: which layers there are, that every tensor of the files has its
place, and the scales of the KV cache. How a matrix is packed, its `LinearFormat` alone knows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.checkpoint.base import (
    EMBEDDING,
    HEAD,
    WEIGHT_DTYPES,
    Checkpoint,
    TensorSource,
    canonical_shapes,
)
from engine.checkpoint.linear_layers import find_peers, is_linear, linear_shapes
from engine.checkpoint.quant_groups import Groups
from engine.checkpoint.quant_scales import SCALE_DTYPES, read_scale
from engine.config import ModelConfig
from engine.errors import CheckpointError
from engine.quant import KVStorage, QuantConfig
from engine.weights.deferred import Deferred
from engine.weights.types import Dense, Int4Groups, Lazy, LinearWeights

# Layers that an engine joins into one at most: q, k and v.
JOINED_LAYERS = 3


class Field(NamedTuple):
    """One tensor of a stored linear layer: the shapes and dtypes it may have."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    is_required: bool = True


@dataclass(frozen=True)
class StoredLinear:
    """A linear layer in its files.

    stem     canonical name without '.weight'
    tensors  the part of a tensor's name after the stem -> the tensor
    peers    `tensors` of the layers that read the same activation, this one included
    """

    stem: str
    outputs: int
    inputs: int
    tensors: Mapping[str, TensorSource]
    peers: tuple[Mapping[str, TensorSource], ...]

    def read(self, suffix: str) -> Tensor:
        return self.tensors[suffix].read()


class LinearFormat(ABC):
    """How a file format stores linear layers, and what that makes of the engine.

    kv_names: what the k and the v scale of a layer may be called, after
    'model.layers.{i}.self_attn.'.
    """

    quant: QuantConfig
    kv_names: tuple[tuple[str, str], ...] = ()

    @abstractmethod
    def fields(self, outputs: int, inputs: int) -> dict[str, Field]:
        """The tensors of a layer by the part of their name after the stem."""

    @abstractmethod
    def unpack(self, linear: StoredLinear) -> LinearWeights:
        """Read one layer; CheckpointError for scales or settings that cannot be right."""

    @abstractmethod
    def sketch(self, linear: StoredLinear) -> LinearWeights:
        """What `unpack` will give, on the meta device; reads nothing."""

    def check(self, linear: StoredLinear) -> None:
        """What names, shapes and dtypes do not show; CheckpointError. Reads no weights."""
        return


class FullPrecision(LinearFormat):
    """Unquantised linear layers of a checkpoint that quantises its KV cache only."""

    def __init__(self, kv: KVStorage, kv_names: tuple[tuple[str, str], ...]) -> None:
        self.quant = QuantConfig(kv=kv)
        self.kv_names = kv_names

    def fields(self, outputs: int, inputs: int) -> dict[str, Field]:
        return {"weight": Field(((outputs, inputs),), WEIGHT_DTYPES)}

    def unpack(self, linear: StoredLinear) -> Dense:
        return Dense(Lazy.whole(linear.tensors["weight"]))

    def sketch(self, linear: StoredLinear) -> Dense:
        return self.unpack(linear)


class QuantisedCheckpoint(Checkpoint):
    """A checkpoint with quantised linear layers, unpacked one matrix at a time when asked for.

    `tensors` holds what is stored in full precision: embedding, norms and head.
    """

    def __init__(
        self,
        where: str,
        config: ModelConfig,
        sources: Mapping[str, TensorSource],
        linear_format: LinearFormat,
        *,
        generation: Mapping[str, Any] | None = None,
        dropped: tuple[str, ...] = (),
        resources: ExitStack | None = None,
    ) -> None:
        self.format = linear_format
        self.quant, self.kv_storage = linear_format.quant, linear_format.quant.kv
        rest = dict(sources)
        found = {
            stem: {
                suffix: rest.pop(f"{stem}.{suffix}")
                for suffix in linear_format.fields(*shape)
                if f"{stem}.{suffix}" in rest
            }
            for stem, shape in linear_shapes(config).items()
        }
        self._linears = {
            stem: StoredLinear(
                stem, *shape, found[stem], tuple(found[peer] for peer in find_peers(stem))
            )
            for stem, shape in linear_shapes(config).items()
        }
        self._kv = {}
        if self.quant.kv is not KVStorage.NONE:
            self._kv = {i: self._take_kv(i, rest) for i in range(config.num_layers)}
        # Ranks that cut the same layer ask for it one after the other.
        self._unpacked = lru_cache(maxsize=JOINED_LAYERS)(self.linear)
        super().__init__(
            where, config, rest, generation=generation, dropped=dropped, resources=resources
        )

    def plain_shapes(self) -> dict[str, tuple[int, ...]]:
        return {n: s for n, s in canonical_shapes(self.config).items() if not is_linear(n)}

    def linear(self, stem: str) -> LinearWeights:
        return self.format.unpack(self._linears[stem])

    def lazy_linear(self, stem: str) -> LinearWeights | Deferred:
        sketch = self.format.sketch(self._linears[stem])
        if isinstance(sketch, Dense):
            return sketch
        return Deferred.by_loading(sketch, partial(self._unpacked, stem))

    def kv_scales(self, layer: int) -> tuple[Tensor, Tensor] | None:
        pair = self._kv.get(layer)
        if not pair:
            return None
        k_scale, v_scale = (read_scale(source).reshape(-1) for source in pair)
        return k_scale, v_scale

    def check(self) -> None:
        """As for full precision; also reads the group index of GPTQ files, which is no weight."""
        super().check()
        missing = [
            f"{linear.stem}.{suffix}"
            for linear in self._linears.values()
            for suffix, field in self._fields(linear).items()
            if field.is_required and suffix not in linear.tensors
        ]
        if missing:
            raise CheckpointError(self._missing_message(missing))
        for linear in self._linears.values():
            for suffix, source in linear.tensors.items():
                _check_field(source, self._fields(linear)[suffix])
        self._check_kv()
        for linear in self._linears.values():
            self.format.check(linear)

    def _fields(self, linear: StoredLinear) -> dict[str, Field]:
        return self.format.fields(linear.outputs, linear.inputs)

    def _take_kv(self, layer: int, rest: dict[str, TensorSource]) -> tuple[TensorSource, ...]:
        """The k and v scale of a layer, taken out of `rest`; empty if the files have neither."""
        for names in self.format.kv_names:
            full = [f"model.layers.{layer}.self_attn.{name}" for name in names]
            pair = tuple(rest.pop(name) for name in full if name in rest)
            if pair:
                return pair
        return ()

    def _check_kv(self) -> None:
        """All layers have both scales, or none has; an INT8 cache cannot do without them."""
        with_scales = [layer for layer, pair in self._kv.items() if len(pair) == 2]
        if len(with_scales) != len(self._kv) and (
            any(self._kv.values()) or self.quant.kv is KVStorage.INT8
        ):
            layer = min(set(self._kv) - set(with_scales))
            names = " and ".join(self.format.kv_names[0])
            raise CheckpointError(
                f"{self.where}: the KV cache is quantised to {self.quant.kv.value} but the scales "
                f"of layer {layer} (model.layers.{layer}.self_attn: {names}) are not both there; "
                "download the checkpoint again or calibrate its KV cache"
            )
        heads = self.config.num_kv_heads
        shapes = ((1,), (), (heads,), (heads, 1, 1))
        for pair in self._kv.values():
            for source in pair:
                _check_field(source, Field(shapes, SCALE_DTYPES))

    def _foreign_reason(self, name: str) -> str:
        stem, _, suffix = name.rpartition(".")
        if stem in self._linears and suffix == "weight":
            return (
                f"is a linear layer in full precision while the others are {self.quant}, but the "
                "linear layers of an engine are all stored alike; quantise all of them"
            )
        for table in (HEAD, EMBEDDING):
            if name.startswith(table.removesuffix("weight")):
                return (
                    f"says that {table} is quantised, which only linear layers of the blocks may "
                    "be; quantise the model again without it"
                )
        return super()._foreign_reason(name)


def sketch_groups(
    linear: StoredLinear, groups: Groups, *, has_zero: bool = False, has_pre_scale: bool = False
) -> Int4Groups:
    """4-bit weights in `groups` on the meta device."""
    count = linear.inputs // groups.engine
    return Int4Groups(
        codes_NK=meta(linear.outputs, linear.inputs, dtype=torch.uint8),
        scale_NR=meta(linear.outputs, count),
        group_size=groups.engine,
        zero_NR=meta(linear.outputs, count, dtype=torch.uint8) if has_zero else None,
        pre_scale_K=meta(linear.inputs) if has_pre_scale else None,
    )


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _check_field(source: TensorSource, field: Field) -> None:
    if source.shape not in field.shapes:
        wanted = " or ".join(str(list(shape)) for shape in field.shapes)
        raise CheckpointError(
            f"{source.origin}: tensor {source.name!r} has shape {list(source.shape)} but the "
            f"config needs {wanted}; use the config file that came with the weights"
        )
    if source.dtype not in field.dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in field.dtypes)
        raise CheckpointError(
            f"{source.origin}: tensor {source.name!r} is stored as "
            f"{str(source.dtype).removeprefix('torch.')} where its format needs {wanted}; use the "
            "config file that came with the weights"
        )
