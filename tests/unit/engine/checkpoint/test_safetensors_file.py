from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import save_file

from engine.checkpoint.safetensors_file import SafetensorsFile
from engine.errors import CheckpointError
from tests.unit.engine.checkpoint.makers import header_file

F32 = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    wide = torch.randn(7, 5, 3, generator=generator)
    floats = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)
    ints = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    made = {str(dtype): wide.to(dtype) for dtype in floats}
    made |= {str(dtype): (wide * 10).to(torch.int8).to(dtype) for dtype in ints}
    return made | {
        "bool": wide > 0,
        "scalar": torch.tensor(2.5),
        "no rows": torch.empty(0, 4),
        "no columns": torch.empty(4, 0),
        "vector": wide.flatten().clone(),
    }


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def test_reads_what_the_library_wrote(tmp_path, tensors):
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert set(file.tensors) == set(tensors)
    assert file.metadata == {"format": "pt"}
    for name, expected in tensors.items():
        source = file.tensors[name]
        assert (source.name, source.shape, source.dtype) == (name, expected.shape, expected.dtype)
        assert source.origin == str(tmp_path / "x.safetensors")
        assert source.num_bytes == expected.nbytes
        loaded = source.read()
        assert (loaded.shape, loaded.dtype) == (expected.shape, expected.dtype)
        assert torch.equal(bits(loaded), bits(expected)), name
    file.close()


@pytest.mark.parametrize("start, stop", [(0, 7), (0, 1), (2, 5), (6, 7), (3, 3), (4, None)])
def test_rows_are_the_slice_and_read_no_other_byte(tmp_path, tensors, monkeypatch, start, stop):
    save_file(tensors, tmp_path / "x.safetensors")
    file = SafetensorsFile(tmp_path / "x.safetensors")
    counts, preadv = [], os.preadv

    def counted(*args):
        counts.append(preadv(*args))
        return counts[-1]

    monkeypatch.setattr(os, "preadv", counted)
    expected = tensors["torch.bfloat16"][start:stop]
    rows = file.tensors["torch.bfloat16"].rows(start, stop)
    assert torch.equal(rows, expected)
    assert rows.is_contiguous()
    assert sum(counts) == expected.nbytes


def test_short_reads_are_continued(tmp_path, tensors, monkeypatch):
    save_file(tensors, tmp_path / "x.safetensors")
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][:7]], at))
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert torch.equal(file.tensors["torch.float32"].rows(1, 6), tensors["torch.float32"][1:6])


def test_a_file_that_shrinks_while_it_is_read(tmp_path, tensors):
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    file = SafetensorsFile(path)
    last = max(file.tensors.values(), key=lambda source: source.offset)
    os.truncate(path, last.offset + 1)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        last.read()


def test_hand_written_file(tmp_path):
    data = bytes([0, 0, 128, 63, 0, 0, 0, 64])  # 1.0 and 2.0, little-endian
    header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}   '
    file = SafetensorsFile(header_file(tmp_path / "x.safetensors", header, data))
    assert file.tensors["a"].read().tolist() == [1.0, 2.0]


BROKEN = {
    "truncated": ({"a": F32}, 20, "is truncated: it holds 20 bytes .* header describes 24"),
    "trailing": ({"a": F32}, 25, "has bytes of no tensor: it holds 25 bytes .* describes 24"),
    "hole": (
        {"a": F32, "b": {"dtype": "U8", "shape": [1], "data_offsets": [25, 26]}},
        26,
        "starts tensor 'b' at byte 25 of the data where byte 24 follows",
    ),
    "overlap": (
        {"a": F32, "b": {"dtype": "U8", "shape": [4], "data_offsets": [20, 24]}},
        24,
        "starts tensor 'b' at byte 20",
    ),
    "size": (
        {"a": {**F32, "shape": [2, 2]}},
        24,
        r"gives tensor 'a' 24 bytes but F32 of shape \[2, 2\] takes 16",
    ),
    "dtype": ({"a": {**F32, "dtype": "F4"}}, 24, "has dtype 'F4', which is not one of F64, F32"),
    "dtype kind": ({"a": {**F32, "dtype": ["F32"]}}, 24, "has dtype"),
    "negative": ({"a": {**F32, "shape": [-2, -3]}}, 24, r"the shape \[-2, -3\]"),
    "fraction": ({"a": {**F32, "shape": [2.0, 3]}}, 24, r"the shape \[2.0, 3\]"),
    "bool": ({"a": {**F32, "shape": [True, 6]}}, 24, "the shape"),
    "offsets": ({"a": {**F32, "data_offsets": [0]}}, 24, r"the data_offsets \[0\]"),
    "backwards": ({"a": {**F32, "data_offsets": [24, 0]}}, 24, "-24 bytes"),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 24]}}, 24, "without dtype, shape"),
    "not an entry": ({"a": 3}, 24, "describes tensor 'a' without"),
    "metadata": ({"a": F32, "__metadata__": {"x": 1}}, 24, "__metadata__"),
    "array": (b"[1]", 0, "does not start with '{'"),
    "json": (b'{"a": ', 0, r"\(header\): is not valid JSON"),
    "duplicate": (b'{"a": 1, "a": 2}', 0, "key 'a' appears twice"),
    "utf-8": (b'{"\xff": 1}', 0, "not UTF-8"),
    "deep": (b'{"a": ' + b"[" * 100_000, 0, "is not valid JSON"),
    "long number": (b'{"a": ' + b"9" * 10_000 + b"}", 0, "is not valid JSON"),
}


@pytest.mark.parametrize("header, data_bytes, message", BROKEN.values(), ids=BROKEN)
def test_damage_is_one_sentence_with_the_file(tmp_path, header, data_bytes, message):
    path = header_file(tmp_path / "x.safetensors", header, bytes(data_bytes))
    with pytest.raises(CheckpointError, match=message) as caught:
        SafetensorsFile(path)
    assert str(caught.value).startswith(str(path))
    assert "; " in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [27, 2**40, 2**64 - 1])
def test_header_longer_than_the_file(tmp_path, length):
    path = header_file(tmp_path / "x.safetensors", b"{}" + b" " * 24, length=length)
    with pytest.raises(CheckpointError, match=f"a header of {length} bytes but .* has 34 bytes"):
        SafetensorsFile(path)


def test_files_that_are_no_safetensors(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(CheckpointError, match="cannot be read .No such file"):
        SafetensorsFile(path)
    path.write_bytes(b"abc")
    with pytest.raises(CheckpointError, match="has 3 bytes, fewer than the 8 of a header"):
        SafetensorsFile(path)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(CheckpointError, match="Git LFS pointer .*; run 'git lfs pull'"):
        SafetensorsFile(path)
    with pytest.raises(CheckpointError, match="cannot be read .Is a directory"):
        SafetensorsFile(tmp_path)


def test_descriptors_are_closed(tmp_path, tensors):
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc")
    before = len(os.listdir("/proc/self/fd"))
    file = SafetensorsFile(path)
    file.close()
    file.close()
    path.write_bytes(b"\x02" + bytes(7) + b"[]")
    with pytest.raises(CheckpointError):
        SafetensorsFile(path)
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(AssertionError, match="is closed"):
        file.tensors["vector"].read()
