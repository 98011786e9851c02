from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine.config import ModelConfig
from engine.errors import UserError
from engine.quant import Algorithm, QuantConfig
from utils.quantisation import checks
from utils.quantisation.plan import Calibration, QuantisePlan

YI_6B = ModelConfig()


def check(folder: Path, qformat: str, *, config: ModelConfig = YI_6B, quant=None, group: int = 0):
    plan = QuantisePlan(
        model_name="yi",
        model_dir=folder,
        qformat=qformat,
        dtype="bfloat16",
        build_dtype="bfloat16",
        device="cpu",
        group_size=group,
        calibration=Calibration(None, None, 1, 1, 1, None),
        output=folder / "new" / "file",
    )
    checks.check(SimpleNamespace(config=config, quant=quant), plan)


@pytest.fixture
def machine(monkeypatch):
    """machine(memory, disk) has that many GB free."""

    def set_free(memory: float, disk: float = 1000) -> None:
        monkeypatch.setattr(checks, "available_memory", lambda device: int(memory * 1e9))
        usage = SimpleNamespace(free=int(disk * 1e9))
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)

    return set_free


def test_memory_names_both_sizes(tmp_path, machine):
    """Yi-6B has 6.06e9 weights, so 12.1 GB in bfloat16 and a tenth more to calibrate."""
    machine(13.4)
    check(tmp_path, "fp8")
    machine(13.0)
    message = "fp8 holds the whole model in bfloat16, about 13.3 GB, and 13.0 GB of memory is free"
    with pytest.raises(UserError, match=message):
        check(tmp_path, "fp8")
    check(tmp_path, "int4_gptq", group=128)


def test_disk_names_both_sizes(tmp_path, machine):
    machine(1000, 12.2)
    check(tmp_path, "int4_awq", group=128)
    machine(1000, 0.5)
    check(tmp_path, "fp8")
    with pytest.raises(UserError, match="has 0.50 GB free and the result needs about 12.12 GB"):
        check(tmp_path, "int4_awq", group=128)


def test_a_quantised_checkpoint(tmp_path, machine):
    machine(1000)
    with pytest.raises(UserError, match=r"--model_dir yi is quantised already \(w8a16\); name the"):
        check(tmp_path, "fp8", quant=QuantConfig(Algorithm.W8A16))


def test_a_width_that_transformers_does_not_take(tmp_path, machine):
    machine(1000)
    config = ModelConfig(hidden_size=128, num_heads=56, num_kv_heads=8)
    with pytest.raises(UserError, match="has the width 128 and 56 heads, .* needs a multiple of"):
        check(tmp_path, "fp8", config=config)


def test_groups(tmp_path, machine):
    machine(1000)
    narrow = ModelConfig(hidden_size=96, num_heads=3, num_kv_heads=1, head_dim=32)
    with pytest.raises(UserError, match="--group_size 64 does not divide the 96 inputs of model"):
        check(tmp_path, "int4_awq", config=narrow, group=64)
    check(tmp_path, "int4_awq", config=narrow, group=32)
    odd = ModelConfig(intermediate_size=64, hidden_size=64, num_heads=1, num_kv_heads=1, head_dim=6)
    with pytest.raises(UserError, match="int4_gptq packs 8 outputs together and .*q_proj has 6"):
        check(tmp_path, "int4_gptq", config=odd, group=32)


def test_the_memory_of_this_machine():
    assert 1 << 20 < checks.available_memory("cpu") < 1 << 50
