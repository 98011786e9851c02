"""Where Triton kernels are tested: on the GPU, or on the CPU in Triton's interpreter without one.

The interpreter is chosen when Triton is imported, so tests/conftest.py imports this first. It
truncates where a GPU rounds fp32 to bf16; the tolerances of the tests hold both.
"""

from __future__ import annotations

import os
import subprocess
import sys

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IS_INTERPRETED = DEVICE == "cpu"

if IS_INTERPRETED and os.environ.get("TRITON_INTERPRET") != "1":
    assert "triton" not in sys.modules, "Triton was imported before its mode was chosen"
    os.environ["TRITON_INTERPRET"] = "1"


def run_compiled(module: str, *args: str) -> str:
    """Output of `python -m module` in a process where Triton compiles, for a target, without GPU.

    The interpreter replaces the compiler for a whole process."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", module, *args]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return result.stdout
