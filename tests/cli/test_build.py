"""build.py from flags to engine directory: contents, reproducibility, interruption."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine import engine_file
from engine.backends import read_record
from engine.engine_file import verify_file
from tests.cli.build_runner import SMALL_DUMMY, contents, run_alone, run_here, start

SWITCHES = (
    "--use_gpt_attention_plugin=bfloat16", "--use_gemm_plugin", "--enable_context_fmha",
    "--remove_input_padding", "--use_fused_mlp", "--max_input_len=64", "--max_output_len=32",
)  # fmt: skip
TOKENIZER_FILES = {
    "tokenizer.model": b"\x00pieces",
    "tokenizer_config.json": b"{}",
    "generation_config.json": b'{"eos_token_id": [2, 7], "temperature": 0.6}',
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, write_hf) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_hf(folder, dtype=torch.bfloat16)
    for name, data in TOKENIZER_FILES.items():
        (folder / name).write_bytes(data)
    (folder / "README.md").write_text("stays behind")
    return folder


def built(output: Path, *flags: str | Path) -> Path:
    result = run_here("--output_dir", output, *flags)
    assert result.status == 0, result.stderr
    return output


@pytest.fixture(scope="module")
def engine(checkpoint, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("built") / "engine"
    return built(output, "--model_dir", checkpoint, "--tp_size", "2", "--pp_size", "2", *SWITCHES)


def read_json(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def test_directory_holds_ranks_config_and_tokenizer(engine):
    ranks = {f"yi_bfloat16_tp2_pp2_rank{rank}.engine" for rank in range(4)}
    assert set(contents(engine)) == {"config.json", *ranks, *TOKENIZER_FILES}
    for name, data in TOKENIZER_FILES.items():
        assert (engine / name).read_bytes() == data


def test_config_has_the_seeds_sections_and_ours(engine, checkpoint):
    config = read_json(engine)
    assert set(config) == {"builder_config", "plugin_config", "engine"}
    builder, plugins, own = (config[key] for key in ("builder_config", "plugin_config", "engine"))
    assert (builder["precision"], builder["tensor_parallel"], builder["pipeline_parallel"]) == (
        "bfloat16",
        2,
        2,
    )
    assert (builder["num_heads"], builder["num_kv_heads"], builder["vocab_size"]) == (8, 2, 97)
    assert (builder["max_input_len"], builder["max_output_len"]) == (64, 32)
    assert builder["use_fused_mlp"] is True
    assert plugins["gpt_attention_plugin"] == "bfloat16"
    assert plugins["gemm_plugin"] == "float16"
    assert (plugins["context_fmha_type"], plugins["nccl_plugin"]) == (1, "bfloat16")
    assert own["source"] == str(checkpoint)
    assert own["is_dummy"] is False
    assert own["generation"] == {
        "bos_token_id": 1,
        "eos_token_id": [2, 7],
        "temperature": 0.6,
    }


def test_recorded_files_are_the_files(engine):
    record = read_record(engine)
    assert len(record.files) == 4
    for rank, file in enumerate(record.files):
        assert file.name.endswith(f"rank{rank}.engine")
        assert file.bytes == (engine / file.name).stat().st_size
        verify_file(engine / file.name, file, threads=1)


def test_report_names_ranks_sizes_and_what_has_no_effect(checkpoint, tmp_path):
    result = run_here("--output_dir", tmp_path, "--model_dir", checkpoint, *SWITCHES)
    assert result.status == 0
    assert "yi_bfloat16_tp1_rank0.engine" in result.stdout
    # 2 (keys and values) · 3 layers · 2 heads · 8 numbers · 2 bytes
    assert "192 bytes per token" in result.stdout
    assert f"engine written to {tmp_path}" in result.stdout
    [ignored] = [line for line in result.stderr.splitlines() if "no effect" in line]
    for flag in ("--use_gemm_plugin", "--enable_context_fmha", "--use_fused_mlp"):
        assert flag in ignored
    assert "--use_rmsnorm_plugin" not in ignored
    assert "DUMMY" not in result.stderr


def test_positions_beyond_training_are_warned_of(checkpoint, tmp_path):
    lengths = ("--max_input_len", "250", "--max_output_len", "7")
    result = run_here("--output_dir", tmp_path, "--model_dir", checkpoint, *lengths)
    assert "exceed the 256 positions the model was trained for" in result.stderr


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtypes(checkpoint, tmp_path, dtype):
    built(tmp_path, "--model_dir", checkpoint, "--dtype", dtype)
    stored = load_file(tmp_path / f"yi_{dtype}_tp1_rank0.engine")
    source = load_file(checkpoint / "model.safetensors")
    wanted = source["model.embed_tokens.weight"].to(getattr(torch, dtype))
    assert torch.equal(stored["embed.weight"], wanted)
    kinds = {tensor.dtype for name, tensor in stored.items() if not name.startswith("_pad.")}
    assert kinds == {getattr(torch, dtype)}
    assert read_json(tmp_path)["builder_config"]["precision"] == dtype


def test_rope_overrides_are_recorded(checkpoint, tmp_path):
    flags = ("--rotary_base", "10000", "--rotary_scaling", "dynamic", "2.5")
    built(tmp_path, "--model_dir", checkpoint, *flags)
    rope = read_record(tmp_path).config.rope
    assert (rope.theta, rope.type, rope.factor) == (1e4, "dynamic", 2.5)
    assert rope.original_max_positions == 256


def test_rope_of_the_checkpoint_is_kept_without_overrides(engine):
    """The seed's builds had base 1e4 whatever the checkpoint said."""
    assert read_record(engine).config.rope.theta == 5e6
    assert read_json(engine)["builder_config"]["rotary_base"] == 5e6


