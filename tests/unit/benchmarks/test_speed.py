"""README's speed tables come from the records, and stay what the records say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import allreduce, cpu_step, gpu, speed
from benchmarks.marks import read_between, write_between
from engine.errors import UserError
from engine.kernels.native import compiled

README = Path(__file__).resolve().parents[3] / "README.md"


def record(**changes: Any) -> dict[str, Any]:
    return {
        "task": "latency", "model": "yi-6b", "mode": "none", "dtype": "bfloat16", "tp": 1,
        "pp": 1, "bs": 1, "isl": 1024, "osl": 128, "decode_tokens_per_s": 203.04, "share": 0.786,
        "first_token_s": 0.0327, "prefill_share": 0.456, "device": "NVIDIA X", "threads": 4,
        "date": "2026-11-25", "versions": {"torch": "2.11.0"},
        "limits": {"device": "cuda", "copy": 3.01e12, "read": 3.1e12,
                   "products": {"bfloat16": 7.8e14}},
        **changes,
    }  # fmt: skip


def test_the_last_record_of_a_workload_counts(tmp_path: Path) -> None:
    old, new = record(decode_tokens_per_s=1.0), record(peers={
        "transformers": {"setup": "transformers 5.17.0, bfloat16, compiled", "decode_ratio": 2.613,
                         "prefill_ratio": None},
        "vllm": {"absent": "not installed"},
    })  # fmt: skip
    other = record(mode="w8a16", task="throughput")
    (tmp_path / "x.json").write_text(json.dumps([old, other, new]))
    heading, _, _, _, row = speed.tables(tmp_path).splitlines()
    assert heading.startswith("**NVIDIA X** (2026-11-25, torch 2.11.0): 3,010 GB/s")
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == [
        "yi-6b", "bfloat16", "1", "1024/128", "203.0", "79", "33", "46",
        "transformers compiled: 2.61 / –",
    ]  # fmt: skip


def test_readme_shows_the_records() -> None:
    assert read_between(README, speed.MARK) == speed.tables()


def test_a_file_without_the_marks_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    with pytest.raises(UserError, match="page.md cannot be read .*; name a Markdown file"):
        write_between(path, "x", "new")
    path.write_text("nothing")
    with pytest.raises(UserError, match="page.md has no lines '<!-- x: begin -->' and"):
        write_between(path, "x", "new")
    assert path.read_text() == "nothing"


def test_text_between_marks_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text("a\n<!-- x: begin -->\nold\n<!-- x: end -->\nb\n")
    write_between(path, "x", "new\nlines")
    assert path.read_text() == "a\n<!-- x: begin -->\nnew\nlines\n<!-- x: end -->\nb\n"
    assert read_between(path, "x") == "new\nlines"


def test_what_cannot_be_measured_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--one_shot is for GPUs; add --device cuda"):
        allreduce.main(["--one_shot"])
    nowhere = "/proc/nowhere"
    with pytest.raises(UserError, match="--out /proc/nowhere cannot be made .*; choose another"):
        gpu.main(["--out", nowhere, "--steps", "limits"])
    with pytest.raises(UserError, match="--work_dir /proc/nowhere cannot be written .*; name a"):
        cpu_step.main(["--layers", "1", "--work_dir", nowhere])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cuda: no usable GPU was found"):
        allreduce.main(["--device", "cuda"])
    monkeypatch.setattr(compiled, "load", lambda name: None)
    with pytest.raises(UserError, match="cpu_step measures compiled kernels; install a C"):
        cpu_step.main(["--layers", "1"])
