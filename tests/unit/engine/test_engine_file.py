"""Rank files against the safetensors library and hashlib."""

from __future__ import annotations

import errno
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from engine import engine_file
from engine.engine_file import (
    CHUNK,
    ChunkDigest,
    FileRecord,
    RankWriter,
    map_tensors,
    rank_file_name,
    verify_file,
)
from engine.errors import EngineError, UserError

METADATA = {"format": "yi-engine", "rank": "0"}


@dataclass(frozen=True, eq=False)
class Stored:
    name: str
    data: torch.Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.data.shape)

    @property
    def nbytes(self) -> int:
        return self.data.nbytes


def samples() -> list[Stored]:
    """Every dtype an engine stores; sizes below, at and above a page."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4096, generator=generator)
    return [
        Stored("norm", values[:7]),
        Stored("exact", values[:2048].to(torch.float16).view(2, 1024)),
        Stored("page", values[:1024].view(32, 32)),
        Stored("bf16", values[:3003].to(torch.bfloat16).view(39, 77)),
        Stored("fp8", values[:130].to(torch.float8_e4m3fn).view(2, 65)),
        Stored("codes", (values[:99] * 40).to(torch.int8).view(3, 33)),
        Stored("nibbles", (values[:50].abs() * 40).to(torch.uint8)),
        Stored("index", (values[:9] * 1000).to(torch.int32)),
    ]


def write_file(path: Path, tensors: list[Stored], block_rows: int = 3) -> FileRecord:
    writer = RankWriter(path, tensors, METADATA)
    try:
        for tensor in tensors:
            writer.write(tensor, tensor.data.split(block_rows))
        return writer.close()
    except UserError:
        writer.abandon()
        raise


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[Path, FileRecord]:
    path = tmp_path_factory.mktemp("rank") / "yi.engine"
    return path, write_file(path, samples())


def test_safetensors_reads_the_file(written):
    path, _ = written
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == METADATA
        names = [name for name in file.keys() if not name.startswith("_pad.")]  # noqa: SIM118
        assert set(names) == {tensor.name for tensor in samples()}
        for tensor in samples():
            found = file.get_tensor(tensor.name)
            assert found.dtype == tensor.dtype
            assert torch.equal(found.view(torch.uint8), tensor.data.view(torch.uint8))


def test_tensors_start_on_pages(written):
    path, record = written
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for tensor in samples():
        begin, end = header[tensor.name]["data_offsets"]
        assert (8 + length + begin) % 4096 == 0
        assert end - begin == tensor.nbytes
    assert record.bytes == len(data)
    assert len(data) % 4096 == 0


def test_map_tensors_gives_equal_tensors(written):
    mapped = map_tensors(written[0])
    assert list(mapped) == [tensor.name for tensor in samples()]
    for tensor in samples():
        found = mapped[tensor.name]
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.data.shape)
        assert torch.equal(found.view(torch.uint8), tensor.data.view(torch.uint8))


def test_mapping_is_private(written):
    """Writing to a loaded tensor does not reach the file."""
    path, record = written
    map_tensors(path)["norm"].zero_()
    verify_file(path, record, threads=1)


@pytest.mark.parametrize("rows", [1, 2, 1000])
def test_blocks_do_not_change_the_file(written, tmp_path, rows):
    record = write_file(tmp_path / written[0].name, samples(), block_rows=rows)
    assert record == written[1]
    assert (tmp_path / record.name).read_bytes() == written[0].read_bytes()


def digest_by_hand(data: bytes, chunk: int) -> str:
    pieces = [data[start : start + chunk] for start in range(0, len(data), chunk)]
    return hashlib.sha256(b"".join(hashlib.sha256(p).digest() for p in pieces)).hexdigest()


@pytest.mark.parametrize("feed", [1, 7, 999, 1000, 1001, 5000])
@pytest.mark.parametrize("size", [0, 1, 999, 1000, 1001, 2000, 3500])
def test_chunk_digest(monkeypatch, size, feed):
    monkeypatch.setattr(engine_file, "CHUNK", 1000)
    data = torch.randint(0, 256, (size,), generator=torch.Generator().manual_seed(size))
    data = bytes(data.tolist())
    digest = ChunkDigest()
    for start in range(0, size, feed):
        digest.update(data[start : start + feed])
    assert digest.hexdigest() == digest_by_hand(data, 1000)


@pytest.mark.parametrize("size", [CHUNK - 1, CHUNK, CHUNK + 1])
def test_checksum_of_large_files(tmp_path, size):
    assert CHUNK == 16 * 1024 * 1024
    path = tmp_path / "large"
    data = bytes(range(251)) * (size // 251 + 1)
    path.write_bytes(data[:size])
    record = FileRecord("large", size, digest_by_hand(data[:size], 16 * 1024 * 1024))
    verify_file(path, record, threads=2)


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_sound_file_is_verified(written, threads, monkeypatch):
    path, record = written
    assert record.sha256 == digest_by_hand(path.read_bytes(), CHUNK)
    verify_file(path, record, threads)


def test_any_flipped_byte_is_refused(written, tmp_path):
    path, record = written
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    padding = 8 + length + header["_pad.0"]["data_offsets"][0]
    positions = [0, 7, 8, 8 + length - 1, 8 + length, padding, len(data) - 1]
    positions += range(1, len(data), 1777)
    damaged = tmp_path / path.name
    for position in positions:
        data[position] ^= 1
        damaged.write_bytes(data)
        with pytest.raises(EngineError, match=r"does not match the checksum in config\.json"):
            verify_file(damaged, record, threads=1)
        data[position] ^= 1


@pytest.mark.parametrize("change", [-1, -4096, -20000, 1])
def test_wrong_size_is_refused(written, tmp_path, change):
    path, record = written
    data = path.read_bytes() + b"\0"
    cut = tmp_path / path.name
    cut.write_bytes(data[: record.bytes + change])
    message = f"has {record.bytes + change} bytes but config.json records {record.bytes}"
    with pytest.raises(EngineError, match=message):
        verify_file(cut, record, threads=1)


def test_missing_file_is_refused(written, tmp_path):
    with pytest.raises(EngineError, match="yi.engine is missing; build the engine again"):
        verify_file(tmp_path / "yi.engine", written[1], threads=1)


def test_swapped_rank_files_are_refused(tmp_path):
    one = write_file(tmp_path / "one", [Stored("w", torch.zeros(8))])
    two = write_file(tmp_path / "two", [Stored("w", torch.ones(8))])
    assert one.bytes == two.bytes
    with pytest.raises(EngineError, match="does not match the checksum"):
        verify_file(tmp_path / "one", two, threads=1)


class PickyFile:
    """A raw file whose disk takes `step` bytes a call and is full after `room` bytes."""

    def __init__(self, path: Path, room: int, step: int):
        self._file, self._room, self._step = path.open("wb", buffering=0), room, step

    def write(self, view: memoryview) -> int:
        if self._room <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = self._file.write(view[: min(self._step, self._room)])
        self._room -= count
        return count

    def close(self) -> None:
        self._file.close()


@pytest.fixture
def picky_open(monkeypatch):
    """picky_open(room, step) makes every rank file a PickyFile from then on."""

    def install(room: int = 1 << 40, step: int = 1 << 30) -> None:
        monkeypatch.setattr(
            engine_file,
            "open",
            lambda path, *arguments, **keywords: PickyFile(path, room, step),
            raising=False,
        )

    return install


def test_short_writes_are_continued(written, tmp_path, picky_open):
    picky_open(step=1000)
    record = write_file(tmp_path / written[0].name, samples())
    assert record == written[1]
    assert (tmp_path / record.name).read_bytes() == written[0].read_bytes()


@pytest.mark.parametrize("room", [0, 100, 4096, 12000])
def test_full_disk_is_a_user_error(tmp_path, picky_open, room):
    picky_open(room=room)
    with pytest.raises(UserError, match="^writing .*yi.engine failed .No space left on device.*"):
        write_file(tmp_path / "yi.engine", samples())


def test_vanished_directory_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="^writing .* failed .No such file or directory"):
        write_file(tmp_path / "gone" / "yi.engine", samples())


@pytest.mark.parametrize(
    "blocks",
    [
        [torch.zeros(3)],
        [torch.zeros(4), torch.zeros(1)],
        [torch.zeros(4, dtype=torch.float64)],
        [torch.zeros(4, 2)[:, 0]],
    ],
    ids=["too few", "too many", "another dtype", "not contiguous"],
)
def test_blocks_must_be_the_planned_tensor(tmp_path, blocks):
    tensor = Stored("w", torch.zeros(4))
    writer = RankWriter(tmp_path / "yi.engine", [tensor], METADATA)
    with pytest.raises(AssertionError):
        writer.write(tensor, blocks)
    writer.abandon()


def test_tensors_come_in_order_and_all(tmp_path):
    first, second = Stored("a", torch.zeros(4)), Stored("b", torch.zeros(4))
    writer = RankWriter(tmp_path / "yi.engine", [first, second], METADATA)
    with pytest.raises(AssertionError, match="planned order"):
        writer.write(second, [second.data])
    writer.abandon()
    writer = RankWriter(tmp_path / "yi.engine", [first, second], METADATA)
    writer.write(first, [first.data])
    with pytest.raises(AssertionError, match="every planned tensor"):
        writer.close()


def test_names_are_unique(tmp_path):
    twins = [Stored("a", torch.zeros(4)), Stored("a", torch.zeros(4))]
    with pytest.raises(AssertionError, match="unique"):
        RankWriter(tmp_path / "yi.engine", twins, METADATA)


@pytest.mark.parametrize(
    "arguments, name",
    [
        (("bfloat16", 1, 1, 0), "yi_bfloat16_tp1_rank0.engine"),
        (("float16", 4, 1, 3), "yi_float16_tp4_rank3.engine"),
        (("float32", 2, 3, 5), "yi_float32_tp2_pp3_rank5.engine"),
    ],
)
def test_file_names(arguments, name):
    assert rank_file_name(*arguments) == name
