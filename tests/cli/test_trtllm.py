"""--backend tensorrt_llm from build.py to run.py, with stand-ins for trtllm-build and the library.

Nothing here has met the real library.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

import run
from engine.backends import read_record
from engine.errors import EngineError
from tests.cli import trtllm_stand_in
from tests.cli.build_runner import Finished, contents, run_here
from tests.conftest import ROOT
from tests.unit.engine.backends.fake_library import FakeLibrary
from tests.unit.engine.backends.help_texts import DIALECTS, NEW, OLD
from utils.cli import run_main

SWITCHES = (
    "--remove_input_padding", "--use_gpt_attention_plugin", "bfloat16",
    "--use_gemm_plugin", "bfloat16", "--enable_context_fmha", "--use_fused_mlp",
    "--max_input_len", "32", "--max_output_len", "16", "--max_batch_size", "2",
)  # fmt: skip


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, help_text: str, extra: str = "") -> None:
    """Put a trtllm-build on PATH that speaks the dialect of `help_text`."""
    folder.mkdir(exist_ok=True)
    shutil.copy(trtllm_stand_in.__file__, folder / "stand_in.py")
    (folder / "help.txt").write_text(help_text)
    tool = folder / "trtllm-build"
    tool.write_text(
        f"#!{sys.executable}\nimport sys\nfrom pathlib import Path\n"
        f"sys.path.insert(0, {str(folder)!r})\nimport stand_in\n{extra}\n"
        f"stand_in.main(Path({str(folder / 'help.txt')!r}).read_text())\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, write_hf) -> Path:
    folder = tmp_path_factory.mktemp("hf")
    write_hf(folder, num_hidden_layers=2)
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def build(checkpoint: Path, output: Path, *flags: str) -> Finished:
    given = ("--model_dir", checkpoint, "--output_dir", output, *SWITCHES, *flags)
    return run_here(*given, "--backend", "tensorrt_llm")


@pytest.mark.parametrize("name", DIALECTS)
def test_each_dialect_builds(name, checkpoint, tmp_path, monkeypatch):
    install(tmp_path / "bin", monkeypatch, DIALECTS[name])
    output = tmp_path / "engine"
    result = build(checkpoint, output, "--tp_size", "2", "--parallel_build")
    assert result.status == 0, result.stderr
    assert "[TRT-LLM] rank 1 built" in result.stderr
    assert f"engine written to {output}" in result.stdout
    names = {"config.json", "given.json", "rank0.engine", "rank1.engine", "tokenizer_config.json"}
    assert set(contents(output)) == names, "the checkpoint in between is gone"
    given = json.loads((output / "given.json").read_text())
    length = {"max_output_len": "16"} if name == "0.8 to 0.10" else {"max_seq_len": "48"}
    assert {n: v for n, v in given.items() if n.startswith("max_")} == {
        "max_batch_size": "2",
        "max_input_len": "32",
        "max_beam_width": "1",
        "max_num_tokens": "64",
        **length,
    }
    assert given["workers"] == "2"
    record = read_record(output)
    assert (record.backend, record.mapping.tp) == ("tensorrt_llm", 2)
    assert record.limits.max_output_len == 16


def test_pipeline_stages_get_their_own_tensors(checkpoint, tmp_path, monkeypatch):
    install(tmp_path / "bin", monkeypatch, NEW)
    result = build(checkpoint, tmp_path / "engine", "--pp_size", "2")
    assert result.status == 0, result.stderr


def test_a_failed_build_keeps_the_checkpoint_and_the_old_engine(checkpoint, tmp_path, monkeypatch):
    output = tmp_path / "engine"
    install(tmp_path / "bin", monkeypatch, OLD)
    assert build(checkpoint, output).status == 0
    before = contents(output)
    fail = "if '--help' not in sys.argv: sys.exit('out of device memory')"
    install(tmp_path / "bin", monkeypatch, OLD, fail)
    result = build(checkpoint, output)
    assert result.status == 2
    kept = output / "trtllm_checkpoint"
    last = result.stderr.splitlines()[-1]
    assert "trtllm-build ended with status 1 (out of device memory)" in last
    assert f"trtllm-build --checkpoint_dir {kept} --output_dir {output} " in last
    assert (kept / "rank0.safetensors").exists()
    files = [path for path in output.iterdir() if path.is_file()]
    assert {path.name: path.read_bytes() for path in files} == before
    install(tmp_path / "bin", monkeypatch, OLD)
    assert build(checkpoint, output).status == 0
    assert not kept.exists()


def test_a_tool_that_writes_nothing(checkpoint, tmp_path, monkeypatch):
    install(tmp_path / "bin", monkeypatch, NEW, "if '--help' not in sys.argv: sys.exit(0)")
    result = build(checkpoint, tmp_path / "engine")
    assert result.status == 2
    assert "trtllm-build ended well but wrote no rank0.engine" in result.stderr


def run_engine(engine: Path, *flags: str | Path) -> Finished:
    out, err = io.StringIO(), io.StringIO()
    argv = ["run.py", "--engine_dir", str(engine), "--max_output_len", "4", *map(str, flags)]
    try:
        with (
            mock.patch.object(sys, "argv", argv),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            run_main(run.main)
    except SystemExit as end:
        return Finished(int(end.code or 0), out.getvalue(), err.getvalue())
    raise AssertionError("run_main always exits")


@pytest.fixture
def engine(tmp_path, monkeypatch) -> Path:
    """An engine of the bundled model."""
    install(tmp_path / "bin", monkeypatch, NEW)
    folder = tmp_path / "engine"
    result = build(ROOT / "models" / "tiny-yi", folder)
    assert result.status == 0, result.stderr
    return folder


def test_run_recognises_the_engine(engine, monkeypatch):
    library = FakeLibrary.install(monkeypatch)
    result = run_engine(engine, "--input_text", "import")
    assert result.status == 0, result.stderr
    assert 'Output [Text 0 Beam 0]: "' in result.stdout
    [call] = library.runner.calls
    assert call["max_new_tokens"] == 4


def test_run_without_the_library(engine, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt_llm", None)
    result = run_engine(engine, "--input_text", "import")
    assert result.status == 2
    [line] = result.stderr.splitlines()
    assert "the engine needs TensorRT-LLM 0.8 … 1.2, which cannot be imported" in line
    assert "the default backend needs none of it" in line


def test_run_on_a_cpu(engine):
    result = run_engine(engine, "--input_text", "import", "--device", "cpu")
    assert result.status == 2
    assert "is a TensorRT engine, which runs on NVIDIA GPUs only" in result.stderr


def test_engines_of_trtllm_build_itself(engine):
    """Without our section of config.json the rest says enough."""
    path = engine / "config.json"
    config = json.loads(path.read_text())
    ours = read_record(engine)
    del config["engine"]
    path.write_text(json.dumps(config))
    theirs = read_record(engine)
    assert theirs.backend == "tensorrt_llm"
    assert (theirs.config, theirs.dtype, theirs.quant) == (ours.config, ours.dtype, ours.quant)
    assert replace(theirs.limits, max_num_tokens=None) == ours.limits
    assert theirs.source == "trtllm-build stand-in"
    (engine / "rank0.engine").unlink()
    with pytest.raises(EngineError, match="is not a complete config.json of trtllm-build"):
        read_record(engine)


def test_a_truncated_engine_is_refused(engine):
    (engine / "rank0.engine").write_bytes(b"p")
    result = run_engine(engine, "--input_text", "import")
    assert result.status == 2
    assert "rank0.engine has 1 bytes but config.json records 4" in result.stderr
