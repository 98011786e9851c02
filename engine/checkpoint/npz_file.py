"""Reads .npz archives of numpy.savez by byte range, never unpickling.

Formats: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html, in stored (not
compressed) members of a zip archive.
"""

from __future__ import annotations

import ast
import os
import struct
import zipfile
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from engine.checkpoint.base import TensorSource
from engine.checkpoint.files import open_weights
from engine.errors import CheckpointError

MEMBER_SUFFIX = ".npy"
# Bytes of a zip archive's local header before the name; the lengths of name and extra field are
# its last two numbers (APPNOTE.TXT 4.3.7).
LOCAL_HEADER = struct.Struct("<4s5H3L2H")
# An array begins with the magic, two bytes of version and the length of its header, the size of
# which depends on the version.
MAGIC = b"\x93NUMPY"
LENGTH_BYTES = {b"\x01": 2, b"\x02": 4, b"\x03": 4}
# More than any header numpy writes for a plain array.
MAX_HEADER_BYTES = 16384

DTYPES = {
    "<f8": torch.float64,
    "<f4": torch.float32,
    "<f2": torch.float16,
    "<i8": torch.int64,
    "<i4": torch.int32,
    "<i2": torch.int16,
    "|i1": torch.int8,
    "|u1": torch.uint8,
    "|b1": torch.bool,
}


@dataclass(frozen=True)
class NpzTensor(TensorSource):
    """One array of an .npz archive; `offset` is its first byte in the file."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    origin: str
    file: NpzFile
    offset: int

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        start, stop = self.row_span(start, stop)
        row_bytes = prod(self.shape[1:]) * self.dtype.itemsize
        buffer = torch.empty((stop - start) * row_bytes, dtype=torch.uint8)
        self.file.read_into(buffer, self.offset + start * row_bytes)
        shape = (stop - start, *self.shape[1:]) if self.shape else ()
        return buffer.view(self.dtype).view(shape)


class NpzFile:
    """An open .npz archive: names, shapes and dtypes at once, contents on demand.

    Raises CheckpointError for a damaged or compressed archive and for arrays of Python objects.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = open_weights(path)
        try:
            self.tensors = {tensor.name: tensor for tensor in self._list_members()}
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
        while view:
            count = os.preadv(self._descriptor, [view], offset)
            if count == 0:
                raise self._damaged(f"ends {len(view)} bytes before the end of an array")
            view, offset = view[count:], offset + count

    def _list_members(self) -> list[NpzTensor]:
        try:
            with zipfile.ZipFile(self.path) as archive:
                members = archive.infolist()
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise self._damaged(f"is not a zip archive that can be read ({error})") from None
        names = [member.filename for member in members]
        if len(set(names)) != len(names):
            raise self._damaged("holds two arrays of one name")
        return [self._read_member(member) for member in members]

    def _read_member(self, member: zipfile.ZipInfo) -> NpzTensor:
        name = member.filename.removesuffix(MEMBER_SUFFIX)
        if member.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(
                f"{self.path}: array {name!r} is compressed, so it cannot be read by slice; save "
                "the arrays again with numpy.savez"
            )
        start = self._data_start(member)
        header = self._pread(min(member.file_size, MAX_HEADER_BYTES), start)
        shape, dtype, header_bytes = self._parse_header(header, name)
        if header_bytes + prod(shape) * dtype.itemsize != member.file_size:
            raise self._damaged(f"gives array {name!r} a size that is not that of its shape")
        assert self._descriptor is not None
        if start + member.file_size > os.fstat(self._descriptor).st_size:
            raise self._damaged(f"ends before array {name!r} does")
        return NpzTensor(name, shape, dtype, str(self.path), self, start + header_bytes)

    def _data_start(self, member: zipfile.ZipInfo) -> int:
        # A damaged directory of the archive may even give a negative offset.
        raw = self._pread(LOCAL_HEADER.size, max(0, member.header_offset))
        if (
            member.header_offset < 0
            or len(raw) < LOCAL_HEADER.size
            or not raw.startswith(b"PK\x03\x04")
        ):
            raise self._damaged(f"has no header for {member.filename!r}")
        *_, name_bytes, extra_bytes = LOCAL_HEADER.unpack(raw)
        return member.header_offset + LOCAL_HEADER.size + name_bytes + extra_bytes

    def _parse_header(self, header: bytes, name: str) -> tuple[tuple[int, ...], torch.dtype, int]:
        """Shape and dtype of an array, and the size of its header."""
        length_bytes = LENGTH_BYTES.get(header[len(MAGIC) : len(MAGIC) + 1])
        if not header.startswith(MAGIC) or length_bytes is None:
            raise self._damaged(f"holds {name!r}, which is not an array of a known version")
        start = len(MAGIC) + 2 + length_bytes
        end = start + int.from_bytes(header[len(MAGIC) + 2 : start], "little")
        try:
            fields = ast.literal_eval(header[start:end].decode("latin-1").strip())
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            fields = None
        if not isinstance(fields, dict) or set(fields) != {"descr", "fortran_order", "shape"}:
            raise self._damaged(f"has an unreadable header for array {name!r}")
        shape, kind = fields["shape"], fields["descr"]
        if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape):
            raise self._damaged(f"gives array {name!r} the shape {shape!r}")
        if fields["fortran_order"] and len(shape) > 1:
            raise CheckpointError(
                f"{self.path}: array {name!r} is stored by columns; save it again with "
                "numpy.savez after numpy.ascontiguousarray"
            )
        if not isinstance(kind, str) or kind not in DTYPES:
            raise CheckpointError(
                f"{self.path}: array {name!r} has dtype {kind!r}, which is none of "
                f"{', '.join(DTYPES)}; save it again as one of them"
            )
        return shape, DTYPES[kind], end

    def _pread(self, count: int, offset: int) -> bytes:
        assert self._descriptor is not None
        return os.pread(self._descriptor, count, offset)

    def _damaged(self, finding: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {finding}; download or write the file again")