def test_hyphens_are_underscores(checkpoint, tmp_path):
    hyphens = ("--model-dir", checkpoint, "--tp-size", "2", "--max-input-len=40")
    hyphens += ("--use-parallel-embedding", "--embedding-sharding-dim", "0")
    underscores = [str(flag).replace("-", "_").replace("__", "--", 1) for flag in hyphens]
    underscores[1] = checkpoint
    one = built(tmp_path / "one", *hyphens)
    two = built(tmp_path / "two", *underscores)
    assert contents(one) == contents(two)
    record = read_record(one)
    assert (record.mapping.tp, record.limits.max_input_len, record.embedding_dim) == (2, 40, 0)


def test_two_builds_are_byte_identical(checkpoint, engine, tmp_path):
    flags = ("--model_dir", checkpoint, "--tp_size", "2", "--pp_size", "2", *SWITCHES)
    assert contents(built(tmp_path / "again", *flags)) == contents(engine)


def test_parallel_build_is_byte_identical(checkpoint, engine, tmp_path):
    output = tmp_path / "parallel"
    flags = ("--model_dir", checkpoint, "--tp_size", "2", "--pp_size", "2", *SWITCHES)
    result = run_alone("--output_dir", output, *flags, "--parallel_build")
    assert result.status == 0, result.stderr
    parallel, serial = contents(output), contents(engine)
    configs = [json.loads(files.pop("config.json")) for files in (parallel, serial)]
    assert parallel == serial
    configs[1]["builder_config"]["parallel_build"] = True
    assert configs[0] == configs[1]


def test_failure_in_a_build_process_is_one_sentence(tmp_path, write_hf):
    folder, output = tmp_path / "checkpoint", tmp_path / "engine"
    write_hf(folder, num_hidden_layers=1)
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-4:] = b"\xff\xff\xff\x7f"  # the last fp32 becomes a NaN
    (folder / "model.safetensors").write_bytes(data)
    flags = ("--output_dir", output, "--tp_size", "2", "--parallel_build", "--log_level", "error")
    result = run_alone("--model_dir", folder, *flags)
    assert result.status == 2
    [line] = result.stderr.splitlines()
    assert "holds NaN or infinite values" in line
    assert not output.exists()


@pytest.mark.parametrize("level", ["error", "info"])
def test_dummy_build_warns_loudly_and_says_so_in_the_engine(tmp_path, level):
    result = run_here(*SMALL_DUMMY, "--output_dir", tmp_path, "--log_level", level)
    assert result.status == 0
    assert result.stderr.count("DUMMY") == 1
    assert result.stderr.startswith("####")
    record = read_record(tmp_path)
    assert record.is_dummy
    assert "DUMMY" in record.notes[0]
    assert (record.config.hidden_size, record.config.vocab_size) == (32, 61)


