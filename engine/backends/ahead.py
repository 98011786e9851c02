"""Compiling an engine's kernels for GPUs that are not here: build.py --target.

A process of its own makes the steps of a session (trace.py) where launching a Triton kernel
compiles it. What it leaves out, and what another version of Triton or of a kernel asks for, is
compiled at run time as ever.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import tempfile
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch

from engine import env
from engine.backends.rank_build import start_uninterrupted
from engine.backends.trace import Trace
from engine.engine_file import ChunkDigest, FileRecord, verify_file
from engine.errors import UserError
from engine.kernels import gpu
from engine.kernels.gpu import TARGETS, Gpu
from engine.kernels.triton._tactics import load_tactics
from engine.record import EngineRecord, Kernels
from engine.tactics import Tactics

logger = logging.getLogger("yi.ahead")

KERNELS_NAME = "kernels.zip"


def check_targets(names: Sequence[str]) -> None:
    """Raise UserError for a --target that cannot be compiled for."""
    for name in names:
        if name not in TARGETS:
            raise UserError(
                f"--target {name} is no GPU architecture that kernels are written for; choose "
                f"from {', '.join(TARGETS)}"
            )
    if names and find_spec("triton") is None:
        raise UserError(
            f"--target {' '.join(names)} compiles kernels with Triton, which is not installed; "
            "'pip install triton', or leave the flag out"
        )


def compile_kernels(
    record: EngineRecord, staging: Path, targets: Sequence[str], tactics: dict[str, Tactics]
) -> Kernels:
    """Write KERNELS_NAME beside the rank files in `staging`.

    `tactics` are measured choices by GPU; without any, the candidates that a first run measures
    are compiled, too.
    """
    logger.info("compiling kernels for %s", ", ".join(targets))
    store = import_module("engine.kernels.triton._store")
    with tempfile.TemporaryDirectory(dir=staging) as folder:
        for card in (card for name in targets for card in TARGETS[name]):
            _run_alone(_Job(record, staging, Path(folder), card, tuple(tactics.values())))
        path = staging / KERNELS_NAME
        store.pack(Path(folder), path)
    digest = ChunkDigest()
    digest.update(path.read_bytes())
    file = FileRecord(KERNELS_NAME, path.stat().st_size, digest.hexdigest())
    return Kernels(file, tuple(targets), store.VERSION, store.compiler())


def use_kernels(engine_dir: Path, kernels: Kernels) -> None:
    """Let launches find what the build compiled. EngineError if the file is damaged."""
    if find_spec("triton") is None:
        return
    path = engine_dir / kernels.file.name
    verify_file(path, kernels.file, threads=1)
    import_module("engine.kernels.triton._store").use(path, kernels.compiler)


class _Job(NamedTuple):
    """Kernels of the engine whose rank files are in `staging`, for `card`, into `folder`."""

    record: EngineRecord
    staging: Path
    folder: Path
    card: Gpu
    tactics: tuple[Tactics, ...]


def _run_alone(job: _Job) -> None:
    """In a process of its own: it replaces Triton's driver."""
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_compile, args=(job,), daemon=True)
    try:
        start_uninterrupted(process)
        process.join()
    finally:
        process.terminate()
        process.join()
    if process.exitcode:
        raise RuntimeError(f"compiling kernels ended with status {process.exitcode}")


def _compile(job: _Job) -> None:
    env.leave_interpreter()
    gpu.imagine(job.card)
    ahead = import_module("engine.kernels.triton._ahead")
    ahead.replace_launches(job.card)
    with ahead.compiling_into(job.folder, threads=os.cpu_count() or 1), torch.inference_mode():
        traces = [Trace(job.record, each, job.staging) for each in job.record.mapping.ranks()]
        for trace in traces:
            trace.run()
        for tactics in job.tactics:
            load_tactics(tactics)
            for trace in traces:
                trace.run_decoding()
        if not job.tactics:
            for trace in traces:
                trace.run_candidates()
