"""Measuring one engine: open it, time its workloads, and relate them to the device's limits.

Every rank calls these alike and gets the same figures, but for those of its own clock.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import torch

from engine.backends import open_engine, read_record
from engine.backends.torch_engine import pick_device
from engine.comm import World
from engine.engine_file import map_tensors
from engine.errors import UserError
from engine.record import EngineRecord
from engine.session import Session
from engine.threads import share_threads
from utils.benchmarking.figures import derive, product_kind
from utils.benchmarking.limits import Limits, combine, measure_limits
from utils.benchmarking.timing import generate_all, time_latency, time_throughput
from utils.benchmarking.traffic import Traffic, rank_traffic
from utils.benchmarking.workload import Workload
from utils.evaluation.memory import PeakMemory

# Tokens of the prompt that is answered right after loading, or fewer if the engine takes fewer.
FIRST_PROMPT = 16


@dataclass(frozen=True)
class Device:
    """Where a rank computes, with how many CPU threads, and what all ranks' devices can do."""

    torch_device: torch.device
    threads: int
    limits: Limits


@dataclass(frozen=True)
class EngineRun:
    """An open engine. Times in seconds: opening it, and then the first token of a short prompt.

    What is measured comes as figures by the names that a record keeps them under.
    """

    session: Session
    world: World
    device: Device
    traffic: Traffic
    memory: PeakMemory
    load_s: float
    first_answer_s: float

    @property
    def record(self) -> EngineRecord:
        return self.session.info

    def latency(self, work: Workload, *, repeats: int) -> dict[str, Any]:
        self._require_room(work)
        timed = time_latency(self.session, work, repeats=repeats)
        record = self.record
        figures = derive(
            timed,
            work,
            config=record.config,
            traffic=self.traffic,
            limits=self.device.limits,
            kind=product_kind(record.quant, record.dtype, self.device.torch_device.type),
        )
        return figures.to_dict() | self._costs()

    def throughput(self, work: Workload, *, requests: int, repeats: int) -> dict[str, Any]:
        """Requests, all there from the start, in batches of `work.batch`."""
        self._require_room(work)
        seconds = time_throughput(self.session, work, requests=requests, repeats=repeats)
        figures = {
            "requests": requests,
            "whole_s": seconds,
            "requests_per_s": requests / seconds,
            "tokens_per_s": requests * work.output_len / seconds,
            "total_tokens_per_s": requests * (work.input_len + work.output_len) / seconds,
        }
        return figures | self._costs()

    def _costs(self) -> dict[str, Any]:
        """Memory is that of the rank which took most, since the engine was opened."""
        self.memory.update()
        peaks = [peak for peak in self.world.all_gather(self.memory.bytes) if peak is not None]
        return {
            "peak_memory_bytes": max(peaks, default=None),
            "load_s": self.load_s,
            "first_answer_s": self.first_answer_s,
        }

    def _require_room(self, work: Workload) -> None:
        """The session would split a larger batch, which is then no static batch."""
        most = self.record.limits.max_batch_size
        if work.batch > most:
            raise UserError(
                f"--batch_size {work.batch} exceeds the engine's --max_batch_size {most}; measure "
                "smaller batches or build with a larger limit"
            )


def open_device(name: str | None, world: World, *, may_share_gpu: bool = True) -> Device:
    """Measures the limits; the ranks do so at the same time."""
    device = pick_device(name, world)
    if not may_share_gpu:
        world.refuse_shared_gpus(device)
    threads = share_threads(world)
    world.barrier()
    limits = combine(world.all_gather(measure_limits(device)))
    return Device(device, threads, limits)


@contextmanager
def open_run(
    engine_dir: str, world: World, device: Device, *, tuning: bool = False
) -> Iterator[EngineRun]:
    """With `tuning` kernels are measured before, in a session of their own."""
    if tuning and device.torch_device.type == "cuda":
        open_engine(engine_dir, world, device=device.torch_device.type, tuning=True)
    with PeakMemory(on_gpu=device.torch_device.type == "cuda") as memory:
        start = time.perf_counter()
        session = open_engine(engine_dir, world, device=device.torch_device.type)
        loaded = time.perf_counter()
        generate_all(session, [[0] * min(FIRST_PROMPT, session.info.limits.max_input_len)], 1)
        answered = time.perf_counter()
        yield EngineRun(
            session=session,
            world=world,
            device=device,
            traffic=engine_traffic(engine_dir, world)[1],
            memory=memory,
            load_s=loaded - start,
            first_answer_s=answered - loaded,
        )


def engine_traffic(engine_dir: str, world: World) -> tuple[EngineRecord, Traffic]:
    """The record of an engine directory, and the traffic of all its ranks together."""
    record = read_record(engine_dir)
    mapping = record.mapping.at(world.rank)
    file = Path(engine_dir) / record.files[mapping.rank].name
    sizes = {name: tensor.nbytes for name, tensor in map_tensors(file).items()}
    own = rank_traffic(sizes, record.config, mapping, record.dtype, record.quant)
    return record, reduce(add, world.all_gather(own))