def test_rebuild_replaces_the_old_engine(checkpoint, tmp_path):
    built(tmp_path, *SMALL_DUMMY, "--tp_size", "2")
    (tmp_path / "notes.txt").write_text("mine")
    built(tmp_path, "--model_dir", checkpoint)
    names = {"config.json", "yi_bfloat16_tp1_rank0.engine", "notes.txt", *TOKENIZER_FILES}
    assert set(contents(tmp_path)) == names
    assert not read_record(tmp_path).is_dummy


def test_full_disk_keeps_the_old_engine(tmp_path, monkeypatch):
    built(tmp_path, *SMALL_DUMMY)
    before = contents(tmp_path)
    write_all = engine_file._write_all

    def fill_up(file, view):
        if file.tell() + len(view) > 30_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_all(file, view)

    monkeypatch.setattr(engine_file, "_write_all", fill_up)
    result = run_here(*SMALL_DUMMY, "--output_dir", tmp_path, "--dtype", "float32")
    assert result.status == 2
    assert result.stdout == ""
    assert "failed (No space left on device); nothing was replaced" in result.stderr
    assert "Traceback" not in result.stderr
    assert contents(tmp_path) == before


def test_too_little_space_is_refused_at_the_start(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(engine_file.shutil, "disk_usage", lambda path: usage)
    output = tmp_path / "engine"
    result = run_here(*SMALL_DUMMY, "--output_dir", output)
    assert result.status == 2
    assert "has 0.00 GB free and the engine needs" in result.stderr
    assert not output.exists()


# Some seconds of writing, so that the signal comes in the middle.
LARGE_DUMMY = (
    "--n_layer=40", "--n_embd=2048", "--n_head=16", "--inter_size=8192", "--vocab_size=64000",
    "--tp_size=2",
)  # fmt: skip


def wait_until_written(process: subprocess.Popen, output: Path, least_bytes: int) -> None:
    """Until the staged rank files have `least_bytes`; 0 waits for the directory only."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        staged = list(output.glob(".building-*"))
        sizes = [path.stat().st_size for path in output.glob(".building-*/*.engine")]
        if staged and sum(sizes) >= least_bytes:
            return
        time.sleep(0.02)
    raise AssertionError("the build did not start to write")


# Mode of the build, bytes written and seconds waited before the signal comes.
MOMENTS = [
    pytest.param([], 3_000_000, 0.0, id="writing"),
    pytest.param(["--parallel_build"], 0, 0.6, id="processes starting"),
    pytest.param([], 0, 0.0, id="starting", marks=pytest.mark.slow),
    pytest.param(["--parallel_build"], 0, 0.05, id="first process", marks=pytest.mark.slow),
    pytest.param(["--parallel_build"], 3_000_000, 0.0, id="in parallel", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("mode, least_bytes, pause", MOMENTS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_interrupted_build_keeps_the_old_engine(tmp_path, number, mode, least_bytes, pause):
    """The signal goes to the whole process group, as a terminal's Ctrl-C does."""
    built(tmp_path, *SMALL_DUMMY)
    before = contents(tmp_path)
    with start("--output_dir", tmp_path, *LARGE_DUMMY, *mode) as process:
        wait_until_written(process, tmp_path, least_bytes)
        time.sleep(pause)
        os.killpg(process.pid, number)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert contents(tmp_path) == before
    assert "Traceback" not in stderr
    assert stderr.splitlines()[-1] == "build.py: interrupted"


def test_killed_build_leaves_what_the_next_one_removes(tmp_path):
    built(tmp_path, *SMALL_DUMMY)
    before = contents(tmp_path)
    with start("--output_dir", tmp_path, *LARGE_DUMMY) as process:
        wait_until_written(process, tmp_path, 1)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=60)
    [leftover] = tmp_path.glob(".building-*")
    assert read_record(tmp_path).config.num_layers == 2
    built(tmp_path, *SMALL_DUMMY)
    assert not leftover.exists()
    assert contents(tmp_path) == before
