"""Reads TensorRT-LLM's unified checkpoints, for any number of ranks.

The ranks' parts are joined, and q, k and v taken apart, while ranges of rows are read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping as Names
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple

from engine import unified
from engine.checkpoint.base import EMBEDDING, FINAL_NORM, HEAD, Checkpoint, TensorSource
from engine.checkpoint.files import read_json
from engine.checkpoint.hf import CONFIG_FILE, read_generation
from engine.checkpoint.quant_settings import Settings
from engine.checkpoint.quantised import QuantisedCheckpoint
from engine.checkpoint.safetensors_file import SafetensorsFile
from engine.checkpoint.unified_form import TO_INT8, Form, Stored, read_form
from engine.checkpoint.windows import Agreed, Joined, Viewed, Window, require_dims
from engine.config import ModelConfig
from engine.errors import CheckpointError
from engine.mapping import Mapping, Span

# Of a scale that a whole matrix shares.
ONE_VALUE = (1, 1)
LAYER = re.compile(r"transformer\.layers\.(\d+)\.(.+)")
PLAIN_WEIGHT = {"weight": Stored("weight", 0, 1)}
NORMS = {
    f"{unified.ATTENTION_NORM}.weight": "input_layernorm.weight",
    f"{unified.MLP_NORM}.weight": "post_attention_layernorm.weight",
}
# Scales of the cached keys and of the cached values, which ModelOpt writes beside the merged one.
KV_SCALES = {
    "attention.k_cache_scaling_factor": "self_attn.k_proj.k_scale",
    "attention.v_cache_scaling_factor": "self_attn.v_proj.v_scale",
}
# Follows from the scale itself.
RECIPROCAL = "attention.kv_cache_rcp_scaling_factor"


class Linear(NamedTuple):
    """Canonical stems in a layer, and whether tensor parallelism cuts the outputs or the inputs."""

    stems: tuple[str, ...]
    cuts_outputs: bool


LINEARS = {
    unified.QKV: Linear(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), True),
    unified.DENSE: Linear(("self_attn.o_proj",), False),
    unified.FC: Linear(("mlp.gate_proj",), True),
    unified.GATE: Linear(("mlp.up_proj",), True),
    unified.PROJ: Linear(("mlp.down_proj",), False),
}
# A scale of an input → the linear layers that read it.
INPUT_SCALES = {
    name: LINEARS[linear].stems + (LINEARS[unified.GATE].stems if linear == unified.FC else ())
    for linear, name in unified.TO_INT8.items()
}


def open_unified(folder: Path) -> Checkpoint:
    """Open a unified checkpoint; reads no weights.

    Raises CheckpointError for damaged or missing files, and for modes that TensorRT-LLM alone
    can read.
    """
    path = folder / CONFIG_FILE
    raw = read_json(path)
    config = unified.read_model(raw, str(path))
    mapping = unified.read_mapping(raw, str(path))
    form = read_form(Settings(str(path), raw).section("quantization"), config)
    with ExitStack() as stack:
        files = [
            stack.enter_context(closing(SafetensorsFile(_find_file(folder, mapping, rank))))
            for rank in range(mapping.world)
        ]
        collector = _Collector(config, mapping, form, _embedding_dim(raw, str(path)))
        collector.collect(files)
        options = {
            "generation": read_generation(folder, {}),
            "dropped": tuple(collector.dropped),
            "resources": stack.pop_all(),
        }
    if form is None:
        checkpoint = Checkpoint(str(folder), config, collector.sources, **options)
    else:
        checkpoint = QuantisedCheckpoint(
            str(folder), config, collector.sources, form.format, **options
        )
    checkpoint.is_rope_known = raw.get("rotary_base") is not None
    return checkpoint


def _embedding_dim(raw: Names[str, Any], where: str) -> int | None:
    """Along which dimension the ranks' embedding tables are joined; None where each is whole."""
    if not raw.get("use_parallel_embedding", False):
        return None
    dim = raw.get("embedding_sharding_dim", 0)
    if type(dim) is not int or dim not in (0, 1):
        raise CheckpointError(
            f"{where}: embedding_sharding_dim {dim!r} is neither 0 (vocabulary) nor 1 (hidden "
            "size); write the file again"
        )
    return dim


def _find_file(folder: Path, mapping: Mapping, rank: int) -> Path:
    path = folder / unified.rank_file(rank)
    if not path.exists():
        raise CheckpointError(
            f"{path}: is missing although {CONFIG_FILE} says that there are {mapping.world} ranks; "
            "copy the whole directory, or convert the model again"
        )
    return path


