"""Writing and reading an engine directory: streamed, checksummed, whole or not there.

A rank file is a safetensors container (8-byte little-endian header length, JSON header, data;
github.com/huggingface/safetensors) whose tensors start on 4 KiB boundaries, so that any of them
can be mapped or read directly. Padding is tensors named `_pad.N`, since the format has no holes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from engine.errors import EngineError, UserError

SCHEMA_VERSION = 1
CONFIG_NAME = "config.json"
ALIGNMENT = 4096
# The checksum is a SHA-256 over the SHA-256 digests of consecutive chunks of this size: chunks can
# be verified by several threads at once.
CHUNK = 16 << 20

_DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.int32: "I32",
}
_DTYPES_BY_NAME = {name: dtype for dtype, name in _DTYPES.items()}


class StoredTensor(Protocol):
    """What a writer needs to know of a tensor before its bytes come."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int


class FileRecord(NamedTuple):
    """A rank file as config.json lists it."""

    name: str
    bytes: int
    sha256: str


def rank_file_name(dtype: str, tp: int, pp: int, rank: int) -> str:
    """The seed's naming: the pipeline part appears only when there is one."""
    stage = f"_pp{pp}" if pp > 1 else ""
    return f"yi_{dtype}_tp{tp}{stage}_rank{rank}.engine"


class RankWriter:
    """Writes one rank file; tensors come in the order given to the constructor.

    Hashing and writing run in a thread of their own, so that they overlap with reading and
    converting the next block; at most a few blocks wait in between. `alignment` 1 leaves no gaps.
    """

    def __init__(
        self,
        path: Path,
        tensors: Sequence[StoredTensor],
        metadata: dict[str, str],
        *,
        alignment: int = ALIGNMENT,
    ):
        self._path = path
        self._header, self._gaps = _make_header(tensors, metadata, alignment)
        self._order = iter(tensors)
        self._queue: Queue[bytes | memoryview | None] = Queue(maxsize=4)
        self._failure: BaseException | None = None
        self._digest = ChunkDigest()
        self._bytes = 0
        self._thread = threading.Thread(target=self._drain, name=f"write {path.name}", daemon=True)
        self._thread.start()
        self._put(self._header)

    def write(self, tensor: StoredTensor, blocks: Iterable[Tensor]) -> None:
        """Append one tensor; `blocks` are its contiguous row blocks in order."""
        assert next(self._order) is tensor, "tensors come in the planned order"
        written = 0
        for block in blocks:
            assert block.dtype == tensor.dtype and block.is_contiguous()
            self._put(memoryview(block.reshape(-1).view(torch.uint8).numpy()))
            written += block.nbytes
        assert written == tensor.nbytes, (tensor.name, written, tensor.nbytes)
        self._put(bytes(self._gaps[tensor.name]))

    def close(self) -> FileRecord:
        """Wait until everything is on disk; returns the record for config.json."""
        self._put(None)
        self._thread.join()
        self._raise_failure()
        assert next(self._order, None) is None, "every planned tensor was written"
        return FileRecord(self._path.name, self._bytes, self._digest.hexdigest())

    def abandon(self) -> None:
        """Stop the thread after a failure elsewhere; the staging directory removes the file."""
        self._failure = self._failure or KeyboardInterrupt()
        self._queue.put(None)
        self._thread.join()

    def _put(self, data: bytes | memoryview | None) -> None:
        self._raise_failure()
        self._queue.put(data)

    def _raise_failure(self) -> None:
        if isinstance(self._failure, OSError):
            raise write_error(self._path, self._failure) from None
        if self._failure is not None:
            raise self._failure

    def _drain(self) -> None:
        # A failed thread goes on emptying the queue, so that the feeding side never blocks.
        try:
            file = open(self._path, "wb", buffering=0)  # noqa: SIM115 - closed below
        except OSError as error:
            self._failure, file = error, None
        while (data := self._queue.get()) is not None:
            if self._failure is None:
                try:
                    _write_all(file, memoryview(data))
                    self._digest.update(data)
                    self._bytes += len(data)
                except BaseException as error:
                    self._failure = error
        if file is not None:
            file.close()


