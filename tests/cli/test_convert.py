"""hf_yi_convert.py as its users run it: flags, refusals, and whole folders or none."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from configparser import ConfigParser
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

import hf_yi_convert
from engine.checkpoint.ft import open_ft, read_ft_kv_scales
from engine.engine_file import read_config
from engine.quant import Algorithm, QuantConfig
from engine.record import EngineRecord
from tests.cli import build_runner
from tests.cli.build_runner import Finished, contents
from tests.conftest import ROOT
from utils import ft_export
from utils.cli import run_main

TINY_YI = ROOT / "models/tiny-yi"
TEXTS = ROOT / "tests/data/cnn_dailymail"
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
)
FEW = ("--calib_dataset", TEXTS, "--calib_size", "2", "--calib_max_length", "20")

# The flags of TensorRT-LLM's script, with their short forms.
TENSORRT_FLAGS = {
    "--in-file": "-i",
    "--out-dir": "-o",
    "--tensor-parallelism": "-tp",
    "--processes": "-p",
    "--calibrate-kv-cache": "-kv",
    "--smoothquant": "-sq",
    "--storage-type": "-t",
    "--dataset-cache-dir": None,
    "--load-model-on-cpu": None,
    "--convert-model-on-cpu": None,
}
OWN_FLAGS = {"--calib_dataset", "--calib_size", "--calib_max_length", "--log_level", "--help"}


def run_here(*flags: str | Path) -> Finished:
    out, err = io.StringIO(), io.StringIO()
    before = signal.getsignal(signal.SIGTERM)
    argv = ["hf_yi_convert.py", *map(str, flags)]
    try:
        with (
            mock.patch.object(sys, "argv", argv),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            run_main(hf_yi_convert.main)
    except SystemExit as end:
        return Finished(int(end.code or 0), out.getvalue(), err.getvalue())
    finally:
        signal.signal(signal.SIGTERM, before)
    raise AssertionError("run_main always exits")


def converted(output: Path, *flags: str | Path) -> Path:
    """The folder that a run makes in `output`."""
    result = run_here("-o", output, *FEW, *flags)
    assert result.status == 0, result.stderr
    [target] = output.iterdir()
    assert f"wrote {target}; build an engine from it with build.py --ft_model_dir" in result.stdout
    return target


def read_ini(folder: Path) -> dict[str, str]:
    parser = ConfigParser(interpolation=None)
    parser.read(folder / "config.ini")
    assert parser.sections() == ["llama"]
    return dict(parser["llama"])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, write_hf) -> Path:
    """A small model with the vocabulary and the tokenizer of tiny-yi."""
    folder = tmp_path_factory.mktemp("convert") / "checkpoint"
    write_hf(folder, vocab_size=4096, num_hidden_layers=2)
    for name in TOKENIZER_FILES:
        shutil.copyfile(TINY_YI / name, folder / name)
    return folder


def test_flags_and_their_short_forms():
    parser = hf_yi_convert.make_parser()
    long = {flag for flag in parser._option_string_actions if flag.startswith("--")}
    assert long == {*TENSORRT_FLAGS, *OWN_FLAGS}
    for flag, short in TENSORRT_FLAGS.items():
        if short is not None:
            actions = parser._option_string_actions
            assert actions[flag] is actions[short], flag


def test_defaults_are_those_of_the_original():
    args = vars(hf_yi_convert.make_parser().parse_args(["-i", "in", "-o", "out"]))
    assert (args["tensor_parallelism"], args["processes"], args["storage_type"]) == (1, 4, "fp32")
    assert (args["calib_size"], args["calib_max_length"]) == (512, 512)
    assert args["smoothquant"] is None and not args["calibrate_kv_cache"]


def test_hyphens_are_underscores():
    parse = hf_yi_convert.make_parser().parse_args
    hyphens = "--in-file a --out-dir b --calibrate-kv-cache --storage-type fp16 --calib-size 3"
    assert parse(hyphens.split()) == parse(hyphens.replace("-", "_").replace("__", "--").split())


@pytest.fixture(scope="module")
def smoothed(checkpoint, tmp_path_factory) -> Path:
    """-sq 0.5 -kv -tp 4: two files for each KV head."""
    output = tmp_path_factory.mktemp("smoothed")
    return converted(output, "-i", checkpoint, "-sq", "0.5", "-kv", "-tp", "4")


def test_folder_is_whole(checkpoint, smoothed):
    assert smoothed.name == "4-gpu"
    fields = read_ini(smoothed)
    own = json.loads((checkpoint / "config.json").read_text())
    for name, value in own.items():
        assert fields[name] == str(value), name
    assert (fields["weight_data_type"], fields["multi_query_mode"]) == ("fp32", "True")
    assert (fields["head_dim"], fields["rope_theta"]) == ("8", "5000000.0")
    assert (fields["smoothquant"], fields["tensor_parallelism"]) == ("0.5", "4")
    for name in TOKENIZER_FILES:
        assert (smoothed / name).read_bytes() == (checkpoint / name).read_bytes()


def logits(folder: Path, weights: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if weights is not None:
        model.load_state_dict(weights)
    with torch.no_grad():
        return model(torch.arange(3, 40)[None] * 11).logits


def test_smoothing_keeps_the_function(checkpoint, smoothed):
    """The weights of the smoothed folder in full precision, run by transformers."""
    with open_ft(smoothed, quant=QuantConfig()) as source:
        source.check()
        weights = {name: tensor.read() for name, tensor in source.tensors.items()}
    original = logits(checkpoint)
    error = (logits(checkpoint, weights) - original).abs().max()
    assert error < 1e-4 * original.abs().max()


def test_int8_weights_are_close_to_the_original(checkpoint, smoothed):
    original = load_file(checkpoint / "model.safetensors")
    with open_ft(smoothed, quant=QuantConfig(Algorithm.W8A8_SQ, per_channel=True)) as source:
        source.check()
        linear = source.linear("model.layers.1.mlp.down_proj")
    w_NK = linear.codes_NK * linear.scale_N[:, None] / linear.smoother_K
    expected = original["model.layers.1.mlp.down_proj.weight"]
    assert (w_NK - expected).norm() < 0.01 * expected.norm()


def test_cache_scales_with_and_without_smoothing(checkpoint, smoothed, tmp_path):
    """Smoothing does not change what a cache holds."""
    plain = converted(tmp_path, "-i", checkpoint, "--calibrate-kv-cache", "-t", "bf16")
    assert plain.name == "1-gpu"
    assert not list(plain.glob("*dense*int8*")) and list(plain.glob("*query_key_value*int8*"))
    with open_ft(plain, quant=QuantConfig()) as source:
        config = source.config
        assert source.dtype == torch.bfloat16
        name = "model.layers.0.self_attn.k_proj.weight"
        expected = load_file(checkpoint / "model.safetensors")[name].bfloat16()
        assert torch.equal(source.tensors[name].read(), expected)
    scales = [read_ft_kv_scales(folder, config) for folder in (plain, smoothed)]
    for (k, v), (k_smoothed, v_smoothed) in zip(*scales, strict=True):
        assert k.shape == v.shape == (2,)
        assert torch.equal(k, k_smoothed) and torch.equal(v, v_smoothed)


def test_engines_are_built_from_it(smoothed, tmp_path):
    flags = ("--use_smooth_quant", "--per_token", "--per_channel", "--int8_kv_cache", "--tp_size=2")
    result = build_runner.run_here("--ft_model_dir", smoothed, "--output_dir", tmp_path, *flags)
    assert result.status == 0, result.stderr
    record = EngineRecord.from_dict(read_config(tmp_path)["engine"], "engine")
    assert record.quant.algorithm is Algorithm.W8A8_SQ
    assert record.generation["eos_token_id"] == [2, 7]
    assert (tmp_path / "tokenizer.model").exists()


def test_two_conversions_are_byte_identical(checkpoint, smoothed, tmp_path):
    again = converted(tmp_path, "-i", checkpoint, "-sq", "0.5", "-kv", "-tp", "4", "-p", "1")
    one, two = contents(smoothed), contents(again)
    inis = [files.pop("config.ini").decode() for files in (one, two)]
    assert one == two
    differing = ("out_dir", "processes")
    lines = [[line for line in ini.splitlines() if not line.startswith(differing)] for ini in inis]
    assert lines[0] == lines[1]


def test_meta_format(checkpoint, smoothed, tmp_path):
    """One shard, without rows to reorder: heads of two channels rotate alike in both formats."""
    folder = tmp_path / "meta"
    folder.mkdir()
    params = {"dim": 16, "n_layers": 1, "n_heads": 8, "n_kv_heads": 2, "norm_eps": 1e-5}
    params |= {"vocab_size": 4096, "rope_theta": 1e6, "use_scaled_rope": True}
    (folder / "params.json").write_text(json.dumps(params))
    shutil.copyfile(TINY_YI / "tokenizer.model", folder / "tokenizer.model")
    generator = torch.Generator().manual_seed(0)
    shapes = {"tok_embeddings": (4096, 16), "norm": (16,), "output": (4096, 16)}
    for name, shape in {
        "attention.wq": (16, 16),
        "attention.wk": (4, 16),
        "attention.wv": (4, 16),
        "attention.wo": (16, 16),
        "feed_forward.w1": (24, 16),
        "feed_forward.w2": (16, 24),
        "feed_forward.w3": (24, 16),
        "attention_norm": (16,),
        "ffn_norm": (16,),
    }.items():
        shapes[f"layers.0.{name}"] = shape
    shard = {f"{n}.weight": torch.randn(s, generator=generator) for n, s in shapes.items()}
    torch.save(shard, folder / "consolidated.00.pth")
    with open_ft(converted(tmp_path / "out", "-i", folder, "-kv"), quant=QuantConfig()) as source:
        assert source.config.rope.type == "llama3"
        assert source.config.rope.theta == 1e6
        assert source.config.max_positions == 4096
        found = source.tensors["model.layers.0.mlp.up_proj.weight"].read()
    assert torch.equal(found, shard["layers.0.feed_forward.w3.weight"])


def test_tied_embeddings(tmp_path, write_hf):
    folder = tmp_path / "tied"
    tensors = write_hf(folder, vocab_size=4096, num_hidden_layers=1, tie_word_embeddings=True)
    shutil.copyfile(TINY_YI / "tokenizer.model", folder / "tokenizer.model")
    with open_ft(converted(tmp_path / "out", "-i", folder, "-kv"), quant=QuantConfig()) as source:
        source.check()
        assert source.config.tie_word_embeddings
        head = source.tensors["lm_head.weight"].read()
    assert torch.equal(head, tensors["model.embed_tokens.weight"])


def quantised(folder: Path) -> None:
    """Int8 weights of compressed-tensors instead of the floating ones."""
    shutil.rmtree(folder)
    shutil.copytree(ROOT / "tests/data/quantized/compressed-tensors-w8a8", folder)
    shutil.copyfile(TINY_YI / "tokenizer.model", folder / "tokenizer.model")


def set_vocabulary(folder: Path) -> None:
    """A model with fewer tokens than its tokenizer."""
    tensors = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:97].clone()
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 97}))


def as_converted(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.ini").write_text("[llama]")


# What is done to the checkpoint, the flags, and the one line that the user reads.
REFUSED = {
    "nothing to do": (None, (), "there is nothing to calibrate: give --calibrate-kv-cache"),
    "alpha above 1": (None, ("-sq", "1.5"), "'1.5' is not a number from 0 to 1"),
    "alpha is no number": (None, ("-sq", "nan"), "'nan' is not a number from 0 to 1"),
    "alpha missing": (None, ("-sq",), "--smoothquant/-sq: expected one argument"),
    "storage type": (None, ("-kv", "-t", "int8"), "--storage-type/-t: invalid choice: 'int8'"),
    "no ranks": (None, ("-kv", "-tp", "0"), "'0' is not a whole number of at least 1"),
    "ranks that do not divide": (
        None,
        ("-kv", "-tp", "3"),
        "--tensor-parallelism 3 does not divide the model's 8 attention heads",
    ),
    "data that does not exist": (
        None,
        ("-kv", "--calib_dataset", "gone.jsonl"),
        "--calib_dataset gone.jsonl does not exist",
    ),
    "checkpoint that does not exist": (
        shutil.rmtree,
        ("-kv",),
        "does not exist; name a folder, or a Hugging Face repository",
    ),
    "log level": (None, ("-kv", "--log_level", "loud"), "--log_level 'loud' is unknown"),
    "unknown flag": (None, ("-kv", "--smoothqant", "1"), "did you mean --smoothquant?"),
    "no configuration": (
        lambda folder: (folder / "config.json").unlink(),
        ("-kv",),
        "has no config.json; give a Hugging Face checkpoint directory",
    ),
    "converted already": (as_converted, ("-kv",), "is a directory written by hf_yi_convert.py"),
    "no tokenizer": (
        lambda folder: [(folder / name).unlink() for name in TOKENIZER_FILES],
        ("-kv",),
        "no tokenizer",
    ),
    "half a tokenizer": (
        lambda folder: (folder / "tokenizer.model").unlink(),
        ("-kv",),
        "makes no tokens of the texts; check that its tokenizer files are whole",
    ),
    "vocabulary": (
        set_vocabulary,
        ("-kv",),
        "the model's vocabulary (vocab_size) has 97 entries; use the files of one checkpoint",
    ),
    "quantised": (
        quantised,
        ("-sq", "0.5"),
        "--smoothquant needs full-precision weights, and those of",
    ),
}


@pytest.mark.parametrize("change, flags, message", REFUSED.values(), ids=REFUSED)
def test_one_sentence_and_nothing_written(checkpoint, tmp_path, change, flags, message):
    folder, output = tmp_path / "checkpoint", tmp_path / "out"
    shutil.copytree(checkpoint, folder)
    if change:
        change(folder)
    quiet = ("--log_level", "error")
    status, stdout, stderr = run_here("-i", folder, "-o", output, *FEW, *quiet, *flags)
    assert status == 2
    assert stdout == ""
    [line] = stderr.splitlines()
    assert line.startswith("hf_yi_convert.py: error: ")
    assert message in line
    assert "--model_dir" not in line and "--tp_size" not in line and "--dataset_path" not in line
    assert not output.exists()


def test_default_texts_out_of_reach(checkpoint, tmp_path):
    flags = ("-kv", "--dataset-cache-dir", tmp_path / "cache", "--log_level", "error")
    result = run_here("-i", checkpoint, "-o", tmp_path / "out", *flags)
    assert result.status == 2
    [line] = result.stderr.splitlines()
    assert f"is not in the cache {tmp_path / 'cache'}" in line
    assert "name local data with --calib_dataset" in line
    assert not (tmp_path / "out").exists()


def test_calibration_stays_on_the_cpu_if_asked(checkpoint, tmp_path, monkeypatch):
    """The tensors would be refused by a GPU that is not there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    result = run_here(
        "-i", checkpoint, "-o", tmp_path, "-kv", *FEW, "--load-model-on-cpu",
        "--convert-model-on-cpu",
    )  # fmt: skip
    assert result.status == 0, result.stderr
    assert "calibrating on cpu with 2 texts of 40 tokens in all" in result.stderr


