"""Evaluating the checkpoint with transformers, on rank 0 while the others rest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from engine.comm import World
from engine.threads import share_threads
from utils.evaluation.hf_side import HfSide, load_model
from utils.evaluation.measure import Watch, measure
from utils.evaluation.memory import PeakMemory, release_memory
from utils.evaluation.plan import EvaluationPlan
from utils.evaluation.prepare import Prepared
from utils.evaluation.task import Ids, Outcome

if TYPE_CHECKING:
    from torch import Tensor

NAME = "transformers"


def run_hf(plan: EvaluationPlan, prepared: Prepared, watch: Watch) -> Outcome:
    """One rank's work; gives an outcome without texts and scores."""
    assert plan.hf is not None
    task = prepared.task
    on_gpu = _is_on_gpu(plan)
    measured = likelihood = None
    with PeakMemory(on_gpu=on_gpu) as memory, _open(plan, prepared) as side:
        if task.windows:
            likelihood = side.likelihood(task.windows)
        if task.cases:
            measured = measure(side, task, watch)
    return Outcome(
        name=NAME,
        mode=plan.hf.dtype,
        is_reference=True,
        answers=measured.answers if measured else (),
        likelihood=likelihood,
        speed=measured.speed if measured else None,
        memory=memory.bytes,
        threads=torch.get_num_threads(),
        device=torch.cuda.get_device_name() if on_gpu else "cpu",
    )


def next_logits(
    plan: EvaluationPlan, prepared: Prepared, contexts: Iterable[Ids]
) -> dict[Ids, Tensor]:
    """fp32 [V] after each context; the model is loaded again, since engines had the memory."""
    with _open(plan, prepared) as side:
        return {context: side.next_logits(context) for context in contexts}


@contextmanager
def _open(plan: EvaluationPlan, prepared: Prepared) -> Iterator[HfSide]:
    assert plan.hf is not None and prepared.hf_dir is not None
    # As many threads as an engine of one rank has.
    share_threads(World())
    side = HfSide(
        load_model(
            prepared.hf_dir,
            dtype=plan.hf.dtype,
            device="cuda" if _is_on_gpu(plan) else "cpu",
            device_map_auto=plan.hf.device_map_auto,
            trust_remote_code=plan.hf.trust_remote_code,
        ),
        prepared.task.rules,
    )
    try:
        yield side
    finally:
        del side
        release_memory()


def _is_on_gpu(plan: EvaluationPlan) -> bool:
    return plan.device != "cpu" and torch.cuda.is_available()
