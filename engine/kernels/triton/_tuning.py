"""Measuring the candidates of a linear layer on this GPU, for builds and benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton

from engine.kernels.triton._tactics import Config, candidates, record

# A time is the least of this many batches of replays.
BATCHES, REPLAYS = 5, 4
# A configuration that a kernel cannot have on this GPU is no candidate.
UNFIT = (triton.runtime.errors.OutOfResources, triton.runtime.errors.PTXASError)


def replay_us(runs: Sequence[Callable[[], Any]]) -> float:
    """Microseconds of one of `runs`, which a CUDA graph makes one after the other.

    They read different weights, together more than the second-level cache, as the layers of a
    model do. Not while serving: it waits for the device.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # Libraries and kernels are made ready by first calls, which a capture does not allow.
        for run in runs:
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    graph.replay()
    times = []
    for _ in range(BATCHES):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(REPLAYS):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / (REPLAYS * len(runs)))
    return min(times)


def tune(
    key: tuple[str, int, int, int],
    runs: Sequence[Callable[[], Any]],
    report: Callable[[str], None] = lambda line: None,
    *,
    configs: Sequence[Config] | None = None,
) -> Config:
    """Measure `configs` (default: every candidate) for layers of `key`, which is an operation, its
    tokens, outputs and inputs, by what `runs` take, which the table tells what to run with. Keeps
    the fastest in the table."""
    best, best_us = None, float("inf")
    for config in configs or candidates(*key):
        record(*key, config)
        try:
            us = replay_us(runs)
        except UNFIT as error:
            report(f"{config}: {type(error).__name__}")
            continue
        report(f"{us:9.2f} us {'/'.join(map(str, config))}")
        if us < best_us:
            best, best_us = config, us
    assert best is not None, f"no candidate of {key[0]} runs on this GPU"
    record(*key, best)
    return best
