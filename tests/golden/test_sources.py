"""The same weights in another format give the same engine, byte for byte."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.golden.truth import TINY_YI

Tensors = dict[str, torch.Tensor]

FLAGS = ("--dtype", "bfloat16", "--tp_size", "2")
ORIGINAL_NAMES = {"input_layernorm": "ln1", "post_attention_layernorm": "ln2"}


def write_original_yi(folder: Path, tensors: Tensors, config: dict) -> None:
    """As 01-ai published Yi-6B first: its own class, and norms named by number."""
    for name, original in ORIGINAL_NAMES.items():
        tensors = {key.replace(name, original): value for key, value in tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    config |= {"architectures": ["YiForCausalLM"], "model_type": "Yi"}


def write_bin(folder: Path, tensors: Tensors, config: dict) -> None:
    torch.save(tensors, folder / "pytorch_model.bin")


def write_bin_shards(folder: Path, tensors: Tensors, config: dict) -> None:
    _write_shards(folder, tensors, "pytorch_model", "bin", torch.save)


def write_safetensors_shards(folder: Path, tensors: Tensors, config: dict) -> None:
    _write_shards(folder, tensors, "model", "safetensors", save_file)


def write_shards_without_index(folder: Path, tensors: Tensors, config: dict) -> None:
    write_safetensors_shards(folder, tensors, config)
    (folder / "model.safetensors.index.json").unlink()


def _write_shards(
    folder: Path, tensors: Tensors, stem: str, suffix: str, save: Callable[[Tensors, Path], None]
) -> None:
    names = sorted(tensors)
    files = {
        name: f"{stem}-0000{1 + place % 3}-of-00003.{suffix}" for place, name in enumerate(names)
    }
    for file in sorted(set(files.values())):
        save({name: tensors[name] for name in names if files[name] == file}, folder / file)
    index = {"metadata": {}, "weight_map": files}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    "write",
    [
        write_original_yi,
        write_bin,
        write_bin_shards,
        write_safetensors_shards,
        write_shards_without_index,
    ],
)
def test_engine_bytes(write, build, tmp_path):
    config = json.loads((TINY_YI / "config.json").read_text())
    write(tmp_path, load_file(TINY_YI / "model.safetensors"), config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    for path in TINY_YI.iterdir():
        if path.suffix in (".json", ".model") and path.name != "config.json":
            shutil.copy(path, tmp_path)
    expected, found = (_contents(build(source, *FLAGS)) for source in (TINY_YI, tmp_path))
    assert len([name for name in expected if name.endswith(".engine")]) == 2
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []


def _contents(engine_dir: Path) -> dict[str, object]:
    contents: dict[str, object] = {path.name: path.read_bytes() for path in engine_dir.iterdir()}
    config = json.loads(contents["config.json"])
    assert config["engine"].pop("source")
    return contents | {"config.json": config}
