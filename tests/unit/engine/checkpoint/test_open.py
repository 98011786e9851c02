from __future__ import annotations

import pytest
import torch

from engine.checkpoint.open import open_checkpoint
from engine.errors import CheckpointError, UserError
from tests.unit.engine.checkpoint.makers import write_folder, write_json


def test_opens_and_checks_a_hf_directory(tmp_path, state):
    write_folder(tmp_path, state)
    with open_checkpoint(str(tmp_path)) as checkpoint:
        name = "model.layers.1.mlp.up_proj.weight"
        assert torch.equal(checkpoint.tensors[name].read(), state[name])


def test_an_incomplete_checkpoint_does_not_open(tmp_path, state):
    write_folder(tmp_path, {n: t for n, t in state.items() if n != "model.norm.weight"})
    with pytest.raises(CheckpointError, match="tensor model.norm.weight is missing"):
        open_checkpoint(str(tmp_path))


def test_one_directory_has_the_weights():
    with pytest.raises(UserError, match="^no checkpoint is given; name one as --model_dir$"):
        open_checkpoint()
    with pytest.raises(UserError, match="^--model_dir a and --meta_ckpt_dir b are both given"):
        open_checkpoint("a", "b")


@pytest.mark.parametrize("flag", ["model_dir", "meta_ckpt_dir"])
def test_paths_that_are_no_directories(tmp_path, flag):
    with pytest.raises(CheckpointError, match=f"--{flag} .*absent does not exist; give"):
        open_checkpoint(**{flag: str(tmp_path / "absent")})
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=f"--{flag} .*file is a file; give the directory"):
        open_checkpoint(**{flag: str(tmp_path / "file")})


@pytest.mark.parametrize(
    "file, message",
    [
        ("params.json", "is a checkpoint in Meta's format; pass it as --meta_ckpt_dir"),
        ("config.ini", "hf_yi_convert.py; pass it as --ft_model_dir"),
        ("2-gpu/config.ini", "is the output of hf_yi_convert.py; pass"),
        ("yi.gguf", "GGUF"),
        ("model.safetensors", "has no config.json; give a Hugging Face checkpoint directory"),
    ],
)
def test_other_directories_are_recognised(tmp_path, file, message):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("{}")
    with pytest.raises(CheckpointError, match=f"--model_dir {tmp_path} .*{message}"):
        open_checkpoint(str(tmp_path))


def test_meta_flag_with_other_directories(tmp_path, state):
    with pytest.raises(CheckpointError, match="--meta_ckpt_dir .* no params.json, .*; correct it"):
        open_checkpoint(meta_ckpt_dir=str(tmp_path))
    write_folder(tmp_path, state)
    with pytest.raises(CheckpointError, match="--meta_ckpt_dir .*; pass it as --model_dir"):
        open_checkpoint(meta_ckpt_dir=str(tmp_path))
    write_json(tmp_path / "params.json", {})
    with pytest.raises(CheckpointError, match="holds no consolidated.00.pth"):
        open_checkpoint(meta_ckpt_dir=str(tmp_path))
