from __future__ import annotations

import os
import random
import struct

import pytest
import torch
from safetensors.torch import save_file

from engine.checkpoint.hf import open_hf
from engine.errors import CheckpointError
from tests.unit.engine.checkpoint.makers import (
    split_state,
    tiny_model,
    tiny_state,
    write_folder,
    write_json,
)


def assert_same(folder, expected) -> None:
    """The folder opens, is whole, and holds `expected` under the names of transformers."""
    with open_hf(folder) as checkpoint:
        checkpoint.check()
        assert checkpoint.tensors.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(checkpoint.tensors[name].read(), tensor), name
            assert torch.equal(checkpoint.tensors[name].rows(1, 9), tensor[1:9]), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_single_file_written_by_transformers(tmp_path, dtype):
    model = tiny_model().to(dtype)
    model.save_pretrained(tmp_path)
    assert_same(tmp_path, model.state_dict())
    with open_hf(tmp_path) as checkpoint:
        assert checkpoint.dtype == dtype
        assert checkpoint.where == str(tmp_path)
        assert checkpoint.config.num_kv_heads == 2


def test_shards_written_by_transformers(tmp_path, state):
    tiny_model().save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same(tmp_path, state)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert_same(tmp_path, state)


def test_safetensors_under_other_names(tmp_path, state):
    write_folder(tmp_path, None)
    for part, tensors in enumerate(split_state(state, 2)):
        save_file(tensors, tmp_path / f"weights.{part}.safetensors")
    assert_same(tmp_path, state)


def test_bin_files(tmp_path, state):
    write_folder(tmp_path, None)
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert_same(tmp_path, state)
    (tmp_path / "pytorch_model.bin").unlink()
    names = [f"pytorch_model-0000{part}-of-00003.bin" for part in (1, 2, 3)]
    parts = split_state(state, 3)
    for name, tensors in zip(names, parts, strict=True):
        torch.save(tensors, tmp_path / name)
    assert_same(tmp_path, state)
    weight_map = {n: name for name, part in zip(names, parts, strict=True) for n in part}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    write_json(tmp_path / "pytorch_model.bin.index.json", index)
    assert_same(tmp_path, state)


