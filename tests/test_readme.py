"""The README's commands, run as they are written, in order, in one shell: the old workflow's from
checkpoint to summary, each with a look at what it made.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from engine.backends import open_engine
from engine.comm import open_world
from tests.conftest import ROOT
from tests.golden.truth import TINY_YI, heldout_tokens, load_model, score
from tests.mpi import SETTINGS, calling, run_ranks
from utils.evaluation.perplexity import cut_windows, perplexity, sum_likelihood

pytestmark = [pytest.mark.slow, pytest.mark.mpi]

PROMPT = "The module provides"


def commands() -> str:
    return "\n".join(
        re.findall(r"^```bash\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    )


# Engine directory → ranks, and how much perplexity it may lose against the fp32 model, per cent.
ENGINES = {
    "yi_tp1_pp1": (1, 0.5),
    "yi_tp4": (4, 0.5),
    "yi_tp2_pp2": (4, 0.5),
    "yi_beams": (1, 0.5),
    "int8": (1, 1.0),
    "int4": (1, 8.0),
    "int8_kv_cache_weight_only": (1, 1.5),
    "sq_per_tensor": (1, 3.0),
    "sq_per_token_channel": (1, 1.5),
    "fp8_tp2": (2, 1.5),
    "awq_int8_kv_cache": (1, 8.0),
    "gptq": (1, 8.0),
    "dummy": (1, None),
}
TOKENS = 6000


class Shell(NamedTuple):
    folder: Path
    output: str


@pytest.fixture(scope="module")
def shell(tmp_path_factory) -> Shell:
    """The commands' folder and what they printed."""
    folder = tmp_path_factory.mktemp("readme")
    made = ("trtllm_models", "engine_outputs", "yi", "quantized_fp8")
    for path in ROOT.iterdir():
        if path.name[0] != "." and path.name not in made:
            (folder / path.name).symlink_to(path)
    bin_folder = Path(sys.executable).parent
    environment = {**os.environ, **SETTINGS, "PATH": f"{bin_folder}:{os.environ['PATH']}"}
    finished = subprocess.run(
        ["bash", "-c", f"set -e\nexec 2>&1\n{commands()}"],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert finished.returncode == 0, finished.stdout[-3000:]
    return Shell(folder, finished.stdout)


def test_every_engine_is_there(shell):
    assert "DUMMY" in shell.output
    engines = shell.folder / "trtllm_models"
    files = {
        path.name: len(list(path.glob("*.engine"))) for path in engines.iterdir() if path.is_dir()
    }
    assert files == {name: ranks for name, (ranks, _) in ENGINES.items()}


def test_every_layout_of_ranks_answers(shell):
    """One rank, four ranks and two times two: each answers the same prompt, with the same text."""
    assert shell.output.count(f'Input [Text 0]: "{PROMPT}"') == 3
    texts = re.findall(
        rf'Input \[Text 0\]: "{PROMPT}"\nOutput \[Text 0 Beam 0\]: "(.{{20}})', shell.output, re.S
    )
    assert len(texts) == 3
    assert len(set(texts)) == 1, "bf16 sums in another order may part later, not this early"


def test_token_ids_are_written(shell):
    engines = shell.folder / "trtllm_models"
    ids = np.load(engines / "out.npy")
    rows = np.loadtxt(engines / "out.csv", delimiter=",", ndmin=2)
    assert ids.reshape(rows.shape).tolist() == rows.tolist()


@pytest.fixture(scope="module")
def exact_perplexity() -> float:
    """What transformers gives in fp32, in the windows that engines get."""
    model, tokens = load_model(TINY_YI), heldout_tokens()[:TOKENS]
    windows = cut_windows(tokens)
    return sum_likelihood(
        lambda group: [score(model, ids) for ids in group], windows, model.config.vocab_size
    ).perplexity


@pytest.mark.parametrize(
    "name, ranks, loss",
    [(name, ranks, loss) for name, (ranks, loss) in ENGINES.items() if loss is not None],
)
def test_every_engine_is_as_good_as_its_mode(shell, exact_perplexity, tmp_path, name, ranks, loss):
    found, answer = shell.folder / "trtllm_models" / name, tmp_path / "perplexity"
    if ranks == 1:
        measure(str(found), str(answer))
    else:
        finished = run_ranks(ranks, calling(measure, str(found), str(answer)), timeout=300)
        assert finished.returncode == 0, finished.stderr
    change = 100 * (float(answer.read_text()) / exact_perplexity - 1)
    assert -loss < change < loss


def measure(engine_dir: str, answer: str) -> None:
    """What every rank runs; rank 0 writes."""
    world = open_world()
    session = open_engine(engine_dir, world, device="cpu")
    value = perplexity(session, heldout_tokens()[:TOKENS])
    if world.rank == 0:
        Path(answer).write_text(str(value))


def test_the_summary_compares_both_sides(shell):
    rows = re.findall(r"^\| (\S+) +\| .*\[.*\]", shell.output, re.M)
    assert set(rows) == {"transformers", "int8_kv_cache_weight_only"}
    assert "ROUGE-1" in shell.output and "perplexity" in shell.output


def test_the_benchmark_ends_with_json(shell):
    [document] = [json.loads(line) for line in shell.output.splitlines() if line.startswith('{"')]
    assert document