class ChunkDigest:
    """SHA-256 over the SHA-256 digests of consecutive `CHUNK`-sized pieces of a byte stream."""

    def __init__(self) -> None:
        self._digests: list[bytes] = []
        self._chunk = hashlib.sha256()
        self._room = CHUNK

    def update(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while len(view):
            piece = view[: self._room]
            self._chunk.update(piece)
            self._room -= len(piece)
            view = view[len(piece) :]
            if not self._room:
                self._digests.append(self._chunk.digest())
                self._chunk, self._room = hashlib.sha256(), CHUNK

    def hexdigest(self) -> str:
        last = [self._chunk.digest()] if self._room < CHUNK else []
        return combine_digests([*self._digests, *last])


def combine_digests(digests: Iterable[bytes]) -> str:
    return hashlib.sha256(b"".join(digests)).hexdigest()


class EngineWriter:
    """Builds an engine directory aside and moves it into place in one go.

    Use as a context manager: without `commit`, nothing of the new engine remains and an engine
    that was there before is untouched.
    """

    def __init__(self, output_dir: Path, flag: str = "--output_dir"):
        self.output_dir, self._flag = output_dir, flag
        self._created = False
        self.staging = output_dir / f".building-{os.getpid()}"

    def __enter__(self) -> EngineWriter:
        try:
            self._created = not self.output_dir.exists()
            self.output_dir.mkdir(parents=True, exist_ok=True)
            remove_abandoned(self.output_dir)
            self.staging.mkdir()
        except OSError as error:
            raise UserError(
                f"{self._flag} {self.output_dir} cannot be written ({error.strerror}); "
                "choose a directory you may write to"
            ) from None
        except KeyboardInterrupt:
            # There is no block yet whose end would clean up.
            shutil.rmtree(self.staging, ignore_errors=True)
            raise
        return self

    def __exit__(self, *failure: object) -> None:
        shutil.rmtree(self.staging, ignore_errors=True)
        if self._created and failure[0] is not None and not any(self.output_dir.iterdir()):
            self.output_dir.rmdir()

    def require_space(self, needed: int) -> None:
        """Raise UserError unless the file system has room for `needed` bytes."""
        free = shutil.disk_usage(self.staging).free
        if free < needed:
            raise UserError(
                f"{self._flag} {self.output_dir} has {free / 1e9:.2f} GB free and the engine needs "
                f"{needed / 1e9:.2f} GB; free some space or choose another directory"
            )

    def commit(self, config: dict[str, Any], companions: Iterable[Path] = ()) -> None:
        """Move every staged file into place, config.json last, and drop the old engine's files.

        `companions` are copied along under their own names.
        """
        old = _listed_files(self.output_dir)
        try:
            for path in companions:
                shutil.copyfile(path, self.staging / path.name)
            (self.staging / CONFIG_NAME).write_text(dump_json(config))
            # Between these moves the old config.json does not match the new files, so a reader
            # refuses the directory instead of running half of each.
            staged = sorted(path.name for path in self.staging.iterdir())
            for name in sorted(staged, key=lambda name: name == CONFIG_NAME):
                os.replace(self.staging / name, self.output_dir / name)
        except OSError as error:
            raise write_error(self.output_dir, error, self._flag) from None
        for name in old - set(staged):
            (self.output_dir / name).unlink(missing_ok=True)


def read_config(engine_dir: Path) -> dict[str, Any]:
    """The `config.json` of an engine directory; EngineError unless it is one of this version."""
    path = engine_dir / CONFIG_NAME
    if not engine_dir.is_dir():
        raise EngineError(
            f"--engine_dir {engine_dir} does not exist; give the --output_dir of a build.py run"
        )
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise EngineError(
            f"--engine_dir {engine_dir} holds no {CONFIG_NAME}, so it is no engine (or its build "
            "was interrupted); build it with build.py"
        ) from None
    except (OSError, ValueError) as error:
        raise EngineError(f"{path} cannot be read ({error}); build the engine again") from None
    if not isinstance(config, dict) or not isinstance(config.get("engine"), dict):
        raise EngineError(
            f"{path} has no 'engine' section: it was not written by this build.py; give the "
            "--output_dir of a build.py run"
        )
    version = config["engine"].get("schema_version")
    if version != SCHEMA_VERSION:
        raise EngineError(
            f"{path} has engine schema version {version!r} and this program reads version "
            f"{SCHEMA_VERSION}; build the engine again with this version's build.py"
        )
    return config


def verify_file(path: Path, record: FileRecord, threads: int) -> None:
    """Raise EngineError unless the file has the recorded size and checksum."""
    check_size(path, record)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with ThreadPoolExecutor(max(1, threads)) as pool:
            offsets = range(0, record.bytes, CHUNK)
            digests = list(pool.map(lambda offset: _chunk_digest(descriptor, offset), offsets))
    finally:
        os.close(descriptor)
    check_digests(path, record, digests)


def check_size(path: Path, record: FileRecord) -> None:
    try:
        size = path.stat().st_size
    except OSError:
        raise EngineError(f"{path} is missing; build the engine again") from None
    if size != record.bytes:
        raise EngineError(
            f"{path} has {size} bytes but config.json records {record.bytes}: the file is "
            "truncated or from another build; build the engine again"
        )


def check_digests(path: Path, record: FileRecord, digests: Iterable[bytes]) -> None:
    """`digests` are those of the file's chunks, in order."""
    if combine_digests(digests) != record.sha256:
        raise EngineError(
            f"{path} does not match the checksum in config.json: the file is damaged or from "
            "another build; build the engine again"
        )


def map_tensors(path: Path) -> dict[str, Tensor]:
    """Name → tensor over a private mapping of the file (CPU); pages are read when touched."""
    storage = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=path.stat().st_size)
    return view_tensors(path, storage)


