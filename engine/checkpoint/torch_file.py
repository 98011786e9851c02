"""Reads files of torch.save by slice: plain tensors only, never running code from the file.

The file is mapped; the map is renewed after a bounded number of bytes, because every page that was
read stays in resident memory as long as the map lives.
"""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.checkpoint.base import TensorSource
from engine.checkpoint.files import open_weights
from engine.errors import CheckpointError

MAX_MAPPED_BYTES = 256 * 2**20

# First byte of a bare pickle (its PROTO opcode), which is how older files begin.
PICKLE_START = b"\x80"

# What torch.load and zipfile raise for a damaged file, found by flipping bytes of good ones.
DAMAGE = (
    RuntimeError,
    OSError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    zipfile.BadZipFile,
    pickle.UnpicklingError,
)


@dataclass(frozen=True)
class TorchTensor(TensorSource):
    """One tensor of a torch.save file."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    origin: str
    file: TorchFile

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        start, stop = self.row_span(start, stop)
        if not self.shape:
            return self.file.map_tensor(self, self.num_bytes).clone()
        rows = torch.empty((stop - start, *self.shape[1:]), dtype=self.dtype)
        row_bytes = prod(self.shape[1:]) * self.dtype.itemsize
        step = max(1, MAX_MAPPED_BYTES // max(1, row_bytes))
        for first in range(start, stop, step):
            end = min(first + step, stop)
            mapped = self.file.map_tensor(self, (end - first) * row_bytes)
            rows[first - start : end - start] = mapped[first:end]
        return rows


class TorchFile:
    """A torch.save file: names, shapes and dtypes at once, contents on demand.

    Raises CheckpointError for a damaged file, for one that holds more than a flat dict of tensors,
    and for the format before torch 1.6, which cannot be read by slice.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mapped: dict[str, Tensor] | None = None
        self._touched_bytes = 0
        self._is_closed = False
        self._refuse_old_format()
        self._check_archive()
        self.tensors = {
            name: TorchTensor(name, tuple(tensor.shape), tensor.dtype, str(path), self)
            for name, tensor in self._map().items()
        }

    def close(self) -> None:
        self._mapped, self._is_closed = None, True

    def map_tensor(self, source: TorchTensor, num_bytes: int) -> Tensor:
        """The mapped tensor of `source`, `num_bytes` of which the caller will read."""
        assert not self._is_closed, f"{self.path} is closed"
        if self._touched_bytes + num_bytes > MAX_MAPPED_BYTES:
            self._mapped = None
        mapped = self._map()
        self._touched_bytes += num_bytes
        tensor = mapped.get(source.name)
        if tensor is None or (tuple(tensor.shape), tensor.dtype) != (source.shape, source.dtype):
            raise CheckpointError(
                f"{self.path}: tensor {source.name!r} changed while the file was read; start again"
            )
        return tensor

    def _map(self) -> dict[str, Tensor]:
        mapped = self._mapped
        if mapped is None:
            mapped = self._load()
            self._mapped, self._touched_bytes = mapped, 0
        return mapped

    def _load(self) -> dict[str, Tensor]:
        try:
            values = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
        except DAMAGE as error:
            raise self._unloadable(error) from None
        if not isinstance(values, dict):
            raise CheckpointError(
                f"{self.path}: holds a {type(values).__name__} where a dict of tensors is needed; "
                "save the model's state_dict() alone"
            )
        return {name: self._plain(name, value) for name, value in values.items()}

    def _plain(self, name: Any, value: Any) -> Tensor:
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{self.path}: entry {name!r} is a {type(value).__name__} and not a tensor; save "
                "the model's state_dict() alone"
            )
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} is not a dense one ({value.layout}, "
                f"{value.device}); save the model's state_dict() with dense tensors"
            )
        return value.detach()

    def _refuse_old_format(self) -> None:
        descriptor = open_weights(self.path)
        head = os.pread(descriptor, len(PICKLE_START), 0)
        os.close(descriptor)
        if head == PICKLE_START:
            raise CheckpointError(
                f"{self.path}: was written in the format before torch 1.6, which cannot be read "
                "by slice; load it with torch.load(path, weights_only=True) and save the result "
                "with torch.save"
            )

    def _check_archive(self) -> None:
        """Find damage and packing that torch.load does not look for."""
        try:
            with zipfile.ZipFile(self.path) as archive:
                members = archive.infolist()
                is_packed = any(m.compress_type != zipfile.ZIP_STORED for m in members)
                for member in members:
                    if member.filename.endswith("/data.pkl") and not is_packed:
                        archive.read(member)  # verifies its checksum
        except DAMAGE as error:
            raise self._unloadable(error) from None
        if is_packed:
            # torch would map the packed bytes as if they were the tensor's.
            raise CheckpointError(
                f"{self.path}: is a compressed archive, which cannot be read by slice; save it "
                "again with torch.save"
            )

    def _unloadable(self, error: Exception) -> CheckpointError:
        foreign = re.search(r"Unsupported (?:global: GLOBAL|class) (\S+)", str(error))
        if foreign:
            return CheckpointError(
                f"{self.path}: needs the Python object {foreign[1]}, and code from a checkpoint "
                "is never run; convert the checkpoint to safetensors where it was made"
            )
        return CheckpointError(
            f"{self.path}: does not load as a torch file ({_first_sentence(error)}); download the "
            "file again or convert the checkpoint to safetensors"
        )


def _first_sentence(error: Exception) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text.split(". ")[0][:160]
