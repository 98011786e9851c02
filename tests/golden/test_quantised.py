"""Every quantised mode at every layout of ranks gives the logits of transformers with the same
rounding: weights dequantised by hand, activations and cache rounded in hooks (quant_truth).

An activation that lies between two codes may go to either, since fp32 sums in another order differ
in the last bit; one such step changes a code, and what follows from it. So modes that round at run
time are held to the median over short prompts, and to a loose bound everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import median

import pytest
import torch
from torch import Tensor

from benchmarks.quality import MODES
from engine.backends import open_engine
from engine.comm import World, open_world
from engine.sampling import SamplingParams
from tests.golden.asking import relative_error
from tests.golden.quant_truth import QuantisedTruth
from tests.golden.truth import cut_prompts
from tests.mpi import calling, run_ranks

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

EXACT, LOOSE = 1e-3, 0.15
FULL_PRECISION = ("FP32", "FP16", "BF16")
QUANTISED = [name for name in MODES if name not in FULL_PRECISION]
# What rounds nothing at run time.
WEIGHT_ONLY = (
    "INT8 weight-only",
    "INT4 weight-only",
    "INT4 AWQ, groups of 128",
    "INT4 GPTQ, groups of 128",
)
SCALED_AT_RUN_TIME = tuple(name for name in MODES if "per token" in name or "at run time" in name)
# tiny-yi's down_proj has six groups of 128 and its o_proj two.
LAYOUTS = {
    "tp 2": (2, 1),
    "pp 2": (1, 2),
    "tp 2, pp 2": (2, 2),
}
SHORT = cut_prompts([1 + index % 6 for index in range(18)])
LONG = cut_prompts([40, 75])


Truths = Callable[[str, int], list[Tensor]]


@pytest.fixture(scope="module")
def truths(workshop) -> Truths:
    """truths(mode, tp): logits of every prompt."""

    @cache
    def score(name: str, parts: int) -> list[Tensor]:
        model = QuantisedTruth(workshop.build(name, "--dtype", "float32"), parts)
        return [model.score(prompt) for prompt in SHORT + LONG]

    return lambda name, tp: score(name, tp if name in SCALED_AT_RUN_TIME else 1)


def check(name: str, found: list[Tensor], truth: list[Tensor]) -> None:
    errors = [relative_error(x, y) for x, y in zip(found, truth, strict=True)]
    if name in WEIGHT_ONLY:
        assert max(errors) < EXACT, (name, errors)
        return
    assert median(errors[: len(SHORT)]) < EXACT, (name, errors)
    assert max(errors) < LOOSE, (name, errors)


@pytest.mark.parametrize("name", QUANTISED)
def test_one_rank(name, workshop, truths, device):
    session = open_engine(workshop.build(name, "--dtype", "float32"), World(), device=device)
    check(name, session.score(SHORT + LONG), truths(name, 1))


@pytest.mark.parametrize("name", QUANTISED)
def test_tokens_one_by_one(name, workshop, device):
    """A token that is decoded gets the logits that it gets within a prompt."""
    session = open_engine(workshop.build(name, "--dtype", "float32"), World(), device=device)
    params = [SamplingParams(max_new_tokens=6, end_ids=())] * len(SHORT)
    results = session.generate(SHORT, params, generation_logits=True)
    texts = [
        [*prompt, *result.beams[0].tokens[:-1]]
        for prompt, result in zip(SHORT, results, strict=True)
    ]
    within = [
        logits_SV[len(prompt) - 1 :]
        for prompt, logits_SV in zip(SHORT, session.score(texts), strict=True)
    ]
    check(name, [result.generation_logits for result in results], within)


@pytest.mark.mpi
@pytest.mark.parametrize("tp, pp", LAYOUTS.values(), ids=LAYOUTS)
def test_ranks(tp, pp, workshop, truths, tmp_path, device):
    """All modes under one mpirun: starting ranks takes longer than asking them."""
    flags = ("--dtype", "float32", "--tp_size", str(tp), "--pp_size", str(pp))
    engines = {name: str(workshop.build(name, *flags)) for name in QUANTISED}
    asked, answers = tmp_path / "engines.json", tmp_path / "answers.pt"
    asked.write_text(json.dumps(engines))
    argv = calling(score_engines, str(asked), str(answers), device)
    finished = run_ranks(tp * pp, argv, timeout=600)
    assert finished.returncode == 0, finished.stderr
    found = torch.load(answers, weights_only=True)
    for name in QUANTISED:
        check(name, found[name], truths(name, tp))


def score_engines(asked: str, answers: str, device: str) -> None:
    """What every rank runs; rank 0 writes."""
    world = open_world()
    found = {}
    for name, folder in json.loads(Path(asked).read_text()).items():
        found[name] = open_engine(folder, world, device=device).score(SHORT + LONG)
    if world.rank == 0:
        torch.save(found, answers)