class _Collector:
    """Gathers canonical sources from the files of all ranks."""

    def __init__(
        self, config: ModelConfig, mapping: Mapping, form: Form | None, embedding_dim: int | None
    ) -> None:
        self.config, self.mapping, self.embedding_dim = config, mapping, embedding_dim
        self.tensors = PLAIN_WEIGHT if form is None else form.tensors
        self.is_static = form is not None and not form.format.quant.per_token
        self.sources: dict[str, TensorSource] = {}
        self.dropped: list[str] = []

    def collect(self, files: Sequence[SafetensorsFile]) -> None:
        first_layer = 0
        for start in range(0, self.mapping.world, self.mapping.tp):
            stage = files[start : start + self.mapping.tp]
            _check_same_names(stage)
            slots = [-1]
            for name in stage[0].tensors:
                parts = [file.tensors[name] for file in stage]
                inside = LAYER.fullmatch(name)
                if inside is None:
                    self._add_outside(name, parts)
                else:
                    slots.append(int(inside[1]))
                    prefix = f"model.layers.{first_layer + int(inside[1])}."
                    self._add_inside(prefix, inside[2], parts)
            first_layer += max(slots) + 1

    def _add_outside(self, name: str, parts: Sequence[TensorSource]) -> None:
        if name == f"{unified.EMBEDDING}.weight":
            dim = self.embedding_dim
            self.sources[EMBEDDING] = self._unpadded(
                parts[0] if dim is None else Joined(parts, dim)
            )
        elif name == f"{unified.HEAD}.weight":
            self.sources[HEAD] = self._unpadded(Joined(parts, 0))
        elif name == f"{unified.FINAL_NORM}.weight":
            self.sources[FINAL_NORM] = parts[0]
        else:
            self.sources[name] = parts[0]

    def _unpadded(self, table: TensorSource) -> TensorSource:
        """Rows beyond the vocabulary make it a multiple of the ranks."""
        if len(table.shape) != 2 or table.shape[0] <= self.config.vocab_size:
            return table
        return Window(table, 0, Span(0, self.config.vocab_size))

    def _add_inside(self, prefix: str, name: str, parts: Sequence[TensorSource]) -> None:
        linear, _, suffix = name.rpartition(".")
        if name in NORMS:
            self.sources[prefix + NORMS[name]] = parts[0]
        elif linear in LINEARS and suffix in self.tensors:
            self._add_linear(prefix, LINEARS[linear], self.tensors[suffix], parts)
        elif name in INPUT_SCALES and self.is_static:
            for stem in INPUT_SCALES[name]:
                self.sources[f"{prefix}{stem}.{TO_INT8}"] = Agreed(parts)
        elif name in KV_SCALES:
            self.sources[prefix + KV_SCALES[name]] = Agreed(parts)
        elif name == unified.KV_SCALE:
            # Beside it may be those of keys and of values, which are the better ones.
            for canonical in KV_SCALES.values():
                self.sources.setdefault(prefix + canonical, Agreed(parts))
        elif name in (*INPUT_SCALES, RECIPROCAL):
            self.dropped.append(parts[0].name)
        else:
            self.sources[prefix + name] = parts[0]

    def _add_linear(
        self, prefix: str, linear: Linear, stored: Stored, parts: Sequence[TensorSource]
    ) -> None:
        sources = [self._view(part, stored) for part in parts]
        if stored.is_factor and all(bool((source.read() == 1).all()) for source in sources):
            self.dropped.append(parts[0].name)
            return
        axis = stored.outputs if linear.cuts_outputs else stored.inputs
        if axis is None or sources[0].shape == ONE_VALUE:
            wholes = [Agreed(sources)] * len(linear.stems)
        elif len(linear.stems) == 1:
            wholes = [Joined(sources, axis)]
        else:
            wholes = [Joined(windows, axis) for windows in self._split_qkv(sources, axis)]
        for stem, whole in zip(linear.stems, wholes, strict=True):
            self.sources[f"{prefix}{stem}.{stored.suffix}"] = whole

    @staticmethod
    def _view(part: TensorSource, stored: Stored) -> TensorSource:
        if stored.dtype is None or part.dtype == stored.dtype or part.dtype.itemsize != 1:
            return part
        return Viewed(part, stored.dtype)

    def _split_qkv(
        self, parts: Sequence[TensorSource], axis: int
    ) -> tuple[list[TensorSource], list[TensorSource], list[TensorSource]]:
        """The q, the k and the v of each rank; of ranks that repeat a KV head, the first only."""
        local = self.mapping.local(self.config)
        sizes = [heads * local.head_dim for heads in (local.heads, local.kv_heads, local.kv_heads)]
        repeats = max(self.mapping.tp // self.config.num_kv_heads, 1)
        found: tuple[list[TensorSource], ...] = ([], [], [])
        for rank, part in enumerate(parts):
            require_dims(part, axis + 1)
            packed, rest = divmod(sum(sizes), part.shape[axis])
            if rest:
                raise CheckpointError(
                    f"{part.origin}: tensor {part.name!r} has shape {list(part.shape)} but the "
                    f"config needs {sum(sizes)} rows of q, k and v; use the config file that came "
                    "with the weights"
                )
            start = 0
            for kind, size in enumerate(sizes):
                span = Span(start, start + size // packed)
                if kind == 0 or rank % repeats == 0:
                    found[kind].append(Window(part, axis, span))
                start = span.stop
        return found


def _check_same_names(stage: Sequence[SafetensorsFile]) -> None:
    for file in stage[1:]:
        for name in stage[0].tensors.keys() ^ file.tensors.keys():
            holder, other = (file, stage[0]) if name in file.tensors else (stage[0], file)
            raise CheckpointError(
                f"{other.path}: has no tensor {name!r} although {holder.path.name} has; use the "
                "files of one conversion"
            )
