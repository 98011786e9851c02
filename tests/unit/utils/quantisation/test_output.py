from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from engine.errors import UserError
from utils.quantisation.output import PlannedTensor, SafetensorsWriter, write_file, write_folder


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "x.npz"
    with write_file(path) as draft:
        draft.write_text("first")
        assert not path.exists()
    assert path.read_text() == "first"
    with pytest.raises(KeyboardInterrupt), write_file(path) as draft:
        draft.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new"
    with pytest.raises(KeyboardInterrupt), write_folder(path) as draft:
        (draft / "config.json").write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    path.mkdir()
    with write_folder(path) as draft:
        (draft / "config.json").write_text("whole")
    assert [file.name for file in path.iterdir()] == ["config.json"]
    with (
        pytest.raises(UserError, match="writing .*new failed .*; nothing was replaced: free some"),
        write_folder(path) as draft,
    ):
        (draft / "config.json").write_text("other")
    assert (path / "config.json").read_text() == "whole"


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match="choose another --export_path"),
        write_file(tmp_path / "file" / "x.npz"),
    ):
        raise AssertionError("not reached")


def test_tensors_one_by_one_as_safetensors_reads_them(tmp_path):
    tensors = {
        "a": torch.arange(6, dtype=torch.int32).reshape(2, 3),
        "b.c": torch.tensor([0.5, -2.0], dtype=torch.float16),
        "d": torch.arange(6, dtype=torch.int32).reshape(2, 3).T,
    }
    plan = [PlannedTensor(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]
    with SafetensorsWriter(tmp_path / "x.safetensors", plan) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_a_plan_is_kept(tmp_path):
    plan = [PlannedTensor("a", torch.int32, (2,))]
    with pytest.raises(AssertionError), SafetensorsWriter(tmp_path / "x", plan):
        pass
    with (
        pytest.raises(AssertionError, match="b"),
        SafetensorsWriter(tmp_path / "x", plan) as writer,
    ):
        writer.write("b", torch.zeros(2, dtype=torch.int32))
