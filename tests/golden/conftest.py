"""Fixtures of the golden tests: engines built once, the devices there are, tiny-yi's truth."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks.quality import Workshop
from engine.backends import open_engine
from engine.comm import World
from engine.session import Session
from tests.cli.build_runner import run_here
from tests.golden import truth
from tests.golden.truth import TINY_YI, Answer

Build = Callable[..., Path]
Open = Callable[..., Session]

# Unequal, across the sizes of cache blocks, and not sorted.
LENGTHS = (
    21, 1, 64, 300, 2, 13, 89, 5, 128, 34, 3, 277, 55, 17, 8, 100, 65, 47, 144, 30, 200, 233,
)  # fmt: skip
NEW_TOKENS = 64
NUM_SCORED = 8
HAS_GPU = torch.cuda.is_available()
LIMITS = ("--max_input_len", "512", "--max_output_len", "64", "--gather_all_token_logits")


@pytest.fixture(
    scope="session",
    params=[
        "cpu",
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="there is no GPU")],
        ),
    ],
)
def device(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Small matrices gain nothing from threads, which lose much on busy machines."""
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def build(tmp_path_factory) -> Iterator[Build]:
    """build(checkpoint, *flags): the engine directory, fp32 unless flags say otherwise; made once
    per session and removed after it."""
    base = tmp_path_factory.mktemp("engines")

    @cache
    def build(checkpoint: Path, *flags: str) -> Path:
        folder = base / str(len(list(base.iterdir())))
        where = ("--model_dir", checkpoint, "--output_dir", folder)
        finished = run_here(*where, "--dtype", "float32", *LIMITS, *flags)
        assert finished.status == 0, finished.stderr
        return folder

    yield build
    shutil.rmtree(base)


@pytest.fixture(scope="session")
def open_built(build) -> Open:
    """open_built(checkpoint, *flags, device=…, max_attention_window=…): a session of one rank."""

    def open_built(
        checkpoint: Path,
        *flags: str,
        device: str = "cpu",
        max_attention_window: int | None = None,
    ) -> Session:
        return open_engine(
            build(checkpoint, *flags),
            World(),
            device=device,
            max_attention_window=max_attention_window,
        )

    return open_built


@pytest.fixture(scope="session")
def workshop(tmp_path_factory) -> Workshop:
    """Calibrations and engines of every mode, each made once per session."""
    return Workshop(tmp_path_factory.mktemp("quality"))


class TinyTruth(NamedTuple):
    """Greedy answers of tiny-yi in fp32, and logits fp32 [S, V] of its first prompts."""

    prompts: list[list[int]]
    answers: list[Answer]
    scores: list[Tensor]

    @property
    def tokens(self) -> list[list[int]]:
        return [answer.tokens for answer in self.answers]

    @property
    def logits(self) -> list[Tensor]:
        return [answer.logits_NV for answer in self.answers]


@pytest.fixture(scope="session")
def tiny() -> TinyTruth:
    prompts = truth.cut_prompts(LENGTHS)
    model = truth.load_model(TINY_YI)
    answers = [truth.continue_greedily(model, p, NEW_TOKENS, truth.END_IDS) for p in prompts]
    assert min(answer.margin for answer in answers) > truth.LEAST_MARGIN
    return TinyTruth(prompts, answers, [truth.score(model, p) for p in prompts[:NUM_SCORED]])
