"""Launches of engines' sessions that the trace of their builds had not made; nothing is compiled.

    python -m tests.unit.engine.backends.run_recorded ENGINE …

Prints JSON: per engine the number of launches that differ in what Triton compiles for, and the
names of the kernels that were not traced so.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from triton.runtime.jit import JITFunction

from engine.backends import read_record
from engine.backends.trace import Trace
from engine.kernels import gpu
from engine.kernels.triton import _ahead
from engine.sampling import SamplingParams
from tests.unit.engine.backends.run_absent import answer

BATCHES = ((1,), (5,), (3, 19, 7), (40, 300), (100,) * 6, (511, 4), (290, 290))
REQUESTS = (
    SamplingParams(max_new_tokens=8),
    SamplingParams(max_new_tokens=50, top_k=5, temperature=0.8, end_ids=(2, 7)),
    SamplingParams(max_new_tokens=20, top_k=0, repetition_penalty=1.2, log_probs=True),
)

launches: set[tuple[str, str]] = set()


def compile_nothing(self: JITFunction, key: Any, *rest: Any, **options: Any) -> object:
    """In place of Triton's: `key` says all that the launch is compiled for."""
    assert self.cache_key
    launches.add((self.__name__, str(key)))
    return object()


def count(engine: Path) -> tuple[int, list[str]]:
    launches.clear()
    record = read_record(engine)
    traces = [Trace(record, mapping, engine) for mapping in record.mapping.ranks()]
    for trace in traces:
        trace.run()
    traced = set(launches)
    launches.clear()
    for trace in traces:
        for params in REQUESTS:
            answer(trace, BATCHES, params)
    return len(launches), sorted(name for name, _ in launches - traced)


if __name__ == "__main__":
    card = gpu.TARGETS["sm_90"][0]
    gpu.imagine(card)
    _ahead.replace_launches(card)
    JITFunction._do_compile = compile_nothing
    with torch.inference_mode():
        print(json.dumps([count(Path(engine)) for engine in sys.argv[1:]]))
