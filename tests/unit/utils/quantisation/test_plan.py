from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from engine.errors import UserError
from utils.quantisation.plan import FORMATS, plan_quantise

FLAGS = {
    "model_dir": "",
    "qformat": "fp8",
    "export_path": "made",
    "dtype": "bfloat16",
    "group_size": None,
    "quantize_lm_head": False,
    "device": "cpu",
    "calib_dataset": None,
    "calib_size": None,
    "calib_max_length": 512,
    "batch_size": 1,
    "seed": None,
    "cache_dir": None,
}


def plan(folder, **flags):
    return plan_quantise({**FLAGS, "model_dir": str(folder), **flags})


@pytest.mark.parametrize(
    "qformat, export_path, output",
    [
        ("fp8", "out", "out/llama_tp1_rank0.npz"),
        ("fp8", "out/mine.npz", "out/mine.npz"),
        ("int4_awq", "./yi-6b-4bit-gs128-awq.pt", "yi-6b-4bit-gs128-awq.pt"),
        ("int4_awq", "out", "out/llama_int4_awq.pt"),
        ("int4_gptq", "yi.safetensors", "yi.safetensors"),
        ("int4_gptq", "v1.5", "v1.5/llama_int4_gptq.safetensors"),
        ("int8_sq", "out/sq", "out/sq"),
    ],
)
def test_a_file_or_a_directory(tmp_path, qformat, export_path, output):
    assert plan(tmp_path, qformat=qformat, export_path=export_path).output == Path(output)


def test_what_is_not_given(tmp_path):
    sizes = {name: plan(tmp_path, qformat=name).calibration.size for name in FORMATS}
    assert sizes == {
        "fp8": 512, "int4_awq": 32, "int8_sq": 512, "int8_wo": 0, "int4_wo": 0, "int4_gptq": 128,
    }  # fmt: skip
    groups = {name: plan(tmp_path, qformat=name).group_size for name in FORMATS}
    assert groups == {
        "fp8": 0, "int4_awq": 128, "int8_sq": 0, "int8_wo": 0, "int4_wo": 128, "int4_gptq": 128,
    }  # fmt: skip


def test_what_is_computed_in(tmp_path, monkeypatch):
    assert plan(tmp_path, dtype="float16").dtype == "bfloat16"
    assert plan(tmp_path, dtype="float32").dtype == "float32"
    assert plan(tmp_path, device="auto").device == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    on_gpu = plan(tmp_path, dtype="float16", device="auto")
    assert (on_gpu.device, on_gpu.dtype, on_gpu.notes) == ("cuda", "float16", ())


def test_a_size_without_calibration_is_remarked(tmp_path):
    (note,) = plan(tmp_path, qformat="int8_wo", calib_size=8).notes
    assert note == "--qformat int8_wo needs no calibration; --calib_size is ignored"


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            {"group_size": 64},
            "--group_size 64 belongs to int4_awq, int4_wo, int4_gptq, not to --qformat fp8",
        ),
        (
            {"export_path": "x.pt"},
            "--export_path x.pt is not what --qformat fp8 writes; name a .npz file or a directory",
        ),
        (
            {"qformat": "int8_sq", "export_path": "x.npz"},
            "x.npz is not what --qformat int8_sq writes; name a directory",
        ),
        ({"device": "cuda"}, "--device cuda: no GPU that torch can use was found; use --device"),
    ],
)
def test_refusals(tmp_path, monkeypatch, flags, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=message):
        plan(tmp_path, **flags)


def test_a_directory_in_use_is_not_written_into(tmp_path):
    (tmp_path / "used").mkdir()
    flags = {"qformat": "int8_wo", "export_path": str(tmp_path / "used")}
    assert plan(tmp_path, **flags).output == tmp_path / "used"
    (tmp_path / "used" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="used exists and is not an empty directory; .* name a new"):
        plan(tmp_path, **flags)


def test_without_modelopt(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--qformat fp8 needs NVIDIA ModelOpt, .*'pip install nv"):
        plan(tmp_path)
    assert plan(tmp_path, qformat="int4_gptq").format.is_grouped