def test_required_flags():
    result = run_here("-kv")
    assert result.status == 2
    assert "the following arguments are required: --in-file/-i, --out-dir/-o" in result.stderr


def test_output_that_cannot_be_made(checkpoint, tmp_path):
    (tmp_path / "file").write_text("")
    result = run_here("-i", checkpoint, "-o", tmp_path / "file", "-kv", *FEW)
    assert result.status == 2
    assert f"--out-dir {tmp_path / 'file'} cannot be written (" in result.stderr
    assert "Traceback" not in result.stderr


def test_foreign_folder_is_not_replaced(checkpoint, tmp_path):
    (tmp_path / "1-gpu").mkdir()
    (tmp_path / "1-gpu/thesis.tex").write_text("mine")
    result = run_here("-i", checkpoint, "-o", tmp_path, "-kv", *FEW)
    assert result.status == 2
    assert "1-gpu holds other files than a conversion's; choose another" in result.stderr
    assert contents(tmp_path / "1-gpu") == {"thesis.tex": b"mine"}
    assert len(list(tmp_path.iterdir())) == 1


def test_conversion_replaces_an_earlier_one(checkpoint, tmp_path):
    target = converted(tmp_path, "-i", checkpoint, "-kv")
    before = set(contents(target))
    (tmp_path / ".building-999999999").mkdir()  # of a run that was killed
    assert converted(tmp_path, "-i", checkpoint, "-sq", "0.5") == target
    assert set(contents(target)) > before
    assert [path.name for path in tmp_path.iterdir()] == ["1-gpu"]


