"""Steps of an engine on a GPU that is not there: how many kernels its build had compiled.

    python -m tests.unit.engine.backends.run_absent ENGINE CACHE

CACHE is Triton's cache folder. Prints JSON: [kernels found, kernels compiled] of a session as a
user starts it, of one that has measured, and of one with an attention window; then whether there
were launchers for all kernels found.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
import triton
from triton.backends.nvidia.driver import make_launcher

from engine.backends import read_record
from engine.backends.trace import Trace
from engine.comm import World
from engine.kernels import gpu
from engine.kernels.triton import _ahead, _store, _tactics
from engine.sampling import SamplingParams
from engine.session import Session
from engine.tactics import find_cases

# Lengths of prompts that answer together; none is a number of tokens that the build traces.
BATCHES = ((5,), (40,), (3, 19), (33, 29))
REQUEST = SamplingParams(max_new_tokens=8)


class Eager:
    """Instead of graphs, which need a GPU."""

    def __init__(self, network):
        self._network = network

    def clear(self):
        pass

    def prepare(self, loop, cache):
        return loop, partial(loop.advance, self._network, cache)


def answer(
    trace: Trace,
    batches: Sequence[Sequence[int]] = BATCHES,
    params: SamplingParams = REQUEST,
    window: int | None = None,
) -> None:
    """Two decode steps after the prompts of each batch."""
    for lengths in batches:
        session = Session(trace._engine, trace._network, World(), trace._parallel, window)
        session._graphs = Eager(trace._network)
        prompts = [[1] * length for length in lengths]
        steps = session._open_batch(
            prompts, [params] * len(prompts), context_logits=False, generation_logits=False
        ).run()
        for _ in range(3):
            next(steps)


def choose(trace: Trace, place: int) -> None:
    """Let every layer run by the candidate at `place` of those that a first run measures."""
    for case, configs in candidates(trace):
        _tactics.record(*case.key, configs[place % len(configs)])


def candidates(trace: Trace):
    _tactics._table.clear()
    cases = find_cases(trace._network, trace._engine.limits.max_batch_size)
    return [(c, _tactics.short_list(*c.key, gpu.TARGETS["sm_90"][0].processors)) for c in cases]


def main(engine: Path, cache: str) -> None:
    events: list[bool] = []
    needed: set[str] = set()

    def listen(*, src, cache_hit, **_) -> None:
        events.append(cache_hit)
        if cache_hit:
            needed.add(make_launcher(src.constants, src.signature, None))

    triton.knobs.cache.dir = cache
    triton.knobs.compilation.listener = listen
    card = gpu.TARGETS["sm_90"][0]
    gpu.imagine(card)
    _ahead.replace_launches(card)
    made: set[str] = set()
    triton.runtime.driver.active.launcher_cls = lambda source, metadata: made.add(
        make_launcher(source.constants, source.signature, None)
    )
    record = read_record(engine)
    assert record.kernels is not None
    _store.use(engine / record.kernels.file.name, record.kernels.compiler).join()
    trace = Trace(record, record.mapping, engine)
    counts = []

    def count() -> None:
        counts.append([events.count(True), events.count(False)])
        events.clear()

    with torch.inference_mode():
        answer(trace)
        count()
        for place in range(max(len(configs) for _, configs in candidates(trace))):
            choose(trace, place)
            answer(trace)
        count()
        answer(trace, window=16)
        count()
    print(json.dumps([*counts, bool(made) and needed <= made]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
