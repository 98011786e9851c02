from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from engine.checkpoint.hf import open_hf
from engine.errors import CheckpointError
from tests.unit.engine.checkpoint.makers import split_state, write_folder, write_json

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path, state):
    """A whole checkpoint of two shards and an index."""
    write_folder(tmp_path, None)
    weight_map = {}
    for name, tensors in zip(SHARDS, split_state(state, 2), strict=True):
        save_file(tensors, tmp_path / name)
        weight_map |= dict.fromkeys(tensors, name)
    write_json(tmp_path / INDEX, {"metadata": {"total_size": 1}, "weight_map": weight_map})
    return tmp_path


@pytest.fixture
def weight_map(folder, state):
    return {n: name for name, part in zip(SHARDS, split_state(state, 2), strict=True) for n in part}


def refused(folder, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        open_hf(folder)
    assert str(folder) in str(caught.value)
    assert "; " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_whole_checkpoint_is_accepted(folder):
    with open_hf(folder) as checkpoint:
        checkpoint.check()


def test_index_names_a_missing_shard(folder):
    (folder / SHARDS[1]).unlink()
    refused(folder, f"{INDEX}: names {SHARDS[1]}, which is not in .*; download the missing file")


@pytest.mark.parametrize("name", ["model-00003-of-00003.safetensors", "model.safetensors"])
def test_weight_file_that_the_index_does_not_name(folder, state, name):
    save_file(state, folder / name)
    refused(folder, f"{name}: is a weight file but {INDEX} does not name it; remove")


def test_single_file_beside_shards_without_index(folder, state):
    (folder / INDEX).unlink()
    save_file(state, folder / "model.safetensors")
    refused(folder, f"{SHARDS[0]}: is a weight file but so is model.safetensors; remove")


def test_tensor_in_two_shards(folder, state):
    tensors = split_state(state, 2)[1]
    save_file({**tensors, "lm_head.weight": state["lm_head.weight"]}, folder / SHARDS[1])
    save_file(state, folder / SHARDS[0])
    refused(folder, f"{SHARDS[1]}: tensor '.*' is also in .*{SHARDS[0]}; remove")


def test_tensor_of_the_index_that_no_shard_holds(folder, weight_map):
    write_json(folder / INDEX, {"weight_map": {**weight_map, "model.more": SHARDS[0]}})
    refused(folder, f"{INDEX}: places tensor 'model.more' in {SHARDS[0]}, which does not hold it")


def test_tensor_in_another_shard_than_the_index_says(folder, weight_map):
    name = next(iter(weight_map))
    write_json(folder / INDEX, {"weight_map": {**weight_map, name: SHARDS[1]}})
    refused(folder, f"places tensor '{name}' in {SHARDS[1]} but it is in .*{SHARDS[0]}; download")


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": [1]}])
def test_index_without_a_map(folder, index):
    write_json(folder / INDEX, index)
    refused(folder, f"{INDEX}: has no weight_map")


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "..", "", 5, None])
def test_index_may_name_plain_files_only(folder, shard):
    write_json(folder / INDEX, {"weight_map": {"a": shard}})
    refused(folder, f"{INDEX}: names .*; download")


def test_shards_without_index_must_be_complete(folder):
    (folder / INDEX).unlink()
    (folder / SHARDS[0]).unlink()
    refused(folder, "holds 1 of 2 weight shards, number 1 is missing; download")


def test_shards_of_two_checkpoints_without_index(folder, state):
    (folder / INDEX).unlink()
    save_file(state, folder / "model-00003-of-00003.safetensors")
    refused(folder, r"holds shards of two checkpoints \(of 2 and of 3 files\); remove")


def test_no_weights_at_all(tmp_path):
    write_folder(tmp_path, None)
    refused(tmp_path, r"holds no weights \(model.safetensors, pytorch_model.bin or shards")


def test_damaged_shard_is_named(folder):
    path = folder / SHARDS[1]
    path.write_bytes(path.read_bytes()[:-1])
    refused(folder, f"{SHARDS[1]}: is truncated")


def test_bin_shards_are_cross_checked_as_well(tmp_path, state):
    write_folder(tmp_path, None)
    torch.save(state, tmp_path / "pytorch_model.bin")
    write_json(
        tmp_path / "pytorch_model.bin.index.json", {"weight_map": {"x": "pytorch_model.bin"}}
    )
    refused(tmp_path, "places tensor 'x' in pytorch_model.bin, which does not hold it")
