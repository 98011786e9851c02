"""Questions to an engine and its answers, in this process or on ranks of their own."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.backends import open_engine
from engine.comm import open_world
from engine.sampling import SamplingParams
from engine.session import Session
from tests.mpi import calling, run_ranks

# Relative errors, in norm over the vocabulary, of fp32 logits that add up in another order.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Question:
    """Prompts with the fields of one SamplingParams each; `score` asks for logits instead."""

    prompts: list[list[int]]
    params: list[dict[str, Any]]
    score: bool = False


def question(prompts: Sequence[Sequence[int]], score: bool = False, **fields: Any) -> Question:
    """One that asks the same of every prompt."""
    return Question(list(map(list, prompts)), [fields] * len(prompts), score)


@dataclass(frozen=True)
class Answers:
    """Per prompt: each beam's tokens and log probability, logits fp32 [S, V] of a prompt that was
    scored or [N, V] of the new tokens."""

    tokens: list[list[list[int]]]
    log_probs: list[list[float | None]]
    logits: list[Tensor]

    @property
    def best(self) -> list[list[int]]:
        return [beams[0] for beams in self.tokens]


def ask(session: Session, asked: Question) -> Answers:
    if asked.score:
        return Answers([], [], session.score(asked.prompts))
    params = [SamplingParams(**fields) for fields in asked.params]
    results = session.generate(asked.prompts, params, generation_logits=params[0].num_beams == 1)
    assert [result.prompt_index for result in results] == list(range(len(results)))
    return Answers(
        [[list(beam.tokens) for beam in result.beams] for result in results],
        [[beam.cum_log_prob for beam in result.beams] for result in results],
        [result.generation_logits for result in results if result.generation_logits is not None],
    )


def ask_ranks(
    ranks: int, engine_dir: Path, asked: dict[str, Question], folder: Path, device: str
) -> dict[str, Answers]:
    """Every question, put to an engine under one mpirun; `folder` is for files in between."""
    questions, answers = folder / "questions.json", folder / "answers.pt"
    questions.write_text(json.dumps({name: asdict(one) for name, one in asked.items()}))
    argv = calling(answer, str(engine_dir), str(questions), str(answers), device)
    finished = run_ranks(ranks, argv, timeout=300)
    assert finished.returncode == 0, finished.stderr
    saved = torch.load(answers, weights_only=True)
    return {name: Answers(**fields) for name, fields in saved.items()}


def answer(engine_dir: str, questions: str, answers: str, device: str) -> None:
    """What every rank runs; rank 0 writes, after all of them got the same tokens."""
    world = open_world()
    session = open_engine(engine_dir, world, device=device)
    asked = json.loads(Path(questions).read_text())
    found = {name: ask(session, Question(**fields)) for name, fields in asked.items()}
    everywhere = world.all_gather({name: one.tokens for name, one in found.items()})
    assert all(tokens == everywhere[0] for tokens in everywhere)
    if world.rank == 0:
        torch.save({name: vars(one) for name, one in found.items()}, answers)


def relative_error(x_NV: Tensor, truth_NV: Tensor) -> float:
    """The largest over rows, each in norm; rows in which the engine gave no token are left out."""
    assert x_NV.shape == truth_NV.shape, (x_NV.shape, truth_NV.shape)
    errors = (x_NV.double() - truth_NV.double()).norm(dim=-1) / truth_NV.double().norm(dim=-1)
    return errors.max().item()


def assert_close(found: Iterable[Tensor], truth: Iterable[Tensor]) -> None:
    errors = [relative_error(x, y) for x, y in zip(found, truth, strict=True)]
    assert errors and max(errors) < TOLERANCE, errors
