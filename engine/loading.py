"""Rank files onto a GPU: read, checked and copied chunk by chunk in several threads.

Every byte is read once. A chunk is hashed while the one before it is on its way to the device, so
loading is bound by the disk, the bus or the hash, whichever is slowest.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from engine.engine_file import CHUNK, FileRecord, check_digests, check_size, view_tensors

# Readers beyond this gain nothing: each keeps two chunks of pinned memory.
MAX_READERS = 16


def load_tensors(
    path: Path, record: FileRecord, device: torch.device, threads: int
) -> dict[str, Tensor]:
    """Name → tensor of a rank file on `device`, all in one allocation.

    Raises EngineError unless the file has the recorded size and checksum.
    """
    check_size(path, record)
    arena = torch.empty(record.bytes, dtype=torch.uint8, device=device)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        readers = threading.local()
        with ThreadPoolExecutor(max(1, min(threads, MAX_READERS))) as pool:

            def copy(offset: int) -> bytes:
                if not hasattr(readers, "own"):
                    readers.own = _Reader(descriptor, device)
                return readers.own.copy(offset, arena[offset : offset + CHUNK])

            digests = list(pool.map(copy, range(0, record.bytes, CHUNK)))
    finally:
        os.close(descriptor)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    check_digests(path, record, digests)
    return view_tensors(path, arena.untyped_storage())


class _Reader:
    """A thread's buffers: one is read into while the other is copied from."""

    def __init__(self, descriptor: int, device: torch.device):
        self._descriptor, self._on_gpu = descriptor, device.type == "cuda"
        self._turns = self._take_turns(device)

    def _take_turns(self, device: torch.device) -> Iterator[tuple[Tensor, torch.cuda.Event | None]]:
        buffers = [torch.empty(CHUNK, dtype=torch.uint8, pin_memory=self._on_gpu) for _ in range(2)]
        events = [torch.cuda.Event() if self._on_gpu else None for _ in buffers]
        while True:
            yield from zip(buffers, events, strict=True)

    def copy(self, offset: int, target: Tensor) -> bytes:
        """Bring the file's bytes from `offset` on to `target`; their digest."""
        buffer, event = next(self._turns)
        if event is not None:
            event.synchronize()
        chunk = buffer[: len(target)]
        self._fill(chunk, offset)
        target.copy_(chunk, non_blocking=self._on_gpu)
        if event is not None:
            event.record()
        return hashlib.sha256(memoryview(chunk.numpy())).digest()

    def _fill(self, chunk: Tensor, offset: int) -> None:
        view, done = memoryview(chunk.numpy()), 0
        while done < len(view):
            count = os.preadv(self._descriptor, [view[done:]], offset + done)
            assert count > 0, "the file was truncated while it was read"
            done += count
