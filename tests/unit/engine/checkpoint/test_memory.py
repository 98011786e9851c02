"""Peak resident memory of readers, measured in a process of its own on 256 MiB files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.unit.engine.checkpoint.makers import header_file

ROOT = Path(__file__).parents[4]
MIB = 2**20
FILE_BYTES = 256 * MIB

SCRIPT = """
import re, sys
from pathlib import Path
import torch
from engine.checkpoint import safetensors_file, torch_file
torch_file.MAX_MAPPED_BYTES = 32 * 2**20
readers = {".bin": torch_file.TorchFile, ".safetensors": safetensors_file.SafetensorsFile}

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

torch.zeros(4, 4).clone()
for path in map(Path, sys.argv[1:]):
    before = peak()
    for source in readers[path.suffix](path).tensors.values():
        for start in range(0, source.shape[0], 1024):
            source.rows(start, start + 1024)
    print(peak() - before)
"""


def test_blocks_of_big_files(tmp_path):
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    rows, half = FILE_BYTES // 2 // 4096, FILE_BYTES // 2
    torch.save({n: torch.zeros(rows, 2048).bfloat16() for n in "ab"}, tmp_path / "x.bin")
    entry = {"dtype": "BF16", "shape": [rows, 2048]}
    header = {
        "a": {**entry, "data_offsets": [0, half]},
        "b": {**entry, "data_offsets": [half, 2 * half]},
    }
    path = header_file(tmp_path / "x.safetensors", header)
    with path.open("r+b") as file:  # a hole: takes no space on the disk
        file.truncate(path.stat().st_size + FILE_BYTES)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(path), str(tmp_path / "x.bin")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    by_range, mapped = (int(line) for line in done.stdout.split())
    assert by_range < 32 * MIB, f"safetensors: peak grew by {by_range // MIB} MiB"
    # 32 MiB of map, two blocks, and what torch.load imports when it is first called
    assert mapped < FILE_BYTES // 2, f"torch file: peak grew by {mapped // MIB} MiB"