def test_full_disk_keeps_the_earlier_one(checkpoint, tmp_path, monkeypatch):
    before = contents(converted(tmp_path, "-i", checkpoint, "-kv"))

    def fill_up(path: Path, mode: str):
        if "layers.1.mlp.proj" in path.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return open(path, mode)

    monkeypatch.setattr(ft_export, "open", fill_up, raising=False)
    result = run_here("-i", checkpoint, "-o", tmp_path, "-kv", *FEW, "--log_level", "error")
    assert result.status == 2
    [line] = result.stderr.splitlines()
    assert "failed (No space left on device); nothing was replaced" in line
    assert line.endswith("choose another --out-dir")
    assert [path.name for path in tmp_path.iterdir()] == ["1-gpu"]
    assert contents(tmp_path / "1-gpu") == before


def test_failure_at_the_very_end_keeps_the_earlier_one(checkpoint, tmp_path, monkeypatch):
    before = contents(converted(tmp_path, "-i", checkpoint, "-kv"))
    rename = Path.rename

    def fail_once(self: Path, target: Path) -> Path:
        if self.name == f".building-{os.getpid()}":
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_once)
    result = run_here("-i", checkpoint, "-o", tmp_path, "-kv", *FEW)
    assert result.status == 2
    assert "failed (Permission denied); nothing was replaced" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["1-gpu"]
    assert contents(tmp_path / "1-gpu") == before


