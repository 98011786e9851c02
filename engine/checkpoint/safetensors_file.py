"""Reads safetensors files by byte range, never by memory map.

Mapped pages would count as resident memory. Format: https://github.com/huggingface/safetensors
(README, "Format"): 8 bytes little-endian header length, JSON header, tensor bytes without holes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.checkpoint.base import TensorSource
from engine.checkpoint.files import open_weights, parse_object
from engine.errors import CheckpointError

LENGTH_BYTES = 8
# Limit of the reference implementation; keeps a damaged length from being allocated.
MAX_HEADER_BYTES = 100_000_000

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}


@dataclass(frozen=True)
class SafetensorsTensor(TensorSource):
    """One tensor of a safetensors file; `offset` is its first byte in the file."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    origin: str
    file: SafetensorsFile
    offset: int

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        start, stop = self.row_span(start, stop)
        row_bytes = prod(self.shape[1:]) * self.dtype.itemsize
        buffer = torch.empty((stop - start) * row_bytes, dtype=torch.uint8)
        self.file.read_into(buffer, self.offset + start * row_bytes)
        shape = (stop - start, *self.shape[1:]) if self.shape else ()
        return buffer.view(self.dtype).view(shape)


class SafetensorsFile:
    """An open safetensors file: a validated header, and tensors read on demand.

    Raises CheckpointError for anything that departs from the format. Reads may run in parallel.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = open_weights(path)
        try:
            self.metadata, self.tensors = self._read_header()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def read_into(self, buffer: Tensor, offset: int) -> None:
        """Fill a flat uint8 CPU tensor from the file's bytes at `offset`."""
        assert self._descriptor is not None, f"{self.path} is closed"
        view = memoryview(buffer.numpy())
        # One call moves at most 2 GiB on Linux and may always move less.
        while view:
            count = os.preadv(self._descriptor, [view], offset)
            if count == 0:
                raise CheckpointError(
                    f"{self.path}: the file ends at byte {offset}, {len(view)} bytes before the "
                    "end of a tensor; it changed while it was read, so start again"
                )
            view, offset = view[count:], offset + count

    def _read_header(self) -> tuple[dict[str, str], dict[str, SafetensorsTensor]]:
        assert self._descriptor is not None
        file_bytes = os.fstat(self._descriptor).st_size
        if file_bytes < LENGTH_BYTES:
            raise self._damaged(
                f"has {file_bytes} bytes, fewer than the {LENGTH_BYTES} of a header"
            )
        length = int.from_bytes(os.pread(self._descriptor, LENGTH_BYTES, 0), "little")
        data_start = LENGTH_BYTES + length
        if length > MAX_HEADER_BYTES or data_start > file_bytes:
            raise self._damaged(
                f"announces a header of {length} bytes but the file has {file_bytes} bytes"
            )
        data = torch.empty(length, dtype=torch.uint8)
        self.read_into(data, LENGTH_BYTES)
        members = self._parse_header(data.numpy().tobytes())
        metadata = members.pop("__metadata__", {})
        if not _is_text_map(metadata):
            raise self._damaged("has a __metadata__ that is not a map of texts")
        entries = [self._parse_entry(name, entry) for name, entry in members.items()]
        self._check_layout(entries, file_bytes - data_start)
        tensors = {
            name: SafetensorsTensor(name, shape, dtype, str(self.path), self, data_start + begin)
            for name, shape, dtype, begin, _ in entries
        }
        return metadata, tensors

    def _parse_header(self, data: bytes) -> dict[str, Any]:
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            raise self._damaged("has a header that is not UTF-8 text") from None
        if not text.startswith("{"):
            raise self._damaged("has a header that does not start with '{'")
        return parse_object(text, f"{self.path} (header)")

    def _parse_entry(
        self, name: str, entry: Any
    ) -> tuple[str, tuple[int, ...], torch.dtype, int, int]:
        if not isinstance(entry, Mapping) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise self._damaged(f"describes tensor {name!r} without dtype, shape and data_offsets")
        kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(kind, str) or kind not in DTYPES:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} has dtype {kind!r}, which is not one of "
                f"{', '.join(DTYPES)}; convert the checkpoint to one of them"
            )
        if not _is_sizes(shape):
            raise self._damaged(f"gives tensor {name!r} the shape {shape!r}")
        if not _is_sizes(offsets) or len(offsets) != 2:
            raise self._damaged(f"gives tensor {name!r} the data_offsets {offsets!r}")
        begin, end = offsets
        needed = prod(shape) * DTYPES[kind].itemsize
        if end - begin != needed:
            raise self._damaged(
                f"gives tensor {name!r} {end - begin} bytes but {kind} of shape {shape} takes "
                f"{needed}"
            )
        return name, tuple(shape), DTYPES[kind], begin, end

    def _check_layout(self, entries: list[tuple], data_bytes: int) -> None:
        """The tensors must cover the data exactly: no overlap, no hole, nothing behind."""
        position = 0
        for name, _, _, begin, end in sorted(entries, key=lambda entry: entry[3:]):
            if begin != position:
                raise self._damaged(
                    f"starts tensor {name!r} at byte {begin} of the data where byte {position} "
                    "follows"
                )
            position = end
        if position != data_bytes:
            relation = "is truncated: it" if data_bytes < position else "has bytes of no tensor: it"
            raise self._damaged(
                f"{relation} holds {data_bytes} bytes of tensor data but its header describes "
                f"{position}"
            )

    def _damaged(self, finding: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {finding}; download or write the file again")


def _is_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)


def _is_text_map(values: Any) -> bool:
    return isinstance(values, dict) and all(isinstance(v, str) for v in values.values())
