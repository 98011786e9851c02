"""Files that appear whole or not at all, and one that is written tensor by tensor."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from math import prod
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from engine.errors import UserError

# Names of https://github.com/huggingface/safetensors (README, "Format").
_DTYPE_NAMES = {torch.float16: "F16", torch.int32: "I32"}
_HEADER_ALIGNMENT = 8


@contextmanager
def write_file(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` if the block ends well and is removed if not.

    UserError if the file system refuses.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield draft
        os.replace(draft, path)
    except OSError as error:
        raise _write_error(path, error) from None
    finally:
        with suppress(OSError):
            draft.unlink()


@contextmanager
def write_folder(path: Path) -> Iterator[Path]:
    """As `write_file`, for a directory that does not exist yet or is empty."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.mkdir(parents=True)
        yield draft
        os.replace(draft, path)
    except OSError as error:
        raise _write_error(path, error) from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _write_error(path: Path, error: OSError) -> UserError:
    return UserError(
        f"writing {path} failed ({error.strerror or error}); nothing was replaced: free some "
        "space or choose another --export_path"
    )


class PlannedTensor(NamedTuple):
    """A tensor of a file before its values are known."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class SafetensorsWriter:
    """Writes a safetensors file whose tensors come one by one, in the order of `plan`."""

    def __init__(self, path: Path, plan: Sequence[PlannedTensor]) -> None:
        self._left = iter(plan)
        self._file = open(path, "wb")  # noqa: SIM115 - closed by __exit__
        self._file.write(_make_header(plan))

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        assert error is not None or next(self._left, None) is None, "all of the plan is written"

    def write(self, name: str, tensor: Tensor) -> None:
        assert next(self._left) == (name, tensor.dtype, tuple(tensor.shape)), name
        self._file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _make_header(plan: Sequence[PlannedTensor]) -> bytes:
    entries, offset = {"__metadata__": {"format": "pt"}}, 0
    for tensor in plan:
        end = offset + tensor.num_bytes
        entries[tensor.name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