def test_too_little_space_is_refused_at_the_start(checkpoint, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    result = run_here("-i", checkpoint, "-o", tmp_path / "out", "-kv", *FEW)
    assert result.status == 2
    assert "has 0.00 GB free and " in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_interrupted_conversion_leaves_nothing(tmp_path, number):
    output = tmp_path / "out"
    command = [sys.executable, "hf_yi_convert.py", "-i", TINY_YI, "-o", output, "-sq", "0.5"]
    command += ["--calib_dataset", ROOT / "models/tiny-yi/heldout.txt", "--calib_size", "400"]
    with subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        deadline = time.monotonic() + 120
        while not list(output.glob(".building-*/model.layers.0.*")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(process.pid, number)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.splitlines()[-1] == "hf_yi_convert.py: interrupted"
    assert "Traceback" not in stderr
    assert not output.exists()


def test_scales_follow_the_data(checkpoint, tmp_path):
    """Other texts give other ranges, so the calibration is not for show."""
    (tmp_path / "one.txt").write_text("import os\n")
    flags = ("-i", checkpoint, "-kv", "--calib_dataset", tmp_path / "one.txt", "--calib_size", "1")
    one = converted(tmp_path / "one", *flags)
    two = converted(tmp_path / "two", "-i", checkpoint, "-kv")
    name = "model.layers.1.attention.k_cache.scale_quant_orig.bin"
    first, second = (np.fromfile(folder / name, np.float32) for folder in (one, two))
    assert first < second
