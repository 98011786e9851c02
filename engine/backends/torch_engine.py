"""The embedded backend: builds on any machine, runs on CPU and on NVIDIA GPUs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from engine import comm
from engine.backends.ahead import KERNELS_NAME, compile_kernels, use_kernels
from engine.backends.base import BuildPlan, BuildReport
from engine.backends.rank_build import build_in_processes, store_plan, write_ranks
from engine.engine_file import EngineWriter, map_tensors, read_config, verify_file
from engine.errors import EngineError, UserError
from engine.loading import load_tensors
from engine.models.yi import Yi
from engine.plugins import builder_switches, plugin_config, wants_one_shot
from engine.record import EngineRecord
from engine.session import Session
from engine.tactics import CACHE_NAME, complete_tactics, load_tactics, read_cache, write_cache
from engine.threads import share_threads
from engine.weights.convert import stream_pieces
from engine.weights.pack import LAYOUT_VERSION


class TorchBackend:
    """PyTorch execution of engine directories; see `engine.backends.base.Backend`."""

    def build(self, plan: BuildPlan, progress: Callable[[int, int], None]) -> BuildReport:
        started = time.monotonic()
        record = replace(plan.record, layout_version=LAYOUT_VERSION)
        ranks = list(record.mapping.ranks())
        with EngineWriter(plan.output_dir) as writer:
            total = _engine_bytes(plan, record)
            writer.require_space(total)
            if plan.parallel and len(ranks) > 1:
                results = build_in_processes(
                    plan, record, writer.staging, lambda done: progress(done, total)
                )
            else:
                with _spare_core(), plan.open_checkpoint() as checkpoint:
                    results = write_ranks(
                        checkpoint,
                        record,
                        ranks,
                        writer.staging,
                        lambda done: progress(done, total),
                    )
            record = replace(record, files=tuple(result.file for result in results))
            known = read_cache(plan.timing_cache) if plan.timing_cache is not None else {}
            if known:
                write_cache(writer.staging / CACHE_NAME, known)
            if plan.targets:
                kernels = compile_kernels(record, writer.staging, plan.targets, known)
                record = replace(record, kernels=kernels)
            writer.commit(_config_json(plan, record), plan.companions)
            if not plan.targets:
                (plan.output_dir / KERNELS_NAME).unlink(missing_ok=True)
        return BuildReport(
            record=record,
            seconds=time.monotonic() - started,
            peak_rss=max(result.peak_rss for result in results),
            processes=len({result.pid for result in results}),
        )

    def open(
        self,
        engine_dir: Path,
        record: EngineRecord,
        world: comm.World,
        *,
        device: str | None,
        max_attention_window: int | None,
        tuning: bool = False,
        may_share_gpu: bool = True,
    ) -> Session:
        if record.layout_version != LAYOUT_VERSION:
            raise EngineError(
                f"--engine_dir {engine_dir} stores weights in layout {record.layout_version} and "
                f"this program reads layout {LAYOUT_VERSION}; build the engine again"
            )
        chosen = pick_device(device, world)
        if not may_share_gpu:
            world.refuse_shared_gpus(chosen)
        threads = share_threads(world)
        mapping = record.mapping.at(world.rank)
        file = record.files[mapping.rank]
        if chosen.type == "cpu":
            verify_file(engine_dir / file.name, file, threads)
            tensors = map_tensors(engine_dir / file.name)
        else:
            tensors = load_tensors(engine_dir / file.name, file, chosen, threads)
        parallel = world.split(
            mapping.tp, mapping.pp, chosen, one_shot=wants_one_shot(read_config(engine_dir))
        )
        network = Yi(record.config, record.quant, mapping, record.embedding_dim, tensors, parallel)
        if chosen.type == "cuda":
            if record.kernels is not None:
                use_kernels(engine_dir, record.kernels)
            load_tactics(engine_dir, chosen)
            if tuning:
                rows = record.limits.max_batch_size
                complete_tactics(engine_dir, network, world, rows=rows)
        return Session(
            replace(record, mapping=mapping), network, world, parallel, max_attention_window
        )


def pick_device(name: str | None, world: comm.World) -> torch.device:
    """The device of this rank: ranks of a host take its GPUs in turn."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UserError("--device cuda: no usable GPU was found; use --device cpu")
    if name == "cpu" or not available:
        return torch.device("cpu")
    device = torch.device("cuda", world.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


@contextmanager
def _spare_core() -> Iterator[None]:
    """Leave a core to the thread that hashes and writes; torch's threads would wait for it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads - 1))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _engine_bytes(plan: BuildPlan, record: EngineRecord) -> int:
    with plan.open_checkpoint() as checkpoint:
        ranks = list(record.mapping.ranks())
        pieces = stream_pieces(checkpoint, store_plan(record), ranks)
        return sum(piece.nbytes for piece in pieces)


def _config_json(plan: BuildPlan, record: EngineRecord) -> dict[str, Any]:
    builder_config = record.builder_config(parallel_build=plan.parallel)
    return {
        "builder_config": builder_config | builder_switches(plan.switches),
        "plugin_config": plugin_config(plan.switches, record.dtype, record.mapping.tp),
        "engine": record.to_dict(),
    }


backend = TorchBackend()