def test_safetensors_win_over_bin(tmp_path, state):
    write_folder(tmp_path, state)
    torch.save(tiny_state(seed=9), tmp_path / "pytorch_model.bin")
    assert_same(tmp_path, state)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_tied_model(tmp_path, kind):
    model = tiny_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    if kind == "bin":
        (tmp_path / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert_same(tmp_path, model.state_dict())


@pytest.mark.parametrize(
    "names",
    [{"architectures": ["YiForCausalLM"], "model_type": "Yi"}, {}],
    ids=["Yi", "renamed to Llama"],
)
def test_norm_names_of_the_first_yi_repositories(tmp_path, state, names):
    old = {".input_layernorm.": ".ln1.", ".post_attention_layernorm.": ".ln2."}
    renamed = {}
    for name, tensor in state.items():
        for new_part, old_part in old.items():
            name = name.replace(new_part, old_part)
        renamed[name] = tensor
    assert sum(".ln1." in name for name in renamed) == 2
    write_folder(tmp_path, renamed, auto_map={"AutoModel": "modeling_yi.YiModel"}, **names)
    (tmp_path / "modeling_yi.py").write_text("raise SystemExit('was run')")
    assert_same(tmp_path, state)


def test_rotary_tables_are_dropped(tmp_path, state):
    tables = {
        f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in (0, 1)
    }
    write_folder(tmp_path, {**state, **tables})
    assert_same(tmp_path, state)
    with open_hf(tmp_path) as checkpoint:
        assert set(checkpoint.dropped) == set(tables)


def test_generation_defaults(tmp_path, state):
    write_folder(tmp_path, state, bos_token_id=1, eos_token_id=2, pad_token_id=None)
    with open_hf(tmp_path) as checkpoint:
        assert checkpoint.generation == {"bos_token_id": 1, "eos_token_id": 2}
    own = {"eos_token_id": [2, 7], "top_p": 0.8, "do_sample": True, "temperature": None, "x": 1}
    write_json(tmp_path / "generation_config.json", own)
    with open_hf(tmp_path) as checkpoint:
        assert checkpoint.generation == {
            "bos_token_id": 1,
            "eos_token_id": [2, 7],
            "top_p": 0.8,
            "do_sample": True,
        }
    write_json(tmp_path / "generation_config.json", {"eos_token_id": "</s>"})
    with pytest.raises(CheckpointError, match="generation_config.json: eos_token_id '</s>' is"):
        open_hf(tmp_path)
    write_folder(tmp_path, state, bos_token_id=[True])
    (tmp_path / "generation_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"/config.json: bos_token_id \[True\]"):
        open_hf(tmp_path)


def test_undeclared_quantised_weights_are_refused(tmp_path, state):
    write_folder(tmp_path, state, quantization_config=None)
    assert_same(tmp_path, state)
    stem = "model.layers.0.self_attn.q_proj."
    for suffix in ("qweight", "weight_packed", "weight_scale", "weight_scale_inv"):
        write_folder(tmp_path, {**state, stem + suffix: torch.ones(2)})
        with pytest.raises(CheckpointError, match=f"already quantised, as tensor {stem + suffix}"):
            open_hf(tmp_path)


def test_unknown_quantisation_methods_are_refused(tmp_path, state):
    write_folder(tmp_path, state, quantization_config={"quant_method": "hqq", "bits": 4})
    with pytest.raises(CheckpointError, match="quant_method 'hqq' is not supported"):
        open_hf(tmp_path)


def test_both_names_of_one_norm(tmp_path, state):
    write_folder(tmp_path, {**state, "model.layers.0.ln1.weight": torch.ones(32)})
    with pytest.raises(CheckpointError, match="ln1.weight' .* are the same weight .*; remove"):
        open_hf(tmp_path)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "config.json: is not valid JSON"),
        ("[]", "config.json: holds a JSON list where an object is needed"),
        ('{"vocab_size": 1, "vocab_size": 2}', "key 'vocab_size' appears twice"),
        ("\xff\xfe", "config.json: is not valid JSON"),
    ],
)
def test_damaged_config(tmp_path, state, text, message):
    write_folder(tmp_path, state)
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=message):
        open_hf(tmp_path)


def test_a_failed_open_closes_its_files(tmp_path, state):
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc")
    write_folder(tmp_path, {**state, "model.layers.0.self_attn.q_proj.qweight": torch.ones(2)})
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(CheckpointError):
        open_hf(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_opening_and_checking_reads_no_weights(tmp_path, state, monkeypatch):
    write_folder(tmp_path, state)
    path = tmp_path / "model.safetensors"
    (header_bytes,) = struct.unpack("<Q", path.read_bytes()[:8])
    end, preadv = [], os.preadv

    def watched(descriptor, views, offset):
        end.append(offset + sum(len(view) for view in views))
        return preadv(descriptor, views, offset)

    monkeypatch.setattr(os, "preadv", watched)
    with open_hf(tmp_path) as checkpoint:
        checkpoint.check()
    assert max(end) == 8 + header_bytes


def test_header_damage_is_refused_or_harmless(tmp_path):
    """Seeded byte flips and cuts in the header: a CheckpointError or the right weights."""
    truth = tiny_state(num_hidden_layers=1)
    write_folder(tmp_path, truth, num_hidden_layers=1)
    path = tmp_path / "model.safetensors"
    good, rng, refused = path.read_bytes(), random.Random(3), 0
    data_start = 8 + struct.unpack("<Q", good[:8])[0]
    for _ in range(400):
        data = bytearray(good)
        data[rng.randrange(data_start)] = rng.choice((rng.randrange(256), rng.choice(b'019"}:,F')))
        path.write_bytes(data if rng.random() < 0.9 else data[: rng.randrange(len(data))])
        try:
            assert_same(tmp_path, truth)
        except CheckpointError as error:
            refused += 1
            assert str(path) in str(error) or str(tmp_path) in str(error)
            assert "\n" not in str(error)
    assert refused > 300
