"""Meta's directories: params.json and model-parallel consolidated.{00..N}.pth files.

The shards are joined, and the query and key rows reordered, while ranges of rows are read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.checkpoint.base import EMBEDDING, FINAL_NORM, HEAD, Checkpoint, TensorSource
from engine.checkpoint.files import read_json
from engine.checkpoint.torch_file import TorchFile
from engine.config import ModelConfig
from engine.errors import CheckpointError

PARAMS_FILE = "params.json"
SHARD = re.compile(r"consolidated\.(\d+)\.pth")
LAYER = re.compile(r"^layers\.(\d+)\.")

# Rotary table; the params give it anew.
NOT_NEEDED = ("rope.freqs",)


class Row(NamedTuple):
    """Canonical name of a tensor, and the dimension along which the shards split it.

    `dim` None: every shard holds the whole tensor.
    """

    canonical: str
    dim: int | None
    is_rotated: bool = False


_BLOCK = "model.layers.{i}."
TENSORS = {
    "layers.{i}.attention.wq.weight": Row(_BLOCK + "self_attn.q_proj.weight", 0, True),
    "layers.{i}.attention.wk.weight": Row(_BLOCK + "self_attn.k_proj.weight", 0, True),
    "layers.{i}.attention.wv.weight": Row(_BLOCK + "self_attn.v_proj.weight", 0),
    "layers.{i}.attention.wo.weight": Row(_BLOCK + "self_attn.o_proj.weight", 1),
    "layers.{i}.feed_forward.w1.weight": Row(_BLOCK + "mlp.gate_proj.weight", 0),
    "layers.{i}.feed_forward.w2.weight": Row(_BLOCK + "mlp.down_proj.weight", 1),
    "layers.{i}.feed_forward.w3.weight": Row(_BLOCK + "mlp.up_proj.weight", 0),
    "layers.{i}.attention_norm.weight": Row(_BLOCK + "input_layernorm.weight", None),
    "layers.{i}.ffn_norm.weight": Row(_BLOCK + "post_attention_layernorm.weight", None),
    "norm.weight": Row(FINAL_NORM, None),
    "output.weight": Row(HEAD, 0),
}
TABLE_NAME = "tok_embeddings.weight"
NORM_NAME = "norm.weight"
GATE = "model.layers.0.mlp.gate_proj.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"


class JoinedTensor(TensorSource):
    """Parts of one matrix in several files, laid one after another along `dim` (0 or 1)."""

    def __init__(self, parts: Sequence[TensorSource], dim: int) -> None:
        first = parts[0]
        for part in parts:
            fits = len(part.shape) == 2 and part.shape[1 - dim] == first.shape[1 - dim]
            if not fits or part.dtype != first.dtype:
                raise CheckpointError(
                    f"{part.origin}: tensor {part.name!r} with shape {list(part.shape)} and "
                    f"{part.dtype} does not continue the one of {first.origin} with shape "
                    f"{list(first.shape)} and {first.dtype}; use the shards of one checkpoint"
                )
        self.name, self.dtype, self.origin = first.name, first.dtype, first.origin
        joined = sum(part.shape[dim] for part in parts)
        self.shape = (joined, first.shape[1]) if dim == 0 else (first.shape[0], joined)
        self.parts, self.dim = tuple(parts), dim

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        start, stop = self.row_span(start, stop)
        joined = torch.empty((stop - start, self.shape[1]), dtype=self.dtype)
        position = 0
        for part in self.parts:
            end = position + part.shape[self.dim]
            if self.dim == 1:
                joined[:, position:end] = part.rows(start, stop)
            else:
                low, high = max(start, position), min(stop, end)
                if low < high:
                    joined[low - start : high - start] = part.rows(low - position, high - position)
            position = end
        return joined


class HalfRotated(TensorSource):
    """Query or key rows for rotary embeddings that pair channel j of a head with j + D/2.

    Meta's files pair neighbours 2j and 2j + 1, so of each head the even rows come first here and
    the odd ones follow.
    """

    def __init__(self, source: TensorSource, head_dim: int) -> None:
        self.name, self.shape, self.dtype = source.name, source.shape, source.dtype
        self.origin = source.origin
        self.source, self.head_dim = source, head_dim

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Reads whole heads, as every row of a head may come from any of its rows."""
        start, stop = self.row_span(start, stop)
        assert self.shape[0] % self.head_dim == 0
        first, end = start // self.head_dim, -(-stop // self.head_dim)
        offset = first * self.head_dim
        heads = self.source.rows(offset, end * self.head_dim)
        pairs = heads.view(end - first, self.head_dim // 2, 2, self.shape[1])
        return pairs.transpose(1, 2).reshape(heads.shape)[start - offset : stop - offset]


def open_meta(folder: Path) -> Checkpoint:
    """Open a directory of Meta's format.

    Raises CheckpointError for damaged or missing files and for shards that do not fit together.
    """
    params_path = folder / PARAMS_FILE
    params = read_json(params_path)
    with ExitStack() as stack:
        files = [stack.enter_context(closing(TorchFile(path))) for path in _list_shards(folder)]
        _check_same_names(files)
        sources = _join_shards(files)
        config = _read_config(params, params_path, sources)
        for name, source in sources.items():
            if name.endswith((".q_proj.weight", ".k_proj.weight")):
                sources[name] = HalfRotated(source, config.head_dim)
        return Checkpoint(
            str(folder),
            config,
            sources,
            dropped=tuple(name for name in NOT_NEEDED if name in files[0].tensors),
            resources=stack.pop_all(),
        )


def _list_shards(folder: Path) -> list[Path]:
    matches = [SHARD.fullmatch(path.name) for path in folder.iterdir()]
    shards = {int(match[1]): folder / match[0] for match in matches if match}
    if not shards:
        raise CheckpointError(
            f"{folder}: holds no consolidated.00.pth; --meta_ckpt_dir takes a directory with "
            f"{PARAMS_FILE} and the consolidated.*.pth files"
        )
    missing = set(range(max(shards) + 1)) - set(shards)
    if missing:
        raise CheckpointError(
            f"{folder}: consolidated.{min(missing):02d}.pth is missing although "
            f"{shards[max(shards)].name} is there; download the missing file"
        )
    return [shards[number] for number in sorted(shards)]


def _check_same_names(files: Sequence[TorchFile]) -> None:
    for file in files[1:]:
        for name in files[0].tensors.keys() ^ file.tensors.keys():
            holder, other = (file, files[0]) if name in file.tensors else (files[0], file)
            raise CheckpointError(
                f"{other.path}: has no tensor {name!r} although {holder.path.name} has; use the "
                "shards of one checkpoint"
            )


def _join_shards(files: Sequence[TorchFile]) -> dict[str, TensorSource]:
    """Canonical name -> tensor joined over the shards; unknown names stay, from the first one."""
    sources: dict[str, TensorSource] = {}
    for name in files[0].tensors:
        parts = [file.tensors[name] for file in files]
        row = _find_row(name, files[0])
        if row is None:
            if name not in NOT_NEEDED:
                sources[name] = parts[0]
        elif row.dim is None or len(parts) == 1:
            sources[row.canonical] = parts[0]
        else:
            sources[row.canonical] = JoinedTensor(parts, row.dim)
    return sources


def _find_row(name: str, file: TorchFile) -> Row | None:
    if name == TABLE_NAME:
        # Llama 2 splits the table by columns, Llama 3 by rows, which then are of full width.
        norm = file.tensors.get(NORM_NAME)
        is_full_width = norm is not None and file.tensors[name].shape[1:] == norm.shape
        return Row(EMBEDDING, 0 if is_full_width else 1)
    layer = LAYER.match(name)
    row = TENSORS.get(LAYER.sub("layers.{i}.", name))
    if row is None or layer is None:
        return row
    return row._replace(canonical=row.canonical.replace("{i}", layer[1]))


def _read_config(
    params: Mapping[str, Any], path: Path, sources: Mapping[str, TensorSource]
) -> ModelConfig:
    """The params, completed by the sizes that only the tensors tell."""
    for name in (EMBEDDING, GATE, QUERY):
        if name not in sources:
            raise CheckpointError(
                f"{path.parent}: tensor {name} is missing from the consolidated.*.pth files; "
                "download the checkpoint again"
            )
        if len(sources[name].shape) != 2:
            raise CheckpointError(
                f"{sources[name].origin}: tensor {sources[name].name!r} has shape "
                f"{list(sources[name].shape)} and is not a matrix; download the checkpoint again"
            )
    vocab_size = params.get("vocab_size")
    is_known = type(vocab_size) is int and vocab_size > 0  # Llama 2 writes -1
    config = ModelConfig.from_meta(
        params,
        str(path),
        vocab_size=vocab_size if is_known else sources[EMBEDDING].shape[0],
        intermediate_size=sources[GATE].shape[0],
    )
    rows, needed = sources[QUERY].shape[0], config.num_heads * config.head_dim
    if rows < needed:
        raise CheckpointError(
            f"{path.parent}: the consolidated.*.pth files hold {rows} of {needed} query rows; "
            "download the shards that are missing"
        )
    return config
