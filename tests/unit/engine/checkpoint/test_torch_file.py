from __future__ import annotations

import io
import random
import zipfile
from pathlib import Path

import pytest
import torch

from engine.checkpoint import torch_file
from engine.checkpoint.torch_file import TorchFile
from engine.errors import CheckpointError


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(6)
    base = torch.randn(9, 6, generator=generator)
    return {
        "float": base,
        "half": base.half(),
        "brain": base.bfloat16(),
        "transposed": base.t(),
        "view": base[2:5, 1:4],
        "parameter": torch.nn.Parameter(base.clone()),
        "scalar": torch.tensor(3.0),
        "no rows": torch.empty(0, 3),
        "no columns": torch.empty(3, 0),
    }


@pytest.mark.parametrize("budget", [2**28, 48, 1])
def test_reads_what_torch_wrote(tmp_path, tensors, monkeypatch, budget):
    torch.save(tensors, tmp_path / "x.bin")
    monkeypatch.setattr(torch_file, "MAX_MAPPED_BYTES", budget)
    file = TorchFile(tmp_path / "x.bin")
    assert set(file.tensors) == set(tensors)
    for name, expected in tensors.items():
        source = file.tensors[name]
        assert (source.shape, source.dtype) == (expected.shape, expected.dtype)
        loaded = source.read()
        assert torch.equal(loaded, expected)
        assert loaded.is_contiguous()
        assert not loaded.requires_grad
        if len(expected.shape) > 0 and len(expected) >= 3:
            assert torch.equal(source.rows(1, 3), expected[1:3])
    file.close()
    with pytest.raises(AssertionError, match="is closed"):
        file.tensors["float"].read()


def test_result_is_not_the_file(tmp_path, tensors):
    torch.save(tensors, tmp_path / "x.bin")
    file = TorchFile(tmp_path / "x.bin")
    file.tensors["float"].read().zero_()
    assert torch.equal(file.tensors["float"].read(), tensors["float"])


class Evil:
    """Unpickling it for real would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_code_is_never_run(tmp_path):
    torch.save({"a": torch.ones(2), "b": Evil(tmp_path / "owned")}, tmp_path / "x.bin")
    with pytest.raises(CheckpointError, match="needs the Python object .*; convert .* safetensors"):
        TorchFile(tmp_path / "x.bin")
    assert not (tmp_path / "owned").exists()


def deflated(values: object) -> bytes:
    stored, packed = io.BytesIO(), io.BytesIO()
    torch.save(values, stored)
    with zipfile.ZipFile(stored) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member))
    return packed.getvalue()


def test_refusals(tmp_path, tensors):
    path = tmp_path / "x.bin"

    def refused(message: str) -> None:
        with pytest.raises(CheckpointError, match=message) as caught:
            TorchFile(path)
        assert str(caught.value).startswith(str(path))
        assert "; " in str(caught.value)
        assert "\n" not in str(caught.value)

    refused("cannot be read .No such file")
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    refused("before torch 1.6, which cannot be read by slice; load it with torch.load")
    path.write_bytes(deflated(tensors))
    refused("is a compressed archive")
    torch.save({"model": tensors}, path)
    refused("entry 'model' is a dict and not a tensor; save the model's state_dict")
    torch.save([torch.ones(2)], path)
    refused("holds a list where a dict of tensors is needed")
    torch.save({3: torch.ones(2)}, path)
    refused("entry 3 is a Tensor")
    torch.save({"s": torch.eye(3).to_sparse()}, path)
    refused("tensor 's' is not a dense one .torch.sparse_coo")
    path.write_bytes(b"")
    refused("does not load as a torch file .BadZipFile: File is not a zip file")
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    refused("Git LFS pointer")
    torch.save(tensors, path)
    path.write_bytes(path.read_bytes()[:-100])
    refused("does not load as a torch file")


def test_file_replaced_while_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_file, "MAX_MAPPED_BYTES", 1)
    torch.save({"a": torch.ones(4, 2)}, tmp_path / "x.bin")
    file = TorchFile(tmp_path / "x.bin")
    torch.save({"a": torch.ones(4, 3)}, tmp_path / "y.bin")
    (tmp_path / "y.bin").replace(tmp_path / "x.bin")
    with pytest.raises(CheckpointError, match="tensor 'a' changed while the file was read"):
        file.tensors["a"].read()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damage_never_ends_in_a_traceback(tmp_path, tensors):
    """Seeded byte flips and cuts: a CheckpointError or a file that loads, nothing else."""
    path = tmp_path / "x.bin"
    torch.save(tensors, path)
    good, rng, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(200):
        data = bytearray(good)
        for _ in range(rng.choice((1, 3))):
            data[rng.choice((rng.randrange(2000), -1 - rng.randrange(1500)))] = rng.randrange(256)
        path.write_bytes(data if rng.random() < 0.9 else data[: rng.randrange(len(data))])
        try:
            file = TorchFile(path)
            for source in file.tensors.values():
                source.read()
        except CheckpointError as error:
            refused += 1
            assert str(path) in str(error)
    assert refused > 50
