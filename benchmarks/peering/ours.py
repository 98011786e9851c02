"""This project's engine as a side of a comparison."""

from __future__ import annotations

import time

from benchmarks.peering.task import Task
from engine.backends import open_engine
from engine.comm import World
from utils.benchmarking.timing import generate_all
from utils.benchmarking.workload import random_prompts


class Ours:
    """See `task.Side`."""

    def __init__(self, task: Task):
        self._session = open_engine(task.engine_dir, World(), device=task.device)
        work, record = task.work, self._session.info
        self._prompts = random_prompts(work.batch, work.input_len, record.config.vocab_size)
        self.setup = f"{record.dtype}, {record.quant}"

    def seconds(self, new_tokens: int) -> float:
        start = time.perf_counter()
        generate_all(self._session, self._prompts, new_tokens)
        return time.perf_counter() - start
