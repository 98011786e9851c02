"""The README's commands, run as they are written, in order, in one shell."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ROOT
from tests.mpi import SETTINGS

PROMPT = "The module provides"


def commands() -> str:
    return "\n".join(
        re.findall(r"^```bash\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    )


@pytest.mark.slow
@pytest.mark.mpi
def test_commands_run_as_written(tmp_path):
    for path in ROOT.iterdir():
        if path.name[0] != "." and path.name not in ("trtllm_models", "engine_outputs"):
            (tmp_path / path.name).symlink_to(path)
    bin_folder = Path(sys.executable).parent
    environment = {**os.environ, **SETTINGS, "PATH": f"{bin_folder}:{os.environ['PATH']}"}
    script = f"set -e\nexec 2>&1\n{commands()}"
    shell = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert shell.returncode == 0, shell.stdout[-3000:]
    assert "DUMMY" in shell.stdout
    engines = tmp_path / "trtllm_models"
    files = {
        path.name: len(list(path.glob("*.engine"))) for path in engines.iterdir() if path.is_dir()
    }
    assert files == {"yi_tp1_pp1": 1, "yi_tp4": 4, "yi_tp2_pp2": 4, "yi_beams": 1, "dummy": 1}
    # One rank, four ranks and two times two: each answers the same prompt.
    assert shell.stdout.count(f'Input [Text 0]: "{PROMPT}"') == 3
    texts = re.findall(
        rf'Input \[Text 0\]: "{PROMPT}"\nOutput \[Text 0 Beam 0\]: "(.{{20}})', shell.stdout, re.S
    )
    assert len(texts) == 3
    ids = np.load(engines / "out.npy")
    rows = np.loadtxt(engines / "out.csv", delimiter=",", ndmin=2)
    assert ids.reshape(rows.shape).tolist() == rows.tolist()
