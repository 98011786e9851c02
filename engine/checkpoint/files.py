"""Small file helpers of the checkpoint readers: strict JSON, opening, Git LFS pointers.

Knows nothing of tensors.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError

# First line of the text file that a clone without Git LFS leaves in place of a large file.
LFS_POINTER = b"version https://git-lfs"


def parse_object(text: str | bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object; CheckpointError for bad JSON, duplicate keys or another JSON type."""

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        members: dict[str, Any] = {}
        for key, value in pairs:
            if key in members:
                raise CheckpointError(
                    f"{where}: key {key!r} appears twice, so its value is ambiguous; "
                    "write the file again"
                )
            members[key] = value
        return members

    try:
        value = json.loads(text, object_pairs_hook=collect)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{where}: is not valid JSON ({error}); download or write the file again"
        ) from None
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{where}: holds a JSON {type(value).__name__} where an object is needed; "
            "download or write the file again"
        )
    return value


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file; CheckpointError names the file."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from None
    return parse_object(data, str(path))


def open_weights(path: Path) -> int:
    """Open a weight file for os.pread and refuse a Git LFS pointer; the caller closes it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except OSError as error:
        raise _unreadable(path, error) from None
    try:
        head = os.pread(descriptor, len(LFS_POINTER), 0)
    except OSError as error:  # a directory opens, but does not read
        os.close(descriptor)
        raise _unreadable(path, error) from None
    if head == LFS_POINTER:
        os.close(descriptor)
        raise CheckpointError(
            f"{path}: is a Git LFS pointer and not the weights themselves; "
            "run 'git lfs pull' in its directory or download the file"
        )
    return descriptor


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{path}: cannot be read ({error.strerror}); check that the file exists and may be read"
    )
