"""Engines built through TensorRT-LLM's unified checkpoint are those built directly, bit by bit, for
every mode that the checkpoint has: so their logits are, too. Two exceptions are the format's."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.quality import MODEL, MODES
from tests.cli.build_runner import run_here

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

# GPTQ's bytes are the library's own, and its FP8 has no scales at run time.
WITHOUT_FORM = ("GPTQ", "scales at run time")
NAMES = [name for name in MODES if not any(words in name for words in WITHOUT_FORM)]
# Of the checkpoint; tests/cli/test_export.py has others.
LAYOUT = ("--tp_size", "2", "--pp_size", "2")


def run(*flags: str) -> None:
    finished = run_here(*flags, "--log_level", "error")
    assert finished.status == 0, finished.stderr


def arrays(folder: Path) -> dict[str, Tensor]:
    [path] = folder.glob("*.engine")
    return {n: t for n, t in load_file(path).items() if not n.startswith("_pad.")}


@pytest.mark.parametrize("name", NAMES)
def test_round_trip(name, workshop, tmp_path):
    mode = MODES[name]
    places = {need: workshop.calibrate(need) for need in mode.needs}
    flags = shlex.split(mode.flags.format(model=MODEL, **places))
    dtype = flags[flags.index("--dtype") + 1]
    exported = str(tmp_path / "unified")
    run(*flags, "--export_checkpoint", exported, *LAYOUT)
    through = ("--dtype", dtype, "--output_dir", str(tmp_path / "engine"))
    run("--checkpoint_dir", exported, *through)
    ours, theirs = arrays(workshop.build(name)), arrays(tmp_path / "engine")
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        if key.endswith(".kv_scale"):
            # TensorRT-LLM has one scale for keys and values of all heads.
            assert torch.equal(theirs[key], tensor.max().expand_as(tensor)), key
        elif key.endswith(".pre_scale"):
            # AWQ's factor of the input has the model's dtype; a mean of three needs more digits.
            assert torch.equal(theirs[key], tensor.to(getattr(torch, dtype)).float()), key
        else:
            assert torch.equal(theirs[key].view(torch.uint8), tensor.view(torch.uint8)), key
