"""Which weight files of a Hugging Face directory make up the model, with or without an index.

Knows file names and tensor names, not what the tensors mean.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from engine.checkpoint.base import TensorSource
from engine.checkpoint.files import read_json
from engine.checkpoint.safetensors_file import SafetensorsFile
from engine.checkpoint.torch_file import TorchFile
from engine.errors import CheckpointError

WeightFile = SafetensorsFile | TorchFile


class Family(NamedTuple):
    """One way of storing weights: how its files are called and the reader of one of them."""

    stem: str
    suffix: str
    reader: type[SafetensorsFile] | type[TorchFile]

    @property
    def single(self) -> str:
        return self.stem + self.suffix

    @property
    def index(self) -> str:
        return self.single + ".index.json"

    def list_parts(self, folder: Path) -> dict[str, tuple[int, int]]:
        """File name -> (number, total) of the files that are named as shards."""
        pattern = re.compile(rf"{self.stem}-(\d+)-of-(\d+){re.escape(self.suffix)}")
        matches = (pattern.fullmatch(path.name) for path in sorted(folder.iterdir()))
        return {m[0]: (int(m[1]), int(m[2])) for m in matches if m}

    def is_in(self, folder: Path) -> bool:
        names = (self.single, self.index)
        return any((folder / name).exists() for name in names) or bool(self.list_parts(folder))


SAFETENSORS = Family("model", ".safetensors", SafetensorsFile)
TORCH = Family("pytorch_model", ".bin", TorchFile)


class Shards(NamedTuple):
    """The files to read, their reader, and the index (tensor -> file name) that lists them."""

    paths: tuple[Path, ...]
    reader: type[SafetensorsFile] | type[TorchFile]
    index_path: Path | None = None
    weight_map: Mapping[str, str] | None = None


def find_shards(folder: Path) -> Shards:
    """Choose the weight files: safetensors, then pytorch_model.bin, then any *.safetensors.

    Raises CheckpointError when shards are missing or two sets of files lie side by side.
    """
    for family in (SAFETENSORS, TORCH):
        if family.is_in(folder):
            return _find_family(folder, family)
    others = tuple(sorted(folder.glob("*.safetensors")))
    if not others:
        raise CheckpointError(
            f"{folder}: holds no weights ({SAFETENSORS.single}, {TORCH.single} or shards of "
            "them); download the checkpoint's weight files into it"
        )
    return Shards(others, SafetensorsFile)


def merge_tensors(files: Mapping[Path, WeightFile]) -> dict[str, TensorSource]:
    """Tensors of all files by their name; a name may appear in one file only."""
    merged: dict[str, TensorSource] = {}
    for path, file in files.items():
        for name, source in file.tensors.items():
            if name in merged:
                raise CheckpointError(
                    f"{path}: tensor {name!r} is also in {merged[name].origin}; remove the file "
                    "that does not belong to the checkpoint"
                )
            merged[name] = source
    return merged


def check_index(shards: Shards, tensors: Mapping[str, TensorSource]) -> None:
    """Raise CheckpointError unless each tensor of the index is in the file the index names."""
    for name, shard in (shards.weight_map or {}).items():
        source = tensors.get(name)
        if source is None:
            raise CheckpointError(
                f"{shards.index_path}: places tensor {name!r} in {shard}, which does not hold it; "
                "download the index and the shards of one and the same revision"
            )
        if Path(source.origin).name != shard:
            raise CheckpointError(
                f"{shards.index_path}: places tensor {name!r} in {shard} but it is in "
                f"{source.origin}; download the index and the shards of one and the same revision"
            )


def _find_family(folder: Path, family: Family) -> Shards:
    parts = family.list_parts(folder)
    index_path, weight_map = None, None
    if (folder / family.index).exists():
        index_path = folder / family.index
        weight_map = _read_weight_map(index_path)
        names = sorted(set(weight_map.values()))
    elif (folder / family.single).exists():
        names = [family.single]
    else:
        _check_parts(folder, parts)
        names = list(parts)
    present = [name for name in (family.single, *parts) if (folder / name).exists()]
    others = [name for name in present if name not in names]
    if others:
        listed = f"{family.index} does not name it" if index_path else f"so is {names[0]}"
        raise CheckpointError(
            f"{folder / others[0]}: is a weight file but {listed}; remove the files that do not "
            "belong to the checkpoint"
        )
    return Shards(tuple(folder / name for name in names), family.reader, index_path, weight_map)


def _check_parts(folder: Path, parts: Mapping[str, tuple[int, int]]) -> None:
    """Without an index the names tell how many shards there must be."""
    totals = sorted({total for _, total in parts.values()})
    if len(totals) > 1:
        raise CheckpointError(
            f"{folder}: holds shards of two checkpoints (of {totals[0]} and of {totals[1]} "
            "files); remove those that do not belong to the checkpoint"
        )
    missing = set(range(1, totals[0] + 1)) - {number for number, _ in parts.values()}
    if missing:
        raise CheckpointError(
            f"{folder}: holds {len(parts)} of {totals[0]} weight shards, number {min(missing)} is "
            "missing; download the missing files"
        )


def _read_weight_map(path: Path) -> dict[str, str]:
    """The index's tensor -> file name map; every file named must lie beside the index."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{path}: has no weight_map of tensor names to files; download the file again"
        )
    for shard in dict.fromkeys(map(str, weight_map.values())):
        if shard in ("", "..") or Path(shard).name != shard:
            raise CheckpointError(
                f"{path}: names {shard!r}, which is not a plain file name; download the file again"
            )
        if not (path.parent / shard).exists():
            raise CheckpointError(
                f"{path}: names {shard}, which is not in {path.parent}; download the missing file"
            )
    return {name: str(shard) for name, shard in weight_map.items()}