def view_tensors(path: Path, storage: torch.UntypedStorage) -> dict[str, Tensor]:
    """Name → tensor over `storage`, which holds the bytes of the whole file, on any device."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__" or name.startswith("_pad."):
            continue
        dtype = _DTYPES_BY_NAME[entry["dtype"]]
        offset = (8 + length + entry["data_offsets"][0]) // dtype.itemsize
        tensors[name] = torch.empty(0, dtype=dtype, device=storage.device).set_(
            storage, offset, entry["shape"], _strides(entry["shape"])
        )
    return tensors


def dump_json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def write_error(path: Path, error: OSError, flag: str = "--output_dir") -> UserError:
    """The sentence for a failed write: disk full, quota, permission; `flag` named the folder."""
    return UserError(
        f"writing {path} failed ({error.strerror or error}); nothing was replaced: free some "
        f"space or choose another {flag}"
    )


def _make_header(
    tensors: Sequence[StoredTensor], metadata: dict[str, str], alignment: int
) -> tuple[bytes, dict[str, int]]:
    """Header bytes (padded to a page) and the padding that follows each tensor."""
    entries: dict[str, Any] = {"__metadata__": metadata}
    gaps: dict[str, int] = {}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.nbytes
        entries[tensor.name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        gap = -end % alignment
        if gap:
            name = f"_pad.{len(gaps)}"
            entries[name] = {"dtype": "U8", "shape": [gap], "data_offsets": [end, end + gap]}
        gaps[tensor.name] = gap
        offset = end + gap
    assert len(gaps) == len(tensors), "tensor names are unique"
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, gaps


def _write_all(file: Any, view: memoryview) -> None:
    while len(view):
        view = view[file.write(view) :]


def _chunk_digest(descriptor: int, offset: int) -> bytes:
    digest = hashlib.sha256()
    end = offset + CHUNK
    while offset < end and (data := os.pread(descriptor, min(1 << 20, end - offset), offset)):
        digest.update(data)
        offset += len(data)
    return digest.digest()


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides[: len(shape)]))


def _listed_files(output_dir: Path) -> set[str]:
    """Rank files that an engine already in the directory lists; foreign files are never touched."""
    try:
        files = read_config(output_dir)["engine"]["files"]
        return {Path(entry["name"]).name for entry in files}
    except (EngineError, KeyError, TypeError):
        return set()


def remove_abandoned(output_dir: Path) -> None:
    """Delete staging directories of builds that were killed."""
    for path in output_dir.glob(".building-*"):
        pid = path.name.rpartition("-")[2]
        # In a container every build may have the same number, so one's own is a leftover too.
        if pid.isdigit() and (int(pid) == os.getpid() or not _is_running(int(pid))):
            shutil.rmtree(path, ignore_errors=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (OSError, OverflowError) as error:
        return isinstance(error, PermissionError)
    return True
