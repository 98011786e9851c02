"""Writing the rank files of a build: in this process, or one process per rank."""

from __future__ import annotations

import multiprocessing
import os
import re
import resource
import signal
from collections.abc import Callable, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import NamedTuple

import torch

from engine.backends.base import BuildPlan
from engine.checkpoint.base import Checkpoint
from engine.engine_file import FileRecord, RankWriter, rank_file_name
from engine.errors import UserError
from engine.mapping import Mapping
from engine.record import EngineRecord
from engine.weights.convert import Piece, StorePlan, stream_pieces

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
POLL_SECONDS = 0.2


class RankResult(NamedTuple):
    """A finished rank file and the process that wrote it; `peak_rss` in bytes."""

    rank: int
    file: FileRecord
    peak_rss: int
    pid: int


def store_plan(record: EngineRecord) -> StorePlan:
    return StorePlan(
        record.config,
        DTYPES[record.dtype],
        record.quant,
        record.embedding_dim,
        is_dummy=record.is_dummy,
    )


def write_ranks(
    checkpoint: Checkpoint,
    record: EngineRecord,
    ranks: Sequence[Mapping],
    staging: Path,
    progress: Callable[[int], None],
) -> list[RankResult]:
    """Write the files of `ranks` in one pass over the checkpoint; `progress` is told the bytes."""
    pieces = list(stream_pieces(checkpoint, store_plan(record), ranks))
    writers = {mapping.rank: _open_writer(record, mapping, pieces, staging) for mapping in ranks}
    done = 0
    try:
        for piece in pieces:
            writers[piece.rank].write(piece, piece.blocks())
            done += piece.nbytes
            progress(done)
        files = {rank: writer.close() for rank, writer in writers.items()}
    except BaseException:
        for writer in writers.values():
            writer.abandon()
        raise
    peak = peak_rss()
    return [RankResult(rank, file, peak, os.getpid()) for rank, file in files.items()]


def peak_rss() -> int:
    """Bytes of memory this process has held at most.

    Linux's own mark where there is one: getrusage's includes what the parent held at the start.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    [kibibytes] = re.findall(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE)
    return int(kibibytes) * 1024


def build_in_processes(
    plan: BuildPlan, record: EngineRecord, staging: Path, progress: Callable[[int], None]
) -> list[RankResult]:
    """One process per rank, at most one per core at a time; each reads only what its rank needs.

    The first failure ends the others and is raised here.
    """
    context = multiprocessing.get_context("spawn")
    waiting = list(record.mapping.ranks())
    running: dict[Connection, multiprocessing.process.BaseProcess] = {}
    results: list[RankResult] = []
    try:
        while waiting or running:
            while waiting and len(running) < (os.cpu_count() or 1):
                receiver, sender = context.Pipe(duplex=False)
                arguments = (sender, plan, record, waiting.pop(0), staging)
                process = context.Process(target=_build_one, args=arguments, daemon=True)
                start_uninterrupted(process)
                sender.close()
                running[receiver] = process
            for connection in wait(list(running), timeout=POLL_SECONDS):
                results.append(_receive(connection, running.pop(connection)))
            progress(sum(path.stat().st_size for path in staging.iterdir()))
    finally:
        for process in running.values():
            process.terminate()
            process.join()
    return sorted(results)


def start_uninterrupted(process: multiprocessing.process.BaseProcess) -> None:
    """Start a process that Ctrl-C does not reach, not even while it imports.

    The parent answers Ctrl-C for all and terminates its children.
    """
    # The first start would launch the tracker, which unblocks the signal.
    resource_tracker.ensure_running()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _build_one(
    sender: Connection, plan: BuildPlan, record: EngineRecord, mapping: Mapping, staging: Path
) -> None:
    torch.set_num_threads(1)
    try:
        with plan.open_checkpoint() as checkpoint:
            [result] = write_ranks(checkpoint, record, [mapping], staging, lambda done: None)
    except UserError as error:
        sender.send(error)
    else:
        sender.send(result)


def _receive(connection: Connection, process: multiprocessing.process.BaseProcess) -> RankResult:
    try:
        answer = connection.recv()
    except EOFError:
        process.join()
        if process.exitcode == -signal.SIGKILL:
            raise UserError(
                "--parallel_build: a build process was killed, most likely for lack of memory; "
                "build without --parallel_build"
            ) from None
        raise RuntimeError(f"a build process died with status {process.exitcode}") from None
    process.join()
    if isinstance(answer, UserError):
        raise answer
    return answer


def _open_writer(
    record: EngineRecord, mapping: Mapping, pieces: Sequence[Piece], staging: Path
) -> RankWriter:
    name = rank_file_name(record.dtype, mapping.tp, mapping.pp, mapping.rank)
    own = [piece for piece in pieces if piece.rank == mapping.rank]
    metadata = {"format": "yi-engine", "rank": str(mapping.rank)}
    return RankWriter(staging / name, own, metadata)
