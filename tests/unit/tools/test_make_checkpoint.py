"""tools/make_checkpoint.py: what it writes, read back by safetensors and transformers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig

from tools import make_checkpoint

# Runs the tool and prints the growth of the peak resident set over the imports, in bytes.
MEASURED = """
import json, resource, runpy, sys
import torch
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
module = runpy.run_path(sys.argv[1])
torch.empty(1).normal_()
before = peak()
status = module["main"](sys.argv[2:])
print(json.dumps({"status": status, "grown": peak() - before}))
"""


def make(out: Path, *arguments: object) -> Path:
    assert make_checkpoint.main(["--out", str(out), *map(str, arguments)]) == 0
    return out


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("tiny") / "new", "--preset", "tiny")


def test_tiny_has_the_tensors_of_a_llama_model(tiny):
    tensors = read_all(tiny)
    layer = {
        "self_attn.q_proj": [256, 256],
        "self_attn.k_proj": [128, 256],
        "self_attn.v_proj": [128, 256],
        "self_attn.o_proj": [256, 256],
        "mlp.gate_proj": [768, 256],
        "mlp.up_proj": [768, 256],
        "mlp.down_proj": [256, 768],
        "input_layernorm": [256],
        "post_attention_layernorm": [256],
    }
    expected = {f"model.layers.{i}.{k}.weight": v for i in range(6) for k, v in layer.items()}
    expected |= {
        "model.embed_tokens.weight": [4096, 256],
        "model.norm.weight": [256],
        "lm_head.weight": [4096, 256],
    }
    assert {name: list(t.shape) for name, t in tensors.items()} == expected
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}


def test_weights_are_normal_and_norms_are_one(tiny):
    for name, tensor in read_all(tiny).items():
        if tensor.ndim == 1:
            assert torch.equal(tensor, torch.ones_like(tensor)), name
            continue
        values = tensor.float()
        assert abs(values.mean()) < 1e-3, name
        assert values.std() == pytest.approx(0.02, rel=0.02), name
        assert values.abs().max() < 0.13, name
        assert len(torch.unique(tensor, dim=0)) == len(tensor), f"{name} repeats a row"


def test_tensors_differ_from_one_another(tiny):
    tensors = read_all(tiny)
    first = {tuple(t.flatten()[:8].tolist()) for t in tensors.values() if t.ndim == 2}
    assert len(first) == 2 + 7 * 6


def test_folder_is_complete_and_holds_nothing_else(tiny):
    names = {path.name for path in tiny.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors"}
    assert json.loads((tiny / "generation_config.json").read_text())["eos_token_id"] == 2


@pytest.mark.parametrize(
    "preset, published, dimensions",
    [
        ("yi-6b", 6.06e9, (4096, 11008, 32, 32, 4, 64000)),
        ("yi-9b", 8.83e9, (4096, 11008, 48, 32, 4, 64000)),
        ("yi-34b", 34.4e9, (7168, 20480, 60, 56, 8, 64000)),
    ],
)
def test_presets_have_yi_dimensions(preset, published, dimensions):
    arguments = make_checkpoint.parse_arguments(["--preset", preset, "--out", "unused"])
    plan = make_checkpoint.make_plan(arguments)
    hidden, ffn, layers, heads, kv_heads, vocab = dimensions
    layer = 2 * hidden * hidden + 2 * hidden * hidden * kv_heads // heads + 3 * hidden * ffn
    weights = layers * (layer + 2 * hidden) + 2 * vocab * hidden + hidden
    assert weights == pytest.approx(published, rel=2e-3)
    assert plan.tensor_bytes == 2 * weights
    assert len(plan.shards) == -(-2 * weights // 4_000_000_000)


def test_config_is_what_transformers_reads(tiny):
    config = AutoConfig.from_pretrained(tiny)
    assert config.model_type == "llama"
    assert config.num_hidden_layers == 6
    assert (config.hidden_size, config.intermediate_size, config.vocab_size) == (256, 768, 4096)
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)
    assert config.rope_parameters["rope_theta"] == 5e6
    assert (config.rms_norm_eps, config.max_position_embeddings) == (1e-5, 4096)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 0)
    assert not config.tie_word_embeddings
    assert config.dtype == torch.bfloat16


def test_shards_of_one_layer_of_yi_6b(tmp_path):
    """870 MB of tensors, the largest of 262 MB, written with memory for one block."""
    out = tmp_path / "m"
    command = [sys.executable, "-c", MEASURED, make_checkpoint.__file__, "--preset", "yi-6b"]
    command += ["--layers", "1", "--config", "vocab_size=32000", "--shard-size", "300MB"]
    result = subprocess.run([*command, "--out", out], capture_output=True, text=True, check=True)
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["status"] == 0
    assert report["grown"] < 120e6

    layer = 4096 * 4096 * 2 + 512 * 4096 * 2 + 3 * 11008 * 4096 + 2 * 4096
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2 * (layer + 2 * 32000 * 4096 + 4096)
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert files == [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    for name in files:
        assert (out / name).stat().st_size < 301e6
        with safe_open(out / name, "pt") as file:
            assert {k for k, v in index["weight_map"].items() if v == name} == set(file.keys())
    shutil.rmtree(out)  # pytest would keep it


def test_dtype_and_seed(tiny, tmp_path):
    small = ("--preset", "tiny", "--layers", 1)
    name = "model.layers.0.mlp.down_proj.weight"
    again = read_all(make(tmp_path / "again", *small))[name]
    other = read_all(make(tmp_path / "other", *small, "--seed", 1))[name]
    wide = read_all(make(tmp_path / "wide", *small, "--dtype", "float32"))[name]
    assert torch.equal(again, read_all(tiny)[name])
    assert not torch.equal(again, other)
    assert wide.dtype == torch.float32
    assert torch.equal(again, wide.to(torch.bfloat16))


def test_config_overrides(tmp_path):
    out = make(tmp_path / "m", "--preset", "tiny", "--layers", 1, "--config", "head_dim=32",
               "tie_word_embeddings=true", "num_key_value_heads=4")  # fmt: skip
    tensors = read_all(out)
    assert "lm_head.weight" not in tensors
    assert tensors["model.layers.0.self_attn.q_proj.weight"].shape == (4 * 32, 256)
    assert tensors["model.layers.0.self_attn.k_proj.weight"].shape == (4 * 32, 256)
    assert AutoConfig.from_pretrained(out).head_dim == 32


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--layers", "0"], "--layers is 0"),
        (["--seed", "-1"], "--seed is -1"),
        (["--shard-size", "4 lots"], "--shard-size 4 lots is not a size"),
        (["--shard-size", "0GB"], "--shard-size 0GB is not a size"),
        (["--config", "colour=red"], "--config colour=red does not set a known key"),
        (["--config", "hidden_size"], "--config hidden_size does not set a known key"),
        (["--config", "hidden_size=wide"], "hidden_size is 'wide'"),
        (["--config", "num_key_value_heads=3"], "num_key_value_heads 3 does not divide"),
        (["--config", "hidden_size=255"], "num_attention_heads 4 does not divide hidden_size 255"),
        (["--config", "vocab_size=1000000000000"], "GB of free disk space and 1024000"),
    ],
)
def test_refuses_with_one_sentence_and_writes_nothing(arguments, sentence, tmp_path, capsys):
    out = tmp_path / "m"
    assert make_checkpoint.main(["--preset", "tiny", "--out", str(out), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert sentence in captured.err
    assert not out.exists()


@pytest.mark.parametrize("name", ["", "kept"])
def test_refuses_a_folder_in_use(name, tmp_path, capsys):
    (tmp_path / "kept").write_text("x")
    assert make_checkpoint.main(["--preset", "tiny", "--out", str(tmp_path / name)]) == 2
    assert "is not an empty folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_leaves_nothing_behind_when_the_disk_fails(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(make_checkpoint, "write_shard", fail)
    assert make_checkpoint.main(["--preset", "tiny", "--out", str(tmp_path)]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_the_file_runs_as_a_script(tmp_path):
    command = [sys.executable, make_checkpoint.__file__, "--preset", "tiny", "--out", tmp_path]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "no tokenizer" in result.stdout
