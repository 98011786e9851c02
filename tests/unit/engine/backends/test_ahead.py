"""Kernels compiled at build for a GPU that is not there, and found by a run."""

from __future__ import annotations

import json
import zipfile

import pytest

from engine.backends import ahead, read_record
from engine.errors import EngineError, UserError
from engine.kernels.gpu import TARGETS
from tests.cli.build_runner import contents, run_here
from tests.conftest import ROOT
from tests.kernels.triton_mode import run_compiled

pytest.importorskip("triton")

LIMITS = ("--max_batch_size", 2, "--max_input_len", 64, "--max_output_len", 32)
# A model without a checkpoint, whose layers have the groups of 128 inputs that AWQ wants.
SHAPE = (
    "--n_layer=3", "--n_embd=512", "--n_head=8", "--n_kv_head=2", "--inter_size=768",
    "--vocab_size=1000", "--max_input_len=600", "--max_output_len=60", "--max_batch_size=6",
    "--log_level=error",
)  # fmt: skip
MODEL = ("--model_dir", ROOT / "models" / "tiny-yi", "--log_level", "error")


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ahead") / "engine"
    with pytest.MonkeyPatch.context() as patch:
        # The cards of an architecture are compiled for one after the other.
        patch.setitem(TARGETS, "sm_90", TARGETS["sm_90"][:1])
        result = run_here(*MODEL, *LIMITS, "--output_dir", folder, "--target", "sm_90")
    assert result.status == 0, result.stderr
    return folder


def test_a_run_finds_every_kernel_of_the_build(engine, tmp_path):
    before = contents(engine)
    output = run_compiled(
        "tests.unit.engine.backends.run_absent", str(engine), str(tmp_path / "cache")
    )
    assert contents(engine) == before
    as_started, as_measured, with_window, has_launchers = json.loads(output)
    # Attention of prompts and of decode steps, norm, RoPE, SwiGLU, embedding, and products.
    assert as_started[0] > 10 and as_started[1] == 0
    assert as_measured[0] > 5 and as_measured[1] == 0
    assert has_launchers
    # A window is not traced: the test sees a kernel that is missing.
    assert with_window[1] > 0


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """Engines whose steps launch different kernels, as far as possible each."""
    folders = []
    for flags in (
        "--use_weight_only --weight_only_precision int4_awq --tp_size 2 --use_parallel_embedding",
        "--enable_fp8 --fp8_kv_cache --paged_kv_cache",
        "--use_smooth_quant --per_token --dtype float16 --max_num_tokens 200",
    ):
        folders.append(tmp_path_factory.mktemp("engine"))
        result = run_here(*SHAPE, *flags.split(), "--output_dir", folders[-1])
        assert result.status == 0, result.stderr
    return folders


def test_the_trace_makes_every_launch_of_a_run(engines):
    output = run_compiled("tests.unit.engine.backends.run_recorded", *map(str, engines))
    counts = json.loads(output)
    assert [missing for _, missing in counts] == [[], [], []]
    assert min(launches for launches, _ in counts) > 15


def test_the_file_holds_what_config_json_says(engine):
    record = read_record(engine)
    assert record.kernels.targets == ("sm_90",)
    assert record.kernels.file.bytes == (engine / ahead.KERNELS_NAME).stat().st_size
    with zipfile.ZipFile(engine / ahead.KERNELS_NAME) as archive:
        names = archive.namelist()
        metadata = [json.loads(archive.read(name)) for name in names if name.endswith(".json")]
    assert len(names) == 3 * len(metadata)
    assert {one["target"]["arch"] for one in metadata} == {90}
    assert {one["triton_version"] for one in metadata} == {record.kernels.triton}


def test_a_damaged_file_is_refused(engine):
    record = read_record(engine)
    damaged = record.kernels._replace(file=record.kernels.file._replace(sha256="0" * 64))
    with pytest.raises(EngineError, match="kernels.zip does not match the checksum in config.json"):
        ahead.use_kernels(engine, damaged)


def test_another_triton_is_told_to_compile_again(monkeypatch):
    from engine.kernels.triton import _store

    warnings = []
    monkeypatch.setattr(_store.logger, "warning", warnings.append)
    monkeypatch.setattr(_store, "triton_key", lambda: "3.6.0 and the digests of its files")
    _store._make_launchers(set(), made_by="another")
    assert len(warnings) == 1 and "compiled by another Triton" in warnings[0]


def test_a_build_without_targets_leaves_no_kernels_behind(tmp_path):
    (tmp_path / ahead.KERNELS_NAME).write_bytes(b"of an engine that was here before")
    assert run_here(*MODEL, *LIMITS, "--output_dir", tmp_path).status == 0
    assert not (tmp_path / ahead.KERNELS_NAME).exists()
    assert read_record(tmp_path).kernels is None


def test_targets_need_triton(monkeypatch):
    monkeypatch.setattr(ahead, "find_spec", lambda name: None)
    ahead.check_targets(())
    with pytest.raises(UserError, match="--target sm_80 compiles kernels with Triton, which is"):
        ahead.check_targets(("sm_80",))
