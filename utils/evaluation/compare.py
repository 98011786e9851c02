"""The order of an evaluation: transformers, then each engine, then what both say where they part.

One model is in memory at a time. Engines are told transformers' answers, so that they can keep
their own logits at the first token that differs; transformers is loaded once more for its.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from engine.comm import World
from engine.errors import EngineError
from utils import log
from utils.evaluation.agreement import summarise_agreement
from utils.evaluation.engine_run import EngineJob, parting_context, run_engine, run_in_own_job
from utils.evaluation.judge import Judge
from utils.evaluation.memory import release_memory
from utils.evaluation.plan import EvaluationPlan
from utils.evaluation.prepare import Prepared, prepare
from utils.evaluation.task import Ids, Outcome
from utils.metrics import Rouge
from utils.request import on_root
from utils.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor


class Comparison:
    """One run of an evaluation; every rank makes one and calls `run`."""

    def __init__(self, plan: EvaluationPlan, world: World, log_level: str):
        self._plan, self._world, self._log_level = plan, world, log_level
        self._tokenizer: Tokenizer | None = None
        self._rouge: Rouge | None = None
        if world.rank != 0:
            world.rest()
        self.prepared: Prepared = on_root(world, self._prepare)

    def _prepare(self) -> Prepared:
        """Rank 0 alone has a tokenizer and scores; the others rest meanwhile."""
        try:
            self._tokenizer, prepared = prepare(self._plan)
            self._check_world(prepared)
            if self._plan.has_references:
                self._rouge = Rouge()
            return prepared
        finally:
            self._world.rest()

    def _check_world(self, prepared: Prepared) -> None:
        """Several engines get jobs of their own; a single one needs its ranks here."""
        if len(prepared.records) != 1:
            return
        ranks, engine_dir = prepared.records[0].mapping.world, self._plan.engine_dirs[0]
        if ranks != self._world.size:
            launch = f"mpirun -n {ranks} python" if ranks > 1 else "python"
            raise EngineError(
                f"--engine_dir {engine_dir} was built for {ranks} rank{'s' * (ranks > 1)} and "
                f"{self._world.size} {'are' if self._world.size > 1 else 'is'} running; start it "
                f"as: {launch} summarize.py --engine_dir {engine_dir} …"
            )

    def run(self) -> list[Outcome]:
        """transformers' outcome, if it is tested, then the engines'; texts, scores and agreement
        are known on rank 0 only."""
        reference = self._run_hf() if self._plan.hf is not None else None
        engines = [
            self._run_engine(place, reference) for place in range(len(self._plan.engine_dirs))
        ]
        if reference is not None and self._world.rank == 0 and self._is_comparable:
            engines = self._compare(reference, engines)
        self._world.rest()
        return [*([] if reference is None else [reference]), *engines]

    @property
    def _is_comparable(self) -> bool:
        """Answers drawn at random by two generators are not expected to agree."""
        return bool(self.prepared.task.cases) and not self.prepared.task.rules.is_random

    def _run_hf(self) -> Outcome:
        """transformers' outcome, on every rank."""
        outcome = None
        if self._world.rank == 0:
            from utils.evaluation import hf_run

            with self._judge(hf_run.NAME) as judge:
                found = hf_run.run_hf(self._plan, self.prepared, judge.see)
            outcome = _judged(found, judge)
        self._world.rest()
        return self._world.bcast(outcome)

    def _run_engine(self, place: int, reference: Outcome | None) -> Outcome:
        job = EngineJob(
            engine_dir=self._plan.engine_dirs[place],
            name=short_names(self._plan.engine_dirs)[place],
            task=self.prepared.task,
            references=reference.answers if reference and self._is_comparable else None,
            device=self._plan.device,
            max_attention_window=self._plan.max_attention_window,
            tuning=self._plan.tuning,
            may_share_gpu=self._plan.may_share_gpu,
        )
        if len(self._plan.engine_dirs) > 1:
            ranks = self.prepared.records[place].mapping.world
            log.info(f"evaluating {job.engine_dir} on {ranks} rank{'s' * (ranks > 1)}")
            outcome = run_in_own_job(job, ranks, self._log_level)
            with self._judge(job.name) as judge:
                judge.see(outcome.answers)
            return _judged(outcome, judge)
        if self._world.rank != 0:
            return run_engine(job, self._world, lambda answers: None)
        with self._judge(job.name) as judge:
            outcome = run_engine(job, self._world, judge.see)
        return _judged(outcome, judge)

    def _judge(self, name: str) -> Judge:
        assert self._tokenizer is not None
        return Judge(name, self.prepared.task.cases, self._tokenizer, self._rouge)

    def _compare(self, reference: Outcome, engines: list[Outcome]) -> list[Outcome]:
        """The engines' outcomes with their agreement; rank 0 only."""
        contexts = {
            (place, divergence): parting_context(self.prepared.task, engine.answers, divergence)
            for place, engine in enumerate(engines)
            for divergence in engine.parting_logits
        }
        known = self._reference_logits(set(contexts.values()))
        return [
            replace(
                engine,
                agreement=summarise_agreement(
                    engine.answers,
                    reference.answers,
                    parting=engine.parting_logits,
                    reference_parting={
                        divergence: known[context]
                        for (owner, divergence), context in contexts.items()
                        if owner == place
                    },
                ),
            )
            for place, engine in enumerate(engines)
        ]

    def _reference_logits(self, contexts: set[Ids]) -> dict[Ids, Tensor]:
        if not contexts:
            return {}
        from utils.evaluation import hf_run

        release_memory()
        return hf_run.next_logits(self._plan, self.prepared, sorted(contexts))


def _judged(outcome: Outcome, judge: Judge) -> Outcome:
    return replace(outcome, texts=tuple(judge.texts), scores=tuple(judge.scores))


def short_names(folders: tuple[str, ...]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = [Path(folder).resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(own[-length:]) for own in parts]
        if len(set(names)) == len(names):
            return names
    return list(folders)
